// The dual of GEM (paper, Eq. 11), one problem, on the host or on the device:
//
//     min over v   1/2 v' P v + q' v     subject to   v >= lower,      P (t, t) positive semidefinite
//
// With u = v - lower it becomes a non-negative QP. For P = G G^T and q = G g the slope of u_j is
//
//     w_j = (P u + c)_j = g_j . (g + G^T v),       c = q + lower * P 1,
//
// the inner product of task j's gradient with the projected gradient: w_j < 0 is a violated constraint.
//
// Method. An active set F holds the tasks with u_j > 0; a Cholesky factor of P_FF is kept. First F is guessed by
// exchanging blocks of constraints. Then it is corrected one constraint at a time: the most violated enters;
// where the minimiser over F has a negative part, u moves as far as it stays feasible and what reached zero
// leaves. Each correction lowers the objective, so no set comes back, whatever the rank of P; one that raises it,
// because P_FF is singular to rounding, is taken back.
//
// Scale. The iterates keep the problem's own units (a Cholesky factor does not care about the scale of rows); only
// comparisons are made in units of gradient length: w_j / |g_j| and u_j |g_j|, with |g_j| = sqrt(P_jj). Rows
// whose norms differ by twenty orders of magnitude are thus treated alike.
//
// Nothing is allocated: the caller brings a workspace. All threads of the team take the same branches.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/status.h"
#include "core/team.h"
#include "core/tolerances.h"

namespace gem_fast {

struct NnqpProblem {
  const double* P;  // (t, t), symmetric, rows of length t
  const double* q;  // (t,)
  int t;
  double lower;
  double ridge;  // added to P's diagonal
};

struct NnqpBatch {
  const double* P;  // `count` problems, or one that all share when `shared`
  const double* q;  // (count, t)
  int64_t count;
  int64_t t;
  bool shared;
  double lower;
  double ridge;

  GEM_FAST_HD NnqpProblem operator[](int64_t b) const {
    return {P + (shared ? 0 : b * t * t), q + b * t, static_cast<int>(t), lower, ridge};
  }
};

struct NnqpAnswer {
  int32_t status;
  // Largest |min(u_j |g_j|, w_j / |g_j|)| relative to the largest |q_j| / |g_j| and |v_j| |g_j|: zero exactly at
  // a KKT point, and free of units.
  double residual;
  int iterations;
};

// Doubles and ints of workspace for one problem with t constraints.
GEM_FAST_HD constexpr int64_t nnqp_doubles(int64_t t) { return t * (t + 1) / 2 + 8 * t; }
GEM_FAST_HD constexpr int64_t nnqp_ints(int64_t t) { return 3 * t; }

template <class Team>
class Nnqp {
 public:
  GEM_FAST_HD Nnqp(const Team& team, const NnqpProblem& problem, double* doubles, int* ints)
      : team_(team), in_(problem), t_(problem.t) {
    auto take = [&doubles](int64_t n) {
      double* here = doubles;
      doubles += n;
      return here;
    };
    factor_ = take(static_cast<int64_t>(t_) * (t_ + 1) / 2);
    inverse_diagonal_ = take(t_);
    y_ = take(t_);
    z_ = take(t_);
    u_ = take(t_);
    w_ = take(t_);
    c_ = take(t_);
    norm_ = take(t_);
    kept_u_ = take(t_);
    active_ = ints;
    place_ = ints + t_;
    kept_active_ = ints + 2 * t_;
  }

  GEM_FAST_INLINE GEM_FAST_HD NnqpAnswer solve(double* v) {
    if (!prepare()) {
      each(t_, [&](int i) { v[i] = 0.0; });
      return {kNonFinite, HUGE_VAL, 0};
    }
    const int iterations = constraint_violated() ? run() : 0;
    // Units so large that a multiplier is not a finite number: no answer, rather than one with infinities in it.
    const bool overflow = largest([&](int i) { return (in_.lower + u_[i]) * 0.0 == 0.0 ? 0.0 : 1.0; }) != 0.0;
    each(t_, [&](int i) { v[i] = overflow ? 0.0 : in_.lower + u_[i]; });
    const double residual = overflow ? HUGE_VAL : this->residual();
    return {residual <= kAcceptedResidual ? kSolved : kInaccurate, residual, iterations};
  }

