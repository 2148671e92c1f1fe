// Rotary position embedding from a cos/sin cache, fused with a cast to fp8 and with writing keys and values into pages:
//   out = fp8(rotated(x) * scale)      (the scale multiplies; 16-bit types, too, where nothing is quantised)
// A token's work is up to five sections: q and k that rotate, q and k that do not, and v. A unit is two vectors of kVec
// elements of one head, half a row apart: the two halves of kVec pairs, or kVec / 2 whole pairs in each; what does not
// rotate is cut up alike. One CTA computes kThreads * kUnroll units of the flattened (token, section, head, unit) list;
// grid = units / those. Data are loaded before cosines, sines and the page are looked up; with kEarly the look-ups come
// first, in front of the wait for the kernel before this one, which then wrote neither the tables nor the positions; so
// does every address.
// Shared memory: none. Bytes moved: the inputs once, a byte an element out. Architecture: any.
#pragma once
#include "attention/fast_div.cuh"
#include "common/early.cuh"
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

// Elements of a unit's half as O, `at` elements behind `to`.
template <typename O, int N>
FI_DEVICE void store_cast(const float (&x)[N], uint8_t* to, uint32_t at) {
  if constexpr (sizeof(O) == 1) {
    quant::store<O>(x, to + at);
  } else {
    Vec<O, N>::from_floats(x).store(to + at * sizeof(O));
  }
}

