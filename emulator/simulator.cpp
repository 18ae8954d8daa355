// fused_block.cu on a CPU, without a GPU: python test_block.py -k simulated. The kernel's own source is
// compiled as C++. Each thread of the kernel is a fiber here: this program, and not the system, switches it.
// KERNEL is the part of the source that source_for_cpu in tests/helpers.py keeps. It drops the host side, and
// the functions that consist of PTX. This file has C++ functions in their place.
//
// The results of the kernel must depend on no order except that of its syncs. So everything else happens in a
// random order:
//   - Warps take turns in any order, and some are slow. In some launches a cluster begins late.
//   - Copies, pushes and additions to x arrive late, in any order. In some launches additions come last.
//   - Shared memory is NaN at first, and so is the place of a copy until the copy arrives.
// A copy from outside a tensor ends the launch. The same seed gives the same order. Three things are not
// shown: time; two threads that interleave between two waits; and threads that see the same stores in
// different orders.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

// ---- What CUDA C++ adds to C++ ----------------------------------------------------------------------------

#define __device__
#define __host__
#define __global__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
typedef _Float16 half;
struct half2 { half x, y; };
struct float2 { float x, y; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct Index { int x; };

template <class To, class From> To bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  memcpy(&to, &from, sizeof to);
  return to;
}
float2 make_float2(float x, float y) { return {x, y}; }
float2 __half22float2(half2 h) { return {(float)h.x, (float)h.y}; }
float __half2float(half h) { return (float)h; }
half __float2half_rn(float f) { return (half)f; }
uint32_t __float_as_uint(float f) { return bits<uint32_t>(f); }
float __int_as_float(int i) { return bits<float>(i); }
long long __float2ll_rn(float f) { return llrintf(f); }
float __ll2float_rn(long long i) { return (float)i; }
float __uint2float_rn(uint32_t i) { return (float)i; }
unsigned long long __float2ull_rz(float f) { return (unsigned long long)f; }
float rsqrtf(float f) { return 1 / sqrtf(f); }
using std::max;
using std::min;

// ---- Fibers: one runs until it has to wait, then the scheduler goes on with another ----------------------

struct Barrier { int arrived = 0, phase = 0; };

struct Warp { Barrier barrier; uint64_t lanes[2][32]; bool dawdles = false, ended = false; };

struct Block {
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* shared;
  Barrier named[16];
  std::vector<Warp> warps;
  int running;  // warps
};

struct Fiber {
  Index thread, block;
  std::unique_ptr<char[]> stack;
  ucontext_t begin;
  jmp_buf at;
  bool begun = false, ended = false;
  const Barrier* barrier = nullptr;  // at which it waits
  int phase;                         // for the end of this phase
};

constexpr int SHARED = SHARED_BYTES, STACK = 1 << 16;  // bytes
std::vector<Block> blocks;
std::vector<Barrier> clusters;
std::vector<Fiber> fibers;
std::vector<std::function<void()>> late, later;  // on their way
bool slow;  // additions go to `later`
std::mt19937 rng;
Fiber* fiber;
jmp_buf scheduler;
bool trapped;
bool lost;  // something was on its way to a block that had ended
int idle;  // turns in which nothing has happened: clock64 advances by it, and at 5000 simulate stops
Index gridDim;
const void* const* tensors;  // what the kernel's Model points to
const long long* tensor_bytes;
size_t n_tensors;
#define threadIdx (fiber->thread)
#define blockIdx (fiber->block)

void yield() {
  if (!_setjmp(fiber->at)) _longjmp(scheduler, 1);
}
void meet(Barrier& b, int threads) {
  const int phase = b.phase;
  if (++b.arrived == threads) b.arrived = idle = 0, b.phase++;
  else fiber->barrier = &b, fiber->phase = phase, yield();
}
bool chance(int of) { return rng() % of == 0; }

Block& block() { return blocks[blockIdx.x]; }
Warp& warp() { return block().warps[threadIdx.x / 32]; }
void __syncwarp() { meet(warp().barrier, 32); }
template <class T> T exchange(T v, int lane) {  // two arrays alternate: no lane can be two barriers ahead
  uint64_t* const lanes = warp().lanes[warp().barrier.phase % 2];
  memcpy(&lanes[threadIdx.x % 32], &v, sizeof v);
  __syncwarp();
  memcpy(&v, &lanes[lane], sizeof v);
  return v;
}
template <class T> T __shfl_xor_sync(unsigned, T v, int bit) { return exchange(v, threadIdx.x % 32 ^ bit); }
template <class T> T __shfl_sync(unsigned, T v, int lane, int width) {
  return exchange(v, threadIdx.x % 32 / width * width + lane);
}