 private:
  // ---- the team's loops -----------------------------------------------------------------------------------
  template <class F>
  GEM_FAST_INLINE GEM_FAST_HD void each(int n, F f) {
    for (int i = team_.rank(); i < n; i += team_.size()) f(i);
    team_.barrier();
  }

  template <class F>
  GEM_FAST_INLINE GEM_FAST_HD double largest(F f) {
    double best = 0.0;
    for (int i = team_.rank(); i < t_; i += team_.size()) best = fmax(best, f(i));
    return team_.max(best);
  }

  template <class F>
  GEM_FAST_INLINE GEM_FAST_HD Indexed smallest(F f) {
    Indexed best{HUGE_VAL, -1};
    for (int i = team_.rank(); i < t_; i += team_.size()) {
      const double value = f(i);
      if (value < best.value) best = {value, i};
    }
    return team_.min_at(best.value, best.index);
  }

  // ---- the problem ----------------------------------------------------------------------------------------
  GEM_FAST_INLINE GEM_FAST_HD double P(int i, int j) const {
    return in_.P[static_cast<int64_t>(i) * t_ + j] + (i == j ? in_.ridge : 0.0);
  }

  // A row without length (or, in a P that is no Gramian, with a negative one) never enters the active set.
  GEM_FAST_INLINE GEM_FAST_HD double slope(int i) const { return norm_[i] > 0.0 ? w_[i] / norm_[i] : 0.0; }

  // w = P x + c for an x that is zero outside the active set and given by place in it.
  GEM_FAST_INLINE GEM_FAST_HD void slopes_at(const double* x) {
    each(t_, [&](int i) { w_[i] = c_[i]; });
    for (int f = 0; f < size_; ++f) {
      const int j = active_[f];
      const double s = x[f];
      const double* row = in_.P + static_cast<int64_t>(j) * t_;
      for (int i = team_.rank(); i < t_; i += team_.size()) w_[i] += row[i] * s;
    }
    team_.barrier();
    if (in_.ridge != 0.0) {
      each(size_, [&](int f) { w_[active_[f]] += in_.ridge * x[f]; });
    }
  }

  GEM_FAST_INLINE GEM_FAST_HD bool prepare() {
    const double lower = in_.lower;
    each(t_, [&](int i) {
      const double* row = in_.P + static_cast<int64_t>(i) * t_;
      double sum = in_.ridge;
      for (int j = 0; j < t_; ++j) sum += row[j];
      const double diagonal = row[i] + in_.ridge;
      norm_[i] = diagonal > 0.0 ? sqrt(diagonal) : 0.0;
      c_[i] = in_.q[i] + (lower != 0.0 ? lower * sum : 0.0 * sum);
      w_[i] = c_[i];
      u_[i] = 0.0;
      place_[i] = kInactive;
    });
    // c has a NaN or an infinity when P or q has one; 0 * x is 0 for every finite x and NaN otherwise.
    const double bad = largest([&](int i) { return c_[i] * 0.0 == 0.0 ? 0.0 : 1.0; });
    size_ = 0;
    input_scale_ =
        largest([&](int i) { return norm_[i] > 0.0 ? fmax(fabs(in_.q[i]) / norm_[i], fabs(lower) * norm_[i]) : 0.0; });
    return bad == 0.0;
  }

  GEM_FAST_INLINE GEM_FAST_HD double scale() {
    return fmax(input_scale_, largest([&](int i) { return u_[i] * norm_[i]; }));
  }

  GEM_FAST_INLINE GEM_FAST_HD bool constraint_violated() {
    return smallest([&](int i) { return slope(i); }).value < -kEnterTolerance * input_scale_;
  }

