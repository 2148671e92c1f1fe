// Programmatic dependent launch (sm_90 and later): no-ops elsewhere, and when the launch does not ask for it.
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

// The next kernel in the stream may start its CTAs from here on. Safe before any write only if the next kernel waits
// (grid_wait) before it reads what this one writes.
FI_DEVICE void grid_launch_dependents() {
#if FI_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Wait until the kernels before this one in the stream have finished and their writes are visible.
FI_DEVICE void grid_wait() {
#if FI_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fi::ptx
