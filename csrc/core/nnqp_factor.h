// The minimiser over an active set F of constraints, for the method of nnqp.h:
//
//     z = argmin over u_F of 1/2 u_F' P_FF u_F + c_F' u_F,      so P_FF z = -c_F.
//
// A Cholesky factor P_FF = L L' and y with L y = -c_F are kept, and follow F: appending a constraint or removing one
// takes |F|^2 operations, and so does z, by L' z = y. Constraints have a place in F, in the order in which they were
// appended.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/nnqp_problem.h"
#include "core/team.h"

namespace gem_fast {

template <class Team>
class NnqpFactor {
 public:
  static constexpr int kInactive = -1;

  // What it takes of the caller's workspace.
  static GEM_FAST_HD constexpr int64_t doubles(int64_t t) { return t * (t + 1) / 2 + 3 * t; }
  static GEM_FAST_HD constexpr int64_t ints(int64_t t) { return 2 * t; }

  GEM_FAST_HD NnqpFactor(const Team& team, const NnqpProblem& problem, const double* c, double* doubles, int* ints)
      : team_(team),
        in_(problem),
        t_(problem.t),
        c_(c),
        inverse_diagonal_(doubles),
        y_(doubles + t_),
        z_(doubles + 2 * t_),
        factor_(doubles + 3 * t_),
        active_(ints),
        place_(ints + t_) {}

  GEM_FAST_INLINE GEM_FAST_HD int size() const { return size_; }
  GEM_FAST_INLINE GEM_FAST_HD int constraint(int f) const { return active_[f]; }
  // Of a constraint in F. Negative where it is not in F: then kInactive, or what the caller wrote there.
  GEM_FAST_INLINE GEM_FAST_HD int& place(int i) const { return place_[i]; }
  // By place. Valid until the next append.
  GEM_FAST_INLINE GEM_FAST_HD double& z(int f) const { return z_[f]; }

  // Before the first constraint is appended.
  GEM_FAST_INLINE GEM_FAST_HD void set_softness(double softness) { in_.softness = softness; }

  // F is empty; the caller sees to the places.
  GEM_FAST_INLINE GEM_FAST_HD void clear() { size_ = 0; }

  // Appends constraint j. False, and the active set as it was, when the squared sine of the angle between its
  // gradient and the span of the active ones is not above `least`; row |F| of the factor then holds L^-1 P_Fj.
  GEM_FAST_INLINE GEM_FAST_HD bool append(int j, double least) {
    const int k = size_;
    each(team_, k, [&](int f) { z_[f] = in_.P[static_cast<int64_t>(active_[f]) * t_ + j]; });
    const double diagonal = in_.entry(j, j);
    double pivot = diagonal;
    double y = -c_[j];
    for (int c = 0; c < k; ++c) {
      double* below = column(c);
      const double l = z_[c] * inverse_diagonal_[c];
      pivot -= l * l;
      y -= l * y_[c];
      share(team_, c + 1, k, [&](int f) { z_[f] -= below[f] * l; });
      if (team_.rank() == 0) below[k] = l;
      team_.barrier();
    }
    if (!(pivot > least * diagonal)) return false;
    const double inverse = inverse_root(pivot);
    if (team_.rank() == 0) {
      column(k)[k] = pivot * inverse;
      inverse_diagonal_[k] = inverse;
      y_[k] = y * inverse;
      active_[k] = j;
      place_[j] = k;
    }
    size_ = k + 1;
    team_.barrier();
    return true;
  }

  // F = the constraints i for which wanted(i), appended one after the other; those that `append` turns down are left
  // out. No constraint may have a place.
  template <class F>
  GEM_FAST_INLINE GEM_FAST_HD void append_all(double least, F wanted) {
    clear();
    if constexpr (std::is_same_v<Team, Solo>) {
      for (int j = 0; j < t_; ++j) {
        if (wanted(j)) append(j, least);
      }
    } else {
      int n = 0;
      int done = 0;
      if constexpr (Team::kOneEach) {
        const int i = team_.rank();
        const bool mine = i < t_ && wanted(i);
        const Order order = team_.order(mine);
        if (mine) active_[order.before] = i;
        team_.barrier();
        n = order.all;
        done = factor_by_rows(n, least);
      } else {
        n = count(team_, t_, wanted);
        each(team_, t_, [&](int i) {
          if (!wanted(i)) return;
          int before = 0;
          for (int j = 0; j < i; ++j) before += wanted(j) ? 1 : 0;
          active_[before] = i;
        });
        done = factor_all(n, least);
      }
      // What is turned down ends the work on all of them at once.
      for (; done < n; ++done) append(active_[done], least);
    }
  }