  GEM_FAST_INLINE GEM_FAST_HD double residual() {
    slopes_at_u();
    const double lower = in_.lower;
    const double reference = largest([&](int i) {
      return fmax(fabs(in_.q[i]) * (norm_[i] > 0.0 ? 1.0 / norm_[i] : 0.0), fabs(lower + u_[i]) * norm_[i]);
    });
    const double gap = largest([&](int i) {
      if (!(fabs(w_[i]) < HUGE_VAL)) return HUGE_VAL;  // fmin and fmax would pass a NaN over
      if (norm_[i] == 0.0) return P(i, i) < 0.0 || w_[i] < 0.0 ? HUGE_VAL : 0.0;
      return fabs(fmin(u_[i] * norm_[i], w_[i] / norm_[i]));
    });
    return gap == 0.0 ? 0.0 : reference < HUGE_VAL ? gap / reference : HUGE_VAL;
  }

  GEM_FAST_INLINE GEM_FAST_HD void slopes_at_u() {
    each(size_, [&](int f) { z_[f] = u_[active_[f]]; });
    slopes_at(z_);
  }

  // ---- the factor L of P_FF, lower triangular, packed by columns, and y with L y = -c_F ---------------------
  GEM_FAST_INLINE GEM_FAST_HD double* column(int c) {
    return factor_ + static_cast<int64_t>(c) * t_ - static_cast<int64_t>(c) * (c + 1) / 2;
  }

  // Appends constraint j. False, and the active set as it was, when the squared sine of the angle between its
  // gradient and the span of the active ones is not above `least`; row k of the factor then holds L^-1 P_Fj.
  GEM_FAST_INLINE GEM_FAST_HD bool append(int j, double least) {
    const int k = size_;
    each(k, [&](int f) { z_[f] = in_.P[static_cast<int64_t>(active_[f]) * t_ + j]; });
    const double diagonal = P(j, j);
    double pivot = diagonal;
    double y = -c_[j];
    for (int c = 0; c < k; ++c) {
      double* below = column(c);
      const double l = z_[c] * inverse_diagonal_[c];
      pivot -= l * l;
      y -= l * y_[c];
      for (int f = c + 1 + team_.rank(); f < k; f += team_.size()) z_[f] -= below[f] * l;
      if (team_.rank() == 0) below[k] = l;
      team_.barrier();
    }
    if (!(pivot > least * diagonal)) return false;
    const double root = sqrt(pivot);
    if (team_.rank() == 0) {
      column(k)[k] = root;
      inverse_diagonal_[k] = 1.0 / root;
      y_[k] = y / root;
      active_[k] = j;
      place_[j] = k;
    }
    size_ = k + 1;
    team_.barrier();
    return true;
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
      const double h = hypot(a, b);
      const double cosine = a / h;
      const double sine = b / h;
      const double next_y = y_[c + 1];
      team_.barrier();
      // New column c is the rotated pair, moved up by one row; the other half stays in the right column, whose
      // first remaining row is old row c+2.
      rotate(left, right, c, k, cosine, sine);
      if (team_.rank() == 0) {
        left[c] = h;
        inverse_diagonal_[c] = 1.0 / h;
        y_[c] = cosine * carried_y + sine * next_y;
      }
      carried_y = cosine * next_y - sine * carried_y;
      team_.barrier();
    }
    size_ = k;
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

  // z = minimiser over the active set: L^T z = y.
  GEM_FAST_INLINE GEM_FAST_HD void minimise() {
    each(size_, [&](int f) { z_[f] = y_[f]; });
    back_substitute();
  }

  // z <- L^-T z.
  GEM_FAST_INLINE GEM_FAST_HD void back_substitute() {
    for (int c = size_ - 1; c >= 0; --c) {
      const double x = z_[c] * inverse_diagonal_[c];
      team_.barrier();
      for (int f = team_.rank(); f < c; f += team_.size()) z_[f] -= column(f)[c] * x;
      if (team_.rank() == 0) z_[c] = x;
      team_.barrier();
    }
  }

