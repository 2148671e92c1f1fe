// The copy engine's other direction on the CPU: a box leaves when it is asked to.
#pragma once
#include "ptx/tma.cuh"
namespace fi::ptx {
inline void tma_store_4d(const TensorMap& map, uint32_t smem, int x, int y, int z, int w) {
  const int at[] = {x, y, z, w};
  if (map.rank != 4) emulator::fail("a store of four coordinates to another map");
  for_box(map, smem, at, [&](const uint8_t* here, uint64_t there, bool inside) {
    if (inside) memcpy(reinterpret_cast<void*>(there), here, map.size);
  });
}
inline void tma_store_commit() {}
template <int pending>
void tma_store_wait_read() {}
inline void stmatrix_x4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  if (row % 16) emulator::fail("misaligned stmatrix");
  const uint32_t words[4] = {r0, r1, r2, r3};
  uint64_t rows[32];
  memcpy(rows, emulator::exchange(row, 0xffffffffu, 37), sizeof(rows));
  const int lane = emulator::current->thread.x & 31;
  for (int i = 0; i < 4; ++i) memcpy(smem_at(uint32_t(rows[8 * i + lane / 4]) + lane % 4 * 4), &words[i], 4);
}
}  // namespace fi::ptx