  // Takes the constraint at place r out: Givens rotations make the factor triangular again.
  GEM_FAST_INLINE GEM_FAST_HD void remove(int r) {
    const int k = size_ - 1;
    const int j = active_[r];
    team_.barrier();
    if (team_.rank() == 0) {
      place_[j] = kInactive;
      for (int f = r; f < k; ++f) {
        active_[f] = active_[f + 1];
        place_[active_[f]] = f;
      }
    }
    for (int c = 0; c < r; ++c) {
      double* col = column(c);
      shift_up(col, r, k);
    }
    // Row r is gone; column c (>= r) of the remaining matrix has rows c+1 .. k in old numbering, one above the
    // diagonal in the new one. Rotating it with its right neighbour clears that entry.
    double carried_y = y_[r];
    team_.barrier();
    for (int c = r; c < k; ++c) {
      double* left = column(c);       // old column c: entries at old rows c+1 .. k are still wanted
      double* right = column(c + 1);  // old column c+1: entries at old rows c+1 .. k
      const double a = left[c + 1];
      const double b = right[c + 1];
      const double squared = a * a + b * b;
      const double inverse = inverse_root(squared);
      const double cosine = a * inverse;
      const double sine = b * inverse;
      const double next_y = y_[c + 1];
      team_.barrier();
      // New column c is the rotated pair, moved up by one row; the other half stays in the right column, whose
      // first remaining row is old row c+2.
      rotate(left, right, c, k, cosine, sine);
      if (team_.rank() == 0) {
        left[c] = squared * inverse;
        inverse_diagonal_[c] = inverse;
        y_[c] = cosine * carried_y + sine * next_y;
      }
      carried_y = cosine * next_y - sine * carried_y;
      team_.barrier();
    }
    size_ = k;
  }

  // z = the minimiser over F.
  GEM_FAST_INLINE GEM_FAST_HD void minimise() {
    each(team_, size_, [&](int f) { z_[f] = y_[f]; });
    back_substitute();
  }

  // The largest |L^-1 r| over all r with |r_i| <= |g_i|: what the minimiser does to errors. The factor is used up: only
  // the constraints and their places are left, and z.
  GEM_FAST_INLINE GEM_FAST_HD double amplification(const double* norm) {
    if constexpr (Team::kOneEach) {
      add_inverse_by_rows(norm);
    } else {
      add_inverse(norm);
    }
    const int k = size_;
    double sum = 0.0;
    for (int f = 0; f < k; ++f) sum += y_[f] * y_[f];
    team_.barrier();
    return sqrt(sum);
  }

  // z = P_FF^-1 P_Fj for the constraint j that `append` has just turned down: g_j = sum over f of z_f g_f.
  GEM_FAST_INLINE GEM_FAST_HD void combine_rejected() {
    each(team_, size_, [&](int f) { z_[f] = column(f)[size_]; });
    back_substitute();
  }

 private:
  // L is packed by columns, the diagonal first: column(c)[r] is entry (r, c).
  GEM_FAST_INLINE GEM_FAST_HD double* column(int c) const {
    return factor_ + static_cast<int64_t>(c) * t_ - static_cast<int64_t>(c) * (c + 1) / 2;
  }

  GEM_FAST_INLINE GEM_FAST_HD static double inverse_root(double x) {
#if defined(__CUDA_ARCH__)
    return rsqrt(x);
#else
    return 1.0 / sqrt(x);
#endif
  }

