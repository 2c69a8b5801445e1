// The row kernels. Rows that lie contiguous are read where they are; others, and very short ones, are first brought to
// scratch, a tile of them at a time. Entries are processed in the same lanes wherever a row lies, and what is written
// depends on one entry and the row's sums alone: so writes may begin and end anywhere.
#include "row.h"

namespace sa_softmax {
namespace {

// Vectors of the compute type to memory of type T.

INLINE Vector<float> rounded(Vector<float> v, float) { return v; }
INLINE Vector<double> rounded(Vector<double> v, double) { return v; }
INLINE Words rounded(Vector<float> v, Bfloat) {
  using U = Simd<float>::U;
  const U bits = as<U>(v), halfway = bits + 0x7fff + ((bits >> 16) & 1);
  const U nan = U{} + 0x7fc0;
  return __builtin_convertvector(v == v ? halfway >> 16 : nan, Words);
}
INLINE Words rounded(Vector<float> v, Half) {
#if defined(__AVX512F__)
  return as<Words>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return as<Words>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  Words words;
  for (int i = 0; i < kLanes<float>; ++i) words[i] = narrow<Half>(v[i]).bits;
  return words;
#endif
}

template <class T>
INLINE void write(T* p, Vector<Compute<T>> v) {
  const auto out = rounded(v, T{});
  std::memcpy(p, &out, sizeof out);
}
// Past the caches, to where p is aligned to all that is written. fence() makes it visible to other threads.
template <class T>
INLINE void stream(T* p, Vector<Compute<T>> v) {
  const auto out = rounded(v, T{});
#if defined(__AVX512F__)
  if constexpr (sizeof out == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), as<__m512i>(out));
#endif
#if defined(__AVX__)
  if constexpr (sizeof out == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), as<__m256i>(out));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof out == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), as<__m128i>(out));
#endif
  std::memcpy(p, &out, sizeof out);
}
INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Rows of n >= kLanes entries in memory. With kMasked, entries where `where` is false read as -inf.
template <class T, bool kMasked>
struct Row {
  using C = Compute<T>;
  const T* data;
  const uint8_t* where;
  int64_t across, where_across;  // to the next

  INLINE Row next(int64_t c) const {
    return {data + c * across, kMasked ? where + c * where_across : where, across, where_across};
  }
  INLINE Vector<C> at(int64_t i) const {
    const Vector<C> v = read(data + i);
    if constexpr (kMasked) return where_true<C>(where + i, v);
    return v;
  }
};

// Calls f(i, u, nullptr) for each vector of the entries [i, n) of a row, where u counts kWays accumulators, and then, if a
// part of a vector is left, f(n - kLanes, 0, lanes) for the last one; its true lanes are those that no other vector had.
template <class C, int kWays, class F>
INLINE void vectors(int64_t i, int64_t n, const F& f) {
  using I = typename Simd<C>::I;
  constexpr int kStep = kLanes<C>;
  for (; i + kWays * kStep <= n; i += kWays * kStep)
    for (int u = 0; u < kWays; ++u) f(i + u * kStep, u, nullptr);
  for (int u = 0; i + kStep <= n; i += kStep, ++u)
    for (int v = 0; v < kWays; ++v)  // so that u is a constant and the accumulators stay in registers
      if (v == u) f(i, v, nullptr);
  if (i == n) return;
  I lane;
  for (int j = 0; j < kStep; ++j) lane[j] = j;
  const I fresh = lane >= typename Simd<C>::Count(kStep - (n - i));
  f(n - kStep, 0, &fresh);
}
// The same for a whole row, by segments: after each, end() adds up what the accumulators hold, so that rounding errors
// hardly grow with a row's length.
template <class C, int kWays, class F, class E>
INLINE void segments(int64_t n, const F& f, const E& end) {
  constexpr int64_t kSegment = 4096;
  for (int64_t i = 0; i < n; i += kSegment) {
    vectors<C, kWays>(i, least(i + kSegment, n), f);
    end();
  }
}
// v in the lanes that f is told of.
template <class I, class V>
INLINE V only(const I* lanes, V v, V otherwise) {
  return *lanes ? v : otherwise;
}
template <class V>
INLINE V only(std::nullptr_t, V v, V) {
  return v;
}

