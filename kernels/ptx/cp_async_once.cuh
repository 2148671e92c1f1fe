// cp.async of what is read once: its lines are the first to leave the L2 (sm_90; elsewhere the L2 is left to itself).
//
// A copy with such a hint must not go to a shared address that ends with the addition of what is uniform (its base, a slot that
// all lanes share): ptxas (13.0, 13.5) leaves that to the instruction, LDGSTS [R + UR], desc[UR][R.64] with opcode 0xdae,
// whose uniform registers it does not even encode. sm_90 executes LDGSTS [R + immediate], opcode 0xfae, alone, and without
// a hint ptxas makes no other one; the former is cudaErrorIllegalInstruction (decode of head_dim 192). So the uniform parts
// pass through an exclusive or with a register that is zero in all lanes, which ptxas cannot know, and only constants
// and what differs between lanes are added behind it. tests/cpu/test_compile.py looks for the opcode.
#pragma once
#include "ptx/cp_async.cuh"

namespace fi::ptx {

// kOnce: the bytes are read once.
template <bool kOnce>
struct AsyncCopies {
  using Address = uint8_t*;
  FI_DEVICE Address address(uint8_t* smem) const { return smem; }
  // cp_async_16 to an `address` plus what is constant or differs between lanes.
  FI_DEVICE static void copy_16(Address to, const void* global, bool valid = true) { cp_async_16(to, global, valid); }
  // The same without the hint, to any address.
  FI_DEVICE static void copy_16_anywhere(Address to, const void* global, bool valid) { cp_async_16(to, global, valid); }
};

#if FI_ARCH == 900
template <>
struct AsyncCopies<true> {
  using Address = uint32_t;
  uint32_t zero;

  FI_DEVICE AsyncCopies() {
    uint32_t below, own;  // no lane's bit is in both
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
    asm volatile("mov.u32 %0, %%lanemask_eq;" : "=r"(own));
    zero = below & own;
  }
  FI_DEVICE Address address(uint8_t* smem) const {
    Address to;
    asm("xor.b32 %0, %1, %2;" : "=r"(to) : "r"(smem_address(smem)), "r"(zero));
    return to;
  }
  FI_DEVICE static void copy_16(Address to, const void* global, bool valid = true) {
    constexpr uint64_t kEvictFirst = 0x12f0000000000000ull;  // what createpolicy.fractional makes of it for all lines
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(global),
                 "r"(valid ? 16 : 0), "l"(kEvictFirst)
                 : "memory");
  }
  FI_DEVICE static void copy_16_anywhere(Address to, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
  }
};
#endif

}  // namespace fi::ptx
