// Runs kernels on the CPU: every thread of a cluster is a fibre, and barriers and warp collectives are meeting points.
// Fibres run in random order between meeting points, so a missing barrier shows as a wrong result. Shared memory starts
// as garbage, cannot be touched before its CTA has started or after it has ended, and ends in a guard page.
#pragma once
#include <dlfcn.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <functional>
#include <vector>
#include <algorithm>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__

namespace emulator {

struct Dim {
  uint32_t x = 0, y = 0, z = 0;
};
struct Fibre;
struct Barrier {
  int arrived = 0;
  uint64_t phase = 0;
  std::vector<Fibre*> waiting;
};
struct Warp {
  Barrier barrier;
  int operation = 0;
  uint64_t slot[2][32];
};
struct Cta {
  Barrier named[16];
  Dim index;
  uint32_t rank = 0;
  int alive = 0;
  bool started = false;
  uint8_t *memory = nullptr, *fixed = nullptr;
  size_t bytes = 0;
  Barrier barrier;
  std::vector<Warp> warps;
};
struct Cluster {
  int alive = 0;
  Barrier barrier;
  std::vector<Cta> ctas;
};
struct Fibre {
  void* stack_pointer;
  uint8_t* stack;
  Dim thread;
  Cta* cta;
  const char* at = "start";
  void* caller = nullptr;
  uint64_t cluster_phase = 0;
  bool cluster_arrived = false, done = false;
};

extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

constexpr size_t kStack = 1 << 16;
inline Dim grid_size;
inline Fibre* current;
inline Cluster* cluster;
inline void* scheduler;
inline std::vector<Fibre*> ready;
inline std::function<void()> body;
inline uint64_t random_state;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulator: %s: CTA %u thread %u\n", what, current ? current->cta->index.x : 0,
          current ? current->thread.x : 0);
  abort();
}
inline uint32_t random_number() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(random_state >> 33);
}
inline void pause() { emulator_switch(&current->stack_pointer, scheduler); }
inline void wait(Barrier& b, uint64_t phase, const char* at) {
  current->at = at;
  while (b.phase == phase) {
    b.waiting.push_back(current);
    pause();
  }
}
inline void release(Barrier& b) {
  b.arrived = 0;
  ++b.phase;
  ready.insert(ready.end(), b.waiting.begin(), b.waiting.end());
  b.waiting.clear();
}
inline void open(Cta& cta) {
  if (mprotect(cta.memory, cta.bytes, PROT_READ | PROT_WRITE)) fail("mprotect");
  memset(cta.memory, 0xa5, cta.bytes);
  memset(cta.fixed, 0xa5, 1 << 16);
  cta.started = true;
}
inline void enter() {
  if (!current->cta->started) open(*current->cta);
  body();
  Fibre* const f = current;
  f->done = true;
  Cta& cta = *f->cta;
  // Threads that have ended count as arrived.
  if (--cta.alive > 0 && cta.barrier.arrived == cta.alive) release(cta.barrier);
  if (f->cluster_arrived && f->cluster_phase == cluster->barrier.phase) --cluster->barrier.arrived;
  if (--cluster->alive > 0 && cluster->barrier.arrived == cluster->alive) release(cluster->barrier);
  if (cta.alive == 0) mprotect(cta.memory, cta.bytes, PROT_NONE);
  pause();
}