  // y = the sums of the rows of |L^-1| D, where D has the norms.
  GEM_FAST_INLINE GEM_FAST_HD void add_inverse(const double* norm) {
    // L^-1 takes the place of L from the last column on.
    const int k = size_;
    team_.barrier();
    for (int c = k - 1; c >= 0; --c) {
      double* inverse = column(c);
      share(team_, c + 1, k, [&](int f) { z_[f] = 0.0; });
      add_rows<true>(team_, k, c + 1, k, z_, [&](int j) { return Scaled{column(j), inverse[j]}; });
      team_.barrier();
      const double diagonal = inverse_diagonal_[c];
      const double length = norm[active_[c]];
      share(team_, c, k, [&](int f) {
        inverse[f] = f == c ? diagonal : -z_[f] * diagonal;
        y_[f] = (f == c ? 0.0 : y_[f]) + fabs(inverse[f]) * length;
      });
      team_.barrier();
    }
  }

  // The same. Each thread has a column of L^-1, row by row; their products with the norms take the place of L.
  GEM_FAST_INLINE GEM_FAST_HD void add_inverse_by_rows(const double* norm) {
    const int k = size_;
    const int f = team_.rank();
    const double length = f < k ? norm[active_[f]] : 0.0;
    double rest[kMostThreads];
    GEM_FAST_UNROLL
    for (int j = 0; j < kMostThreads; ++j) rest[j] = j == f ? 1.0 : 0.0;
    team_.barrier();
    GEM_FAST_KEEP_LOOP
    for (int c = 0; c < k; ++c) {
      const double x = rest[0] * inverse_diagonal_[c];
      eliminate(rest, x, column(c) + c + 1, k - c - 1);
      if (f <= c) column(f)[c] = fabs(x) * length;
      team_.barrier();
    }
    double sum = 0.0;
    GEM_FAST_UNROLL_BY(8)
    for (int j = 0; j < k; ++j) sum += j <= f && f < k ? column(j)[f] : 0.0;
    if (f < k) y_[f] = sum;
    team_.barrier();
  }

  // rest[j] <- rest[j + 1] - x * below[j] for j < count: a step of an elimination whose next number is rest[0]. The
  // indexes are constants, so that `rest` stays in registers.
  GEM_FAST_INLINE GEM_FAST_HD static void eliminate(double (&rest)[kMostThreads], double x, const double* below,
                                                    int count) {
    constexpr int kAtOnce = 4;
    GEM_FAST_UNROLL
    for (int first = 0; first < kMostThreads; first += kAtOnce) {
      if (first >= count) break;
      GEM_FAST_UNROLL
      for (int j = first; j < first + kAtOnce; ++j) {
        if (j + 1 < kMostThreads && j < count) rest[j] = rest[j + 1] - x * below[j];
      }
    }
  }

  // The factor of the constraints active_[0 .. n), each of its columns by the whole team, and y; the arithmetic is that
  // of `append`. Returns how many there are before the first that `append` would turn down: these are F then.
  GEM_FAST_INLINE GEM_FAST_HD int factor_all(int n, double least) {
    below_diagonal(0, n, [&](int r, int s) { column(s)[r] = in_.entry(active_[r], active_[s]); });
    each(team_, n, [&](int f) {
      z_[f] = in_.entry(active_[f], active_[f]);
      column(f)[f] = z_[f];
      y_[f] = -c_[active_[f]];
    });
    for (int c = 0; c < n; ++c) {
      const double* mine = column(c);
      const double pivot = mine[c];
      if (!(pivot > least * z_[c])) break;
      const double inverse = inverse_root(pivot);
      if (team_.rank() == 0) {
        inverse_diagonal_[c] = inverse;
        place_[active_[c]] = c;
      }
      const double y = y_[c] * inverse;
      share(team_, c + 1, n, [&](int f) {
        const double l = mine[f] * inverse;
        y_[f] -= l * y;
        column(f)[f] -= l * l;
      });
      below_diagonal(c + 1, n, [&](int r, int s) { column(s)[r] -= (mine[r] * inverse) * (mine[s] * inverse); });
      size_ = c + 1;
      team_.barrier();
    }
    // Columns take their inverse roots in the end, so that there is one barrier for each above.
    below_diagonal(0, size_, [&](int r, int s) { column(s)[r] *= inverse_diagonal_[s]; });
    each(team_, size_, [&](int f) {
      column(f)[f] *= inverse_diagonal_[f];
      y_[f] *= inverse_diagonal_[f];
    });
    return size_;
  }

