// Paged key/value cache: copying or casting new tokens into their pages, and the index arithmetic around it.
// append_pages copies two tensors (keys and values, or compressed KV and rope keys) byte for byte into their caches. Token t of
// request b at position p goes to row p % page_size of page kv_indices[kv_indptr[b] + p / page_size].
// A thread has one place in a token (tensor, head, vector) and kUnroll tokens: its addresses are computed once. A CTA has kThreads
// places, of several tokens where a token has fewer; grid = token groups x groups of places. The data are asked for first;
// then each of the CTA's tokens is looked up by one thread.
// append_quantized does the same with caches of a byte an element: it divides the elements by a scale and casts them.
// Shared memory: 16 bytes a token of the CTA. Bytes moved: the appended tokens twice, and 4 indices a token. Architecture: any.
#pragma once
#include "common/segments.cuh"
#include "common/vec.cuh"
#include "ptx/pdl.cuh"
#include "quantization/formats.cuh"

namespace fi {

// Where the token at a position of a request goes: false for one that goes nowhere.
FI_DEVICE bool place_row(int32_t request, int32_t position, const int32_t* kv_indices, const int32_t* kv_indptr,
                         uint32_t batch, uint32_t page_size, int64_t& page, uint32_t& row) {
  if (request < 0 || uint32_t(request) >= batch || position < 0) return false;
  const uint32_t in_request = uint32_t(position) / page_size;
  const int32_t begin = kv_indptr[request], end = kv_indptr[request + 1];
  // A position past the request's pages would land in another request's page.
  if (int64_t(begin) + in_request >= end) return false;
  page = kv_indices[begin + in_request];
  row = uint32_t(position) - in_request * page_size;
  return true;
}
FI_DEVICE bool find_row(const int32_t* batch_indices, const int32_t* positions, const int32_t* kv_indices,
                        const int32_t* kv_indptr, uint32_t batch, uint32_t page_size, uint32_t token, int64_t& page,
                        uint32_t& row) {
  return place_row(batch_indices[token], positions[token], kv_indices, kv_indptr, batch, page_size, page, row);
}

struct AppendParams {
  const void* a;  // [nnz, heads, kBytesA]
  const void* b;  // [nnz, heads, kBytesB]
  void* a_cache;
  void* b_cache;
  const int32_t* batch_indices;  // [nnz]; negative: skip the token
  const int32_t* positions;      // [nnz]
  const int32_t* kv_indices;
  const int32_t* kv_indptr;  // [batch + 1]
  int64_t a_stride_n, a_stride_h, b_stride_n, b_stride_h;  // bytes, as all strides here
  int64_t a_page, a_row, a_head;
  int64_t b_page, b_row, b_head;
  uint32_t tokens;
  uint32_t token_vectors;  // heads * (kBytesA + kBytesB) / kVec
  uint32_t heads;
  uint32_t batch;
  uint32_t page_size;
};

// What a thread of the append kernels has: a place in a token, and which of the CTA's tokens.
template <int kThreads_, int kUnroll>
struct AppendShare {
  static constexpr int kThreads = kThreads_;
  static constexpr int64_t kNowhere = int64_t(1) << 63;
  struct Target {
    int64_t a, b;  // bytes from the start of either cache to the token's row; kNowhere
  };
  uint32_t side;    // tokens whose places lie side by side in the CTA
  uint32_t slot;    // which of them this thread's are
  uint32_t column;  // vector of the token
  uint32_t first;   // first token of the CTA
  uint32_t count;   // its tokens,
  uint32_t tokens;  // and those that there are from `first` on
  bool active;

  FI_DEVICE explicit AppendShare(const AppendParams& params) : side(1), slot(0), column(blockIdx.y * kThreads + threadIdx.x) {
    active = column < params.token_vectors;
    if (2 * params.token_vectors <= kThreads) {  // uniform
      side = kThreads / params.token_vectors;
      slot = column / params.token_vectors;
      column -= slot * params.token_vectors;
      active = slot < side;
    }
    count = side * kUnroll;
    first = blockIdx.x * count;
    tokens = params.tokens - first;
  }
  FI_DEVICE uint32_t token(int n) const { return n * side + slot; }
  FI_DEVICE bool has(int n) const { return active && token(n) < tokens; }
};

// Looks up every token of a CTA, each by one thread: the longest chain of loads here, so it begins in front of the data.
template <class Share>
struct AppendLookup {
  using Target = typename Share::Target;
  const AppendParams& params;
  const Share& share;
  int32_t request = -1, position = 0;  // of token threadIdx.x