  // ---- the method -----------------------------------------------------------------------------------------
  GEM_FAST_INLINE GEM_FAST_HD void activate_where(bool first) {
    // The wanted set is read off before the factor is rebuilt, because rebuilding overwrites the places.
    const double entered = -kEnterTolerance * input_scale_;
    each(t_, [&](int i) {
      const int f = place_[i];
      const bool wanted = first || f < 0 ? slope(i) < entered : z_[f] > 0.0;
      u_[i] = wanted ? 1.0 : 0.0;
    });
    each(t_, [&](int i) { place_[i] = kInactive; });
    size_ = 0;
    for (int j = 0; j < t_; ++j) {
      if (u_[j] != 0.0) append(j, kGuessPivot);
    }
  }

  // Block exchanges: every violated constraint enters and every negative multiplier leaves, as long as
  // their number goes down. Leaves the factor of the guessed set.
  GEM_FAST_INLINE GEM_FAST_HD int guess() {
    int fewest = t_ + 1;
    int round = 0;
    for (; round < kGuessRounds; ++round) {
      activate_where(round == 0);
      minimise();
      slopes_at(z_);
      const double entered = -kEnterTolerance * input_scale_;
      const int wrong = count([&](int i) {
        const int f = place_[i];
        return f < 0 ? slope(i) < entered : z_[f] <= 0.0;
      });
      if (wrong == 0 || wrong >= fewest) break;
      fewest = wrong;
    }
    return round;
  }

  template <class F>
  GEM_FAST_INLINE GEM_FAST_HD int count(F f) {
    // Every thread counts the same t flags: cheaper than one more reduction, and uniform by construction.
    int n = 0;
    for (int i = 0; i < t_; ++i) n += f(i) ? 1 : 0;
    team_.barrier();
    return n;
  }

  GEM_FAST_INLINE GEM_FAST_HD int run() {
    int iterations = guess();
    minimise();
    each(t_, [&](int i) {
      const int f = place_[i];
      u_[i] = f < 0 ? 0.0 : fmax(z_[f], 0.0);
    });
    const int limit = kIterationsAtLeast + kIterationsPerConstraint * t_;
    descend(kNone);
    double lowest = HUGE_VAL;
    Indexed worst{0.0, kNone};
    for (bool moved = true;; ++iterations) {
      slopes_at_u();
      if (moved) {
        const double value = objective();
        const double unit = scale();
        if (value > lowest + kObjectiveRounding * unit * unit) {
          go_back();
          refuse(worst.index);
          slopes_at_u();
        } else {
          lowest = fmin(lowest, value);
          keep();
        }
      }
      worst = smallest([&](int i) { return place_[i] == kInactive ? slope(i) : 0.0; });
      if (iterations >= limit || !(worst.value < -kEnterTolerance * scale())) break;
      moved = enter(worst.index) && descend(worst.index);
      if (!moved) refuse(worst.index);
    }
    return iterations;
  }

  // 1/2 u' P u + c' u, for w = P u + c. Every thread sums the same t terms, as in `count`.
  GEM_FAST_INLINE GEM_FAST_HD double objective() {
    double sum = 0.0;
    for (int i = 0; i < t_; ++i) sum += 0.5 * u_[i] * (w_[i] + c_[i]);
    team_.barrier();
    return sum;
  }

  // u is the best so far: constraints that were refused because it had not moved may be tried again.
  GEM_FAST_INLINE GEM_FAST_HD void keep() {
    kept_size_ = size_;
    each(size_, [&](int f) { kept_active_[f] = active_[f]; });
    each(t_, [&](int i) {
      kept_u_[i] = u_[i];
      if (place_[i] == kRefused) place_[i] = kInactive;
    });
  }

  // u as it was kept, with its factor. What float64 cannot factor a second time stays out.
  GEM_FAST_INLINE GEM_FAST_HD void go_back() {
    each(t_, [&](int i) {
      u_[i] = kept_u_[i];
      if (place_[i] != kRefused) place_[i] = kInactive;
    });
    size_ = 0;
    for (int f = 0; f < kept_size_; ++f) {
      const int j = kept_active_[f];
      if (!append(j, 0.0)) {
        if (team_.rank() == 0) u_[j] = 0.0;
        team_.barrier();
      }
    }
  }

  GEM_FAST_INLINE GEM_FAST_HD bool enter(int j) { return append(j, kPivotFloor * (size_ + 1)) || exchange(j); }

