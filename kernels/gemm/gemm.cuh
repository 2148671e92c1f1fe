// What every GEMM kernel shares: the parameter struct of out = a @ b + bias + residual, the epilogue functor, 16-bit pairs as fp32.
// a is [m, k] with rows k-contiguous; b is "column-major", [n, k] in memory with rows k-contiguous, unless a kernel says
// otherwise. k and n are multiples of 8 and every row starts on 16 bytes, so a 16-byte access lies inside or outside a row.
#pragma once
#include "common/math.cuh"
#include "common/vec.cuh"
#include "ptx/mma.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct GemmParams {
  const void* a;
  const void* b;
  const void* bias;  // [n] in the type of a, or null
  void* out;
  int64_t a_stride;    // elements between rows of a
  int64_t b_stride;    // elements between columns of b (rows of it when kRowMajorB)
  int64_t out_stride;  // elements between rows of out
  int64_t a_batch, b_batch, out_batch;  // elements between the matrices of a batch (blockIdx.z)
  uint32_t m, n, k;
  const void* residual;  // [m, n] in the type of out, or null; may be out itself
  int64_t residual_stride, residual_batch;
};

// Two packed 16-bit floats as fp32, the low half first.
template <class T>
FI_DEVICE float2 unpack2(uint32_t pair);
template <>
FI_DEVICE float2 unpack2<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}
template <>
FI_DEVICE float2 unpack2<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// A number that is computed here if kHere, not where it is used: behind the last barrier its arithmetic would be waited for.
template <bool kHere>
FI_DEVICE int64_t computed_here(int64_t x) {
  if constexpr (kHere) asm volatile("" : "+l"(x));
  return x;
}

// 16 bytes of a weight that are not read again, past L1. Not as constants: those ptxas moves behind the wait for the predecessor.
// Where a warp reads pieces of 64 bytes, L2 gets the whole line for the first (16 x 4096 x 4096: 14.1 us against 14.6).
FI_DEVICE uint4 load_weight(const void* p) {
  uint4 r;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p)
               : "memory");
  return r;
}

// 16 bytes of a; if kAll, in front of the first product: the compiler would load the next ones behind it, which waits for these.
template <bool kAll>
FI_DEVICE uint4 load_rows(const void* p) {
  if constexpr (!kAll) return *static_cast<const uint4*>(p);
  uint4 r;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
  return r;
}

// An epilogue maps the fp32 sum of one element to the value that is rounded to Out and stored:
//   E(params);  float e(float sum, uint32_t row, uint32_t column)
// Kernels call it for elements inside the matrix only, once each.
template <class T, class Out>
struct BiasEpilogue {
  const T* bias;
  const Out* residual;
  int64_t residual_stride;
  uint32_t n;
  FI_DEVICE explicit BiasEpilogue(const GemmParams& params)
      : bias(static_cast<const T*>(params.bias)),
        residual(static_cast<const Out*>(params.residual)),
        residual_stride(params.residual_stride),
        n(params.n) {
    if (residual) residual += blockIdx.z * params.residual_batch;
  }
  FI_DEVICE float operator()(float sum, uint32_t row, uint32_t column) const {
    if (bias) sum += to_float(bias[column]);
    if (residual) sum += to_float(residual[row * residual_stride + column]);
    return sum;
  }
  // The same with the residual asked for early: its bits, of one element or of two (column even), and what they mean.
  FI_DEVICE uint32_t residual_bits(uint32_t row, uint32_t column) const {
    if (!residual) return 0;
    const Out* at = residual + row * residual_stride + column;
    if constexpr (sizeof(Out) == 4) return *reinterpret_cast<const uint32_t*>(at);
    return *reinterpret_cast<const uint16_t*>(at);
  }
  FI_DEVICE uint2 residual_bits2(uint32_t row, uint32_t column) const {
    if (!residual) return make_uint2(0, 0);
    const Out* at = residual + row * residual_stride + column;
    if constexpr (sizeof(Out) == 4) return *reinterpret_cast<const uint2*>(at);
    return make_uint2(*reinterpret_cast<const uint32_t*>(at), 0);
  }
  FI_DEVICE static float2 residual_of(uint2 bits) {
    if constexpr (sizeof(Out) == 4)
      return make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
    else
      return unpack2<Out>(bits.x);
  }
  FI_DEVICE float plus(float sum, float residual_value, uint32_t column) const {
    if (bias) sum += to_float(bias[column]);
    return sum + residual_value;
  }
  // silu(gate) * up of two sums, of columns `column` and `column + n`; of sums that nothing is added to.
  FI_DEVICE static float gated(float gate, float up) {
    return gate * math::ptx_rcp(1.f + math::ptx_exp2(-gate * math::log2e)) * up;
  }
  FI_DEVICE float gated(float gate, float up, uint32_t row, uint32_t column) const {
    if (bias) gate += to_float(bias[column]), up += to_float(bias[column + n]);
    const float y = gated(gate, up);
    return residual ? y + to_float(residual[row * residual_stride + column]) : y;
  }
};

template <class T>
FI_DEVICE void unpack8(const uint4& v, float (&out)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<T>(words[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

// Two neighbouring elements of a row in one store; column is even.
template <class Out>
FI_DEVICE void store2(Out* out, float first, float second) {
  if constexpr (sizeof(Out) == 4) {
    *reinterpret_cast<float2*>(out) = make_float2(first, second);
  } else {
    *reinterpret_cast<uint32_t*>(out) = ptx::pack2<Out>(first, second);
  }
}

}  // namespace fi