uint32_t __reduce_max_sync(unsigned, uint32_t v) {
  for (int bit = 16; bit; bit /= 2) v = max(v, __shfl_xor_sync(~0u, v, bit));
  return v;
}
uint32_t __reduce_add_sync(unsigned, uint32_t v) {
  for (int bit = 16; bit; bit /= 2) v += __shfl_xor_sync(~0u, v, bit);
  return v;
}
template <class T> void atomicMax(T* p, T v) { *p = max(*p, v); }
int atomicCAS_system(int* p, int old, int v) { return *p == old ? std::exchange(*p, v) : *p; }
void __threadfence_system() {}
void __nanosleep(int) { yield(); }
void __trap() { trapped = true, _longjmp(scheduler, 1); }
long long clock64() { return idle / 1000 * 7'000'000'000; }  // past PATIENCE once nothing happens any more

// ---- What the toolbox's instructions do ------------------------------------------------------------------

// Of the same place in the shared memory of `block`, which has 256 KiB of addresses.
uint32_t address(int block, const void* own) {
  const long place = (const uint8_t*)own - ::block().shared;
  if (place < 0 || place >= SHARED) __trap();
  return block << 18 | place;
}
uint8_t* at(uint32_t address) { return blocks[address >> 18].shared + address % (1 << 18); }

uint32_t __cvta_generic_to_shared(const void* p) { return address(blockIdx.x, p); }
uint32_t in_rank(const void* own, int rank) { return address(blockIdx.x / CLUSTER * CLUSTER + rank, own); }

struct Mbarrier { int bytes : 31; unsigned phase : 1; uint16_t arrivals, missing; };
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

void count(void* barrier, int bytes, int arrivals) {
  Mbarrier& b = *(Mbarrier*)barrier;
  if (b.missing < arrivals) __trap();
  idle = 0;
  b.bytes += bytes;
  b.missing -= arrivals;
  if (b.missing == 0 && b.bytes == 0) b.phase ^= 1, b.missing = b.arrivals;
}
void barrier_init(uint64_t* b, int n) { *(Mbarrier*)b = {0, 0, (uint16_t)n, (uint16_t)n}; }
void barrier_arrive(uint64_t* b) { count(b, 0, 1); }
void barrier_expect(uint64_t* b, uint32_t bytes) { count(b, bytes, 1); }
bool phase_running(uint64_t* b, uint32_t parity, bool = false) {
  if (((Mbarrier*)b)->phase == parity) yield();
  return ((Mbarrier*)b)->phase == parity;
}
void barriers_exist() {}
void cluster_sync() { meet(clusters[blockIdx.x / CLUSTER], CLUSTER * 32 * block().warps.size()); }

void land(int block, void* barrier, int bytes) {
  lost |= blocks[block].running == 0;
  count(barrier, -bytes, 0);
}
void push(uint32_t to, float v, uint32_t barrier) {
  late.push_back([=] { memcpy(at(to), &v, 4); land(to >> 18, at(barrier), 4); });
}
void push4(uint32_t to, const float* v, uint32_t barrier) {
  if (to % 16) __trap();
  for (int i = 0; i < 4; i++) push(to + 4 * i, v[i], barrier);
}
void check_read(const void* from, int bytes) {  // all of it lies in one of the tensors
  for (size_t i = 0; i < n_tensors; i++)
    if (from >= tensors[i] && (char*)from + bytes <= (char*)tensors[i] + tensor_bytes[i]) return;
  __trap();
}
uint64_t read_once_policy() { return 0; }
void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* full, uint64_t) {
  if ((address(blockIdx.x, to) | (uintptr_t)from | bytes) % 16) __trap();
  check_read(from, bytes);
  memset(to, 0xff, bytes);
  late.push_back([=, own = blockIdx.x] { memcpy(to, from, bytes); land(own, full, bytes); });
}

void order_copies() {}
longlong2 load_relaxed(const long long* p) { yield(); return {p[0], p[1]}; }
float load_relaxed(const float* p) { yield(); return *p; }
void add_relaxed(long long* p, long long v) {
  (slow ? later : late).push_back([=] { *p += v; });
}
void arrive_release(unsigned* counter) { ++*counter, idle = 0; }
unsigned load_acquire(const unsigned* counter) { yield(); return *counter; }
uint4 load16(const half* p) { check_read(p, 16); return *(const uint4*)p; }
void named_barrier(int id, int threads) { meet(block().named[id], threads); }
unsigned long long global_ns() {  // advances, as the producer waits for it
  static unsigned long long ns = 0;
  return ns += 100;
}

