// Storage formats of quantised values and of their scales, to and from fp32: round to nearest even, saturating.
//   e4m3, e5m2, int8   one byte a value            (NaN stays NaN; int8 has none: it becomes 0, and its scale is NaN)
//   e2m1               four bits, the first of two values in the low nibble   (no NaN either)
//   e8m0               scale 2^(code - 127), code 255 is NaN                                      (OCP MX 1.0)
// From sm_89 on fp8 is converted by cvt; below, by integer arithmetic on the fp32 bits, with the same results.
#pragma once
#include "common/math.cuh"
#include "common/vec.cuh"

namespace fi {

struct E2m1 {};  // a tag: two of them share a byte

namespace quant {

// The larger one, NaN where either is NaN (fmaxf would drop it).
FI_DEVICE float max_nan(float x, float y) {
#if FI_ARCH >= 800
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x > y || x != x ? x : y;
#endif
}
// For reductions of magnitudes.
struct MaxNan {
  FI_DEVICE static float identity() { return 0.f; }
  FI_DEVICE static float apply(float a, float b) { return max_nan(a, b); }
};

// fp32 to a float of kMantissa bits and exponent bias kBias in a byte, largest code kLast, NaN 0x7f; the sign separately.
template <int kMantissa, int kBias, uint32_t kLast>
FI_DEVICE uint32_t encode_magnitude(float a) {
  if (a != a) return 0x7f;
  constexpr int kDrop = 23 - kMantissa;
  constexpr uint32_t kSmallestNormal = uint32_t(128 - kBias) << 23;
  if (__float_as_uint(a) < kSmallestNormal) {
    // The sum's unit is the smallest subnormal, so the addition rounds, and its low bits are the code.
    const uint32_t unit = (151 - kBias - kMantissa) << 23;
    return __float_as_uint(a + __uint_as_float(unit)) & 0xff;
  }
  uint32_t bits = __float_as_uint(a);
  bits += (1u << (kDrop - 1)) - 1 + (bits >> kDrop & 1);
  return min_of((bits >> kDrop) - (uint32_t(127 - kBias) << kMantissa), kLast);
}

FI_DEVICE uint32_t with_sign(uint32_t code, float x) { return code | (__float_as_uint(x) >> 24 & 0x80); }

template <typename O>
struct Format;

template <>
struct Format<__nv_fp8_e4m3> {
  static constexpr float kMax = 448.f;
  static constexpr uint32_t kMaxMantissa = 0x600000;  // of kMax = 1.75 * 2^8
  static constexpr int kMaxExponent = 8;
  FI_DEVICE static uint32_t encode(float x) { return with_sign(encode_magnitude<3, 7, 0x7e>(fabsf(x)), x); }
  FI_DEVICE static uint32_t encode_two(float x, float y) {
#if FI_ARCH >= 890
    return __nv_cvt_float2_to_fp8x2(make_float2(x, y), __NV_SATFINITE, __NV_E4M3);
#else
    return encode(x) | encode(y) << 8;
#endif
  }
  // The code's bits as an fp32 number, 2^120 too small: that makes subnormal codes right, too.
  FI_DEVICE static float decode(uint32_t code) {
    if ((code & 0x7f) == 0x7f) return __uint_as_float(0x7fc00000);
    return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
  }
};

template <>
struct Format<__nv_fp8_e5m2> {
  static constexpr float kMax = 57344.f;
  static constexpr uint32_t kMaxMantissa = 0x600000;  // of kMax = 1.75 * 2^15
  static constexpr int kMaxExponent = 15;
  FI_DEVICE static uint32_t encode(float x) { return with_sign(encode_magnitude<2, 15, 0x7b>(fabsf(x)), x); }
  FI_DEVICE static uint32_t encode_two(float x, float y) {
#if FI_ARCH >= 890
    return __nv_cvt_float2_to_fp8x2(make_float2(x, y), __NV_SATFINITE, __NV_E5M2);
#else
    return encode(x) | encode(y) << 8;
#endif
  }
  FI_DEVICE static float decode(uint32_t code) {
    const uint32_t magnitude = code & 0x7f, sign = (code & 0x80) << 24;
    if (magnitude >= 0x7c) return __uint_as_float(sign | (magnitude == 0x7c ? 0x7f800000 : 0x7fc00000));
    return __uint_as_float(sign | magnitude << 21) * 0x1p112f;
  }
};

template <>
struct Format<int8_t> {
  static constexpr float kMax = 127.f;
  static constexpr uint32_t kMaxMantissa = 0x7e0000;  // of kMax = 1.984375 * 2^6
  static constexpr int kMaxExponent = 6;
  FI_DEVICE static uint32_t encode(float x) {
    return uint32_t(max_of(min_of(__float2int_rn(x), 127), -127)) & 0xff;  // NaN is converted to 0
  }
  FI_DEVICE static uint32_t encode_two(float x, float y) { return encode(x) | encode(y) << 8; }
  FI_DEVICE static float decode(uint32_t code) { return float(int8_t(code)); }
};

template <>
struct Format<E2m1> {
  static constexpr float kMax = 6.f;
  static constexpr uint32_t kMaxMantissa = 0x400000;  // of kMax = 1.5 * 2^2
  static constexpr int kMaxExponent = 2;
  // The code of |x| in the lowest byte; the bits above are garbage. Below 2, from 2 and from 4 on a code is a step of
  // 1/2, 1 and 2: the addend makes the step the sum's last bit, so the addition rounds, and it holds the code's offset.
  FI_DEVICE static uint32_t magnitude(float x) {
    const float a = fminf(fabsf(x), kMax);
    const float addend = a < 2.f ? 0x1p22f : (a < 4.f ? 0x1p23f + 2.f : 0x1p24f + 8.f);
    return __float_as_uint(a + addend);
  }
  FI_DEVICE static float decode(uint32_t code) {
    return __uint_as_float((code & 8) << 28 | (code & 7) << 22) * 0x1p126f;
  }
  // Two values a byte, the first in the low nibble.
  FI_DEVICE static uint32_t encode_two(float x, float y) {
    const uint32_t signs = (__float_as_uint(x) >> 28 & 8) | (__float_as_uint(y) >> 24 & 0x80);
    return (magnitude(x) & 7) | (magnitude(y) & 7) << 4 | signs;
  }
  // The codes of four values in bytes 0 and 2, two each (the other bytes are garbage).
  FI_DEVICE static uint32_t encode_four(float a, float b, float c, float d) {
    const uint32_t low = __byte_perm(__byte_perm(magnitude(a), magnitude(b), 0x0040),
                                     __byte_perm(magnitude(c), magnitude(d), 0x0040), 0x5410);
    const uint32_t high = __byte_perm(__byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0073),
                                      __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0073), 0x5410);
    const uint32_t nibbles = (low & 0x07070707u) | (high & 0x80808080u) >> 4;
    return nibbles | nibbles >> 4;
  }
  FI_DEVICE static uint32_t encode_eight(const float* x) {
    return __byte_perm(encode_four(x[0], x[1], x[2], x[3]), encode_four(x[4], x[5], x[6], x[7]), 0x6420);
  }
};

