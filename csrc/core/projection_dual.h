// The dual of one projection (nnqp.h), and whether g~ = g + G^T v can be relied on where P and q were rounded.
//
// Rounding. Of an inner product <a, b> it is at most e |a| |b|, with e as in tolerances.h. With
// S = |g| + sum_k v_k |g_k| the slopes g_k . g~ are then off by e S |g_k| at most.
//
// Well conditioned. As P and q go from what they are to what they would be without rounding, the answer moves
// continuously, and an active set A moves g~ by at most e S max |L^-1 r| over |r_k| <= |g_k|, where P_AA = L L'. Let A
// be the active constraints and those whose slope is within 2 d |g_k| of zero. If the bound is at most d for A, then no
// other constraint can become active on the way, and g~ is within d of what exact products give (up to terms of
// relative size e |A| max |L^-1 r|^2, which must be at most 1/2). Here d = kProjectionError times the scale below.
//
// Length. g_m = g + margin G^T 1 is what v = margin gives, and g~ its projection onto a cone: |g~| <= |g_m|. Where
// float64 has too few digits for a v that keeps to this, v goes back towards the margin, as far as P and its rounding
// demand.
#pragma once

#include "core/nnqp.h"
#include "core/projection_problem.h"

namespace gem_fast {

template <class Team>
class ProjectionDual {
 public:
  GEM_FAST_HD ProjectionDual(const Team& team, const ProjectionProblem& problem, double* doubles, int* ints)
      : team_(team),
        in_(problem.dual),
        t_(problem.dual.t),
        in_float32_(problem.products == Products::kFloat32),
        rounding_((in_float32_ ? kFloat32Rounding : kFloat64Rounding) *
                  (problem.cancellation == nullptr ? 1.0 : *problem.cancellation)),
        g_squared_(*problem.g_squared),
        nnqp_(team, problem.dual, doubles, ints) {}

  // v = 0 where no constraint is violated, and where P or q is not finite. kInaccurate after float32 products asks for
  // float64 ones.
  GEM_FAST_INLINE GEM_FAST_HD NnqpAnswer solve(double* v) {
    const bool finite = nnqp_.prepare();
    if (!finite || !violated()) {
      each(team_, t_, [&](int i) { v[i] = 0.0; });
      return {finite ? kSolved : kNonFinite, finite ? 0.0 : HUGE_VAL, 0};
    }
    int iterations = 0;
    bool solved = false;
    // One call of minimise, which is large: compilers inline it at each. The second attempt is for multipliers too
    // large for float64: the gradients are dependent but for a last digit of theirs.
    GEM_FAST_KEEP_LOOP
    for (int attempt = 1; attempt <= 2; ++attempt) {
      iterations += minimise();
      solved =
          is_accurate() && (in_float32_ ? is_well_conditioned() : (attempt == 2 || has_digits()) && keeps_to_length());
      if (solved || in_float32_ || attempt == 2) break;
      nnqp_.prepare();
      nnqp_.set_softness(kSoftness);
    }
    if (!solved) shorten();
    const double residual = (gap_ + rounding_ * terms_) / scale_;
    each(team_, t_, [&](int i) { v[i] = in_.lower + nnqp_.u()[i]; });
    return {solved ? kSolved : kInaccurate, residual, iterations};
  }

 private:
  GEM_FAST_INLINE GEM_FAST_HD bool violated() {
    return count(team_, t_, [&](int i) { return in_.q[i] < 0.0; }) > 0;
  }

  GEM_FAST_INLINE GEM_FAST_HD int minimise() {
    const int iterations = nnqp_.minimise();
    nnqp_.set_softness(0.0);
    if (nnqp_.overflows()) scale_u(0.0);
    measure();
    return iterations;
  }

  GEM_FAST_INLINE GEM_FAST_HD bool is_accurate() const { return gap_ <= kAcceptedResidual * scale_; }

  GEM_FAST_INLINE GEM_FAST_HD void scale_u(double s) {
    each(team_, t_, [&](int i) { nnqp_.u()[i] = s > 0.0 ? s * nnqp_.u()[i] : 0.0; });
  }

