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
  const float f = empty ? 0.f : params.out_scale * params.scales.output(head / params.group_size) / p.d;
  const float values[4] = {p.o.x * f, p.o.y * f, p.o.z * f, p.o.w * f};
  O* out = static_cast<O*>(params.out) + row * params.out_stride_row + head * params.out_stride_head + dim;
  Vec<O, 4>::from_floats(values).store(out);
  if (dim == 0 && params.lse) {
    const int64_t num_qo_heads = params.num_qo_heads(Config::kHeadPair ? 2 : 1);
    params.lse[row * num_qo_heads + head] = empty ? -FI_INF : p.m + math::ptx_log2(p.d);
  }
}

// One CTA merges the chunks of a request's head block. smem: 24 bytes a thread. The state of chunk c and head h is
// number first_state + c * chunk_stride + h.
template <class Config, class Tr>
FI_DEVICE void merge_chunks(const DecodeParams& params, const DecodeItem& item, uint32_t first_head, int units,
                            int64_t first_state, int64_t chunk_stride, uint8_t* smem) {
  constexpr int kQuads = Tr::kHeadDim / 4;
  // Threads are `slices` rows of `width` units; a slice takes every slices-th chunk, 8 loads in flight at a time.
  const int width = min(units, Tr::kThreads), slices = Tr::kThreads / width;
  const int slice = threadIdx.x / width, column = threadIdx.x % width;
  constexpr int kBatch = 8;
  float4* exchange_o = reinterpret_cast<float4*>(smem);
  float2* exchange_md = reinterpret_cast<float2*>(smem + Tr::kThreads * 16);
  for (int base = 0; base < units; base += width) {
    const int unit = base + column;
    const bool active = slice < slices && unit < units;
    const int head = unit / kQuads, dim = unit % kQuads * 4;
    Partial sum;
    if (active) {
      for (int chunk = slice; chunk < item.num_chunks; chunk += kBatch * slices) {
        float4 part[kBatch];
        float2 md[kBatch];
        float top = sum.m;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int c = chunk + i * slices;
          const int64_t state = first_state + c * chunk_stride + head;
          const bool there = c < item.num_chunks;
          md[i] = there ? __ldcg(params.partial_md + state) : make_float2(-FI_INF, 0.f);
          part[i] = there ? __ldcg(reinterpret_cast<const float4*>(params.partial_out + state * Tr::kHeadDim + dim))
                          : make_float4(0.f, 0.f, 0.f, 0.f);
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
    if (active && slice == 0) finish<Config>(params, item.request, first_head + head, dim, sum);
  }
}

}  // namespace fi::decode_detail