  FI_DEVICE AppendLookup(const AppendParams& params, const Share& share) : params(params), share(share) {
    if (threadIdx.x < share.count && threadIdx.x < share.tokens) ask(threadIdx.x);
  }
  FI_DEVICE void ask(uint32_t i) {
    request = params.batch_indices[share.first + i];
    position = params.positions[share.first + i];
  }
  FI_DEVICE void finish(Target* targets) {
    for (uint32_t i = threadIdx.x; i < share.count; i += Share::kThreads) {
      if (i != threadIdx.x) {
        request = -1;
        if (i < share.tokens) ask(i);
      }
      int64_t page;
      uint32_t row;
      Target to{Share::kNowhere, Share::kNowhere};
      if (place_row(request, position, params.kv_indices, params.kv_indptr, params.batch, params.page_size, page, row))
        to = {page * params.a_page + row * params.a_row, page * params.b_page + row * params.b_row};
      targets[i] = to;
    }
    __syncthreads();  // the targets are complete
  }
};

// Config: kBytesA, kBytesB (of one head), kVec (bytes an access), kThreads, kUnroll
template <class Config>
FI_DEVICE void append_pages(const AppendParams& params) {
  constexpr int kVec = Config::kVec, kThreads = Config::kThreads, kUnroll = Config::kUnroll;
  constexpr uint32_t kVecsA = Config::kBytesA / kVec, kVecsB = Config::kBytesB / kVec;
  using V = Vec<uint8_t, kVec>;
  using Share = AppendShare<kThreads, kUnroll>;
  __shared__ typename Share::Target targets[kThreads * kUnroll];

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const Share share(params);
  AppendLookup<Share> lookup(params, share);
  const uint32_t vectors_a = params.heads * kVecsA;
  const bool is_a = kVecsB == 0 || share.column < vectors_a;
  const uint32_t rest = is_a ? share.column : share.column - vectors_a;
  const uint32_t head = is_a ? rest / kVecsA : rest / max_of(kVecsB, 1u);
  const uint32_t offset = (rest - head * (is_a ? kVecsA : kVecsB)) * kVec;
  const int64_t stride_n = is_a ? params.a_stride_n : params.b_stride_n;
  const uint8_t* from = static_cast<const uint8_t*>(is_a ? params.a : params.b) + (share.first + share.slot) * stride_n +
                        head * (is_a ? params.a_stride_h : params.b_stride_h) + offset;
  V data[kUnroll];
#pragma unroll
  for (int n = 0; n < kUnroll; ++n)
    if (share.has(n)) data[n] = load_streaming<V>(from + n * share.side * stride_n);
  lookup.finish(targets);
  uint8_t* cache = static_cast<uint8_t*>(is_a ? params.a_cache : params.b_cache) +
                   head * (is_a ? params.a_head : params.b_head) + offset;
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const int64_t to = is_a ? targets[share.token(n)].a : targets[share.token(n)].b;
    if (share.active && to != Share::kNowhere) data[n].store(cache + to);
  }
}

struct AppendQuantizedParams {
  AppendParams to;       // strides in bytes; vectors of kVec elements
  const float* a_scale;  // [1] or, with the head stride 1, [heads] on the device; null: a_value
  const float* b_scale;
  float a_value, b_value;
  uint32_t a_scale_head, b_scale_head;
};

