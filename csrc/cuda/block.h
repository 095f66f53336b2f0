// What the threads of a block share: memory, warps, and a team for the algorithms of core/.
//
// All shared memory is dynamic: a launch names its bytes and a kernel lays them out.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "core/team.h"

extern __shared__ __align__(16) unsigned char gem_fast_shared[];

namespace gem_fast::cuda {

inline constexpr int kWarp = kMostThreads;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warps() { return (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp; }

// Of equal values the smaller index, as one thread going through them in order would find it.
__device__ inline Indexed smaller(const Indexed& a, const Indexed& b) {
  return b.value < a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

template <class X>
__device__ inline X warp_sum(X x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ inline double warp_max(double x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ inline Indexed warp_min_at(double x, int i) {
  Indexed best{x, i};
  for (int step = kWarp / 2; step > 0; step /= 2) {
    best = smaller(best, {__shfl_xor_sync(kAllLanes, best.value, step), __shfl_xor_sync(kAllLanes, best.index, step)});
  }
  return best;
}

// A warp as a team (core/team.h) for up to 32 numbers: shuffles, and no barrier of the block. A shuffle alone orders no
// memory.
class WarpTeam {
 public:
  static constexpr bool kOneEach = true;

  __device__ int rank() const { return lane(); }
  __device__ int size() const { return kWarp; }
  __device__ void barrier() const { __syncwarp(); }
  __device__ double from(int i, double x) const { return __shfl_sync(kAllLanes, x, i); }

  __device__ Order order(bool flag) const {
    const unsigned all = __ballot_sync(kAllLanes, flag);
    __syncwarp();
    return {__popc(all & ((1u << lane()) - 1u)), __popc(all)};
  }

  __device__ double max(double x) const {
    x = warp_max(x);
    __syncwarp();
    return x;
  }

  __device__ Indexed min_at(double x, int i) const {
    const Indexed best = warp_min_at(x, i);
    __syncwarp();
    return best;
  }
};

// A block as a team. The number of threads must be a multiple of the warp's.
class BlockTeam {
 public:
  static constexpr bool kOneEach = false;

  struct Scratch {
    double value[kWarp];
    int index[kWarp];
  };

  __device__ explicit BlockTeam(Scratch* scratch) : scratch_(scratch) {}

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ int lane() const { return cuda::lane(); }
  __device__ int lanes() const { return kWarp; }
  __device__ int group() const { return warp(); }
  __device__ int groups() const { return warps(); }
  __device__ void barrier() const { __syncthreads(); }

  __device__ int sum(int n) const {
    n = warp_sum(n);
    if (lane() == 0) scratch_->index[warp()] = n;
    __syncthreads();
    n = 0;
    for (int w = 0; w < warps(); ++w) n += scratch_->index[w];
    __syncthreads();
    return n;
  }

  __device__ double max(double x) const {
    x = warp_max(x);
    if (lane() == 0) scratch_->value[warp()] = x;
    __syncthreads();
    for (int w = 0; w < warps(); ++w) x = fmax(x, scratch_->value[w]);
    __syncthreads();
    return x;
  }

  __device__ Indexed min_at(double x, int i) const {
    Indexed best = warp_min_at(x, i);
    if (lane() == 0) {
      scratch_->value[warp()] = best.value;
      scratch_->index[warp()] = best.index;
    }
    __syncthreads();
    for (int w = 0; w < warps(); ++w) best = smaller(best, {scratch_->value[w], scratch_->index[w]});
    __syncthreads();
    return best;
  }

 private:
  Scratch* scratch_;
};

// Whether this block is the last of the grid to come here; what the others wrote before is then visible to it. Counts
// in `arrived`, which must be zero before the launch, and uses the first word of shared memory.
__device__ inline bool is_last_block(unsigned* arrived) {
  auto* before = reinterpret_cast<unsigned*>(gem_fast_shared);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *before = atomicAdd(arrived, 1u);
  __syncthreads();
  const bool last = *before == gridDim.x - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace gem_fast::cuda
