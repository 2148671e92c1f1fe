// Merging softmax states over disjoint keys in the decode kernel, and writing the result.
#pragma once
#include "attention/decode_params.cuh"
#include "common/math.cuh"
#include "common/vec.cuh"

namespace fi::decode_detail {

// exp2 of a difference to a maximum that may be -inf (nothing seen yet).
FI_DEVICE float finite_or_zero(float m) { return m == -FI_INF ? 0.f : m; }

// Running softmax over a set of keys for one head and four dims.
struct Partial {
  float m = -FI_INF, d = 0.f;
  float4 o = make_float4(0.f, 0.f, 0.f, 0.f);

  FI_DEVICE void scale(float f) {
    d *= f;
    o.x *= f, o.y *= f, o.z *= f, o.w *= f;
  }
  FI_DEVICE void add(float f, float other_d, const float4& other) {
    d = fmaf(f, other_d, d);
    o.x = fmaf(f, other.x, o.x), o.y = fmaf(f, other.y, o.y);
    o.z = fmaf(f, other.z, o.z), o.w = fmaf(f, other.w, o.w);
  }
};

// Writes four dims of one head's result, and its lse.
template <class Config>
FI_DEVICE void finish(const DecodeParams& params, int row, uint32_t head, int dim, Partial p) {
  using O = typename Config::O;
  if (params.sinks) {  // exp(sink) joins the denominator once, here
    const float sink = params.sinks[head] * math::log2e;
    const float m = fmaxf(p.m, sink), safe = finite_or_zero(m);
    p.scale(math::ptx_exp2(p.m - safe));
    p.d += math::ptx_exp2(sink - safe);
    p.m = m;
  }
  const bool empty = p.d <= 0.f;  // no key was seen; a NaN among the logits is passed on
  // The denominator is far from the 2^126 where this division ends.
  const float f = empty ? 0.f : __fdividef(params.out_scale * params.scales.output(head / params.group_size), p.d);
  const float values[4] = {p.o.x * f, p.o.y * f, p.o.z * f, p.o.w * f};
  O* out = static_cast<O*>(params.out) + row * params.out_stride_row + head * params.out_stride_head + dim;
  Vec<O, 4>::from_floats(values).store(out);
  if (dim == 0 && params.lse) {
    // A number of its own kind, or the compiler makes this division in front of the loop over units, where all wait for it.
    uint32_t num_qo_heads = params.num_head_blocks;
    asm volatile("" : "+r"(num_qo_heads));
    num_qo_heads = num_qo_heads / params.blocks_per_kv * params.group_size * (Config::kHeadPair ? 2 : 1);
    params.lse[int64_t(row) * num_qo_heads + head] = empty ? -FI_INF : p.m + math::ptx_log2(p.d);
  }
}

// One CTA merges the chunks of a request's head block. The state of chunk c and head h is number
// first_state + c * chunk_stride + h. Threads are `slices` rows of `width` units; a slice takes every slices-th chunk, 8 loads in
// flight at a time. What the constructor does is done before the CTA knows that it is the one: a whole request waits for the rest.
template <class Config, class Tr>
struct ChunkMerge {
  static constexpr int kQuads = Tr::kHeadDim / 4, kBatch = 8;
  const DecodeParams& params;
  const DecodeItem& item;
  int units, width, slices, slice, column;
  uint32_t first_state, step;  // in states, of which there are far fewer than 2^32
  const float2* from_md;       // of this thread's first unit and chunk
  const float* from_o;

  FI_DEVICE ChunkMerge(const DecodeParams& params, const DecodeItem& item, int units, uint32_t first_state, uint32_t chunk_stride)
      : params(params), item(item), units(units), width(min(units, Tr::kThreads)) {
    // Small whole numbers: half of one is far more than the error of this division.
    slices = int(__fdividef(Tr::kThreads + 0.5f, float(width)));
    slice = int(__fdividef(threadIdx.x + 0.5f, float(width)));
    column = threadIdx.x - slice * width;
    this->first_state = first_state + slice * chunk_stride;
    step = slices * chunk_stride;
    point(column);
    asm volatile("" : "+l"(from_md), "+l"(from_o));
  }
  FI_DEVICE void point(int unit) {
    const uint32_t state = first_state + unit / kQuads;
    from_md = params.partial_md + state;
    from_o = params.partial_out + int64_t(state) * Tr::kHeadDim + unit % kQuads * 4;
  }

  // smem: 24 bytes a thread.
  FI_DEVICE void run(uint32_t first_head, uint8_t* smem) {
    float4* exchange_o = reinterpret_cast<float4*>(smem);
    float2* exchange_md = reinterpret_cast<float2*>(smem + Tr::kThreads * 16);
    for (int unit = column; unit - column < units; unit += width) {
      const bool active = slice < slices && unit < units;
      Partial sum;
      if (active) {
        if (unit != column) point(unit);
        for (int chunk = slice; chunk < item.num_chunks; chunk += kBatch * slices) {
          float4 part[kBatch];
          float2 md[kBatch];
          float top = sum.m;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const bool there = chunk + i * slices < item.num_chunks;
            md[i] = there ? __ldcg(from_md) : make_float2(-FI_INF, 0.f);
            part[i] = there ? __ldcg(reinterpret_cast<const float4*>(from_o)) : make_float4(0.f, 0.f, 0.f, 0.f);
            from_md += step, from_o += int64_t(step) * Tr::kHeadDim;
          }
#pragma unroll
          for (int i = 0; i < kBatch; ++i) top = fmaxf(top, md[i].x);
          sum.scale(math::ptx_exp2(sum.m - finite_or_zero(top)));
          sum.m = top;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) sum.add(math::ptx_exp2(md[i].x - finite_or_zero(top)), md[i].y, part[i]);
        }
        exchange_o[threadIdx.x] = sum.o;
        exchange_md[threadIdx.x] = make_float2(sum.m, sum.d);
      }
      if (slices > 1) {
        __syncthreads();
        if (active && slice == 0) {
          for (int other = 1; other < slices; ++other) {
            const float2 md = exchange_md[other * width + column];
            const float top = fmaxf(sum.m, md.x);
            sum.scale(math::ptx_exp2(sum.m - finite_or_zero(top)));
            sum.add(math::ptx_exp2(md.x - finite_or_zero(top)), md.y, exchange_o[other * width + column]);
            sum.m = top;
          }
        }
      }
      if (active && slice == 0) finish<Config>(params, item.request, first_head + unit / kQuads, unit % kQuads * 4, sum);
    }
  }
};

}  // namespace fi::decode_detail
