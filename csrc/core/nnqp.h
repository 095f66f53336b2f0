// The active-set method for the dual of GEM (nnqp_problem.h), one problem, on the host or on the device.
//
// With u = v - lower it is a non-negative QP. For P = G G^T and q = G g the slope of u_j is
//
//     w_j = (P u + c)_j = g_j . (g + G^T v),       c = q + lower * P 1,
//
// the inner product of task j's gradient with the projected gradient: w_j < 0 is a violated constraint.
//
// Method. The active set F holds the tasks with u_j > 0; the minimiser over F comes from a factor of P_FF that follows
// F (nnqp_factor.h). First F is guessed by exchanging blocks of constraints. Then it is corrected one constraint at a
// time: the most violated enters; where the minimiser over F has a negative part, u moves as far as it stays feasible
// and what reached zero leaves. Each correction lowers the objective, so no set comes back, whatever the rank of P; one
// that raises it, because P_FF is singular to rounding, is taken back.
//
// Scale. The iterates keep the problem's own units (a Cholesky factor does not care about the scale of rows); only
// comparisons are made in units of gradient length: w_j / |g_j| and u_j |g_j|, with |g_j| = sqrt(P_jj). Rows whose
// norms differ by twenty orders of magnitude are thus treated alike.
//
// Nothing is allocated: the caller brings a workspace. All threads of the team take the same branches.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/nnqp_factor.h"
#include "core/nnqp_problem.h"
#include "core/status.h"
#include "core/team.h"
#include "core/tolerances.h"

namespace gem_fast {

// Doubles and ints of workspace for one problem with t constraints.
GEM_FAST_HD constexpr int64_t nnqp_doubles(int64_t t) { return NnqpFactor<Solo>::doubles(t) + 6 * t; }
GEM_FAST_HD constexpr int64_t nnqp_ints(int64_t t) { return NnqpFactor<Solo>::ints(t) + t; }

template <class Team>
class Nnqp {
 public:
  GEM_FAST_HD Nnqp(const Team& team, const NnqpProblem& problem, double* doubles, int* ints)
      : team_(team),
        in_(problem),
        t_(problem.t),
        u_(doubles),
        w_(doubles + t_),
        c_(doubles + 2 * t_),
        norm_(doubles + 3 * t_),
        inverse_norm_(doubles + 4 * t_),
        kept_u_(doubles + 5 * t_),
        kept_active_(ints),
        factor_(team, problem, c_, doubles + 6 * t_, ints + t_) {}

  GEM_FAST_INLINE GEM_FAST_HD NnqpAnswer solve(double* v) {
    if (!prepare()) {
      each(team_, t_, [&](int i) { v[i] = 0.0; });
      return {kNonFinite, HUGE_VAL, 0};
    }
    const int iterations = minimise();
    const bool overflow = overflows();
    each(team_, t_, [&](int i) { v[i] = overflow ? 0.0 : in_.lower + u_[i]; });
    const double residual = overflow ? HUGE_VAL : this->residual();
    return {residual <= kAcceptedResidual ? kSolved : kInaccurate, residual, iterations};
  }

  // ---- its parts, for projection_dual.h -------------------------------------------------------------------
  // False where P or q is not finite.
  GEM_FAST_INLINE GEM_FAST_HD bool prepare() {
    const double lower = in_.lower;
    // P 1: P is symmetric, so that its rows may be added up.
    each(team_, t_, [&](int i) { c_[i] = in_.ridge; });
    add_rows<false>(team_, t_, 0, t_, c_, [&](int j) { return Scaled{in_.P + static_cast<int64_t>(j) * t_, 1.0}; });
    each(team_, t_, [&](int i) {
      const double diagonal = in_.P[static_cast<int64_t>(i) * t_ + i] + in_.ridge;
      norm_[i] = diagonal > 0.0 ? sqrt(diagonal) : 0.0;
      inverse_norm_[i] = diagonal > 0.0 ? 1.0 / norm_[i] : 0.0;
      c_[i] = in_.q[i] + (lower != 0.0 ? lower * c_[i] : 0.0 * c_[i]);
      w_[i] = c_[i];
      u_[i] = 0.0;
      factor_.place(i) = kInactive;
    });
    // c has a NaN or an infinity when P or q has one; 0 * x is 0 for every finite x and NaN otherwise.
    const int bad = count(team_, t_, [&](int i) { return c_[i] * 0.0 != 0.0; });
    input_scale_ = largest(team_, t_, [&](int i) {
      return norm_[i] > 0.0 ? fmax(fabs(in_.q[i]) * inverse_norm_[i], fabs(lower) * norm_[i]) : 0.0;
    });
    return bad == 0;
  }