// y[i] = f(i) for each vector, from any i on.
template <class T, class F>
INLINE void write_row(T* y, int64_t n, bool streams, const F& f) {
  constexpr int64_t kStep = kLanes<Compute<T>>;
  int64_t i = 0;
  if (!streams) {
    for (; i + kStep <= n; i += kStep) write(y + i, f(i));
    if (i < n) write(y + n - kStep, f(n - kStep));
    return;
  }
  T edge[kStep];
  const int64_t lead = int64_t(-reinterpret_cast<uintptr_t>(y) / sizeof(T) % kStep);
  if (lead > 0) {
    write(edge, f(0));
    std::memcpy(y, edge, size_t(lead) * sizeof(T));
  }
  for (i = lead; i + kStep <= n; i += kStep) stream(y + i, f(i));
  if (i == n) return;
  write(edge, f(n - kStep));
  std::memcpy(y + i, edge + kStep - (n - i), size_t(n - i) * sizeof(T));
}

template <bool kWhole, class C>
INLINE Vector<C> participating(Vector<C> z, Vector<C> v) {
  return kWhole ? v : z == all(-kInfinity<C>) ? Vector<C>{} : v;
}

// What else rows need: e, scratch of `pitch` entries for each; whether to stream; and how far ahead the row lies that
// is fetched meanwhile.
template <class C>
struct Means {
  C* e;
  int64_t pitch;
  bool streams;
  int64_t next, next_g;
  INLINE Means of(int64_t c) const { return {e + c * pitch, pitch, streams, next, next_g}; }
};
template <class T>
INLINE void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);  // to the second level: the first holds the row at hand
}

// The least entry that participates.
template <class R>
__attribute__((noinline)) typename R::C least_finite(const R& z, int64_t n) {
  using C = typename R::C;
  Vector<C> least = all(kInfinity<C>);
  vectors<C, 1>(0, n, [&](int64_t i, int, auto) {
    const Vector<C> v = z.at(i);
    least = smaller(v == all(-kInfinity<C>) ? all(kInfinity<C>) : v, least);
  });
  return halve<C>(least, smaller);
}
template <class C>
INLINE bool is_common(C high) {
  return high >= kLeast<C> && high <= kMost<C>;
}

template <class C>
struct Total {
  Vector<C> whole{}, ways[4] = {};
  INLINE void end() {
    whole += combine(ways, plus);
    for (Vector<C>& way : ways) way = Vector<C>{};
  }
};
// What the lanes of a row say of it; the exponentials of common_shift are stored.
template <class C>
struct Found {
  Extrema<Vector<C>> of;
  Vector<C> total;
};
template <class R>
INLINE Found<typename R::C> find(const R& z, int64_t n, const Means<typename R::C>& means) {
  using C = typename R::C;
  const Shift<C> common = common_shift<C>();
  Total<C> total;
  Vector<C> low[4], high[4];
  for (int u = 0; u < 4; ++u) low[u] = all(kInfinity<C>), high[u] = -low[u];
  const auto add = [&](int64_t i, int u, auto lanes) {
    fetch(z.data + means.next + i);
    const Vector<C> v = z.at(i), e = exp_shifted<C, true>(v, common);
    high[u] = larger(v, high[u]);
    low[u] = smaller(v, low[u]);
    total.ways[u] += only(lanes, e, Vector<C>{});
    store(means.e + i, e);
  };
  segments<C, 4>(n, add, [&] { total.end(); });
  return {{combine(low, smaller), combine(high, larger)}, total.whole};
}
// The exponentials for the maximum `high`, whatever it is, and their sum.
template <class R>
__attribute__((noinline)) typename R::C exponentials(const R& z, int64_t n, typename R::C high, typename R::C* e) {
  using C = typename R::C;
  const Shift<C> by = shift(high);
  Total<C> total;
  const auto add = [&](int64_t i, int u, auto lanes) {
    const Vector<C> out = exp_shifted<C>(z.at(i) - by.origin, by);
    total.ways[u] += only(lanes, out, Vector<C>{});
    store(e + i, out);
  };
  segments<C, 4>(n, add, [&] { total.end(); });
  return halve<C>(total.whole, plus);
}
// Up to four rows: what forward and gradient begin with.
template <class C>
struct Rows {
  Extrema<Four<C>> of;
  Four<C> sums;           // of the exponentials of common_shift, which are stored
  bool whole[kTogether];  // no entry is -inf: all participate
};
template <class R>
INLINE Rows<typename R::C> find_rows(const R& z, int64_t count, int64_t n, const Means<typename R::C>& means) {
  using C = typename R::C;
  Vector<C> low[kTogether], high[kTogether], total[kTogether];
  for (int64_t c = 0; c < count; ++c) {
    const Found<C> row = find(z.next(c), n, means.of(c));
    low[c] = row.of.low, high[c] = row.of.high, total[c] = row.total;
  }
  for (int64_t c = count; c < kTogether; ++c) low[c] = high[c] = total[c] = Vector<C>{};
  Rows<C> rows{{halve_four<C>(low, smaller), halve_four<C>(high, larger)}, halve_four<C>(total, plus), {}};
  for (int64_t c = 0; c < count; ++c) {
    rows.whole[c] = rows.of.low[c] != -kInfinity<C>;
    if (!rows.whole[c]) rows.of.low[c] = least_finite(z.next(c), n);
  }
  return rows;
}
// y = (unit z - lo) e scale
template <bool kWhole, class R, class Y>
INLINE void weigh(const R& z, int64_t n, Y* y, const Means<typename R::C>& means, typename R::C unit, typename R::C lo,
                  typename R::C scale) {
  using C = typename R::C;
  const Vector<C> units = all(unit), los = all(lo), scales = all(scale);
  write_row(y, n, means.streams, [&](int64_t i) {
    const Vector<C> v = z.at(i);
    return participating<kWhole, C>(v, (v * units - los) * load(means.e + i) * scales);
  });
}
// y = the row operation of up to four rows. The exponentials are computed with the extrema, for all rows whose maximum turns
// out to be common.
template <class R, class Y>
__attribute__((noinline)) void forward(const R& z, int64_t count, int64_t n, Y* y, int64_t y_across,
                                       const Means<typename R::C>& means, bool normalized) {
  using C = typename R::C;
  const Rows<C> rows = find_rows(z, count, n, means);
  Four<C> l = rows.sums;
  for (int64_t c = 0; c < count; ++c)
    if (!is_common<C>(rows.of.high[c])) l[c] = exponentials(z.next(c), n, rows.of.high[c], means.of(c).e);
  const Factor<Four<C>> f = normalized ? factor<C>(rows.of) : room<C>(rows.of, 1);
  const Four<C> scale = (normalized ? f.inverse_range : f.inverse_unit) / l;
  for (int64_t c = 0; c < count; ++c)
    if (rows.whole[c])
      weigh<true>(z.next(c), n, y + c * y_across, means.of(c), f.unit[c], f.lo[c], scale[c]);
    else
      weigh<false>(z.next(c), n, y + c * y_across, means.of(c), f.unit[c], f.lo[c], scale[c]);
}

