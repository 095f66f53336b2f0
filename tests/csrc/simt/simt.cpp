// Runs CUDA threads as fibres on one CPU thread. Built without sanitizers, which it informs:
// - AddressSanitizer learns how much shared memory the launch asked for;
// - ThreadSanitizer takes every fibre for a thread of its own and learns that barriers order their accesses, and that
//   nothing else does: neither the order in which fibres happen to run, nor a shuffle, nor that one block follows
//   another. It so finds missing barriers, and blocks that write the same place, whatever order was run.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cuda_runtime.h"

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
}

constexpr size_t kSharedArray = 256 * 1024;
alignas(4096) unsigned char gem_fast_shared[kSharedArray];

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

int shared_bytes_optin = 99 * 1024;
int capability = 9;
uint64_t seed = 1;

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 512;
// More fibres than a block has threads: a block shares none with the one before it, which would order them.
constexpr unsigned kFibres = 2 * kMaxThreads + 61;
constexpr size_t kStack = 256 * 1024;
constexpr unsigned kWithoutOrder = 1;  // __tsan_switch_to_fiber_no_sync

// Where a fibre goes on. swapcontext would save the signal mask at every switch, by two calls of the kernel.
using Place = void* [5];

enum class State { kReady, kWaiting, kDone };

struct Fibre {
  ucontext_t start;
  Place place;
  void* tsan;
  unsigned thread;
  State state;
  bool made;
  bool started;
};

struct Warp {
  uint64_t words[2][kWarp];
  uint32_t fragments[2][kWarp][6];
  unsigned phase[kWarp];
  unsigned arrived;
};

Fibre fibres[kFibres];
Place host;
void* host_tsan;
unsigned order[kMaxThreads];     // the fibres of this block, in the order they run
unsigned fibre_of[kMaxThreads];  // by thread
unsigned current;                // place in `order`
unsigned at_barrier;
unsigned finished;
Warp warps[kMaxThreads / kWarp];
void (*thread_body)(const void*);
const void* thread_context;
// Addresses that stand for what orders accesses. A thread leaves a barrier before the next but one is reached. Blocks
// have different barriers: none orders one block after another.
constexpr unsigned kBlocksApart = 64;
char launched, ended, fenced, barriers[kBlocksApart][2], warp_barriers[kBlocksApart][kMaxThreads / kWarp][2];
unsigned barrier_phase;

[[noreturn]] void fail(const char* message) {
  fprintf(stderr, "simt: block %u: %s (%u of %u threads at a barrier, %u finished)\n", blockIdx.x, message, at_barrier,
          blockDim.x, finished);
  _exit(3);
}

void acquire(char* what) {
  if (__tsan_acquire != nullptr) __tsan_acquire(what);
}
void release(char* what) {
  if (__tsan_release != nullptr) __tsan_release(what);
}

void tsan_switch(void* to) {
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(to, kWithoutOrder);
}

uint64_t random_below(uint64_t n) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (seed >> 33) % n;
}

[[noreturn]] __attribute__((noinline)) void leave_for(Place& to) { __builtin_longjmp(to, 1); }

__attribute__((noinline)) void jump(Place& from, Place& to) {
  if (__builtin_setjmp(from) == 0) leave_for(to);
}

__attribute__((noinline)) void start(Place& from, const ucontext_t& to) {
  if (__builtin_setjmp(from) == 0) setcontext(&to);
}

void go_to(Place& from, Fibre& to) {
  threadIdx.x = to.thread;
  tsan_switch(to.tsan);
  if (to.started) {
    jump(from, to.place);
  } else {
    to.started = true;
    start(from, to.start);
  }
}

// Goes on with the next fibre that can; back to the host when all are done.
void run_next() {
  Fibre& from = fibres[order[current]];
  for (unsigned step = 1; step <= blockDim.x; ++step) {
    const unsigned place = (current + step) % blockDim.x;
    Fibre& to = fibres[order[place]];
    if (to.state != State::kReady) continue;
    current = place;
    if (&to != &from) go_to(from.place, to);
    return;
  }
  if (finished < blockDim.x) fail("deadlock: a barrier or a shuffle is not reached by every thread");
  tsan_switch(host_tsan);
  jump(from.place, host);
}

void fibre_body() {
  while (true) {
    acquire(&launched);
    thread_body(thread_context);
    release(&ended);
    fibres[order[current]].state = State::kDone;
    ++finished;
    run_next();
  }
}

// Every lane of the warp hands in a word; returns all of them once they are there.
const uint64_t* exchange(uint64_t mine) {
  const unsigned thread = threadIdx.x;
  const unsigned lane = thread % kWarp;
  Warp& warp = warps[thread / kWarp];
  uint64_t* words = warp.words[warp.phase[lane]++ % 2];
  words[lane] = mine;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    for (unsigned i = 0; i < kWarp; ++i) fibres[fibre_of[thread - lane + i]].state = State::kReady;
  } else {
    fibres[order[current]].state = State::kWaiting;
    run_next();
  }
  return words;
}

void make(Fibre& fibre) {
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for a stack");
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = stack;
  fibre.start.uc_stack.ss_size = kStack;
  makecontext(&fibre.start, fibre_body, 0);
  // AddressSanitizer would clear its notes of the stack at every switch if it were told where it is.
  fibre.start.uc_stack.ss_sp = nullptr;
  fibre.start.uc_stack.ss_size = 0;
  if (__tsan_create_fiber != nullptr) fibre.tsan = __tsan_create_fiber(0);
  fibre.made = true;
}