  // See NnqpProblem.
  GEM_FAST_INLINE GEM_FAST_HD void set_softness(double softness) {
    in_.softness = softness;
    factor_.set_softness(softness);
  }

  // Finds u; returns how many iterations it took.
  GEM_FAST_INLINE GEM_FAST_HD int minimise() { return constraint_violated() ? run() : 0; }

  // Whether units are so large that a multiplier is not a finite number: there is no answer then, rather than one with
  // infinities in it.
  GEM_FAST_INLINE GEM_FAST_HD bool overflows() {
    return count(team_, t_, [&](int i) { return (in_.lower + u_[i]) * 0.0 != 0.0; }) > 0;
  }

  // The largest violation of the KKT conditions, in units of length: see NnqpAnswer. w is then that of u.
  GEM_FAST_INLINE GEM_FAST_HD double gap() {
    slopes_at_u();
    return largest(team_, t_, [&](int i) {
      if (!(fabs(w_[i]) < HUGE_VAL)) return HUGE_VAL;  // fmin and fmax would pass a NaN over
      if (norm_[i] == 0.0) return in_.entry(i, i) < 0.0 || w_[i] < 0.0 ? HUGE_VAL : 0.0;
      return fabs(fmin(u_[i] * norm_[i], w_[i] * inverse_norm_[i]));
    });
  }

  // By constraint: u = v - lower, w = P u + c, c = q + lower P 1 and |g_j|.
  GEM_FAST_INLINE GEM_FAST_HD double* u() { return u_; }
  GEM_FAST_INLINE GEM_FAST_HD const double* w() const { return w_; }
  GEM_FAST_INLINE GEM_FAST_HD const double* c() const { return c_; }
  GEM_FAST_INLINE GEM_FAST_HD const double* norm() const { return norm_; }
  // Of the constraints with u_j > 0.
  GEM_FAST_INLINE GEM_FAST_HD NnqpFactor<Team>& factor() { return factor_; }

 private:
  // ---- the problem ----------------------------------------------------------------------------------------
  // A row without length (or, in a P that is no Gramian, with a negative one) never enters the active set.
  GEM_FAST_INLINE GEM_FAST_HD double slope(int i) const { return norm_[i] > 0.0 ? w_[i] * inverse_norm_[i] : 0.0; }

  // w = P z + c for the z of the factor.
  GEM_FAST_INLINE GEM_FAST_HD void slopes_at_z() {
    each(team_, t_, [&](int i) { w_[i] = c_[i]; });
    add_rows<false>(team_, t_, 0, factor_.size(), w_, [&](int f) {
      return Scaled{in_.P + static_cast<int64_t>(factor_.constraint(f)) * t_, factor_.z(f)};
    });
    team_.barrier();
    if (in_.ridge != 0.0 || in_.softness != 0.0) {
      each(team_, factor_.size(), [&](int f) {
        const int i = factor_.constraint(f);
        w_[i] += in_.added(i) * factor_.z(f);
      });
    }
  }

  GEM_FAST_INLINE GEM_FAST_HD void slopes_at_u() {
    each(team_, factor_.size(), [&](int f) { factor_.z(f) = u_[factor_.constraint(f)]; });
    slopes_at_z();
  }

  GEM_FAST_INLINE GEM_FAST_HD double scale() {
    return fmax(input_scale_, largest(team_, t_, [&](int i) { return u_[i] * norm_[i]; }));
  }

  GEM_FAST_INLINE GEM_FAST_HD double residual() {
    const double gap = this->gap();
    const double lower = in_.lower;
    const double reference = largest(
        team_, t_, [&](int i) { return fmax(fabs(in_.q[i]) * inverse_norm_[i], fabs(lower + u_[i]) * norm_[i]); });
    return gap == 0.0 ? 0.0 : reference < HUGE_VAL ? gap / reference : HUGE_VAL;
  }