template <class C>
using LaneSums = Sums<Vector<C>, typename Simd<C>::I>;
template <bool kWhole, class R, class G>
INLINE LaneSums<typename R::C> gradient_sums(const R& z, const G& g, int64_t n, const Means<typename R::C>& means,
                                             const Extrema<typename R::C>& row, typename R::C unit, typename R::C lo) {
  using C = typename R::C;
  using I = typename Simd<C>::I;
  const Vector<C> low = all(row.low), high = all(row.high), units = all(unit), los = all(lo);
  LaneSums<C> sums[2] = {};
  vectors<C, 2>(0, n, [&](int64_t i, int u, auto lanes) {
    fetch(g.data + means.next_g + i);
    const Vector<C> v = z.at(i);
    const Vector<C> ge = only(lanes, participating<kWhole, C>(v, g.at(i) * load(means.e + i)), Vector<C>{});
    LaneSums<C>& sum = sums[u];
    sum.s += ge;
    sum.d += participating<kWhole, C>(v, ge * (v * units - los));
    sum.at_low = only(lanes, I(v == low), I{}) ? sum.at_low + 1 : sum.at_low;
    sum.at_high = only(lanes, I(v == high), I{}) ? sum.at_high + 1 : sum.at_high;
  });
  return {sums[0].s + sums[1].s, sums[0].d + sums[1].d, sums[0].at_low + sums[1].at_low,
          sums[0].at_high + sums[1].at_high};
}
template <bool kWhole, bool kUsual, class R, class G, class Y>
INLINE void write_gradient(const R& z, const G& g, int64_t n, Y* dx, const Means<typename R::C>& means,
                           const Extrema<typename R::C>& row, const Gradient<typename R::C>& by) {
  using C = typename R::C;
  const Entries<C, !kUsual> entries(row, by);
  write_row(dx, n, means.streams, [&](int64_t i) {
    const Vector<C> v = z.at(i);
    return participating<kWhole, C>(v, entries.dx(v, g.at(i), load(means.e + i) * entries.p_scale, entries.a(v)));
  });
}
template <bool k>
struct Constant {
  static constexpr bool value = k;
};
// f(whole, usual), as constants; what is true of neither serves all.
template <class F>
INLINE void choose(bool whole, bool usual, const F& f) {
  if (!usual) return f(Constant<false>{}, Constant<false>{});
  if (whole) return f(Constant<true>{}, Constant<true>{});
  f(Constant<false>{}, Constant<true>{});
}
// dx of up to four rows (section 5 of the spec); g counts as 0 where z is -inf.
template <class R, class G, class Y>
__attribute__((noinline)) void vjp(const R& z, const G& g, int64_t count, int64_t n, Y* dx, int64_t dx_across,
                                   const Means<typename R::C>& means, bool normalized) {
  using C = typename R::C;
  using V = Four<C>;
  using Count = typename Simd<C>::Count;
  const Rows<C> rows = find_rows(z, count, n, means);
  V l = rows.sums;
  const Factor<V> f = normalized ? factor<C>(rows.of) : room<C>(rows.of, n);
  const auto row = [&](int64_t c) { return Extrema<C>{rows.of.low[c], rows.of.high[c]}; };
  bool usual[kTogether] = {}, wanted[kTogether] = {};
  for (int64_t c = 0; c < count; ++c) {
    wanted[c] = true;
    usual[c] = is_common<C>(rows.of.high[c]) &&
               (normalized ? f.inverse_range[c] * f.unit[c] < kLargeFactor<C> : f.unit[c] == 1);
    if (!usual[c]) l[c] = exponentials(z.next(c), n, rows.of.high[c], means.of(c).e);
  }
  Vector<C> s[kTogether], d[kTogether];
  typename Simd<C>::I at_low[kTogether], at_high[kTogether];
  for (int64_t c = count; c < kTogether; ++c) s[c] = d[c] = Vector<C>{}, at_low[c] = at_high[c] = typename Simd<C>::I{};
  Sums<V, V> sums;
  for (bool complete = false; !complete;) {
    for (int64_t c = 0; c < count; ++c) {
      if (!wanted[c]) continue;
      const auto add_up = [&](auto whole) {
        const LaneSums<C> of = gradient_sums<whole.value>(z.next(c), g.next(c), n, means.of(c), row(c), f.unit[c], f.lo[c]);
        s[c] = of.s, d[c] = of.d, at_low[c] = of.at_low, at_high[c] = of.at_high;
      };
      rows.whole[c] ? add_up(Constant<true>{}) : add_up(Constant<false>{});
    }
    sums = {halve_four<C>(s, plus), halve_four<C>(d, plus),
            __builtin_convertvector(halve_four<Count>(at_low, plus), V),
            __builtin_convertvector(halve_four<Count>(at_high, plus), V)};
    // A sum that overflows, because g is huge, may be finite with smaller exponentials.
    complete = true;
    for (int64_t c = 0; c < count; ++c) {
      wanted[c] = usual[c] && !(sums.s[c] - sums.s[c] == 0 && sums.d[c] - sums.d[c] == 0);
      if (!wanted[c]) continue;
      usual[c] = complete = false;
      l[c] = exponentials(z.next(c), n, rows.of.high[c], means.of(c).e);
    }
  }
  const Gradient<V> by = gradient<C>(rows.of, f, l, sums, normalized);
  for (int64_t c = 0; c < count; ++c)
    choose(rows.whole[c], usual[c], [&](auto whole, auto common) {
      write_gradient<whole.value, common.value>(z.next(c), g.next(c), n, dx + c * dx_across, means.of(c), row(c),
                                                {by.unit[c], by.lo[c], by.p_scale[c], by.a_scale[c], by.D[c],
                                                 by.more[c], by.to_low[c], by.to_high[c], by.grow[c]});
    });
}