// ---- The kernel, and its launch --------------------------------------------------------------------------

#include KERNEL

std::function<void()> kernel;  // with the launch's arguments

void run_thread() {
  kernel();
  fiber->ended = true;
  _longjmp(scheduler, 1);
}

void run_lane(Fiber* lane) {  // until it waits
  fiber = lane;
  if (lane->ended || trapped || (lane->barrier && lane->barrier->phase == lane->phase)) return;
  lane->barrier = nullptr;
  if (_setjmp(scheduler)) return;
  if (lane->begun) _longjmp(lane->at, 1);
  lane->begun = true;
  setcontext(&lane->begin);
}

// Runs a warp's lanes, sometimes only a few of them. Returns whether all have ended.
bool run_warp(Fiber* lanes) {
  const unsigned n = chance(8) ? rng() % 32 : 32, start = rng();
  for (unsigned i = 0; i < n; i++) run_lane(lanes + (start + i) % 32);
  return std::all_of(lanes, lanes + 32, [](const Fiber& f) { return f.ended; });
}

void arrive_some() {
  if (!later.empty()) idle = 0;
  if (chance(500)) std::move(later.begin(), later.end(), std::back_inserter(late)), later.clear();
  for (int n = late.empty() || chance(3) ? 0 : 1 + rng() % late.size(); n > 0; n--) {
    std::swap(late[rng() % late.size()], late.back());
    const std::function<void()> arrive = std::move(late.back());
    late.pop_back();
    arrive();
    idle = 0;
  }
}

// Like fused_launch, in the order that `seed` gives. Returns whether the launch ended by itself, and nothing
// was on its way to a block that had ended.
extern "C" __attribute__((visibility("default"))) int simulate(const void* const* pointers,
    const long long* bytes, int n_clusters, int first_layer, int end_layer, int tokens, unsigned seed) {
  tensors = pointers, tensor_bytes = bytes, n_tensors = sizeof(Worker::Model) / sizeof(void*);
  const int n_blocks = n_clusters * CLUSTER, warps = WORKERS / 32 + 1;
  kernel = [=] {
    Worker::thread_main(*(const Worker::Model*)pointers, *(Worker::Shared*)block().shared, first_layer,
                        end_layer, tokens);
  };
  gridDim.x = n_blocks;
  rng.seed(seed);
  trapped = lost = false, idle = 0, slow = chance(2);
  clusters.assign(n_clusters, {});
  blocks.resize(n_blocks);
  for (Block& b : blocks) {
    b.memory = std::make_unique<uint8_t[]>(SHARED + 128);
    b.shared = b.memory.get() + 128 - (uintptr_t)b.memory.get() % 128;
    memset(b.shared, 0xff, SHARED);
    b.warps.resize(warps), b.running = warps;
  }
  fibers.resize(n_blocks * warps * 32);
  for (size_t i = 0; i < fibers.size(); i++) {
    Fiber& f = fibers[i];
    f.thread.x = i % (warps * 32), f.block.x = i / (warps * 32);
    f.stack.reset(new char[STACK]);
    getcontext(&f.begin);
    f.begin.uc_stack.ss_sp = f.stack.get(), f.begin.uc_stack.ss_size = STACK;
    makecontext(&f.begin, run_thread, 0);
  }

  std::vector<int> order(n_blocks * warps);
  std::iota(order.begin(), order.end(), 0);
  size_t ended = 0;
  const int tardy = chance(8) ? rng() % n_clusters : n_clusters;  // a cluster that begins when others are far
  // The longest launch of the tests takes 40,000 turns. In a broken kernel, choose() may never return.
  for (int turn = 0; ended < order.size() && !trapped && idle++ < 5000 && turn < 200'000; turn++) {
    if (tardy < n_clusters && turn < 3000) idle = 0;
    if (turn % 16 == 0) std::shuffle(order.begin(), order.end(), rng);
    for (int w : order) {
      Warp& warp = blocks[w / warps].warps[w % warps];
      if (turn % 64 == 0) warp.dawdles = chance(4);
      if (trapped || warp.ended || (warp.dawdles && !chance(20))) continue;
      if (w / warps / CLUSTER == tardy && turn < 3000) continue;
      warp.ended = run_warp(&fibers[w * 32]);
      if (warp.ended) ended++, blocks[w / warps].running--;
    }
    arrive_some();
  }
  for (auto* on_their_way : {&late, &later}) {
    for (auto& arrive : *on_their_way) arrive();
    on_their_way->clear();
  }
  fibers.clear(), blocks.clear();
  return ended == order.size() && !lost;
}
