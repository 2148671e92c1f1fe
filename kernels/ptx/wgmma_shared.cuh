// Warpgroup products with both operands in shared memory (sm_90a), for the matrix products: m64nNk32 bytes, d += a b in fp32.
// 16-bit types (k16) take b contiguous along k or along n; fp8 (k32) along k only, e4m3 and e5m2 in any mixture.
// The rules, the accumulator's layout and the descriptors are those of ptx/wgmma.cuh.
#pragma once
#include "ptx/wgmma.cuh"

namespace fi::ptx {

// run: both k-contiguous. run_n: b n-contiguous (16-bit types). `accumulate` 0: d = a b.
template <typename A, typename B, int N>
struct WgmmaShared;

// The instruction's operand lists cannot be loops: registers by the 32, and the numbers of the operands behind them.
#define FI_W0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FI_W1 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FI_W2 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FI_W3 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FI_W48 FI_W0 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FI_W64 FI_W0 ", " FI_W1
#define FI_W96 FI_W64 ", " FI_W2
#define FI_W128 FI_W96 ", " FI_W3
#define FI_W16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FI_D(i) "+f"(d[i])
#define FI_D8(i) FI_D(i), FI_D(i + 1), FI_D(i + 2), FI_D(i + 3), FI_D(i + 4), FI_D(i + 5), FI_D(i + 6), FI_D(i + 7)
#define FI_D32(i) FI_D8(i), FI_D8(i + 8), FI_D8(i + 16), FI_D8(i + 24)
#define FI_D48 FI_D32(0), FI_D8(32), FI_D8(40)
#define FI_D64 FI_D32(0), FI_D32(32)
#define FI_D96 FI_D64, FI_D32(64)
#define FI_D128 FI_D96, FI_D32(96)
#define FI_D16 FI_D8(0), FI_D8(8)

#define FI_PRODUCT(NAME, N, KIND, REGS, OPERANDS, P0, P1, P2, TAIL)                                            \
  FI_DEVICE static void NAME(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {                      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #N KIND " {" REGS "}, %" #P0 ", %" #P1 ", p, 1, 1" TAIL   \
                 ";\n}"                                                                                        \
                 : OPERANDS                                                                                    \
                 : "l"(a), "l"(b), "r"(accumulate));                                                           \
  }
#define FI_UNPACK(...) __VA_ARGS__
#define FI_HALF(N, T, NAME, REGS, OPERANDS, P0, P1, P2)                                                              \
  template <>                                                                                                        \
  struct WgmmaShared<T, T, N> {                                                                                      \
    FI_PRODUCT(run, N, "k16.f32." NAME "." NAME, REGS, FI_UNPACK OPERANDS, P0, P1, P2, ", 0, 0")                     \
    FI_PRODUCT(run_n, N, "k16.f32." NAME "." NAME, REGS, FI_UNPACK OPERANDS, P0, P1, P2, ", 0, 1")                   \
  };
#define FI_BYTES(N, A, AN, B, BN, REGS, OPERANDS, P0, P1, P2)                                                        \
  template <>                                                                                                        \
  struct WgmmaShared<A, B, N> {                                                                                      \
    FI_PRODUCT(run, N, "k32.f32." AN "." BN, REGS, FI_UNPACK OPERANDS, P0, P1, P2, "")                               \
  };
#define FI_ALL(N, REGS, OPERANDS, P0, P1, P2)                                                                        \
  FI_HALF(N, __nv_bfloat16, "bf16", REGS, OPERANDS, P0, P1, P2)                                                      \
  FI_HALF(N, __half, "f16", REGS, OPERANDS, P0, P1, P2)                                                              \
  FI_BYTES(N, __nv_fp8_e4m3, "e4m3", __nv_fp8_e4m3, "e4m3", REGS, OPERANDS, P0, P1, P2)                              \
  FI_BYTES(N, __nv_fp8_e4m3, "e4m3", __nv_fp8_e5m2, "e5m2", REGS, OPERANDS, P0, P1, P2)                              \
  FI_BYTES(N, __nv_fp8_e5m2, "e5m2", __nv_fp8_e4m3, "e4m3", REGS, OPERANDS, P0, P1, P2)                              \
  FI_BYTES(N, __nv_fp8_e5m2, "e5m2", __nv_fp8_e5m2, "e5m2", REGS, OPERANDS, P0, P1, P2)
FI_ALL(32, FI_W16, (FI_D16), 16, 17, 18)
FI_ALL(64, FI_W0, (FI_D32(0)), 32, 33, 34)
FI_ALL(96, FI_W48, (FI_D48), 48, 49, 50)
FI_ALL(128, FI_W64, (FI_D64), 64, 65, 66)
FI_ALL(192, FI_W96, (FI_D96), 96, 97, 98)
FI_ALL(256, FI_W128, (FI_D128), 128, 129, 130)

#undef FI_ALL
#undef FI_BYTES
#undef FI_HALF
#undef FI_UNPACK
#undef FI_PRODUCT
#undef FI_D16
#undef FI_D128
#undef FI_D96
#undef FI_D64
#undef FI_D48
#undef FI_D32
#undef FI_D8
#undef FI_D
#undef FI_W16
#undef FI_W128
#undef FI_W96
#undef FI_W64
#undef FI_W48
#undef FI_W3
#undef FI_W2
#undef FI_W1
#undef FI_W0

}  // namespace fi::ptx