  // The gradient of the violated constraint j is a combination of the active ones, g_j = sum_f a_f g_f. Along
  // (u_F - s a, u_j + s) the objective falls without curvature, until a multiplier is used up: that constraint leaves
  // and j takes its place. False, and nothing changed, where none is used up or the place is no better.
  GEM_FAST_INLINE GEM_FAST_HD bool exchange(int j) {
    const int k = size_;
    each(k, [&](int f) { z_[f] = column(f)[k]; });
    back_substitute();
    const double length = norm_[j];
    const Indexed used_up = smallest([&](int i) {
      const int f = place_[i];
      return f >= 0 && z_[f] * norm_[i] > kCombination * length ? u_[i] / z_[f] : HUGE_VAL;
    });
    if (used_up.index < 0) return false;
    each(t_, [&](int i) {
      w_[i] = u_[i];  // w is computed anew before it is read again
      const int f = place_[i];
      if (f >= 0) u_[i] = i == used_up.index ? 0.0 : fmax(u_[i] - used_up.value * z_[f], 0.0);
      if (i == j) u_[i] = used_up.value;
    });
    remove(place_[used_up.index]);
    if (append(j, kPivotFloor * (size_ + 1))) return true;
    append(used_up.index, 0.0);
    each(t_, [&](int i) { u_[i] = w_[i]; });
    return false;
  }

  // A constraint is left alone, until u has moved, when its violation cannot be told from rounding: its gradient is a
  // combination of the active ones as far as float64 resolves (by Cauchy-Schwarz the violation is then at most
  // sqrt(pivot) |g~|), or its multiplier would not grow.
  GEM_FAST_INLINE GEM_FAST_HD void refuse(int j) {
    if (team_.rank() == 0) place_[j] = kRefused;
    team_.barrier();
  }

  GEM_FAST_INLINE GEM_FAST_HD void drop_zeros() {
    for (int f = size_ - 1; f >= 0; --f) {
      const bool gone = u_[active_[f]] <= 0.0;
      team_.barrier();
      if (gone) remove(f);
    }
  }

  // Moves u to the minimiser over the active set, dropping what would become negative. False, and u as it was, when
  // the constraint that just entered would be the first to go: its violation was rounding.
  GEM_FAST_INLINE GEM_FAST_HD bool descend(int entered) {
    while (size_ > 0) {
      minimise();
      const Indexed nearest = smallest([&](int i) {
        const int f = place_[i];
        return f >= 0 && z_[f] <= 0.0 ? u_[i] / (u_[i] - z_[f]) : HUGE_VAL;
      });
      if (nearest.index < 0) break;
      if (nearest.index == entered && u_[entered] == 0.0) {
        remove(place_[entered]);
        return false;
      }
      const double step = nearest.value;
      each(t_, [&](int i) {
        const int f = place_[i];
        if (f < 0) return;
        // The nearest one leaves even where the product rounds to less than u: the loop ends for any input.
        const bool used_up = i == nearest.index || (z_[f] <= 0.0 && u_[i] <= step * (u_[i] - z_[f]));
        u_[i] = used_up ? 0.0 : u_[i] + step * (z_[f] - u_[i]);
      });
      drop_zeros();
    }
    each(size_, [&](int f) { u_[active_[f]] = z_[f]; });
    return true;
  }

  static constexpr int kNone = -1;
  static constexpr int kInactive = -1;
  static constexpr int kRefused = -2;

  const Team team_;
  const NnqpProblem in_;
  const int t_;
  int size_ = 0;  // |F|
  int kept_size_ = 0;
  double input_scale_ = 0.0;  // largest |q_j| / |g_j| and |lower| |g_j|
  double* factor_;
  double* inverse_diagonal_;
  double* y_;
  double* z_;  // by place in F
  double* u_;  // by constraint
  double* w_;  // by constraint
  double* c_;
  double* norm_;
  double* kept_u_;    // the best u so far
  int* kept_active_;  // and its active set
  int* active_;       // constraint at each place of F
  int* place_;        // place of each constraint in F, or kInactive or kRefused
};

}  // namespace gem_fast