  // The same. Each thread has its row of what is left in registers.
  GEM_FAST_INLINE GEM_FAST_HD int factor_by_rows(int n, double least) {
    const int f = team_.rank();
    const bool mine = f < n;
    const int i = mine ? active_[f] : 0;
    double rest[kMostThreads];
    GEM_FAST_UNROLL
    for (int j = 0; j < kMostThreads; ++j) rest[j] = mine && j < n ? in_.entry(i, active_[j]) : 0.0;
    const double diagonal = mine ? in_.entry(i, i) : 0.0;
    double y = mine ? -c_[i] : 0.0;
    GEM_FAST_KEEP_LOOP
    for (int c = 0; c < n; ++c) {
      const double pivot = team_.from(c, rest[0]);
      if (!(pivot > least * team_.from(c, diagonal))) break;
      const double inverse = inverse_root(pivot);
      const double l = rest[0] * inverse;
      const double y_c = team_.from(c, y) * inverse;
      if (f == c) {
        inverse_diagonal_[c] = inverse;
        place_[i] = c;
        y_[c] = y_c;
      }
      if (f >= c && mine) column(c)[f] = l;
      y -= l * y_c;
      team_.barrier();
      eliminate(rest, l, column(c) + c + 1, n - c - 1);
      size_ = c + 1;
    }
    return size_;
  }

  // f(r, s) for first <= s < r < n, spread over a team that is a rectangle.
  template <class F>
  GEM_FAST_INLINE GEM_FAST_HD void below_diagonal(int first, int n, F f) const {
    for (int s = first + team_.group(); s < n; s += team_.groups()) {
      for (int r = s + 1 + team_.lane(); r < n; r += team_.lanes()) f(r, s);
    }
  }

  // Entries r+1 .. k of a column move up by one row.
  GEM_FAST_INLINE GEM_FAST_HD void shift_up(double* col, int r, int k) {
    for (int first = r; first < k; first += team_.size()) {
      const int f = first + team_.rank();
      const double moved = f < k ? col[f + 1] : 0.0;
      team_.barrier();
      if (f < k) col[f] = moved;
      team_.barrier();
    }
  }

  GEM_FAST_INLINE GEM_FAST_HD void rotate(double* left, double* right, int c, int k, double cosine, double sine) {
    for (int first = c + 2; first <= k; first += team_.size()) {
      const int f = first + team_.rank();
      const double a = f <= k ? left[f] : 0.0;
      const double b = f <= k ? right[f] : 0.0;
      team_.barrier();
      if (f <= k) {
        left[f - 1] = cosine * a + sine * b;
        right[f] = cosine * b - sine * a;
      }
      team_.barrier();
    }
  }

  // z <- L^-T z.
  GEM_FAST_INLINE GEM_FAST_HD void back_substitute() {
    if constexpr (Team::kOneEach) {
      const int f = team_.rank();
      double z = f < size_ ? z_[f] : 0.0;
      GEM_FAST_UNROLL_BY(4)
      for (int c = size_ - 1; c >= 0; --c) {
        const double below = f < c ? column(f)[c] : 0.0;
        const double x = team_.from(c, z) * inverse_diagonal_[c];
        z = f == c ? x : z - below * x;
      }
      if (f < size_) z_[f] = z;
      team_.barrier();
    } else {
      for (int c = size_ - 1; c >= 0; --c) {
        const double x = z_[c] * inverse_diagonal_[c];
        share(team_, 0, c, [&](int f) { z_[f] -= column(f)[c] * x; });
        team_.barrier();
      }
      each(team_, size_, [&](int f) { z_[f] *= inverse_diagonal_[f]; });
    }
  }

  const Team team_;
  NnqpProblem in_;
  const int t_;
  const double* c_;
  int size_ = 0;  // |F|
  double* inverse_diagonal_;
  double* y_;
  double* z_;
  double* factor_;
  int* active_;  // constraint at each place
  int* place_;
};

}  // namespace gem_fast