template <typename O>
constexpr int kBits = is_same_v<O, E2m1> ? 4 : 8;

// Elements as fp32. bf16 by the word: of a half on its own the compiler makes two instructions.
template <typename T, int N>
FI_DEVICE void to_floats(const Vec<T, N>& in, float (&out)[N]) {
  if constexpr (is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&in);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      out[i] = __uint_as_float(words[i / 2] << 16);
      out[i + 1] = __uint_as_float(words[i / 2] & 0xffff0000u);
    }
  } else {
    in.to_floats(out);
  }
}

// N values, N * kBits / 8 bytes, stored in one access.
template <typename O, int N>
FI_DEVICE void store(const float (&x)[N], uint8_t* to) {
  if constexpr (N == 1) {
    static_assert(kBits<O> == 8, "half a byte cannot be stored");
    *to = uint8_t(Format<O>::encode_two(x[0], 0.f));
  } else if constexpr (kBits<O> == 4) {
    if constexpr (N % 8 == 0) {
      Vec<uint32_t, N / 8> out;
#pragma unroll
      for (int i = 0; i < N; i += 8) out[i / 8] = Format<O>::encode_eight(x + i);
      out.store(to);
    } else if constexpr (N == 4) {
      *reinterpret_cast<uint16_t*>(to) = uint16_t(__byte_perm(Format<O>::encode_four(x[0], x[1], x[2], x[3]), 0, 0x4420));
    } else {
      *to = uint8_t(Format<O>::encode_two(x[0], x[1]));
    }
  } else {
    Vec<uint16_t, N / 2> out;  // a pair at a time: bytes put together one by one cost an instruction each
#pragma unroll
    for (int i = 0; i < N; i += 2) out[i / 2] = uint16_t(Format<O>::encode_two(x[i], x[i + 1]));
    out.store(to);
  }
}

