// Every constant of the solver that is a tolerance or a limit, and why it has its value.
#pragma once

namespace gem_fast {

// A constraint is added to the active set only when it is violated by more than this, relative to the
// problem's scale: below it, what is seen is the rounding of P and q rather than a violation.
inline constexpr double kEnterTolerance = 1e-12;

// Times the number of active constraints: the smallest squared sine of the angle between a gradient and the span of
// the active ones that float64 resolves. Below it the gradient counts as a combination of theirs, so a rank-deficient P
// is solved as it stands, without a ridge, and multipliers stay bounded.
inline constexpr double kPivotFloor = 1e-15;

// The smallest coefficient of such a combination, of gradients scaled to unit length, that lets a constraint take the
// place of an active one: with less, the exchange would trade a violation that is rounding for huge multipliers.
inline constexpr double kCombination = 1e-2;

// A correction may raise the objective by this much, in units of the squared scale, and count as none. One that raises
// it by more followed a minimiser that is rounding, over active gradients that are dependent as far as float64
// resolves.
inline constexpr double kObjectiveRounding = 1e-12;

// While the active set is only being guessed, a gradient this close to the span of the others is left out.
inline constexpr double kGuessPivot = 1e-9;

// Rounds of block exchanges that guess the active set before it is corrected one constraint at a time.
inline constexpr int kGuessRounds = 6;

// Corrections of the active set: at most this many per constraint, plus a constant for small problems.
inline constexpr int kIterationsPerConstraint = 20;
inline constexpr int kIterationsAtLeast = 100;

// An answer whose residual is larger than this is reported as inaccurate. Residuals are near 1e-15 except where active
// gradients oppose each other to within 1e-8 of their length: there P resolves a violation only down to
// sqrt(kPivotFloor).
inline constexpr double kAcceptedResidual = 1e-6;

// ---- projections (projection_dual.h) ----

// The error of an inner product <a, b> is at most this times |a| |b|. A lane adds at most 256 products before float64
// takes over, and the rounding errors of n additions come to sqrt(n) units of 2^-24, or of 2^-53: 16 units.
inline constexpr double kFloat32Rounding = 0x1p-20;
inline constexpr double kFloat64Rounding = 0x1p-49;

// Squared lengths below this have lost digits to float32's smallest numbers.
inline constexpr double kLeastFloat32Square = 0x1p-100;

// What float32 products may change g~ by, relative to the length of g (with a margin: of g + margin G^T 1, if longer).
// The gradients of networks in training come to 1e-5.
inline constexpr double kProjectionError = 1e-4;

// What of |g~|^2, relative to that squared length, may be rounding of P and q before multipliers count as too large for
// float64: they add up to 7e5 |g| then.
inline constexpr double kLostDigits = 1e-3;

// The softness of a second try, where multipliers came out too large for float64's digits. It bounds them by
// |g| / (2 sqrt(softness)), at the price of violations of at most sqrt(softness) / 2 |g|.
inline constexpr double kSoftness = 1e-12;

// What |g~|^2 may exceed that squared length by, relative to it.
inline constexpr double kLengthening = 1e-6;

}  // namespace gem_fast
