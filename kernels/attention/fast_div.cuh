// Unsigned division by a number that only the host knows: one multiplication, an addition and a shift.
//   l = ceil(log2 d), magic = floor(2^32 (2^l - d) / d) + 1, n / d = (umulhi(n, magic) + n) >> l     for n < 2^31
#pragma once
#include "common/base.cuh"

namespace fi {

struct FastDiv {
  uint32_t divisor;
  uint32_t magic;
  uint32_t shift;

  FI_DEVICE uint32_t quotient(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
};

}  // namespace fi