// --- scales -----------------------------------------------------------------------------------------------------------

// The code of the smallest power of two >= amax / kMax of the format, from 2^-127 on; 255 for NaN. Exact.
template <typename O>
FI_DEVICE uint32_t e8m0_code(float amax) {
  const uint32_t bits = __float_as_uint(amax);  // not negative
  if (bits > 0x7f800000) return 255;
  const int code = int(bits >> 23) - Format<O>::kMaxExponent + ((bits & 0x7fffff) > Format<O>::kMaxMantissa);
  return uint32_t(max_of(code, 0));
}
FI_DEVICE float e8m0_decode(uint32_t code) {
  if (code == 255) return __uint_as_float(0x7fc00000);
  return __uint_as_float(code == 0 ? 0x400000 : code << 23);
}
// 1 / 2^(code - 127).
FI_DEVICE float e8m0_reciprocal(uint32_t code) {
  if (code == 255) return __uint_as_float(0x7fc00000);
  return __uint_as_float(code == 254 ? 0x400000 : (254 - code) << 23);
}

// 1 / x, correctly rounded, for x from 2^-125 to 2^125, NaN and infinity: what a division does without its exceptions.
FI_DEVICE float reciprocal(float x) {
  const float y = math::ptx_rcp(x);
  return x == FI_INF ? 0.f : fmaf(y, fmaf(-x, y, 1.f), y);
}
// x / scale, correctly rounded, where inverse = 1 / scale is (Markstein): one multiplication and a correction, in the form
// that keeps the sign of -0. For finite x and a finite scale; an infinite scale is passed as 0, with the inverse 0.
FI_DEVICE float divide_finite(float x, float scale, float inverse) {
  const float quotient = x * inverse;
  return fmaf(-fmaf(quotient, scale, -x), inverse, quotient);
}
// The same for any x and scale.
FI_DEVICE float divide(float x, float scale, float inverse) {
  const float quotient = x * inverse;
  const float excess = fmaf(quotient, scale, -x);
  return fabsf(excess) < FI_INF ? fmaf(-excess, inverse, quotient) : quotient;
}

// Where the scale of (row, column) lies in tiles of `kRows` rows by 4 columns, `columns` padded to 4. Rows of 128-row
// tiles are interleaved as the tensor cores of sm_100 read them: 32 quads of rows r, r + 32, r + 64, r + 96.
template <int kRows>
FI_DEVICE int64_t tiled_place(uint32_t row, uint32_t column, uint32_t columns) {
  const int64_t tile = int64_t(row / kRows) * (columns / 4) + column / 4;
  const uint32_t inside = kRows == 128 ? (row % 32) * 16 + (row % 128) / 32 * 4 : (row % kRows) * 4;
  return tile * (kRows * 4) + inside + column % 4;
}

}  // namespace quant
}  // namespace fi
