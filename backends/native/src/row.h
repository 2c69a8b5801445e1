// What a row's extrema say about how to compute it.
#pragma once

#include "simd.h"

namespace sa_softmax {
namespace {

// V is a number, for one row, or Four<C>, for four.
template <class V>
struct Extrema {
  V low, high;  // of the participating entries that are not NaN; (inf, -inf) if there are none
};

template <class V>
struct WordsOf;
template <>
struct WordsOf<float> {
  using Type = uint32_t;
};
template <>
struct WordsOf<double> {
  using Type = uint64_t;
};
template <>
struct WordsOf<Four<float>> {
  typedef uint32_t Type __attribute__((vector_size(16)));
};
template <>
struct WordsOf<Four<double>> {
  typedef uint64_t Type __attribute__((vector_size(32)));
};

// The self-adjusting factor without overflow (C7): `unit` is a power of two near 1 / max(hi, -lo), `inverse_unit` its
// inverse; lo and R are multiplied by it. R = 0 has 1 / R = 0, which makes the row 0 (C1, G5).
template <class V>
struct Factor {
  V unit, inverse_unit, lo, inverse_range;
};
template <class C, class V>
INLINE Factor<V> factor(const Extrema<V>& row) {
  using S = Simd<C>;
  using Word = typename WordsOf<V>::Type;
  const V zero{};
  const V lo = row.low < zero ? row.low : zero, hi = row.high > zero ? row.high : zero;
  const V largest = hi > -lo ? hi : -lo;
  const Word least = Word{} + 1, most = Word{} + (2 * S::bias - 1);
  Word exponent = as<Word>(largest) >> S::mantissa;
  exponent = exponent < least ? least : exponent > most ? most : exponent;
  const V unit = as<V>((most + 1 - exponent) << S::mantissa), inverse = as<V>(exponent << S::mantissa);
  const V range = hi * unit - lo * unit;
  return {unit, inverse, lo * unit, range == zero ? zero : 1 / range};
}

// Under product, g x - D and the sum of n terms g x e may overflow where the gradient does not (G8), if scores are huge:
// then they are multiplied by `unit`.
template <class C, class V>
INLINE Factor<V> room(const Extrema<V>& row, int64_t n) {
  using S = Simd<C>;
  using Word = typename S::Word;
  const V zero{}, one = zero + 1, huge = zero + (kSame<C, float> ? C(0x1p100) : C(0x1p960));
  const Word halvings = Word(64 - __builtin_clzll(uint64_t(n) | 1) + 3);
  const V unit = zero + as<C>((S::bias - halvings) << S::mantissa);
  const V inverse = zero + as<C>((S::bias + halvings) << S::mantissa);
  const auto is_huge = (row.high > huge) | (row.low < -huge);
  return {is_huge ? unit : one, is_huge ? inverse : one, zero, one};
}

// The sums of a row's gradient: s of g e, d of g e (unit z - lo), and how many entries are extremal. V and I are vectors,
// then what they add up to.
template <class V, class I>
struct Sums {
  V s, d;
  I at_low, at_high;
};
// dx = (p ((g a - D) + g / R) + extremal) grow, with a = (unit z - lo) a_scale and p = e p_scale: g / R is what is left where
// softmax saturates, so it is added last. Where 1 / R = inverse_range unit or g / R overflows, though their sum may not,
// terms are smaller by 1 / grow.
template <class V>
struct Gradient {
  V unit, lo, p_scale, a_scale, D, more, to_low, to_high, grow;
};
template <class C>
constexpr C kLargeFactor = kSame<C, float> ? C(0x1p100) : C(0x1p960);
// l is the sum of e.
template <class C, class V>
INLINE Gradient<V> gradient(const Extrema<V>& row, const Factor<V>& f, V l, const Sums<V, V>& sums, bool normalized) {
  const V zero{}, one = zero + 1;
  const V inverse_l = 1 / l, S = sums.s * inverse_l, D = sums.d * inverse_l * f.inverse_range;
  const V spare = f.inverse_range * f.unit < zero + kLargeFactor<C> ? one : zero + C(0x1p-60);
  const V outside = spare * f.unit;
  const V to_low = (D - S) / sums.at_low * f.inverse_range * outside;
  const V to_high = -D / sums.at_high * f.inverse_range * outside;
  return {f.unit,
          f.lo,
          inverse_l * (normalized ? one : f.inverse_unit),
          f.inverse_range * spare,
          D * spare,
          f.inverse_range * outside,
          normalized ? row.low < zero ? to_low : zero : zero,
          normalized ? row.high > zero ? to_high : zero : zero,
          1 / spare};
}
// The gradients of entries. Not kGrow: grow = 1.
template <class C, bool kGrow>
struct Entries {
  Vector<C> low, high, unit, lo, p_scale, a_scale, D, more, to_low, to_high, grow;

  INLINE Entries(const Extrema<C>& row, const Gradient<C>& by)
      : low(all(row.low)), high(all(row.high)), unit(all(by.unit)), lo(all(by.lo)), p_scale(all(by.p_scale)),
        a_scale(all(by.a_scale)), D(all(by.D)), more(all(by.more)), to_low(all(by.to_low)), to_high(all(by.to_high)),
        grow(all(by.grow)) {}
  INLINE Vector<C> grown(Vector<C> v) const { return kGrow ? v * grow : v; }
  INLINE Vector<C> a(Vector<C> z) const { return (z * unit - lo) * a_scale; }
  INLINE Vector<C> dx(Vector<C> z, Vector<C> g, Vector<C> p, Vector<C> a) const {
    Vector<C> out = p * ((g * a - D) + g * more);
    out = z == low ? out + to_low : out;
    return grown(z == high ? out + to_high : out);
  }
};

}  // namespace
}  // namespace sa_softmax
