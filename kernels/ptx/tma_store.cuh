// The copy engine's other direction (sm_90): a box of shared memory to global memory, by one thread. Elements outside the
// tensor are not written. Stores of a thread are gathered in groups.
#pragma once
#include "ptx/tma.cuh"

namespace fi::ptx {

FI_DEVICE void tma_store_4d(const TensorMap& map, uint32_t smem, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map), "r"(smem),
               "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
FI_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Wait until at most `pending` of this thread's groups still read shared memory.
template <int pending>
FI_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from fragment layout (lane 4 g + t: row g, columns 2 t, 2 t + 1) to shared memory.
// `row`: lane l's address is where row l % 8 of matrix l / 8 goes.
FI_DEVICE void stmatrix_x4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace fi::ptx
