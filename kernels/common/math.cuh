// Scalar math by its PTX instruction. Where flush-to-zero is used the name's instruction says so: nothing else in the
// project flushes denormals (no -ftz, no fast-math).
#pragma once
#include "common/base.cuh"

namespace fi::math {

constexpr float log2e = 1.44269504088896340736f;
constexpr float loge2 = 0.693147180559945309417f;
// Infinity as a constant expression.
#define FI_INF __int_as_float(0x7f800000)

// 2^x, 2 ulp; denormal results are flushed to 0 (ex2.approx.ftz): softmax weights below 2^-126 do not matter.
FI_DEVICE float ptx_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FI_DEVICE float ptx_log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FI_DEVICE float ptx_rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FI_DEVICE float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// sin and cos for |x| <= pi: absolute error 2^-20.9. Reduce larger angles before.
FI_DEVICE float ptx_sin(float x) {
  float y;
  asm("sin.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FI_DEVICE float ptx_cos(float x) {
  float y;
  asm("cos.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The smaller one, and NaN where x is NaN, which fminf would replace.
FI_DEVICE float min_nan(float x, float bound) {
#if FI_ARCH >= 800
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
#else
  return x > bound ? bound : x;
#endif
}
// Hardware tanh: relative error 2^-11, enough for logits that end in bf16 or fp16; sm_75 and later.
FI_DEVICE float tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fi::math
