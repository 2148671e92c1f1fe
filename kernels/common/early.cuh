// What a kernel that starts before its predecessor ends (ptx/pdl.cuh) does in front of the wait, and right behind it.
// The compiler would compute an address where it is used, behind the wait, and ptxas moves the wait itself in front of
// loads of constants (ld.global.nc) that the source has before it.
#pragma once
#include "common/base.cuh"

namespace fi {

// A value that is complete here, not where it is used.
template <typename P>
FI_DEVICE void computed_early(P*& p) {
  asm volatile("" : "+l"(p));
}
FI_DEVICE void computed_early(float& x) {
  uint32_t bits = __float_as_uint(x);
  asm volatile("" : "+r"(bits));
  x = __uint_as_float(bits);
}

// The wait, when the addresses are there. Without the predicate ptxas would move it in front of their arithmetic.
FI_DEVICE uint64_t address_bits() { return 0; }
template <typename P, typename... More>
FI_DEVICE uint64_t address_bits(P*& p, More*&... more) {
  computed_early(p);
  return reinterpret_cast<uint64_t>(p) | address_bits(more...);
}
template <typename P, typename... More>
FI_DEVICE void grid_wait_behind(P*& p, More*&... more) {
#if FI_ARCH >= 900
  const uint64_t bits = address_bits(p, more...);
  asm volatile("{\n.reg .pred p;\nsetp.ne.u64 p, %0, 0;\n@p griddepcontrol.wait;\n}" ::"l"(bits) : "memory");
#endif
}

// Issued where the source has it, in the order of the source: a pointer that went through computed_early is generic otherwise.
template <typename V>
FI_DEVICE V load_here(const void* p) {
  V v;
  if constexpr (sizeof(V) == 16) {
    uint4 r;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
    *reinterpret_cast<uint4*>(&v) = r;
  } else if constexpr (sizeof(V) == 8) {
    uint64_t r;
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(r) : "l"(p) : "memory");
    *reinterpret_cast<uint64_t*>(&v) = r;
  } else if constexpr (sizeof(V) == 4) {
    uint32_t r;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
    *reinterpret_cast<uint32_t*>(&v) = r;
  } else {
    v = *static_cast<const V*>(p);
  }
  return v;
}

}  // namespace fi
