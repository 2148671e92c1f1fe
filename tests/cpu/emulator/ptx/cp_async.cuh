// Asynchronous copies on the CPU: done at once. Addresses in shared memory count from the CTA's own.
#pragma once
#include "common/base.cuh"
namespace fi::ptx {
inline uint32_t smem_address(const void* p) { return uint32_t(static_cast<const uint8_t*>(p) - emulator::current->cta->memory); }
inline uint8_t* smem_at(uint32_t address) {
  if (address >= emulator::current->cta->bytes) emulator::fail("address outside of shared memory");
  return emulator::current->cta->memory + address;
}
template <int kBytes>
void cp_async(void* smem, const void* global, bool valid) {
  if (size_t(smem) % kBytes || (valid && size_t(global) % kBytes)) emulator::fail("misaligned copy");
  if (valid) memcpy(smem, global, kBytes);
  else memset(smem, 0, kBytes);
}
inline void cp_async_16(void* smem, const void* global, bool valid = true) { cp_async<16>(smem, global, valid); }
inline void cp_async_commit() {}
template <int pending>
void cp_async_wait() {}
}  // namespace fi::ptx