// Config: T, I (of positions), Q (of q's outputs), O (of the others), kVec, kInterleave, kPaged, kEarly, kUnroll, kThreads
template <class Config>
FI_DEVICE void rope_quantize(const RopeQuantizeParams& params) {
  using T = typename Config::T;
  using Q = typename Config::Q;
  using O = typename Config::O;
  using V = Vec<T, Config::kVec>;
  constexpr int kVec = Config::kVec, kUnroll = Config::kUnroll, kThreads = Config::kThreads;
  constexpr bool kAdjacent = Config::kInterleave && kVec == 1;  // the pair is two neighbouring one-element vectors
  constexpr uint32_t kNone = 0xffffffffu;

  constexpr bool kEarly = Config::kEarly;
  static_assert(!kEarly || kUnroll == 1, "cosines and sines of one unit are held");

  ptx::grid_launch_dependents();
  if constexpr (!kEarly) ptx::grid_wait();

  V a[kUnroll], b[kUnroll];
  uint32_t token[kUnroll], which[kUnroll], head[kUnroll], slot[kUnroll];
  // Elements from a row's start to the unit's first and second vector.
  auto first = [&](int n) { return slot[n] * (kAdjacent ? 2 : kVec); };
  auto second = [&](int n) { return first(n) + (kAdjacent ? 1 : params.section[which[n]].units.divisor * kVec); };
  auto row_of = [&](int n) {
    const RopeSection& section = params.section[which[n]];
    return static_cast<const T*>(section.x) + token[n] * section.x_stride_n + head[n] * section.x_stride_h;
  };
  auto load = [&](int n) {
    const T* x = row_of(n);
    a[n] = load_streaming<V>(x + first(n));
    b[n] = load_streaming<V>(x + second(n));
  };
  // Where the head's row goes; null: nowhere.
  auto find = [&](int n) -> uint8_t* {
    const RopeSection& section = params.section[which[n]];
    uint8_t* out = section.out + head[n] * section.out_stride_h;
    if (!Config::kPaged || !section.paged) return out + token[n] * section.out_stride_n;
    int64_t page;
    uint32_t row;
    if (!find_row(params.batch_indices, params.cache_positions, params.kv_indices, params.kv_indptr, params.batch,
                  params.page_size, token[n], page, row))
      return nullptr;
    return out + page * section.out_stride_n + row * section.out_stride_row;
  };
  // Of the unit's pairs; interleaved, those of the first vector and then those of the second.
  constexpr int kPairs = Config::kInterleave && !kAdjacent ? kVec / 2 : kVec;
  auto angles = [&](int n, float(&c)[kVec], float(&s)[kVec]) {
    const uint32_t half = params.section[which[n]].units.divisor * kVec;
    const float* cosines =
        params.cos_sin + int64_t(static_cast<const typename Config::I*>(params.positions)[token[n]]) * params.cos_sin_stride;
    const float* sines = cosines + half;
#pragma unroll
    for (int part = 0; part < kVec / kPairs; ++part) {
      const uint32_t at = slot[n] * kPairs + part * (half / 2);
      load_floats(cosines + at, reinterpret_cast<float(&)[kPairs]>(c[part * kPairs]));
      load_floats(sines + at, reinterpret_cast<float(&)[kPairs]>(s[part * kPairs]));
    }
  };
  float c[kVec], s[kVec];
  // kEarly: of the one unit.
  uint8_t *early_out = nullptr, *out_a = nullptr, *out_b = nullptr;
  const T *x_a = nullptr, *x_b = nullptr;
  float early_scale = 0.f;
  auto is_query = [&](int n) { return which[n] == 0 || which[n] == 2; };
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const uint32_t i = blockIdx.x * (kThreads * kUnroll) + n * kThreads + threadIdx.x;
    token[n] = kNone;
    if (i < params.units) {
      token[n] = params.token_units.quotient(i);
      uint32_t rest = i - token[n] * params.token_units.divisor;
      which[n] = 0;
#pragma unroll
      for (int k = 0; k < kRopeSections - 1; ++k) which[n] += rest >= params.section[k].end;
      if (which[n]) rest -= params.section[which[n] - 1].end;
      head[n] = params.section[which[n]].units.quotient(rest);
      slot[n] = rest - head[n] * params.section[which[n]].units.divisor;
      if constexpr (!kEarly) {
        load(n);
      } else {
        early_out = find(n);
        if (which[n] < 2) angles(n, c, s);
        const uint32_t size = is_query(n) ? sizeof(Q) : sizeof(O);
        x_a = row_of(n) + first(n), x_b = row_of(n) + second(n);
        early_scale = params.section[which[n]].scale;
        out_a = early_out + first(n) * size, out_b = early_out + second(n) * size;
        computed_early(x_a), computed_early(x_b), computed_early(out_a), computed_early(out_b), computed_early(early_scale);
      }
    }
  }
  if constexpr (kEarly) {
    ptx::grid_wait();
    if (!early_out) return;
    a[0] = load_here<V>(x_a);  // written while this kernel already runs: not by way of the read-only path
    b[0] = load_here<V>(x_b);
  }
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    uint8_t* out = nullptr;
    if constexpr (!kEarly) {
      if (token[n] == kNone) continue;
      out = find(n);
      if (!out) continue;
    }
    float x[kVec], y[kVec];
    quant::to_floats(a[n], x);
    quant::to_floats(b[n], y);
    if (which[n] < 2) {
      if constexpr (!kEarly) angles(n, c, s);
      if constexpr (Config::kInterleave && !kAdjacent) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const float x0 = x[2 * j], x1 = x[2 * j + 1], y0 = y[2 * j], y1 = y[2 * j + 1];
          x[2 * j] = x0 * c[j] - x1 * s[j];
          x[2 * j + 1] = x1 * c[j] + x0 * s[j];
          y[2 * j] = y0 * c[kPairs + j] - y1 * s[kPairs + j];
          y[2 * j + 1] = y1 * c[kPairs + j] + y0 * s[kPairs + j];
        }
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const float x0 = x[j], y0 = y[j];
          x[j] = x0 * c[j] - y0 * s[j];
          y[j] = y0 * c[j] + x0 * s[j];
        }
      }
    }
    const float scale = kEarly ? early_scale : params.section[which[n]].scale;
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] *= scale, y[j] *= scale;
    auto store = [&](auto type) {
      using To = decltype(type);
      store_cast<To>(x, kEarly ? out_a : out, kEarly ? 0 : first(n));
      store_cast<To>(y, kEarly ? out_b : out, kEarly ? 0 : second(n));
    };
    if (!is_same_v<Q, O> && is_query(n)) {
      store(Q{});
    } else {
      store(O{});
    }
  }
}

}  // namespace fi