// Config: T (of the tokens), O (of the caches), kDimA, kDimB (elements of one head), kVec, kThreads, kUnroll
template <class Config>
FI_DEVICE void append_quantized(const AppendQuantizedParams& params) {
  using T = typename Config::T;
  using O = typename Config::O;
  using V = Vec<T, Config::kVec>;
  constexpr int kVec = Config::kVec, kThreads = Config::kThreads, kUnroll = Config::kUnroll;
  constexpr uint32_t kVecsA = Config::kDimA / kVec, kVecsB = Config::kDimB / kVec;
  using Share = AppendShare<kThreads, kUnroll>;
  __shared__ typename Share::Target targets[kThreads * kUnroll];
  const AppendParams& to = params.to;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const Share share(to);
  AppendLookup<Share> lookup(to, share);
  const uint32_t vectors_a = to.heads * kVecsA;
  const bool is_a = kVecsB == 0 || share.column < vectors_a;
  const uint32_t rest = is_a ? share.column : share.column - vectors_a;
  const uint32_t head = is_a ? rest / kVecsA : rest / max_of(kVecsB, 1u);
  const uint32_t column = (rest - head * (is_a ? kVecsA : kVecsB)) * kVec;
  const int64_t stride_n = is_a ? to.a_stride_n : to.b_stride_n;
  const uint8_t* from = static_cast<const uint8_t*>(is_a ? to.a : to.b) + (share.first + share.slot) * stride_n +
                        head * (is_a ? to.a_stride_h : to.b_stride_h) + column * sizeof(T);
  V data[kUnroll];
#pragma unroll
  for (int n = 0; n < kUnroll; ++n)
    if (share.has(n)) data[n] = load_streaming<V>(from + n * share.side * stride_n);
  float scale = is_a ? params.a_value : params.b_value;
  if (const float* given = is_a ? params.a_scale : params.b_scale; given && share.active)
    scale = given[head * (is_a ? params.a_scale_head : params.b_scale_head)];
  lookup.finish(targets);
  const float inverse = 1.f / scale;
  uint8_t* cache = static_cast<uint8_t*>(is_a ? to.a_cache : to.b_cache) + head * (is_a ? to.a_head : to.b_head) + column;
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const int64_t target = is_a ? targets[share.token(n)].a : targets[share.token(n)].b;
    if (share.active && target != Share::kNowhere) {
      float v[kVec];
      quant::to_floats(data[n], v);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[j] = quant::divide(v[j], scale, inverse);
      quant::store<O>(v, cache + target);
    }
  }
}

struct PositionsParams {
  const int32_t* append_indptr;  // [batch + 1]
  const int32_t* seq_lens;       // [batch], after the append
  int32_t* batch_indices;        // [nnz]
  int32_t* positions;            // [nnz]
  uint32_t nnz;
  uint32_t batch;
};

// batch_indices[t] = b and positions[t] = seq_lens[b] - append_indptr[b + 1] + t; -1 and 0 for tokens outside every
// request. One thread a token; grid = nnz / kThreads.
template <class Config>
FI_DEVICE void batch_positions(const PositionsParams& params) {
  ptx::grid_wait();  // and no early start of what follows: it may read these tables before it waits
  const uint32_t token = blockIdx.x * Config::kThreads + threadIdx.x;
  if (token >= params.nnz) return;
  const int request = find_segment(params.append_indptr, int(params.batch), token);
  params.batch_indices[token] = request;
  params.positions[token] =
      request < 0 ? 0 : params.seq_lens[request] - params.append_indptr[request + 1] + int32_t(token);
}

struct SeqLensParams {
  const int32_t* kv_indptr;         // [batch + 1]
  const int32_t* kv_last_page_len;  // [batch]
  int32_t* seq_lens;                // [batch]
  uint32_t batch;
  int32_t page_size;
};

// seq_lens[b] = (pages - 1) * page_size + last_page_len, 0 without pages. One thread a request; grid = batch / kThreads.
template <class Config>
FI_DEVICE void page_seq_lens(const SeqLensParams& params) {
  ptx::grid_wait();  // and no early start of what follows: it may read these tables before it waits
  const uint32_t request = blockIdx.x * Config::kThreads + threadIdx.x;
  if (request >= params.batch) return;
  const int32_t pages = params.kv_indptr[request + 1] - params.kv_indptr[request];
  params.seq_lens[request] = pages > 0 ? (pages - 1) * params.page_size + params.kv_last_page_len[request] : 0;
}

}  // namespace fi
