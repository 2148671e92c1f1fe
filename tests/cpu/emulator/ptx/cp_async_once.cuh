// Copies with hints for the L2, which is not emulated.
#pragma once
#include "ptx/cp_async.cuh"
namespace fi::ptx {
template <bool kOnce>
struct AsyncCopies {
  using Address = uint8_t*;
  Address address(uint8_t* smem) const { return smem; }
  static void copy_16(Address to, const void* global, bool valid = true) { cp_async_16(to, global, valid); }
  static void copy_16_anywhere(Address to, const void* global, bool valid) { cp_async_16(to, global, valid); }
};
}  // namespace fi::ptx