  GEM_FAST_INLINE GEM_FAST_HD bool constraint_violated() {
    return count(team_, t_, [&](int i) { return slope(i) < -kEnterTolerance * input_scale_; }) > 0;
  }

  // ---- the method -----------------------------------------------------------------------------------------
  GEM_FAST_INLINE GEM_FAST_HD void activate_where(bool first) {
    // The wanted set is read off before the factor is built anew, which overwrites the places.
    const double entered = -kEnterTolerance * input_scale_;
    each(team_, t_, [&](int i) {
      const int f = factor_.place(i);
      const bool wanted = first || f < 0 ? slope(i) < entered : factor_.z(f) > 0.0;
      u_[i] = wanted ? 1.0 : 0.0;
    });
    each(team_, t_, [&](int i) { factor_.place(i) = kInactive; });
    factor_.append_all(kGuessPivot, [&](int i) { return u_[i] != 0.0; });
  }

  // Block exchanges: every violated constraint enters and every negative multiplier leaves, as long as
  // their number goes down. Leaves the factor of the guessed set, and its minimiser.
  struct Guess {
    int rounds;
    bool solved;  // nothing is violated at the minimiser, and no multiplier is negative
  };
  GEM_FAST_INLINE GEM_FAST_HD Guess guess() {
    int fewest = t_ + 1;
    int round = 0;
    for (; round < kGuessRounds; ++round) {
      activate_where(round == 0);
      factor_.minimise();
      slopes_at_z();
      const double entered = -kEnterTolerance * input_scale_;
      const int wrong = count(team_, t_, [&](int i) {
        const int f = factor_.place(i);
        return f < 0 ? slope(i) < entered : factor_.z(f) <= 0.0;
      });
      if (wrong == 0) return {round, true};
      if (wrong >= fewest) break;
      fewest = wrong;
    }
    return {round, false};
  }

  GEM_FAST_INLINE GEM_FAST_HD int run() {
    const Guess guessed = guess();
    int iterations = guessed.rounds;
    each(team_, t_, [&](int i) {
      const int f = factor_.place(i);
      u_[i] = f < 0 ? 0.0 : fmax(factor_.z(f), 0.0);
    });
    if (guessed.solved) return iterations;
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
      worst = smallest(team_, t_, [&](int i) { return factor_.place(i) == kInactive ? slope(i) : 0.0; });
      if (iterations >= limit || !(worst.value < -kEnterTolerance * scale())) break;
      moved = enter(worst.index) && descend(worst.index);
      if (!moved) refuse(worst.index);
    }
    return iterations;
  }

  // 1/2 u' P u + c' u, for w = P u + c. Every thread sums the same t terms: cheaper than one more reduction.
  GEM_FAST_INLINE GEM_FAST_HD double objective() {
    double sum = 0.0;
    for (int i = 0; i < t_; ++i) sum += 0.5 * u_[i] * (w_[i] + c_[i]);
    team_.barrier();
    return sum;
  }

  // u is the best so far: constraints that were refused because it had not moved may be tried again.
  GEM_FAST_INLINE GEM_FAST_HD void keep() {
    kept_size_ = factor_.size();
    each(team_, factor_.size(), [&](int f) { kept_active_[f] = factor_.constraint(f); });
    each(team_, t_, [&](int i) {
      kept_u_[i] = u_[i];
      if (factor_.place(i) == kRefused) factor_.place(i) = kInactive;
    });
  }

  // u as it was kept, with its factor. What float64 cannot factor a second time stays out.
  GEM_FAST_INLINE GEM_FAST_HD void go_back() {
    each(team_, t_, [&](int i) {
      u_[i] = kept_u_[i];
      if (factor_.place(i) != kRefused) factor_.place(i) = kInactive;
    });
    factor_.clear();
    for (int f = 0; f < kept_size_; ++f) {
      const int j = kept_active_[f];
      if (!factor_.append(j, 0.0)) {
        if (team_.rank() == 0) u_[j] = 0.0;
        team_.barrier();
      }
    }
  }

  GEM_FAST_INLINE GEM_FAST_HD bool enter(int j) {
    return factor_.append(j, kPivotFloor * (factor_.size() + 1)) || exchange(j);
  }