template <class T>
uint64_t to_bits(T x) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T x;
  memcpy(&x, &bits, sizeof(T));
  return x;
}
// All lanes of the warp hand in a value; every lane gets all of them.
__attribute__((noinline)) inline const uint64_t* exchange(uint64_t value, uint32_t mask, int operation) {
  current->caller = __builtin_return_address(0);
  if (mask != 0xffffffffu) fail("partial mask");
  Warp& w = current->cta->warps[current->thread.x / 32];
  const uint64_t phase = w.barrier.phase;
  if (w.barrier.arrived == 0) w.operation = operation;
  if (w.operation != operation) fail("lanes of a warp in different collectives");
  w.slot[phase & 1][current->thread.x % 32] = value;
  if (++w.barrier.arrived == 32) release(w.barrier);
  else wait(w.barrier, phase, "warp");
  return w.slot[phase & 1];
}
__attribute__((noinline)) inline void cta_barrier() {
  current->caller = __builtin_return_address(0);
  Barrier& b = current->cta->barrier;
  const uint64_t phase = b.phase;
  if (++b.arrived == current->cta->alive) release(b);
  else wait(b, phase, "__syncthreads");
}
// bar.sync and bar.arrive: `threads` threads of the CTA meet, some of them without waiting.
__attribute__((noinline)) inline void named_barrier(int number, int threads, bool waits) {
  current->caller = __builtin_return_address(0);
  if (number < 1 || number > 15) fail("number of a barrier");
  Barrier& b = current->cta->named[number];
  const uint64_t phase = b.phase;
  if (++b.arrived == threads) release(b);
  else if (waits) wait(b, phase, "named barrier");
}
inline void cluster_arrive() {
  if (current->cluster_arrived) fail("two arrivals without a wait");
  current->cluster_arrived = true;
  current->cluster_phase = cluster->barrier.phase;
  if (++cluster->barrier.arrived == cluster->alive) release(cluster->barrier);
}
inline void cluster_wait() {
  if (!current->cluster_arrived) fail("wait without an arrival");
  wait(cluster->barrier, current->cluster_phase, "cluster");
  current->cluster_arrived = false;
}
template <class T>
T* cluster_map(T* p, uint32_t rank) {
  const size_t fixed = reinterpret_cast<uint8_t*>(p) - current->cta->fixed;
  if (fixed < 1 << 16 && rank < cluster->ctas.size()) return reinterpret_cast<T*>(cluster->ctas[rank].fixed + fixed);
  const size_t offset = reinterpret_cast<uint8_t*>(p) - current->cta->memory;
  if (offset >= current->cta->bytes || rank >= cluster->ctas.size()) fail("cluster_map");
  return reinterpret_cast<T*>(cluster->ctas[rank].memory + offset);
}
// Mailboxes: the bytes that are missing in this phase (negative before they are expected), the phase, and how many of the
// senders have not said how much they send. What is posted arrives at any time.
struct Mail {
  Cta* cta;
  uint8_t *at, *box;
  int size;
  bool adds;
  alignas(16) uint8_t value[16];
};
inline std::vector<Mail> mail;
struct Box {
  int32_t missing;
  uint32_t phase : 8, pending : 12, senders : 12;
};
inline void mailbox_count(Box& box, int bytes) {
  box.missing += bytes;
  if (box.pending > 0 || box.missing != 0) return;
  ++box.phase;
  box.pending = box.senders;
}
inline void deliver(size_t i) {
  const Mail m = mail[i];
  mail[i] = mail.back();
  mail.pop_back();
  if (m.cta->alive == 0) fail("mail for a CTA that has ended");
  if (m.adds && m.size == 4) *reinterpret_cast<uint32_t*>(m.at) += *reinterpret_cast<const uint32_t*>(m.value);
  else if (m.adds) *reinterpret_cast<uint64_t*>(m.at) += *reinterpret_cast<const uint64_t*>(m.value);
  else memcpy(m.at, m.value, m.size);
  mailbox_count(*reinterpret_cast<Box*>(m.box), -m.size);
}
inline void mailbox_open(uint64_t* box, uint32_t senders) {
  Box& b = *reinterpret_cast<Box*>(box);
  b.missing = 0;
  b.phase = 0;
  b.pending = b.senders = senders;
}
inline void mailbox_expect(uint64_t* box, uint32_t bytes) {
  Box& b = *reinterpret_cast<Box*>(box);
  if (b.pending == 0) fail("too many expectations in a phase");
  --b.pending;
  mailbox_count(b, bytes);
}
inline void mailbox_announce(uint64_t* box, uint32_t bytes, uint32_t rank) {
  if (cluster->ctas[rank].alive == 0) fail("mail for a CTA that has ended");
  mailbox_expect(cluster_map(box, rank), bytes);
}
inline void mailbox_wait(uint64_t* box, uint32_t parity) {
  const Box& b = *reinterpret_cast<Box*>(box);
  for (int i = 0; (b.phase & 1) == parity; ++i) {
    if (i > 1000000) fail("no mail");
    current->at = "mailbox";
    ready.push_back(current);
    pause();
  }
}
template <class T>
void post(T* at, T value, uint64_t* box, uint32_t rank, bool adds) {
  Cta& cta = cluster->ctas[rank];
  if (!cta.started) fail("mail for a CTA that has not started");
  Mail m = {&cta, reinterpret_cast<uint8_t*>(cluster_map(at, rank)), reinterpret_cast<uint8_t*>(cluster_map(box, rank)),
            int(sizeof(T)), adds, {}};
  memcpy(m.value, &value, sizeof(T));
  mail.push_back(m);
}
inline uint8_t* shared_memory() { return current->cta->memory; }
inline uint8_t* fixed_memory() { return current->cta->fixed; }

