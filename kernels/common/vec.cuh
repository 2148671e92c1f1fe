// Vec<T, N>: N elements moved as one access of up to 16 bytes, and their conversion to and from fp32.
#pragma once
#include "common/base.cuh"

namespace fi {

FI_DEVICE float to_float(float x) { return x; }
FI_DEVICE float to_float(__half x) { return __half2float(x); }
FI_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
FI_DEVICE float to_float(__nv_fp8_e4m3 x) { return float(x); }
FI_DEVICE float to_float(__nv_fp8_e5m2 x) { return float(x); }

template <typename T>
FI_DEVICE T from_float(float x);
template <>
FI_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FI_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
FI_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
// fp8: round to nearest even, saturating to the largest finite value.
template <>
FI_DEVICE __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x) {
  return __nv_fp8_e4m3(x);
}
template <>
FI_DEVICE __nv_fp8_e5m2 from_float<__nv_fp8_e5m2>(float x) {
  return __nv_fp8_e5m2(x);
}

template <typename T>
struct Limits;
template <>
struct Limits<__nv_fp8_e4m3> {
  static constexpr float max = 448.f;
};
template <>
struct Limits<__nv_fp8_e5m2> {
  static constexpr float max = 57344.f;
};

template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16, "one access is at most 16 bytes");
  T data[N];

  // By words: of elements loaded under a condition the compiler would take 16-bit halves apart behind the load, which waits
  // for the data before the next load is issued.
  FI_DEVICE static Vec load(const void* p) {
    if constexpr (sizeof(Vec) == 16) {
      Vec v;
      *reinterpret_cast<uint4*>(&v) = *static_cast<const uint4*>(p);
      return v;
    } else {
      return *static_cast<const Vec*>(p);
    }
  }
  // As assembly: of a plain assignment the compiler may make several narrow stores, which cost half the bandwidth.
  FI_DEVICE void store(void* p) const {
    if constexpr (sizeof(Vec) == 16) {
      const uint4 r = *reinterpret_cast<const uint4*>(this);
      asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(r.x), "r"(r.y), "r"(r.z), "r"(r.w) : "memory");
    } else if constexpr (sizeof(Vec) == 8) {
      const uint2 r = *reinterpret_cast<const uint2*>(this);
      asm volatile("st.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(r.x), "r"(r.y) : "memory");
    } else {
      *static_cast<Vec*>(p) = *this;
    }
  }
  // What is not read again soon: the first to leave the L2.
  FI_DEVICE void store_streaming(void* p) const {
    static_assert(sizeof(Vec) == 16);
    const uint4 r = *reinterpret_cast<const uint4*>(this);
    asm volatile("st.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(r.x), "r"(r.y), "r"(r.z), "r"(r.w) : "memory");
  }
  // To elements at, at + 1, ... of an array of `size`: those that exist. `aligned`: the array starts on sizeof(Vec).
  FI_DEVICE void store_part(T* array, uint32_t at, uint32_t size, bool aligned) const {
    if (aligned && at + N <= size) {
      store(array + at);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (at + j < size) array[at + j] = data[j];
    }
  }
  FI_DEVICE T& operator[](int i) { return data[i]; }
  FI_DEVICE const T& operator[](int i) const { return data[i]; }

  FI_DEVICE void to_floats(float (&out)[N]) const {
    if constexpr (is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const uint32_t pair = reinterpret_cast<const uint32_t*>(data)[i / 2];
        out[i] = __uint_as_float(pair << 16), out[i + 1] = __uint_as_float(pair & 0xffff0000u);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(data[i]);
  }
  FI_DEVICE static Vec from_floats(const float (&in)[N]) {
    Vec v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.data[i] = from_float<T>(in[i]);
    return v;
  }
};

// N aligned elements as fp32, in accesses of up to 16 bytes.
template <typename T, int N>
FI_DEVICE void load_floats(const T* p, float (&out)[N]) {
  constexpr int kPart = min_of<int>(N, 16 / sizeof(T));
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    const auto part = Vec<T, kPart>::load(p + i);
#pragma unroll
    for (int j = 0; j < kPart; ++j) out[i + j] = to_float(part[j]);
  }
}

// What is made of a loaded x is made from here on: the compiler would widen it right behind its load, and wait for it there.
FI_DEVICE void keep_until_here(int32_t& x) { asm volatile("" : "+r"(x)); }
FI_DEVICE void keep_until_here(int64_t& x) { asm volatile("" : "+l"(x)); }

// Read once, never again: past L1.
template <typename V>
FI_DEVICE V load_streaming(const void* p) {
  static_assert(sizeof(V) == 16 || sizeof(V) == 8 || sizeof(V) == 4 || sizeof(V) == 2);
  V v;
  if constexpr (sizeof(V) == 16) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(p));
    v = *reinterpret_cast<V*>(&r);
  } else {
    v = *static_cast<const V*>(p);
  }
  return v;
}

}  // namespace fi
