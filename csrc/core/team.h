// A team is the set of threads that solves one problem together. An algorithm written for a team runs
// unchanged on one CPU thread (Solo) and on a block of CUDA threads.
//
//   rank(), size()        this thread's place in the team
//   barrier()             everything the team wrote before it is visible to the whole team after it
//   max(x), min_at(x, i)  reductions; every thread gets the result
#pragma once

#if defined(__CUDACC__)
#define GEM_FAST_HD __host__ __device__
#else
#define GEM_FAST_HD
#endif

#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
#define GEM_FAST_INLINE inline __attribute__((always_inline))
#else
#define GEM_FAST_INLINE inline
#endif

namespace gem_fast {

struct Indexed {
  double value;
  int index;
};

struct Solo {
  static constexpr GEM_FAST_HD int rank() { return 0; }
  static constexpr GEM_FAST_HD int size() { return 1; }
  GEM_FAST_HD void barrier() const {}
  GEM_FAST_HD double max(double x) const { return x; }
  GEM_FAST_HD Indexed min_at(double x, int i) const { return {x, i}; }
};

}  // namespace gem_fast