inline void run(std::function<void()> f, Dim size_of_grid, uint32_t threads, uint32_t size, size_t bytes, uint64_t seed) {
  const uint32_t grid = size_of_grid.x * size_of_grid.y * size_of_grid.z;
  body = f;
  grid_size = size_of_grid;
  random_state = seed;
  const size_t page = 4096, room = (bytes + page - 1) / page * page;
  Cluster c;
  std::vector<Fibre> fibres(size * threads);
  uint8_t* const memory = static_cast<uint8_t*>(
      mmap(nullptr, size * (room + page), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  std::vector<uint8_t> fixed(size << 16);
  uint8_t* const stacks = static_cast<uint8_t*>(
      mmap(nullptr, fibres.size() * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (uint32_t base = 0; base < grid; base += size) {
    c = Cluster();
    c.ctas.resize(size);
    c.alive = size * threads;
    cluster = &c;
    for (uint32_t r = 0; r < size; ++r) {
      Cta& cta = c.ctas[r];
      const uint32_t number = base + r;
      cta.index = {number % grid_size.x, number / grid_size.x % grid_size.y, number / grid_size.x / grid_size.y};
      cta.rank = r;
      cta.alive = threads;
      cta.warps.resize(threads / 32);
      cta.memory = memory + r * (room + page);
      cta.bytes = room;
      cta.fixed = fixed.data() + (size_t(r) << 16);
      for (uint32_t t = 0; t < threads; ++t) {
        Fibre& f = fibres[r * threads + t];
        f = Fibre();
        f.cta = &cta;
        f.thread.x = t;
        f.stack = stacks + (r * threads + t) * kStack;
        void** top = reinterpret_cast<void**>(f.stack + kStack) - 2;
        *top = reinterpret_cast<void*>(&enter);
        f.stack_pointer = top - 6;
        ready.push_back(&f);
      }
    }
    while (!ready.empty()) {
      if (!mail.empty() && random_number() % 4 == 0) {
        current = nullptr;
        deliver(random_number() % mail.size());
      }
      const size_t i = random_number() % ready.size();
      current = ready[i];
      ready[i] = ready.back();
      ready.pop_back();
      emulator_switch(&scheduler, current->stack_pointer);
    }
    if (!mail.empty()) fail("mail that nobody waited for");
    for (Fibre& f : fibres) {
      if (!f.done) {
        current = &f;
        for (Fibre& g : fibres)
          if (!g.done) {
            Dl_info info = {};
            dladdr(g.caller, &info);
            fprintf(stderr, "CTA %u thread %u waits at %s, %s+%#lx\n", g.cta->index.x, g.thread.x, g.at, info.dli_fname,
                    size_t(g.caller) - size_t(info.dli_fbase));
          }
        fail("deadlock");
      }
    }
  }
  munmap(memory, size * (room + page));
  munmap(stacks, fibres.size() * kStack);
  current = nullptr;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->cta->index)
#define gridDim (emulator::grid_size)
#define __cvta_generic_to_shared(p) size_t(0)
using std::max;
using std::min;
#define __INTADDR__(x) reinterpret_cast<uint64_t>(x)

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T>
void __stcg(T* p, T x) {
  *p = x;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }

inline void __syncthreads() { emulator::cta_barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulator::exchange(0, mask, 1); }
template <class T>
T __shfl_sync(uint32_t mask, T x, int lane) {
  return emulator::from_bits<T>(emulator::exchange(emulator::to_bits(x), mask, 2)[lane & 31]);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int bits) {
  return emulator::from_bits<T>(emulator::exchange(emulator::to_bits(x), mask, 3)[(emulator::current->thread.x ^ bits) & 31]);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T x, int offset) {
  const uint64_t* all = emulator::exchange(emulator::to_bits(x), mask, 4);
  const int lane = emulator::current->thread.x & 31;
  return emulator::from_bits<T>(all[lane >= offset ? lane - offset : lane]);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T x, int offset) {
  const uint64_t* all = emulator::exchange(emulator::to_bits(x), mask, 5);
  const int lane = emulator::current->thread.x & 31;
  return emulator::from_bits<T>(all[lane + offset < 32 ? lane + offset : lane]);
}
inline uint32_t __ballot_sync(uint32_t mask, bool x) {
  const uint64_t* all = emulator::exchange(x, mask, 6);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t(all[i] != 0) << i;
  return bits;
}
inline int __reduce_max_sync(uint32_t mask, int x) {
  const uint64_t* all = emulator::exchange(emulator::to_bits(x), mask, 7);
  int best = emulator::from_bits<int>(all[0]);
  for (int i = 1; i < 32; ++i) best = best > emulator::from_bits<int>(all[i]) ? best : emulator::from_bits<int>(all[i]);
  return best;
}
inline bool __any_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) == 0xffffffffu; }

template <class T>
struct Same {
  using Type = T;
};
template <class T>
T atomicAdd(T* p, typename Same<T>::Type x) {
  const T old = *p;
  *p = old + x;
  return old;
}
inline uint32_t atomicInc(uint32_t* p, uint32_t limit) {
  const uint32_t old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}
template <class T>
T atomicMax(T* p, typename Same<T>::Type x) {
  const T old = *p;
  if (x > old) *p = x;
  return old;
}
template <class T>
T atomicMin(T* p, typename Same<T>::Type x) {
  const T old = *p;
  if (x < old) *p = x;
  return old;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(uint64_t x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
inline int __ffsll(uint64_t x) { return __builtin_ffsll((long long)(x)); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline float __int_as_float(int x) { return emulator::from_bits<float>(uint32_t(x)); }
inline float __uint_as_float(uint32_t x) { return emulator::from_bits<float>(x); }
inline int __float_as_int(float x) { return int(emulator::to_bits(x)); }
inline uint32_t __float_as_uint(float x) { return uint32_t(emulator::to_bits(x)); }
inline double __longlong_as_double(int64_t x) { return emulator::from_bits<double>(uint64_t(x)); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fadd_rd(float a, float b) {
  const double exact = double(a) + double(b);
  float y = float(exact);
  return double(y) > exact ? nextafterf(y, -INFINITY) : y;
}
inline float __ull2float_rz(uint64_t x) {
  float y = float(x);
  return (long double)(y) > (long double)(x) ? nextafterf(y, 0.f) : y;
}
template <class F>
uint64_t to_u64(F x) {  // truncated and saturating
  if (!(x > 0)) return 0;
  if (x >= F(18446744073709551616.0)) return ~uint64_t(0);
  return uint64_t(x);
}
inline uint64_t __float2ull_rz(float x) { return to_u64(x); }
inline uint64_t __double2ull_rz(double x) { return to_u64(x); }
inline uint64_t __double2ull_ru(double x) { return to_u64(ceil(x)); }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  const double rounded = nearbyint(double(x));
  return rounded >= 2147483647.0 ? 2147483647 : rounded <= -2147483648.0 ? int(-2147483648ll) : int(rounded);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline uint32_t __funnelshift_r(uint32_t lo, uint32_t hi, uint32_t shift) {
  return uint32_t((uint64_t(hi) << 32 | lo) >> (shift & 31));
}
inline uint32_t __vsetne4(uint32_t a, uint32_t b) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i += 8) r |= uint32_t((a >> i & 255) != (b >> i & 255)) << i;
  return r;
}
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void sincospif(float x, float* s, float* c) {
  *s = float(sin(M_PI * double(x)));
  *c = float(cos(M_PI * double(x)));
}
inline float __half2float(__half x) { return _cvtsh_ss(x.bits); }
inline __half __float2half_rn(float x) { return {x != x ? uint16_t(0x7fff) : uint16_t(_cvtss_sh(x, 0))}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = __float_as_uint(x);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
// fp8: kMantissa bits of mantissa, the rest exponent; e4m3 has no infinities.
template <int kMantissa>
float fp8_to_float(uint8_t bits) {
  constexpr int kExponent = 7 - kMantissa, kBias = (1 << (kExponent - 1)) - 1;
  const int e = (bits >> kMantissa) & ((1 << kExponent) - 1), m = bits & ((1 << kMantissa) - 1);
  float x;
  if (kMantissa == 3 && (bits & 0x7f) == 0x7f) x = NAN;
  else if (kMantissa == 2 && e == 31) x = m ? NAN : INFINITY;
  else x = e ? ldexpf(float((1 << kMantissa) + m), e - kBias - kMantissa) : ldexpf(float(m), 1 - kBias - kMantissa);
  return bits & 0x80 ? -x : x;
}
// To the nearest, to even between two, saturating.
template <int kMantissa>
uint8_t fp8_from_float(float x) {
  constexpr int kLargest = kMantissa == 3 ? 0x7e : 0x7b;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return sign | 0x7f;
  const float size = fabsf(x);
  int best = 0;
  for (int i = 1; i <= kLargest; ++i) {
    const float a = fabsf(fp8_to_float<kMantissa>(best) - size), b = fabsf(fp8_to_float<kMantissa>(i) - size);
    if (b < a || (b == a && i % 2 == 0)) best = i;
  }
  return uint8_t(best | sign);
}
template <int kMantissa>
struct Fp8 {
  Fp8() = default;
  explicit Fp8(float x) : bits(fp8_from_float<kMantissa>(x)) {}
  explicit operator float() const { return fp8_to_float<kMantissa>(bits); }
  uint8_t bits;
};
struct __nv_fp8_e4m3 : Fp8<3> {
  using Fp8<3>::Fp8;
};
struct __nv_fp8_e5m2 : Fp8<2> {
  using Fp8<2>::Fp8;
};
using __nv_fp8x2_storage_t = uint16_t;
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
struct __half2_raw {
  uint16_t x, y;
};
inline __half2_raw __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t pair, __nv_fp8_interpretation_t kind) {
  auto half = [&](uint8_t bits) { return __float2half_rn(kind == __NV_E4M3 ? fp8_to_float<3>(bits) : fp8_to_float<2>(bits)).bits; };
  return {half(uint8_t(pair)), half(uint8_t(pair >> 8))};
}
