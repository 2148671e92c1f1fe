// Chain speculative sampling (Leviathan et al. 2023): accept a prefix of the draft tokens, then draw one more token.
//   draft token i is accepted if u_i * draft_probs[i][token] < target_probs[i][token];
//   the first rejected position draws from max(target - draft, 0), and if none is rejected, position n from the target.
// A cluster of kCluster CTAs (1 below sm_90) of kThreads computes one row; grid = batch * kCluster. Its first CTA draws.
// Uniforms: Philox draw i for position i, draw n for the token.
// Shared memory (dynamic): RowShared. Bytes moved: two rows of vocab. Architecture: any; clusters need sm_90.
#pragma once
#include "sampling.cuh"

namespace fi {

struct SpeculativeParams {
  const void* draft_probs;      // [batch, n, vocab], contiguous
  const void* draft_token_ids;  // [batch, n]
  const void* target_probs;     // [batch, n + 1, vocab]
  void* output;                 // [batch, n + 1], -1 behind the drawn token
  int32_t* accepted;            // [batch], added to or written: positions whose own test passes
  int32_t* emitted;             // [batch], added to or written: the accepted prefix
  const uint64_t* seed;
  const uint64_t* offset;
  uint64_t seed_value, offset_value;
  uint32_t num_draft;
  uint32_t vocab;
  uint32_t flags;               // SamplingFlags
};

// Config: T, kThreads, kCluster, kSegments (RowShared), kSharedBytes (its size)
template <class Config>
FI_DEVICE void chain_speculative(const SpeculativeParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  constexpr int kThreads = Config::kThreads;
  using Shape = sampling::Shape<kThreads, Config::kCluster>;
  using Shared = RowShared<Config::kSegments, false, 0>;
  static_assert(sizeof(Shared) == Config::kSharedBytes);
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);

  set_counters<Shape>(shared);
  Shape::start();
  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t n = params.num_draft, vocab = params.vocab, flags = params.flags;
  const int64_t row = Shape::row();
  const bool wide = (flags & kIndices64) != 0;
  const T* draft = static_cast<const T*>(params.draft_probs) + row * n * int64_t(vocab);
  const T* target = static_cast<const T*>(params.target_probs) + row * (n + 1) * int64_t(vocab);
  const Stream stream(params.seed, params.offset, params.seed_value, params.offset_value, flags, uint32_t(row));

  // Every warp makes the same decisions.
  uint32_t emitted = n, accepted = 0;
  for (uint32_t base = 0; base < n; base += 32) {
    const uint32_t i = base + lane_id();
    bool pass = false;
    if (i < n) {
      const int64_t token = read_index(params.draft_token_ids, wide, row * n + i);
      if (0 <= token && token < vocab) {
        const float u = float(uint32_t(stream.bits64(i) >> 40)) * 5.9604644775390625e-8f;  // 24 bits, [0, 1)
        pass = __fmul_rn(u, to_float(draft[i * int64_t(vocab) + token])) < to_float(target[i * int64_t(vocab) + token]);
      }
    }
    const uint32_t passed = __ballot_sync(kFullMask, pass);
    const uint32_t failed = ~passed & (n - base < 32 ? (1u << (n - base)) - 1 : 0xffffffffu);
    accepted += __popc(passed);
    if (failed && emitted == n) emitted = base + __ffs(failed) - 1;
  }

  const bool aligned = (flags & kAlignedInput) != 0;
  ResidualRow<T> source{{target + emitted * int64_t(vocab), vocab, aligned}, {nullptr, vocab, aligned}};
  if (emitted < n) source.draft.data = draft + emitted * int64_t(vocab);
  uint32_t top = 0;
  Started<Shape> started;
#pragma unroll 1
  for (uint32_t phase = 0;; ++phase) {
    summarise<Residuals, false, false, Shape>(source, shared, true, started, NotHeld{});
    if (Shape::rank() == 0) {
      Shape::receive(&shared.box[0], phase, summary_bytes<false>(source, true));
      top = row_top(shared, source.segments());
      if (0 < threadIdx.x && threadIdx.x < Shape::kCluster)
        Shape::post(&shared.told, uint64_t(top), &shared.box[1], threadIdx.x);
    } else {
      Shape::receive(&shared.box[1], phase, 8);
      top = uint32_t(shared.told);
    }
    // The target may nowhere exceed the draft (equal rows that rounding rejected): then the target itself.
    if (source.draft.data == nullptr || top > key_of(0.f)) break;
    source.draft.data = nullptr;
    __syncthreads();  // every thread knows that: the next message may come
  }
  if (Shape::rank() != 0) return;
  const RowState<Residuals, kThreads, ResidualRow<T>, Shared> state(source, shared, top);
  uint32_t token = 0;
  if (state.valid()) {
    state.correct_unit();
    token = draw<true>(state, 0, stream.bits64(n)).token;
  }
  if (warp_id() == 0) {
    for (uint32_t i = lane_id(); i <= n; i += 32) {
      int64_t value = -1;
      if (i < emitted) value = read_index(params.draft_token_ids, wide, row * n + i);
      if (i == emitted) value = token;
      write_index(params.output, wide, row * (n + 1) + i, value);
    }
    if (lane_id() == 0) {
      params.accepted[row] = accepted + (flags & kNewAccepted ? 0 : params.accepted[row]);
      params.emitted[row] = emitted + (flags & kNewEmitted ? 0 : params.emitted[row]);
    }
  }
}

}  // namespace fi
