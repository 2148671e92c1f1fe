// Philox4x32-10 (Salmon et al., SC 2011): a keyed permutation of a 128-bit counter. Counter-based, so any thread of any
// launch computes the same draw; the NumPy reference has the same function (fi_cupy/reference/sampling.py).
#pragma once
#include "common/base.cuh"

namespace fi {

struct Philox {
  // The four words at (key = seed, counter = (offset, row, draw)).
  FI_DEVICE static uint4 words(uint64_t seed, uint64_t offset, uint32_t row, uint32_t draw) {
    uint4 c = make_uint4(uint32_t(offset), uint32_t(offset >> 32), row, draw);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c.x, p1 = uint64_t(0xCD9E8D57u) * c.z;
      c = make_uint4(uint32_t(p1 >> 32) ^ c.y ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w ^ k1, uint32_t(p0));
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }
  // 64 random bits: a uniform number is these times 2^-64.
  FI_DEVICE static uint64_t bits64(uint64_t seed, uint64_t offset, uint32_t row, uint32_t draw) {
    const uint4 w = words(seed, offset, row, draw);
    return uint64_t(w.x) << 32 | w.y;
  }
};

}  // namespace fi
