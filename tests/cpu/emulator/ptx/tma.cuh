// The copy engine on the CPU, as early as it can be: boxes land when they are asked for. A map is what emulate.tensor_map
// makes: address, rank, element bytes, extents, strides in bytes, box; the 128-byte swizzle.
#pragma once
#include "ptx/mbarrier.cuh"
namespace fi::ptx {
struct alignas(64) TensorMap {
  uint64_t address;
  uint32_t rank, size;
  uint32_t extent[5];
  uint32_t box[5];
  uint64_t stride[5];
  uint64_t unused[3];
};
static_assert(sizeof(TensorMap) == 128);
inline bool elect_one() { return emulator::current->thread.x % 32 == 0; }
inline void tma_prefetch(const TensorMap&) {}
// For each element of the box at `at`: f(its place in shared memory, its address, whether it is inside the array).
template <class F>
uint32_t for_box(const TensorMap& map, uint32_t smem, const int* at, F f) {
  uint32_t count = 1;
  for (uint32_t d = 0; d < map.rank; ++d) count *= map.box[d];
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t rest = i;
    uint64_t address = map.address;
    bool inside = true;
    for (uint32_t d = 0; d < map.rank; ++d) {
      const int64_t x = at[d] + int64_t(rest % map.box[d]);
      rest /= map.box[d];
      inside = inside && x >= 0 && x < map.extent[d];
      address += x * (d == 0 ? map.size : map.stride[d - 1]);
    }
    uint32_t here = smem + i * map.size;
    here ^= (here >> 7 & 7) << 4;
    f(reinterpret_cast<uint8_t*>(smem_at(here)), address, inside);
  }
  return count;
}
inline void tma_load(uint32_t smem, const TensorMap& map, uint32_t barrier, const int* at) {
  if (smem % 128 || map.rank > 5) emulator::fail("copy to a misaligned address");
  if (map.box[0] * map.size != 128) emulator::fail("a box must be 128 bytes wide");
  const uint32_t count = for_box(map, smem, at, [&](uint8_t* here, uint64_t there, bool inside) {
    if (inside) memcpy(here, reinterpret_cast<const void*>(there), map.size);
    else memset(here, 0, map.size);
  });
  mbarrier_complete(barrier, count * map.size);
}
inline void tma_load_4d(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
  const int at[] = {x, y, z, w};
  tma_load(smem, map, barrier, at);
}
inline void tma_load_5d(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w, int u) {
  const int at[] = {x, y, z, w, u};
  tma_load(smem, map, barrier, at);
}
inline void tma_prefetch_5d(const TensorMap&, int, int, int, int, int) {}
inline void fence_proxy_async() {}
}  // namespace fi::ptx
