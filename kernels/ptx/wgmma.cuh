// Warpgroup matrix products (sm_90a): m64nNk16, d += a b with d in fp32 registers of the four warps, b in shared memory and
// a in shared memory (ss) or registers (rs). Asynchronous: fence, products, commit, wait; d and a's registers belong to the
// tensor cores from the first product to the wait.
// Accumulator: lane l of warp w holds rows 16 w + l / 4 (d[4j], d[4j + 1]) and that + 8 (d[4j + 2], d[4j + 3]), columns
// 8 j + 2 (l % 4) + {0, 1}. The A fragment of columns [16 k, 16 k + 16) is the same elements, packed in pairs.
// Shared-memory operands lie as the copy engine's 128-byte swizzle leaves them: panels of 64 elements a row, [rows][128 B],
// 1024-byte aligned.
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

// Registers may be read and written by products from here on.
FI_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FI_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most `pending` groups of products are under way.
template <int pending>
FI_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// After the wait for the group that computes d: keeps the compiler from moving reads of d above it.
template <int kRegs>
FI_DEVICE void wgmma_arrived(float (&d)[kRegs]) {
#pragma unroll
  for (int i = 0; i < kRegs; ++i) asm volatile("" : "+f"(d[i]));
}

// Accumulators on their way to shared memory: word i of the warp, elements packed in pairs as the accumulator holds them, is
// an 8 x 8 block, whose row r goes to the 16 bytes at the address that lane 8 i + r gives.
FI_DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&w)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w[0]), "r"(w[1]), "r"(w[2]),
               "r"(w[3])
               : "memory");
}
FI_DEVICE uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}

// Matrix descriptor for the 128-byte swizzle. stride: bytes from 8 rows to the next 8. panel: bytes from 64 columns to the
// next 64 for an operand whose contiguous dimension is not k (V); ignored for the others. A step of 16 along k adds
// 32 bytes inside a panel for k-contiguous operands, 16 rows for the others; the field counts 16-byte units.
FI_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t panel, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(panel >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// setmaxnreg: all four warps of a warpgroup take registers that others gave back. A multiple of 8.
template <int kRegs>
FI_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegs));
}
template <int kRegs>
FI_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegs));
}

// ss: a and b k-contiguous (q k^T). rs and st: b contiguous along n (p v, v as it lies in the cache), a in registers or
// k-contiguous in shared memory. `accumulate` 0: d = a b.
template <typename T, int N>
struct Wgmma;

// The instruction's operand lists cannot be loops: registers by the eight, and numbers behind them as parameters.
#define FI_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FI_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FI_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FI_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FI_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FI_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FI_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FI_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FI_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FI_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FI_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FI_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FI_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FI_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FI_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FI_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FI_D(i) "+f"(d[i])
#define FI_D8(i) FI_D(i), FI_D(i + 1), FI_D(i + 2), FI_D(i + 3), FI_D(i + 4), FI_D(i + 5), FI_D(i + 6), FI_D(i + 7)
#define FI_D32(i) FI_D8(i), FI_D8(i + 8), FI_D8(i + 16), FI_D8(i + 24)
#define FI_R32 FI_R0 ", " FI_R1 ", " FI_R2 ", " FI_R3
#define FI_R64 FI_R32 ", " FI_R4 ", " FI_R5 ", " FI_R6 ", " FI_R7
#define FI_R96 FI_R64 ", " FI_R8 ", " FI_R9 ", " FI_R10 ", " FI_R11
#define FI_R128 FI_R96 ", " FI_R12 ", " FI_R13 ", " FI_R14 ", " FI_R15

// N, element type, its PTX name, register list, register operands, numbers of the five operands behind them.
#define FI_WGMMA(N, T, NAME, REGS, OPERANDS, P0, P1, P2, P3, P4, P5)                                                     \
  template <>                                                                                                            \
  struct Wgmma<T, N> {                                                                                                   \
    FI_DEVICE static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {                                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, %" #P0 ", %" #P1        \
                   ", p, 1, 1, 0, 0;\n}"                                                                                 \
                   : OPERANDS                                                                                            \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                   \
    }                                                                                                                    \
    FI_DEVICE static void st(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {                                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, %" #P0 ", %" #P1        \
                   ", p, 1, 1, 0, 1;\n}"                                                                                 \
                   : OPERANDS                                                                                            \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                   \
    }                                                                                                                    \
    FI_DEVICE static void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5 ", 0;\n"                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, {%" #P0 ", %" #P1       \
                   ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, 1;\n}"                                                     \
                   : OPERANDS                                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                               \
    }                                                                                                                    \
  };
#define FI_UNPACK(...) __VA_ARGS__
#define FI_WGMMA_TYPES(N, REGS, OPERANDS, ...)                              \
  FI_WGMMA(N, __nv_bfloat16, "bf16", REGS, FI_UNPACK OPERANDS, __VA_ARGS__) \
  FI_WGMMA(N, __half, "f16", REGS, FI_UNPACK OPERANDS, __VA_ARGS__)
FI_WGMMA_TYPES(64, FI_R32, (FI_D32(0)), 32, 33, 34, 35, 36, 37)
FI_WGMMA_TYPES(80, FI_R32 ", " FI_R4, (FI_D32(0), FI_D8(32)), 40, 41, 42, 43, 44, 45)
FI_WGMMA_TYPES(96, FI_R32 ", " FI_R4 ", " FI_R5, (FI_D32(0), FI_D8(32), FI_D8(40)), 48, 49, 50, 51, 52, 53)
FI_WGMMA_TYPES(112, FI_R32 ", " FI_R4 ", " FI_R5 ", " FI_R6, (FI_D32(0), FI_D8(32), FI_D8(40), FI_D8(48)), 56, 57, 58, 59, 60, 61)
FI_WGMMA_TYPES(128, FI_R64, (FI_D32(0), FI_D32(32)), 64, 65, 66, 67, 68, 69)
FI_WGMMA_TYPES(256, FI_R128, (FI_D32(0), FI_D32(32), FI_D32(64), FI_D32(96)), 128, 129, 130, 131, 132, 133)

#undef FI_WGMMA_TYPES
#undef FI_WGMMA
#undef FI_UNPACK
#undef FI_D32
#undef FI_D8
#undef FI_D
#undef FI_R128
#undef FI_R96
#undef FI_R64
#undef FI_R32
#undef FI_R0
#undef FI_R1
#undef FI_R2
#undef FI_R3
#undef FI_R4
#undef FI_R5
#undef FI_R6
#undef FI_R7
#undef FI_R8
#undef FI_R9
#undef FI_R10
#undef FI_R11
#undef FI_R12
#undef FI_R13
#undef FI_R14
#undef FI_R15

}  // namespace fi::ptx
