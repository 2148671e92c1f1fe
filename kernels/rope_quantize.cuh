// Rotary position embedding from a cos/sin cache, fused with a cast to fp8 and with writing keys and values into pages:
//   out = fp8(rotated(x) * scale)      (the scale multiplies)
// A token's work is up to five sections: q and k that rotate, q and k that do not, and v. A unit is two vectors of kVec
// elements of one head, half a row apart: the two halves of kVec pairs, or kVec / 2 whole pairs in each; what does not
// rotate is cut up alike. One CTA computes kThreads * kUnroll units of the flattened (token, section, head, unit) list;
// grid = units / those. Data are loaded before cosines, sines and the page are looked up.
// Shared memory: none. Bytes moved: the inputs once, a byte an element out. Architecture: any.
#pragma once
#include "page.cuh"

namespace fi {

constexpr int kRopeSections = 5;

// One array: heads of `2 * units * kVec` elements.
struct RopeSection {
  const void* x;
  uint8_t* out;
  int64_t x_stride_n, x_stride_h;                // elements
  int64_t out_stride_n, out_stride_h;            // bytes; in a cache out_stride_n is a page's
  int64_t out_stride_row;                        // bytes, of a token in its page
  FastDiv units;                                 // of a head
  uint32_t end;                                  // units of a token up to and with this section's
  float scale;
  uint32_t paged;                                // goes into the cache
};

struct RopeQuantizeParams {
  RopeSection section[kRopeSections];  // the first two rotate
  const void* positions;               // [tokens]
  const float* cos_sin;                // [max_position, rotary_dim], cosines first
  int64_t cos_sin_stride;
  const int32_t* batch_indices;  // [tokens], and the page table, as in AppendParams
  const int32_t* cache_positions;
  const int32_t* kv_indices;
  const int32_t* kv_indptr;
  FastDiv token_units;
  uint32_t units;  // of all tokens, below 2^31
  uint32_t batch;
  uint32_t page_size;
};

// Config: T, I (of positions), O, kVec, kInterleave, kPaged, kUnroll, kThreads
template <class Config>
FI_DEVICE void rope_quantize(const RopeQuantizeParams& params) {
  using T = typename Config::T;
  using V = Vec<T, Config::kVec>;
  constexpr int kVec = Config::kVec, kUnroll = Config::kUnroll, kThreads = Config::kThreads;
  constexpr bool kAdjacent = Config::kInterleave && kVec == 1;  // the pair is two neighbouring one-element vectors
  constexpr uint32_t kNone = 0xffffffffu;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  V a[kUnroll], b[kUnroll];
  uint32_t token[kUnroll], which[kUnroll], head[kUnroll], slot[kUnroll];
  // Elements from a row's start to the unit's first and second vector.
  auto first = [&](int n) { return slot[n] * (kAdjacent ? 2 : kVec); };
  auto second = [&](int n) { return first(n) + (kAdjacent ? 1 : params.section[which[n]].units.divisor * kVec); };
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const uint32_t i = blockIdx.x * (kThreads * kUnroll) + n * kThreads + threadIdx.x;
    token[n] = kNone;
    if (i < params.units) {
      token[n] = params.token_units.quotient(i);
      uint32_t rest = i - token[n] * params.token_units.divisor;
      which[n] = 0;
#pragma unroll
      for (int s = 0; s < kRopeSections - 1; ++s) which[n] += rest >= params.section[s].end;
      const RopeSection& section = params.section[which[n]];
      if (which[n]) rest -= params.section[which[n] - 1].end;
      head[n] = section.units.quotient(rest);
      slot[n] = rest - head[n] * section.units.divisor;
      const T* x = static_cast<const T*>(section.x) + token[n] * section.x_stride_n + head[n] * section.x_stride_h;
      a[n] = load_streaming<V>(x + first(n));
      b[n] = load_streaming<V>(x + second(n));
    }
  }
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    if (token[n] == kNone) continue;
    const RopeSection& section = params.section[which[n]];
    uint8_t* out = section.out;
    if (Config::kPaged && section.paged) {
      int64_t page;
      uint32_t row;
      if (!find_row(params.batch_indices, params.cache_positions, params.kv_indices, params.kv_indptr, params.batch,
                    params.page_size, token[n], page, row))
        continue;
      out += page * section.out_stride_n + row * section.out_stride_row;
    } else {
      out += token[n] * section.out_stride_n;
    }
    out += head[n] * section.out_stride_h;
    float x[kVec], y[kVec];
    quant::to_floats(a[n], x);
    quant::to_floats(b[n], y);
    if (which[n] < 2) {
      const uint32_t half = section.units.divisor * kVec;
      const float* cosines =
          params.cos_sin + int64_t(static_cast<const typename Config::I*>(params.positions)[token[n]]) * params.cos_sin_stride;
      const float* sines = cosines + half;
      if constexpr (Config::kInterleave && !kAdjacent) {
        constexpr int kPairs = kVec / 2;
        float cx[kPairs], sx[kPairs], cy[kPairs], sy[kPairs];
        load_floats(cosines + slot[n] * kPairs, cx);
        load_floats(sines + slot[n] * kPairs, sx);
        load_floats(cosines + half / 2 + slot[n] * kPairs, cy);
        load_floats(sines + half / 2 + slot[n] * kPairs, sy);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const float x0 = x[2 * j], x1 = x[2 * j + 1], y0 = y[2 * j], y1 = y[2 * j + 1];
          x[2 * j] = x0 * cx[j] - x1 * sx[j];
          x[2 * j + 1] = x1 * cx[j] + x0 * sx[j];
          y[2 * j] = y0 * cy[j] - y1 * sy[j];
          y[2 * j + 1] = y1 * cy[j] + y0 * sy[j];
        }
      } else {
        float c[kVec], s[kVec];
        load_floats(cosines + slot[n] * kVec, c);
        load_floats(sines + slot[n] * kVec, s);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const float x0 = x[j], y0 = y[j];
          x[j] = x0 * c[j] - y0 * s[j];
          y[j] = y0 * c[j] + x0 * s[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] *= section.scale, y[j] *= section.scale;
    quant::store<typename Config::O>(x, out + first(n));
    quant::store<typename Config::O>(y, out + second(n));
  }
}

}  // namespace fi
