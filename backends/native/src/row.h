// The row operation and its gradient on one row in memory.
#pragma once

#include "simd.h"

namespace sa_softmax {
namespace {

template <class C>
struct Extrema {
  C low, high;  // of the participating entries that are not NaN; (inf, -inf) if there are none
};
template <class C>
INLINE Extrema<C> extrema(const C* z, int64_t n) {
  Vector<C> low[4], high[4];
  for (int u = 0; u < 4; ++u) low[u] = all(kInfinity<C>), high[u] = -low[u];
  chunks(z, n, [&](int64_t, const C* at) {
    for (int u = 0; u < 4; ++u) {
      const Vector<C> v = load(at + u * kLanes<C>);
      const Vector<C> w = v == all(-kInfinity<C>) ? all(kInfinity<C>) : v;
      high[u] = v > high[u] ? v : high[u];
      low[u] = w < low[u] ? w : low[u];
    }
  });
  const auto smaller = [](auto a, auto b) { return a < b ? a : b; };
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  return {reduce<C>(low, smaller), reduce<C>(high, larger)};
}

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

// y = the row operation on z, where -inf marks what does not participate. e holds n entries of scratch; it may be y,
// and y may be z unless e is y.
template <class C>
__attribute__((noinline)) void forward_row(const C* z, int64_t n, C* y, C* e, bool normalized) {
  const Extrema<C> row = extrema(z, n);
  const Vector<C> high = all(row.high);
  Vector<C> total[4] = {};
  chunks(z, n, [&](int64_t i, const C* at) {
    Vector<C> out[4];
    for (int u = 0; u < 4; ++u) {
      out[u] = exp_difference<C>(load(at + u * kLanes<C>), high);
      total[u] += out[u];
    }
    store_chunk(e, i, n, out);
  });
  const Factor<C> f = normalized ? factor(row) : Factor<C>{1, 1, 0, 1};
  const Vector<C> unit = all(f.unit), lo = all(f.lo), scale = all(f.inverse_range * (1 / sum<C>(total)));
  chunks(z, n, [&](int64_t i, const C* at) {
    const Chunk<C> es(e, i, n);
    Vector<C> out[4];
    for (int u = 0; u < 4; ++u) {
      const Vector<C> v = load(at + u * kLanes<C>);
      const Vector<C> w = (v * unit - lo) * scale * load(es.at + u * kLanes<C>);
      out[u] = v == all(-kInfinity<C>) ? Vector<C>{} : w;
    }
    store_chunk(y, i, n, out);
  });
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

// z becomes the row operation times a number, and the inverse of this number is returned: whoever sums over the row need
// not scale it. A row's scores are rounded themselves, so the exact difference is not worth its time. n is padded.
template <class C>
__attribute__((noinline)) C weights_row(C* z, int64_t n, bool normalized) {
  const Extrema<C> row = extrema(z, n);
  const Vector<C> high = all(row.high);
  const Factor<C> f = normalized ? factor(row) : room(row, n);
  const Vector<C> unit = all(f.unit), lo = all(f.lo);
  Vector<C> total[4] = {};
  for (int64_t i = 0; i < n; i += kChunk<C>)
    for (int u = 0; u < 4; ++u) {
      C* const at = z + i + u * kLanes<C>;
      const Vector<C> v = load(at);
      const Vector<C> e = exp_difference<C, false>(v, high);
      const auto on = v != all(-kInfinity<C>);
      total[u] += on ? e : Vector<C>{};
      store(at, on ? (v * unit - lo) * e : Vector<C>{});
    }
  const C sum_of_e = sum<C>(total);
  return sum_of_e == 0 ? C(0) : f.inverse_range * (normalized ? C(1) : f.inverse_unit) * (1 / sum_of_e);
}

// dx of one row (section 5 of the spec); g counts as 0 where z is -inf. dx may be z or g; e holds n entries of scratch.
// With kValues y is the row operation itself, too; it may be g unless dx is.
template <class C, bool kValues = false>
__attribute__((noinline)) void vjp_row(const C* z, const C* g, int64_t n, C* dx, C* e, bool normalized,
                                       C* y = nullptr) {
  using I = typename Simd<C>::I;
  const Vector<C> zero{}, excluded = all(-kInfinity<C>);
  const Extrema<C> row = extrema(z, n);
  const Vector<C> low = all(row.low), high = all(row.high);
  const Factor<C> f = normalized ? factor(row) : room(row, n);
  const Vector<C> unit = all(f.unit), lo = all(f.lo);
  Vector<C> l[4] = {}, d[4] = {}, s[4] = {};
  I at_low[4] = {}, at_high[4] = {};
  chunks(z, n, [&](int64_t i, const C* at) {
    const Chunk<C> gs(g, i, n);
    Vector<C> out[4];
    for (int u = 0; u < 4; ++u) {
      const Vector<C> v = load(at + u * kLanes<C>);
      const Vector<C> x = v == excluded ? zero : v, up = v == excluded ? zero : load(gs.at + u * kLanes<C>);
      out[u] = exp_difference<C>(v, high);
      const Vector<C> ge = up * out[u];
      l[u] += out[u];
      s[u] += ge;
      d[u] += ge * (x * unit - lo);
      at_low[u] -= v == low;
      at_high[u] -= v == high;
    }
    store_chunk(e, i, n, out);
  });
  const C inverse_l = 1 / sum<C>(l);
  using Count = typename Simd<C>::Count;
  const Count ties_low = sum<Count>(at_low), ties_high = sum<Count>(at_high);
  const C S = sum<C>(s) * inverse_l;
  const C D = sum<C>(d) * inverse_l * f.inverse_range;
  const C to_low = normalized && row.low < 0 ? (D - S) / C(ties_low) : C(0);
  const C to_high = normalized && row.high > 0 ? -D / C(ties_high) : C(0);
  // dx = p (g a - D) + (g p + extremal) / R, where 1 / R = inverse_range unit may overflow though the product does not.
  const Vector<C> p_scale = all(inverse_l), a_scale = all(f.inverse_range), Ds = all(D), to_lows = all(to_low),
                  to_highs = all(to_high), outside = all(normalized ? C(1) : f.inverse_unit),
                  inside = all(normalized ? f.unit : C(1));
  chunks(z, n, [&](int64_t i, const C* at) {
    const Chunk<C> gs(g, i, n), es(e, i, n);
    Vector<C> out[4], values[4];
    for (int u = 0; u < 4; ++u) {
      const Vector<C> v = load(at + u * kLanes<C>);
      const Vector<C> up = load(gs.at + u * kLanes<C>), p = load(es.at + u * kLanes<C>) * p_scale;
      const Vector<C> a = (v * unit - lo) * a_scale;
      const Vector<C> extremal = (v == low ? to_lows : zero) + (v == high ? to_highs : zero);
      const Vector<C> dx = p * (up * a - Ds) * outside + (up * p + extremal) * a_scale * inside;
      out[u] = v == excluded ? zero : dx;
      if (kValues) values[u] = v == excluded ? zero : p * a * outside;
    }
    if (kValues) store_chunk(y, i, n, values);
    store_chunk(dx, i, n, out);
  });
}

}  // namespace
}  // namespace sa_softmax
