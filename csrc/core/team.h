// A team is the set of threads that solves one problem together. An algorithm written for a team runs
// unchanged on one CPU thread (Solo) and on a warp or a block of CUDA threads.
//
//   rank(), size()        this thread's place in the team
//   kOneEach              whether there are at least as many threads as numbers to share out
//   barrier()             everything the team wrote before it is visible to the whole team after it
//   max(x), min_at(x, i)  reductions; every thread gets the result
//
// Teams with kOneEach have at most kMostThreads, from(i, x), which is the x of thread i, and order(flag), see Order.
// The others have sum(n); and, where they are several threads, lane(), lanes(), group() and groups(): the same threads
// as a rectangle.
#pragma once

#include <cmath>

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

// Before a loop whose body is to stand in a kernel's code once, or as often as it runs, or n times.
#if defined(__CUDACC__)
#define GEM_FAST_PRAGMA(x) _Pragma(#x)
#define GEM_FAST_KEEP_LOOP _Pragma("unroll 1")
#define GEM_FAST_UNROLL _Pragma("unroll")
#define GEM_FAST_UNROLL_BY(n) GEM_FAST_PRAGMA(unroll n)
#else
#define GEM_FAST_KEEP_LOOP
#define GEM_FAST_UNROLL
#define GEM_FAST_UNROLL_BY(n)
#endif

namespace gem_fast {

struct Indexed {
  double value;
  int index;
};

// Of the threads with a flag: how many come before this one, and how many there are.
struct Order {
  int before;
  int all;
};

// The most threads of a team with kOneEach.
inline constexpr int kMostThreads = 32;

struct Solo {
  static constexpr bool kOneEach = false;

  static constexpr GEM_FAST_HD int rank() { return 0; }
  static constexpr GEM_FAST_HD int size() { return 1; }
  GEM_FAST_HD void barrier() const {}
  GEM_FAST_HD double max(double x) const { return x; }
  GEM_FAST_HD Indexed min_at(double x, int i) const { return {x, i}; }
  GEM_FAST_HD int sum(int n) const { return n; }
};

// f(i) for first <= i < n, spread over the team. Those of one i are the same thread's, whatever `first` is.
template <class Team, class F>
GEM_FAST_INLINE GEM_FAST_HD void share(const Team& team, int first, int n, F f) {
  GEM_FAST_KEEP_LOOP
  for (int i = team.rank(); i < n; i += team.size()) {
    if (i >= first) f(i);
    if constexpr (Team::kOneEach) break;
  }
}

template <class F>
GEM_FAST_INLINE GEM_FAST_HD void share(const Solo&, int first, int n, F f) {
  for (int i = first; i < n; ++i) f(i);
}

// f(i) for i < n, spread over the team.
template <class Team, class F>
GEM_FAST_INLINE GEM_FAST_HD void each(const Team& team, int n, F f) {
  share(team, 0, n, f);
  team.barrier();
}

// Numbers times a factor.
struct Scaled {
  const double* x;
  double factor;
};

// Adds row(k) to `to` for first <= k < last, in this order: its elements up to n; where kLower, from k on.
template <bool kLower, class Team, class F>
GEM_FAST_INLINE GEM_FAST_HD void add_rows(const Team& team, int n, int first, int last, double* to, F row) {
  share(team, 0, n, [&](int i) {
    double sum = to[i];
    const int end = kLower && i < last ? i + 1 : last;
    GEM_FAST_UNROLL_BY(8)
    for (int k = first; k < end; ++k) {
      const Scaled scaled = row(k);
      sum += scaled.x[i] * scaled.factor;
    }
    to[i] = sum;
  });
}

template <bool kLower, class F>
GEM_FAST_INLINE GEM_FAST_HD void add_rows(const Solo&, int n, int first, int last, double* to, F row) {
  for (int k = first; k < last; ++k) {
    const Scaled scaled = row(k);
    for (int i = kLower ? k : 0; i < n; ++i) to[i] += scaled.x[i] * scaled.factor;
  }
}

// How many i < n there are with f(i).
template <class Team, class F>
GEM_FAST_INLINE GEM_FAST_HD int count(const Team& team, int n, F f) {
  if constexpr (Team::kOneEach) {
    return team.order(team.rank() < n && f(team.rank())).all;
  } else {
    int mine = 0;
    share(team, 0, n, [&](int i) { mine += f(i) ? 1 : 0; });
    return team.sum(mine);
  }
}

// The largest of 0 and f(i) for i < n.
template <class Team, class F>
GEM_FAST_INLINE GEM_FAST_HD double largest(const Team& team, int n, F f) {
  double best = 0.0;
  share(team, 0, n, [&](int i) { best = fmax(best, f(i)); });
  return team.max(best);
}

// The smallest f(i) for i < n, and the first such i; -1 where none is below infinity.
template <class Team, class F>
GEM_FAST_INLINE GEM_FAST_HD Indexed smallest(const Team& team, int n, F f) {
  Indexed best{HUGE_VAL, -1};
  share(team, 0, n, [&](int i) {
    const double value = f(i);
    if (value < best.value) best = {value, i};
  });
  return team.min_at(best.value, best.index);
}

}  // namespace gem_fast