// Copies `count` rows of a tile to scratch: dst[c * pitch + i] = element i of row c, -inf where `where` is false and
// beyond the end.
template <class T, class C>
INLINE void gather(const T* src, int64_t along, int64_t across, const uint8_t* where, int64_t where_along,
                   int64_t where_across, C* dst, int64_t pitch, int64_t n, int64_t count) {
  const auto copy = [&](int64_t i, int64_t c) { dst[c * pitch + i] = widen(src[i * along + c * across]); };
  if (along == 1)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t i = 0; i < n; ++i) dst[c * pitch + i] = widen(src[i + c * across]);
  else
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < count; ++c) copy(i, c);
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = n; i < pitch; ++i) dst[c * pitch + i] = -kInfinity<C>;
  if (where == nullptr) return;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = 0; i < n; ++i) {
      C& z = dst[c * pitch + i];
      z = where[i * where_along + c * where_across] ? z : -kInfinity<C>;
    }
}

template <class T, class C>
INLINE void scatter(const C* src, int64_t pitch, T* dst, int64_t along, int64_t across, int64_t n, int64_t count) {
  if (along == 1)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t i = 0; i < n; ++i) dst[i + c * across] = narrow<T>(src[c * pitch + i]);
  else
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < count; ++c) dst[i * along + c * across] = narrow<T>(src[c * pitch + i]);
}