// Shared memory of a new block: NaNs everywhere, out of bounds beyond what was asked for, and not yet touched.
void prepare_shared(size_t bytes) {
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(gem_fast_shared, kSharedArray);
  // ThreadSanitizer forgets what it knew of memory that is mapped anew.
  if (__tsan_acquire != nullptr && bytes > 0) {
    mmap(gem_fast_shared, (bytes + 4095) / 4096 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
         -1, 0);
  }
  memset(gem_fast_shared, 0xff, bytes);
  if (__asan_poison_memory_region != nullptr) {
    __asan_poison_memory_region(gem_fast_shared + bytes, kSharedArray - bytes);
  }
}

void run_block(unsigned block) {
  blockIdx.x = block;
  at_barrier = finished = 0;
  const auto shift = static_cast<unsigned>(static_cast<uint64_t>(block) * blockDim.x % kFibres);
  for (unsigned i = 0; i < blockDim.x; ++i) {
    const unsigned f = (i + shift) % kFibres;
    if (!fibres[f].made) make(fibres[f]);
    fibres[f].thread = i;
    fibres[f].state = State::kReady;
    order[i] = fibre_of[i] = f;
  }
  for (unsigned i = blockDim.x; i > 1; --i) {
    const uint64_t other = random_below(i);
    const unsigned f = order[i - 1];
    order[i - 1] = order[other];
    order[other] = f;
  }
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
    warps[w].arrived = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) warps[w].phase[lane] = 0;
  }
  release(&launched);
  current = 0;
  go_to(host, fibres[order[0]]);
}

}  // namespace

void barrier() {
  char* const here = &barriers[blockIdx.x % kBlocksApart][barrier_phase % 2];
  release(here);
  if (++at_barrier == blockDim.x) {
    at_barrier = 0;
    ++barrier_phase;
    for (unsigned i = 0; i < blockDim.x; ++i) fibres[order[i]].state = State::kReady;
  } else {
    fibres[order[current]].state = State::kWaiting;
    run_next();
  }
  acquire(here);
}

uint64_t shuffle(uint64_t mine, unsigned from) { return exchange(mine)[from]; }

unsigned ballot(bool flag) {
  const uint64_t* flags = exchange(flag);
  unsigned mask = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) mask |= static_cast<unsigned>(flags[lane]) << lane;
  return mask;
}

void warp_barrier() {
  const unsigned thread = threadIdx.x;
  const Warp& warp = warps[thread / kWarp];
  char* const here = &warp_barriers[blockIdx.x % kBlocksApart][thread / kWarp][warp.phase[thread % kWarp] % 2];
  release(here);
  exchange(0);
  acquire(here);
}

void fence() {
  release(&fenced);
  acquire(&fenced);
}

unsigned add(unsigned* to, unsigned x) {
  const unsigned before = *to;
  *to += x;
  return before;
}

namespace {

double number(MmaKind kind, uint32_t word, unsigned half) {
  if (kind == MmaKind::kTf32) return __uint_as_float(word & 0xffffe000u);
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  if (kind == MmaKind::kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  _Float16 x;
  memcpy(&x, &bits, sizeof x);
  return static_cast<double>(x);
}

}  // namespace

void mma(MmaKind kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned lane = threadIdx.x % kWarp;
  Warp& warp = warps[threadIdx.x / kWarp];
  auto& all = warp.fragments[warp.phase[lane] % 2];
  memcpy(all[lane], a, sizeof a);
  memcpy(all[lane] + 4, b, sizeof b);
  exchange(0);
  const unsigned halves = kind == MmaKind::kTf32 ? 1 : 2;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, bottom = i / 2, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (unsigned unit = 0; unit < 8; ++unit) {
      for (unsigned half = 0; half < halves; ++half) {
        const uint32_t x = all[4 * row + unit % 4][bottom + unit / 4 * 2];
        const uint32_t y = all[4 * column + unit % 4][4 + unit / 4];
        sum += number(kind, x, half) * number(kind, y, half);
      }
    }
    auto cut = static_cast<float>(sum);
    if (std::isfinite(cut) && std::abs(static_cast<double>(cut)) > std::abs(sum)) cut = std::nextafter(cut, 0.0f);
    d[i] = cut;
  }
}

void launch(unsigned blocks, unsigned threads, size_t shared_bytes, void (*thread)(const void*), const void* context) {
  if (__tsan_get_current_fiber != nullptr) host_tsan = __tsan_get_current_fiber();
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  thread_body = thread;
  thread_context = context;
  for (unsigned block = 0; block < blocks; ++block) {
    prepare_shared(shared_bytes);
    run_block(block);
  }
  acquire(&ended);
}

}  // namespace simt

// ---- the host's side
// -------------------------------------------------------------------------------------------------

namespace {
const void* asked_kernel;
int asked_bytes;
}  // namespace

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? simt::capability : simt::shared_bytes_optin;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  memset(to, byte, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > simt::shared_bytes_optin) return cudaErrorInvalidValue;
  asked_kernel = kernel;
  asked_bytes = value;
  return cudaSuccess;
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const size_t allowed = kernel == asked_kernel && asked_bytes > 48 * 1024 ? asked_bytes : 48 * 1024;
  const unsigned threads = config.blockDim.x;
  const bool fits = config.gridDim.x > 0 && config.gridDim.x < 1u << 31 && threads > 0 && threads % 32 == 0 &&
                    threads <= 512 && config.dynamicSmemBytes <= allowed;
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}
