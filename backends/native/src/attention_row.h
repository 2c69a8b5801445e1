// The rows of scores of attention, in scratch: what they become on the way to the output, and to the gradients.
#pragma once

#include "row.h"

namespace sa_softmax {
namespace {

template <class C>
constexpr int kChunk = 4 * kLanes<C>;  // four vectors at a time hide the latency of an addition

// Calls f(offset, pointer to kChunk entries) along a row; the last, incomplete chunk is a copy padded by -inf. So an
// entry's lane, and with it every sum, depends on its index alone.
template <class C, class F>
INLINE void chunks(const C* z, int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kChunk<C> <= n; i += kChunk<C>) f(i, z + i);
  if (i < n) {
    C tail[kChunk<C>];
    for (int j = 0; j < kChunk<C>; ++j) tail[j] = -kInfinity<C>;
    std::memcpy(tail, z + i, size_t(n - i) * sizeof(C));
    f(i, tail);
  }
}
// The entries of another row that belong to the chunk at i; 0 beyond its end.
template <class C>
struct Chunk {
  C tail[kChunk<C>];
  const C* at;
  INLINE Chunk(const C* row, int64_t i, int64_t n) : at(row + i) {
    if (i + kChunk<C> <= n) return;
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, row + i, size_t(n - i) * sizeof(C));
    at = tail;
  }
};
template <class C>
INLINE void store_chunk(C* row, int64_t i, int64_t n, const Vector<C> (&v)[4]) {
  if (i + kChunk<C> <= n)
    for (int u = 0; u < 4; ++u) store(row + i + u * kLanes<C>, v[u]);
  else
    std::memcpy(row + i, v, size_t(n - i) * sizeof(C));
}

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

// y becomes the row operation of scale z times a number, and the inverse of this number is returned: whoever sums over the
// row need not scale it. A row's scores are rounded themselves, so the exact difference is not worth its time. scale > 0; n
// is padded; y may begin where z does, or before.
template <class C, class Y>
__attribute__((noinline)) C weights_row(const C* z, int64_t n, bool normalized, C scale, Y* y) {
  Extrema<C> row = extrema(z, n);
  row.low *= scale;
  row.high *= scale;
  const Vector<C> high = all(row.high);
  const Factor<C> f = normalized ? factor(row) : room(row, n);
  const Vector<C> unit = all(f.unit), lo = all(f.lo);
  Vector<C> total[4] = {};
  for (int64_t i = 0; i < n; i += kChunk<C>)
    for (int u = 0; u < 4; u += 2) {
      Vector<C> out[2];
      for (int w = 0; w < 2; ++w) {
        const Vector<C> v = load(z + i + (u + w) * kLanes<C>) * scale;
        const Vector<C> e = exp_difference<C, false>(v, high);
        const auto on = v != all(-kInfinity<C>);
        total[u + w] += on ? e : Vector<C>{};
        out[w] = on ? (v * unit - lo) * e : Vector<C>{};
      }
      store_two(y + i + u * kLanes<C>, out[0], out[1]);
    }
  const C sum_of_e = sum<C>(total);
  return sum_of_e == 0 ? C(0) : f.inverse_range * (normalized ? C(1) : f.inverse_unit) * (1 / sum_of_e);
}

// dx of one row (section 5 of the spec); g counts as 0 where z is -inf. dx may be z or g; e holds n entries of scratch.
// y is the row operation itself; it may be g unless dx is.
template <class C>
__attribute__((noinline)) void vjp_row(const C* z, const C* g, int64_t n, C* dx, C* e, bool normalized, C* y) {
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
      values[u] = v == excluded ? zero : p * a * outside;
    }
    store_chunk(y, i, n, values);
    store_chunk(dx, i, n, out);
  });
}

}  // namespace
}  // namespace sa_softmax
