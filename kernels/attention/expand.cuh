// What attention kernels do to values that are not stored as they are multiplied: fp8 pairs become 16-bit pairs (exact),
// and ROPE_LLAMA rotates pairs of features in fp32.
#pragma once
#include "common/math.cuh"
#include "common/vec.cuh"
#include "ptx/mma.cuh"

namespace fi {

// Two fp8 values (low byte first) as a pair of halves; exact.
template <typename KV>
FI_DEVICE uint32_t halves_of(uint32_t pair) {
  const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair),
                                                   is_same_v<KV, __nv_fp8_e4m3> ? __NV_E4M3 : __NV_E5M2);
  return uint32_t(h.x) | (uint32_t(h.y) << 16);
}

// The same as a pair of T: bf16 holds every fp8 value, too.
template <typename T, typename KV>
FI_DEVICE uint32_t widen_pair(uint32_t pair) {
  const uint32_t halves = halves_of<KV>(pair);
  if constexpr (is_same_v<T, __half>) {
    return halves;
  } else {
    const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&halves));
    return ptx::pack2<T>(x.x, x.y);
  }
}

// Rotates (lo, hi), two neighbouring pairs of features, to `position`. turns: their frequencies in 2^-64 turns a position.
FI_DEVICE void rotate(float (&lo)[2], float (&hi)[2], const uint64_t* turns, uint32_t position) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint64_t turn = turns[i];
    // The angle's fraction of a turn in 32 bits; as a signed number it is in (-1/2, 1/2) turns.
    const uint32_t fraction = position * uint32_t(turn >> 32) + __umulhi(position, uint32_t(turn));
    const float angle = float(int32_t(fraction)) * (3.14159265358979f * 0x1p-31f);
    const float c = math::ptx_cos(angle), s = math::ptx_sin(angle);
    const float x = lo[i], y = hi[i];
    lo[i] = x * c - y * s;
    hi[i] = y * c + x * s;
  }
}
template <typename M>
FI_DEVICE void rotate(uint32_t& lo, uint32_t& hi, const uint64_t* turns, uint32_t position) {
  float x[2], y[2];
  reinterpret_cast<const Vec<M, 2>&>(lo).to_floats(x);
  reinterpret_cast<const Vec<M, 2>&>(hi).to_floats(y);
  rotate(x, y, turns, position);
  lo = ptx::pack2<M>(x[0], x[1]);
  hi = ptx::pack2<M>(y[0], y[1]);
}

}  // namespace fi