  // The gap at u, and the lengths and sums that the bounds are made of. Every thread adds the same t terms.
  GEM_FAST_INLINE GEM_FAST_HD void measure() {
    gap_ = nnqp_.gap();
    const double m = in_.lower;
    const double *u = nnqp_.u(), *w = nnqp_.w(), *c = nnqp_.c(), *norm = nnqp_.norm();
    double at_margin = g_squared_;  // |g_m|^2
    double norms = 0.0;
    moved_ = gained_ = slope_ = 0.0;
    GEM_FAST_UNROLL_BY(4)
    for (int i = 0; i < t_; ++i) {
      const double with_gm = c[i] - in_.ridge * m;  // g_i . g_m
      at_margin += m * (in_.q[i] + with_gm);
      norms += norm[i];
      moved_ += u[i] * norm[i];
      gained_ += u[i] * (w[i] + c[i] - in_.ridge * (u[i] + 2.0 * m));
      slope_ += u[i] * with_gm;
    }
    scale_ = sqrt(fmax(g_squared_, at_margin));
    terms_at_margin_ = sqrt(g_squared_) + m * norms;
    terms_ = terms_at_margin_ + moved_;
    team_.barrier();
  }

  // Whether float32 products lead to a g~ within kProjectionError.
  GEM_FAST_INLINE GEM_FAST_HD bool is_well_conditioned() {
    const int lost = count(team_, t_, [&](int i) {
      const double squared = in_.P[static_cast<int64_t>(i) * t_ + i];
      return squared < kLeastFloat32Square && (squared != 0.0 || in_.q[i] != 0.0);
    });
    if (lost > 0 || !(g_squared_ >= kLeastFloat32Square)) return false;
    const double most = kProjectionError * scale_ / (rounding_ * terms_);
    NnqpFactor<Team>& factor = nnqp_.factor();
    const auto joins = [&](int j) {
      const double length = nnqp_.norm()[j];
      const bool near = length > 0.0 && !(nnqp_.w()[j] > 2.0 * kProjectionError * scale_ * length);
      return near && factor.place(j) < 0;
    };
    if (count(team_, t_, joins) > 0) {
      for (int j = 0; j < t_; ++j) {
        if (joins(j) && !factor.append(j, 1.0 / (most * most))) return false;
      }
    }
    const double amplification = factor.amplification(nnqp_.norm());
    return amplification <= most && rounding_ * factor.size() * amplification * amplification <= 0.5;
  }

  // What |g~|^2 may be off by, because P and q are rounded.
  GEM_FAST_INLINE GEM_FAST_HD double rounded() const { return rounding_ * moved_ * (2.0 * terms_at_margin_ + moved_); }
  GEM_FAST_INLINE GEM_FAST_HD bool has_digits() const { return rounded() <= kLostDigits * scale_ * scale_; }

  // Whether |g~| <= |g_m|.
  GEM_FAST_INLINE GEM_FAST_HD bool keeps_to_length() const {
    return gained_ + rounded() <= kLengthening * scale_ * scale_;
  }

  // Of all s u, with s from 0 to 1, the one that makes the largest possible |g~| smallest.
  GEM_FAST_INLINE GEM_FAST_HD void shorten() {
    const double slope = slope_ + rounding_ * terms_at_margin_ * moved_;
    const double curvature = gained_ - 2.0 * slope_ + rounding_ * moved_ * moved_;
    scale_u(slope < 0.0 && curvature > 0.0 ? fmin(-slope / curvature, 1.0) : 0.0);
    measure();
  }

  const Team team_;
  const NnqpProblem in_;
  const int t_;
  const bool in_float32_;
  const double rounding_;
  const double g_squared_;
  double gap_ = 0.0;              // see Nnqp
  double scale_ = 0.0;            // the length of g or g_m, the longer one
  double terms_ = 0.0;            // |g| + sum_k v_k |g_k|
  double terms_at_margin_ = 0.0;  // the same at v = margin
  double moved_ = 0.0;            // sum_k u_k |g_k|, u = v - margin
  double gained_ = 0.0;           // |g~|^2 - |g_m|^2
  double slope_ = 0.0;            // g_m . G^T u
  Nnqp<Team> nnqp_;
};

}  // namespace gem_fast