  // The gradient of the violated constraint j is a combination of the active ones, g_j = sum_f a_f g_f. Along
  // (u_F - s a, u_j + s) the objective falls without curvature, until a multiplier is used up: that constraint leaves
  // and j takes its place. False, and nothing changed, where none is used up or the place is no better.
  GEM_FAST_INLINE GEM_FAST_HD bool exchange(int j) {
    factor_.combine_rejected();
    const double length = norm_[j];
    const Indexed used_up = smallest(team_, t_, [&](int i) {
      const int f = factor_.place(i);
      return f >= 0 && factor_.z(f) * norm_[i] > kCombination * length ? u_[i] / factor_.z(f) : HUGE_VAL;
    });
    if (used_up.index < 0) return false;
    each(team_, t_, [&](int i) {
      w_[i] = u_[i];  // w is computed anew before it is read again
      const int f = factor_.place(i);
      if (f >= 0) u_[i] = i == used_up.index ? 0.0 : fmax(u_[i] - used_up.value * factor_.z(f), 0.0);
      if (i == j) u_[i] = used_up.value;
    });
    factor_.remove(factor_.place(used_up.index));
    if (factor_.append(j, kPivotFloor * (factor_.size() + 1))) return true;
    factor_.append(used_up.index, 0.0);
    each(team_, t_, [&](int i) { u_[i] = w_[i]; });
    return false;
  }

  // A constraint is left alone, until u has moved, when its violation cannot be told from rounding: its gradient is a
  // combination of the active ones as far as float64 resolves (by Cauchy-Schwarz the violation is then at most
  // sqrt(pivot) |g~|), or its multiplier would not grow.
  GEM_FAST_INLINE GEM_FAST_HD void refuse(int j) {
    if (team_.rank() == 0) factor_.place(j) = kRefused;
    team_.barrier();
  }

  GEM_FAST_INLINE GEM_FAST_HD void drop_zeros() {
    for (int f = factor_.size() - 1; f >= 0; --f) {
      const bool gone = u_[factor_.constraint(f)] <= 0.0;
      team_.barrier();
      if (gone) factor_.remove(f);
    }
  }

  // Moves u to the minimiser over the active set, dropping what would become negative. False, and u as it was, when
  // the constraint that just entered would be the first to go: its violation was rounding.
  GEM_FAST_INLINE GEM_FAST_HD bool descend(int entered) {
    while (factor_.size() > 0) {
      factor_.minimise();
      const Indexed nearest = smallest(team_, t_, [&](int i) {
        const int f = factor_.place(i);
        return f >= 0 && factor_.z(f) <= 0.0 ? u_[i] / (u_[i] - factor_.z(f)) : HUGE_VAL;
      });
      if (nearest.index < 0) break;
      if (nearest.index == entered && u_[entered] == 0.0) {
        factor_.remove(factor_.place(entered));
        return false;
      }
      const double step = nearest.value;
      each(team_, t_, [&](int i) {
        const int f = factor_.place(i);
        if (f < 0) return;
        // The nearest one leaves even where the product rounds to less than u: the loop ends for any input.
        const bool used_up = i == nearest.index || (factor_.z(f) <= 0.0 && u_[i] <= step * (u_[i] - factor_.z(f)));
        u_[i] = used_up ? 0.0 : u_[i] + step * (factor_.z(f) - u_[i]);
      });
      drop_zeros();
    }
    each(team_, factor_.size(), [&](int f) { u_[factor_.constraint(f)] = factor_.z(f); });
    return true;
  }

  static constexpr int kNone = -1;
  static constexpr int kInactive = NnqpFactor<Team>::kInactive;
  static constexpr int kRefused = -2;  // in place of kInactive

  const Team team_;
  NnqpProblem in_;
  const int t_;
  int kept_size_ = 0;
  double input_scale_ = 0.0;  // largest |q_j| / |g_j| and |lower| |g_j|
  // By constraint.
  double* u_;
  double* w_;
  double* c_;
  double* norm_;
  double* inverse_norm_;
  double* kept_u_;    // the best u so far
  int* kept_active_;  // and its active set
  NnqpFactor<Team> factor_;
};

}  // namespace gem_fast
