// What the threads of a block share: memory, warps, and a team for the algorithms of core/.
//
// All shared memory is dynamic: a launch names its bytes and a kernel lays them out.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "core/team.h"

extern __shared__ __align__(16) unsigned char gem_fast_shared[];

namespace gem_fast::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warps() { return (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp; }

// A block as a team (core/team.h). The number of threads must be a multiple of the warp's.
class BlockTeam {
 public:
  struct Scratch {
    double value[kWarp];
    int index[kWarp];
  };

  __device__ explicit BlockTeam(Scratch* scratch) : scratch_(scratch) {}

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ void barrier() const { __syncthreads(); }

  __device__ double max(double x) const {
    for (int step = kWarp / 2; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, step));
    if (lane() == 0) scratch_->value[warp()] = x;
    __syncthreads();
    for (int w = 0; w < warps(); ++w) x = fmax(x, scratch_->value[w]);
    __syncthreads();
    return x;
  }

  __device__ Indexed min_at(double x, int i) const {
    Indexed best{x, i};
    for (int step = kWarp / 2; step > 0; step /= 2) {
      best =
          smaller(best, {__shfl_xor_sync(kAllLanes, best.value, step), __shfl_xor_sync(kAllLanes, best.index, step)});
    }
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
  // Of equal values the smaller index, as one thread going through them in order would find it.
  __device__ static Indexed smaller(const Indexed& a, const Indexed& b) {
    return b.value < a.value || (b.value == a.value && b.index < a.index) ? b : a;
  }

  Scratch* scratch_;
};

}  // namespace gem_fast::cuda
