// The rows of scores of attention, in scratch: what they become on the way to the output, and to the gradients.
#pragma once

#include "row.h"

namespace sa_softmax {
namespace {

// Rows are padded by -inf to whole chunks: four vectors at a time hide the latency of an addition.
template <class C>
constexpr int kChunk = 4 * kLanes<C>;
static_assert(kPad % kChunk<float> == 0 && kPad % kChunk<double> == 0);

// The extrema of each lane. kFinite: -inf does not count.
template <bool kFinite, class C>
INLINE void look(const C* z, int64_t n, Vector<C> (&low)[4], Vector<C> (&high)[4]) {
  for (int64_t i = 0; i < n; i += kChunk<C>)
    for (int u = 0; u < 4; ++u) {
      const Vector<C> v = load(z + i + u * kLanes<C>);
      high[u] = larger(v, high[u]);
      low[u] = kFinite && v == all(-kInfinity<C>) ? low[u] : smaller(v, low[u]);
    }
}
// -inf does not count, and mostly stands at a row's ends, where causality or a window begins: elsewhere it is found by
// having counted.
template <class C>
INLINE Extrema<Vector<C>> lane_extrema(const C* z, int64_t n) {
  constexpr int64_t kEnds = 2 * kChunk<C>;
  const int64_t first = least(n, kEnds), last = n - first > kEnds ? n - kEnds : first;
  Vector<C> low[4], high[4];
  for (int u = 0; u < 4; ++u) low[u] = all(kInfinity<C>), high[u] = -low[u];
  look<true>(z, first, low, high);
  look<false>(z + first, last - first, low, high);
  look<true>(z + last, n - last, low, high);
  return {combine(low, smaller), combine(high, larger)};
}
template <class C>
__attribute__((noinline)) C least_finite(const C* z, int64_t n) {
  Vector<C> low[4], high[4];
  for (int u = 0; u < 4; ++u) low[u] = all(kInfinity<C>), high[u] = -low[u];
  look<true>(z, n, low, high);
  return halve<C>(combine(low, smaller), smaller);
}

// Two vectors in a row.
template <class C>
INLINE void store_two(C* y, Vector<C> first, Vector<C> second) {
  store(y, first);
  store(y + kLanes<C>, second);
}
#if SA_SOFTMAX_VECTOR == 64
INLINE void store_two(Bfloat* y, Vector<float> first, Vector<float> second) {
  Vector<float> both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(first), "v"(second));
  std::memcpy(y, &both, sizeof both);
}
#endif

// The polynomial of a weight's exponential: of one that is rounded to 8 bits, an error of 7.5e-5.
constexpr float kShortPower[] = {0.07801287f, 0.22608502f, 0.6958267f, 0.9999257f};

// The weights of a row of scores, which are scale z: y = (scale z - lo) exp(scale (z - high)), and `inverse` times their sum
// is the inverse of what is left to divide by. A row's scores are rounded themselves, so the exact difference is not worth
// its time: the exponential is 2^(z in_powers - top), which is so near 1 at z = high as top is small; where it is not, high
// is subtracted first. V is C, for one row, or Four<C>.
template <class V>
struct Weights {
  V in_powers, top, high, unit, in_units, lo, inverse;
};
// `of` are the extrema of z; n as in room().
template <class C, class V>
INLINE Weights<V> weights_of(const Extrema<V>& of, int64_t n, bool normalized, C scale) {
  const Extrema<V> row{of.low * scale, of.high * scale};
  const Factor<V> f = normalized ? factor<C>(row) : room<C>(row, n);
  const V in_powers = V{} + scale * Simd<C>::log2e_high;
  return {in_powers,      of.high * in_powers, of.high, f.unit,
          scale * f.unit, f.lo,                normalized ? f.inverse_range : f.inverse_unit};
}
// The weights of z, to y, and the sum of their exponentials.
template <bool kHigh, class C, class Y>
__attribute__((noinline)) C sum_of_weights(const C* z, int64_t n, C scale, Y* y, const Weights<C>& by) {
  const Vector<C> in_powers = all(by.in_powers), top = all(by.top), high = all(by.high), unit = all(by.unit),
                  in_units = all(by.in_units), lo = all(by.lo);
  Vector<C> total[4] = {};
  for (int64_t i = 0; i < n; i += kChunk<C>)
    for (int u = 0; u < 4; u += 2) {
      Vector<C> out[2];
      for (int w = 0; w < 2; ++w) {
        const Vector<C> v = load(z + i + (u + w) * kLanes<C>);
        Vector<C> power = kHigh ? (v - high) * in_powers : v * in_powers - top;
        if (kHigh) power = v == all(-kInfinity<C>) ? v : power;
        Vector<C> e;
        if constexpr (kSame<Y, C>)
          e = power_of_2<C>(power, Simd<C>::power);
        else
          e = power_of_2<C>(power, kShortPower);
        const Vector<C> a = (kHigh ? v * scale * unit : v * in_units) - lo;
        out[w] = unless_below(power, kLowestPower<C>, a * e);
        total[u + w] += e;
      }
      store_two(y + i + u * kLanes<C>, out[0], out[1]);
    }
  return sum<C>(total);
}
// y[c] becomes the row operation of scale z[c] times a number, whose inverse comes back in `inverse`: whoever sums over the
// row need not scale it. scale > 0; n is padded; y may begin where z does, or before. `count` rows of up to four.
template <class C, class Y>
INLINE void weights_rows(const C* const (&z)[4], const int64_t (&n)[4], int64_t count, bool normalized, C scale,
                         Y* const (&y)[4], C* inverse) {
  Vector<C> low[4] = {}, high[4] = {};
  for (int64_t c = 0; c < count; ++c) {
    const Extrema<Vector<C>> of = lane_extrema(z[c], n[c]);
    low[c] = of.low, high[c] = of.high;
  }
  Extrema<Four<C>> rows{halve_four<C>(low, smaller), halve_four<C>(high, larger)};
  int64_t longest = 0;
  for (int64_t c = 0; c < count; ++c) {
    longest = n[c] > longest ? n[c] : longest;
    if (rows.low[c] == -kInfinity<C>) rows.low[c] = least_finite(z[c], n[c]);
  }
  const Weights<Four<C>> by = weights_of(rows, longest, normalized, scale);
  for (int64_t c = 0; c < count; ++c) {
    const Weights<C> row{by.in_powers[c], by.top[c], by.high[c],   by.unit[c],
                         by.in_units[c],  by.lo[c],  by.inverse[c]};
    const auto run = is_huge(row.high * scale) ? sum_of_weights<true, C, Y> : sum_of_weights<false, C, Y>;
    const C sum_of_e = run(z[c], n[c], scale, y[c], row);
    inverse[c] = sum_of_e == 0 ? C(0) : row.inverse * (1 / sum_of_e);
  }
}

// kPlain: all entries participate, and no score or factor is huge.
template <bool kPlain, class C>
__attribute__((noinline)) void vjp_row(const C* z, const C* g, int64_t n, C* dx, C* e, bool normalized, C* y,
                                       const Extrema<C>& row, const Factor<C>& f) {
  using I = typename Simd<C>::I;
  using Count = typename Simd<C>::Count;
  const Vector<C> zero{}, low = all(row.low), high = all(row.high), unit = all(f.unit), lo = all(f.lo);
  const auto participating = [&](Vector<C> z, Vector<C> v) { return kPlain || z != all(-kInfinity<C>) ? v : zero; };
  const Shift<C> by = shift(row.high);
  Vector<C> l[4] = {}, d[4] = {}, s[4] = {};
  I at_low[4] = {}, at_high[4] = {};
  for (int64_t i = 0; i < n; i += kChunk<C>)
    for (int u = 0; u < 4; ++u) {
      const int64_t at = i + u * kLanes<C>;
      const Vector<C> v = load(z + at);
      const Vector<C> exponential = exp_shifted<C>(kPlain ? v : v - by.origin, by);
      const Vector<C> ge = participating(v, load(g + at) * exponential);
      l[u] += exponential;
      s[u] += ge;
      d[u] += participating(v, ge * (v * unit - lo));
      at_low[u] = v == low ? at_low[u] + 1 : at_low[u];
      at_high[u] = v == high ? at_high[u] + 1 : at_high[u];
      store(e + at, exponential);
    }
  const Sums<C, C> sums{sum<C>(s), sum<C>(d), C(sum<Count>(at_low)), C(sum<Count>(at_high))};
  const Gradient<C> gradients = gradient<C>(row, f, sum<C>(l), sums, normalized);
  const Entries<C, !kPlain> entries(row, gradients);
  for (int64_t i = 0; i < n; i += kLanes<C>) {
    const Vector<C> v = load(z + i), up = load(g + i), p = load(e + i) * entries.p_scale, a = entries.a(v);
    store(y + i, participating(v, entries.grown(p * a)));
    store(dx + i, participating(v, entries.dx(v, up, p, a)));
  }
}
// dx of one row (section 5 of the spec); g counts as 0 where z is -inf. dx may be z or g; e holds n entries of scratch.
// y is the row operation itself; it may be g unless dx is.
template <class C>
INLINE void vjp_row(const C* z, const C* g, int64_t n, C* dx, C* e, bool normalized, C* y) {
  Vector<C> lows[4], highs[4];
  for (int u = 0; u < 4; ++u) lows[u] = all(kInfinity<C>), highs[u] = -lows[u];
  look<false>(z, n, lows, highs);
  Extrema<C> row{reduce<C>(lows, smaller), reduce<C>(highs, larger)};
  const bool whole = row.low != -kInfinity<C>;
  if (!whole) row.low = least_finite(z, n);
  const Factor<C> f = normalized ? factor<C>(row) : room<C>(row, n);
  const bool plain = whole && !is_huge(row.high) && f.inverse_range * f.unit < kLargeFactor<C>;
  (plain ? vjp_row<true, C> : vjp_row<false, C>)(z, g, n, dx, e, normalized, y, row, f);
}

}  // namespace
}  // namespace sa_softmax