template <class T, bool kVjp>
void rows(const RowJob& job, int64_t begin, int64_t end, void* scratch) {
  using C = Compute<T>;
  const int64_t pitch = padded(job.n), across = job.tiles_across();
  C* const z = static_cast<C*>(scratch);
  C* const g = z + job.width * pitch;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile % across * job.width, count = least(job.width, job.columns - first);
    RowStrides at{first * job.across.x, first * job.across.g, first * job.across.where, first * job.across.y};
    int64_t rest = tile / across;
    for (int64_t axis = job.outer_rank - 1; axis >= 0; --axis) {
      const int64_t index = rest % job.outer_shape[axis];
      rest /= job.outer_shape[axis];
      at.x += index * job.outer[axis].x;
      at.g += index * job.outer[axis].g;
      at.where += index * job.outer[axis].where;
      at.y += index * job.outer[axis].y;
    }
    const T* const x = static_cast<const T*>(job.x) + at.x;
    const T* const up = kVjp ? static_cast<const T*>(job.g) + at.g : nullptr;
    T* const y = static_cast<T*>(job.y) + at.y;
    const uint8_t* const where = job.where ? job.where + at.where : nullptr;
    const int64_t together = job.together();
    if (job.direct) {
      const int64_t ahead = 1024 / job.n > together ? 1024 / job.n : together;
      const Means<C> means{z, pitch, job.streams, ahead * job.across.x, ahead * job.across.g};
      for (int64_t c = 0; c < count; c += together) {
        const int64_t several = least(together, count - c);
        T* const to = y + c * job.across.y;
        const auto run = [&](auto source) {
          if constexpr (kVjp)
            vjp(source, Row<T, false>{up + c * job.across.g, nullptr, job.across.g, 0}, several, job.n, to, job.across.y,
                means, job.normalized);
          else
            forward(source, several, job.n, to, job.across.y, means, job.normalized);
        };
        if (where == nullptr)
          run(Row<T, false>{x + c * job.across.x, nullptr, job.across.x, 0});
        else
          run(Row<T, true>{x + c * job.across.x, where + c * job.across.where, job.across.x, job.across.where});
      }
      continue;
    }
    gather(x, job.along.x, job.across.x, where, job.along.where, job.across.where, z, pitch, job.n, count);
    if (kVjp) gather<T, C>(up, job.along.g, job.across.g, nullptr, 0, 0, g, pitch, job.n, count);
    // Of the same length as where it lies, so that its bits are the same, unless it is too short for one vector.
    const int64_t n = job.n < kLanes<C> ? kLanes<C> : job.n;
    C* const e = g + job.width * pitch;
    C* const out = e + together * pitch;
    const Means<C> means{e, pitch, false, 0, 0};
    for (int64_t c = 0; c < count; c += together) {
      const int64_t several = least(together, count - c);
      const Row<C, false> source{z + c * pitch, nullptr, pitch, 0};
      if constexpr (kVjp)
        vjp(source, Row<C, false>{g + c * pitch, nullptr, pitch, 0}, several, n, out, pitch, means, job.normalized);
      else
        forward(source, several, n, out, pitch, means, job.normalized);
      std::memcpy(z + c * pitch, out, size_t(several * pitch) * sizeof(C));
    }
    scatter(z, pitch, y, job.along.y, job.across.y, job.n, count);
  }
  if (job.streams) fence();
}

}  // namespace

namespace SA_SOFTMAX_ISA {

extern const RowKernels row_kernels;
const RowKernels row_kernels = {
    {rows<Half, false>, rows<Bfloat, false>, rows<float, false>, rows<double, false>},
    {rows<Half, true>, rows<Bfloat, true>, rows<float, true>, rows<double, true>},
};

}  // namespace SA_SOFTMAX_ISA
}  // namespace sa_softmax
