// What a row's extrema say about how to compute it.
#pragma once

#include "simd.h"

namespace sa_softmax {
namespace {

template <class C>
struct Extrema {
  C low, high;  // of the participating entries that are not NaN; (inf, -inf) if there are none
};

// The self-adjusting factor without overflow (C7): `unit` is a power of two near 1 / max(hi, -lo), `inverse_unit` its
// inverse; lo and R are multiplied by it. R = 0 has 1 / R = 0, which makes the row 0 (C1, G5).
template <class C>
struct Factor {
  C unit, inverse_unit, lo, inverse_range;
};
template <class C>
INLINE Factor<C> factor(Extrema<C> row) {
  using S = Simd<C>;
  using Word = typename S::Word;
  const C lo = row.low < 0 ? row.low : 0, hi = row.high > 0 ? row.high : 0;
  const C largest = hi > -lo ? hi : -lo;
  Word exponent = as<Word>(largest) >> S::mantissa;
  exponent = exponent < 1 ? 1 : exponent > 2 * S::bias - 1 ? 2 * S::bias - 1 : exponent;
  const C unit = as<C>((2 * S::bias - exponent) << S::mantissa), inverse = as<C>(exponent << S::mantissa);
  const C range = hi * unit - lo * unit;
  return {unit, inverse, lo * unit, range == 0 ? C(0) : 1 / range};
}

// Under product, g x - D and the sum of n terms g x e may overflow where the gradient does not (G8), if scores are huge:
// then they are multiplied by `unit`.
template <class C>
INLINE Factor<C> room(Extrema<C> row, int64_t n) {
  constexpr C huge = kSame<C, float> ? C(0x1p100) : C(0x1p960);
  Factor<C> f{1, 1, 0, 1};
  if (row.high > huge || row.low < -huge)
    for (int64_t terms = 4 * n; terms > 0; terms /= 2) f.unit /= 2, f.inverse_unit *= 2;
  return f;
}

}  // namespace
}  // namespace sa_softmax
