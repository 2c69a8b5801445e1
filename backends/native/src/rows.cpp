// The row kernels. Rows that lie contiguous are read where they are; others, and very short ones, are first brought to
// scratch, a tile of them at a time. Entries are processed in the same lanes wherever a row lies, and what is written
// depends on one entry and the row's sums alone: so writes may begin and end anywhere.
#include "row.h"

namespace sa_softmax {
namespace {

// Vectors of the compute type from and to memory of type T.

template <class T, int kCount>
struct Pack {
  typedef T V __attribute__((vector_size(kCount * sizeof(T))));
};
template <class T, int kCount>
INLINE typename Pack<T, kCount>::V load_pack(const void* p) {
  typename Pack<T, kCount>::V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
using Words = typename Pack<uint16_t, kLanes<float>>::V;

INLINE Vector<float> read(const float* p) { return load(p); }
INLINE Vector<double> read(const double* p) { return load(p); }
INLINE Vector<float> read(const Bfloat* p) {
  using U = Simd<float>::U;
  return as<Vector<float>>(__builtin_convertvector(load_pack<uint16_t, kLanes<float>>(p), U) << 16);
}
INLINE Vector<float> read(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vector<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

INLINE Vector<float> rounded(Vector<float> v, float) { return v; }
INLINE Vector<double> rounded(Vector<double> v, double) { return v; }
INLINE Words rounded(Vector<float> v, Bfloat) {
  using U = Simd<float>::U;
  const U bits = as<U>(v), halfway = bits + 0x7fff + ((bits >> 16) & 1);
  const U nan = U{} + 0x7fc0;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : halfway >> 16, Words);
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

// A row of n >= kLanes entries in memory. With kMasked, entries where `where` is false read as -inf.
template <class T, bool kMasked>
struct Row {
  using C = Compute<T>;
  const T* data;
  const uint8_t* where;

  INLINE Vector<C> at(int64_t i) const {
    const Vector<C> v = read(data + i);
    if constexpr (!kMasked) return v;
    using I = typename Simd<C>::I;
    const I on = __builtin_convertvector(load_pack<uint8_t, kLanes<C>>(where + i), I);
    return on != 0 ? v : all(-kInfinity<C>);
  }
};

// Calls f(i, u, nullptr) for each vector of a row, where u counts kWays accumulators, and then, if a part of a vector is
// left, f(n - kLanes, 0, lanes) for the last one; its true lanes are those that no other vector had.
template <class C, int kWays, class F>
INLINE void vectors(int64_t n, const F& f) {
  using I = typename Simd<C>::I;
  constexpr int kStep = kLanes<C>;
  int64_t i = 0;
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

template <class C>
struct Range {
  Extrema<C> of;
  bool whole;  // no entry is -inf: all participate
};
template <class R>
INLINE Range<typename R::C> range(const R& z, int64_t n) {
  using C = typename R::C;
  const auto smaller = [](auto a, auto b) { return a < b ? a : b; };
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  Vector<C> low[4], high[4];
  for (int u = 0; u < 4; ++u) low[u] = all(kInfinity<C>), high[u] = -low[u];
  vectors<C, 4>(n, [&](int64_t i, int u, auto) {
    const Vector<C> v = z.at(i);
    high[u] = v > high[u] ? v : high[u];
    low[u] = v < low[u] ? v : low[u];
  });
  const Extrema<C> of{reduce<C>(low, smaller), reduce<C>(high, larger)};
  if (of.low != -kInfinity<C>) return {of, true};
  Vector<C> least = all(kInfinity<C>);
  vectors<C, 1>(n, [&](int64_t i, int, auto) {
    const Vector<C> v = z.at(i), w = v == all(-kInfinity<C>) ? all(kInfinity<C>) : v;
    least = w < least ? w : least;
  });
  return {{halve<C>(least, smaller), of.high}, false};
}
template <bool kWhole, class C>
INLINE Vector<C> participating(Vector<C> z, Vector<C> v) {
  return kWhole ? v : z == all(-kInfinity<C>) ? Vector<C>{} : v;
}

// What else a row needs: e, scratch for n entries; whether to stream; and how far ahead the next row lies, to fetch it.
template <class C>
struct Means {
  C* e;
  bool streams;
  int64_t next, next_g;
};
template <class T>
INLINE void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);  // to the second level: the first holds the row at hand
}

template <bool kWhole, class R, class Y>
__attribute__((noinline)) void forward(const R z, int64_t n, Y* y, const Means<typename R::C> means, bool normalized,
                                       Extrema<typename R::C> row) {
  using C = typename R::C;
  const Vector<C> high = all(row.high), zero{};
  Vector<C> total[4] = {};
  vectors<C, 4>(n, [&](int64_t i, int u, auto lanes) {
    fetch(z.data + means.next + i);
    const Vector<C> out = exp_difference<C>(z.at(i), high);
    total[u] += only(lanes, out, zero);
    store(means.e + i, out);
  });
  const Factor<C> f = normalized ? factor(row) : Factor<C>{1, 1, 0, 1};
  const Vector<C> unit = all(f.unit), lo = all(f.lo), scale = all(f.inverse_range * (1 / sum<C>(total)));
  write_row(y, n, means.streams, [&](int64_t i) {
    const Vector<C> v = z.at(i);
    return participating<kWhole, C>(v, (v * unit - lo) * scale * load(means.e + i));
  });
}
// y = the row operation.
template <class R, class Y>
INLINE void forward(const R& z, int64_t n, Y* y, const Means<typename R::C>& means, bool normalized) {
  const auto row = range(z, n);
  (row.whole ? forward<true, R, Y> : forward<false, R, Y>)(z, n, y, means, normalized, row.of);
}

template <bool kWhole, class R, class G, class Y>
__attribute__((noinline)) void vjp(const R z, const G g, int64_t n, Y* dx, const Means<typename R::C> means,
                                   bool normalized, Extrema<typename R::C> row) {
  using C = typename R::C;
  using I = typename Simd<C>::I;
  using Count = typename Simd<C>::Count;
  const Vector<C> zero{};
  const Vector<C> low = all(row.low), high = all(row.high);
  const Factor<C> f = normalized ? factor(row) : room(row, n);
  const Vector<C> unit = all(f.unit), lo = all(f.lo);
  Vector<C> l[2] = {}, d[2] = {}, s[2] = {};
  I at_low[2] = {}, at_high[2] = {};
  vectors<C, 2>(n, [&](int64_t i, int u, auto lanes) {
    fetch(z.data + means.next + i);
    fetch(g.data + means.next_g + i);
    const Vector<C> v = z.at(i), e = exp_difference<C>(v, high);
    store(means.e + i, e);
    const Vector<C> ge = only(lanes, participating<kWhole, C>(v, g.at(i) * e), zero);
    l[u] += only(lanes, e, zero);
    s[u] += ge;
    d[u] += participating<kWhole, C>(v, ge * (v * unit - lo));
    at_low[u] -= only(lanes, I(v == low), I{});
    at_high[u] -= only(lanes, I(v == high), I{});
  });
  const auto plus = [](auto a, auto b) { return a + b; };
  const C inverse_l = 1 / halve<C>(l[0] + l[1], plus);
  const C S = halve<C>(s[0] + s[1], plus) * inverse_l;
  const C D = halve<C>(d[0] + d[1], plus) * inverse_l * f.inverse_range;
  const Count ties_low = halve<Count>(at_low[0] + at_low[1], plus), ties_high = halve<Count>(at_high[0] + at_high[1], plus);
  const C to_low = normalized && row.low < 0 ? (D - S) / C(ties_low) * f.inverse_range : C(0);
  const C to_high = normalized && row.high > 0 ? -D / C(ties_high) * f.inverse_range : C(0);
  // dx = p ((g a - D) + g / R) + extremal: g / R is what is left where softmax saturates, so it is added last. Where
  // 1 / R = inverse_range unit or g / R overflows, though the sum may not, the terms are made smaller.
  constexpr C large = kSame<C, float> ? C(0x1p100) : C(0x1p960);
  const C spare = f.inverse_range * f.unit < large ? C(1) : C(0x1p-60);
  const Vector<C> p_scale = all(inverse_l * (normalized ? 1 : f.inverse_unit)),
                  a_scale = all(f.inverse_range * spare), more = all(f.inverse_range * (spare * f.unit)),
                  Ds = all(D * spare), to_lows = all(to_low * (spare * f.unit)),
                  to_highs = all(to_high * (spare * f.unit)), grow = all(1 / spare);
  write_row(dx, n, means.streams, [&](int64_t i) {
    const Vector<C> v = z.at(i);
    const Vector<C> up = g.at(i);
    Vector<C> out = load(means.e + i) * p_scale * ((up * ((v * unit - lo) * a_scale) - Ds) + up * more);
    out += v == low ? to_lows : zero;
    out += v == high ? to_highs : zero;
    return participating<kWhole, C>(v, out * grow);
  });
}
// dx of one row (section 5 of the spec); g counts as 0 where z is -inf.
template <class R, class G, class Y>
INLINE void vjp(const R& z, const G& g, int64_t n, Y* dx, const Means<typename R::C>& means, bool normalized) {
  const auto row = range(z, n);
  (row.whole ? vjp<true, R, G, Y> : vjp<false, R, G, Y>)(z, g, n, dx, means, normalized, row.of);
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
  C* const e = g + job.width * pitch;
  C* const out = e + pitch;
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
    if (job.direct) {
      for (int64_t c = 0; c < count; ++c) {
        const T* const row = x + c * job.across.x;
        const Means<C> means{z, job.streams, job.across.x, job.across.g};
        const auto run = [&](auto source) {
          if constexpr (kVjp)
            vjp(source, Row<T, false>{up + c * job.across.g, nullptr}, job.n, y + c * job.across.y, means, job.normalized);
          else
            forward(source, job.n, y + c * job.across.y, means, job.normalized);
        };
        if (where == nullptr)
          run(Row<T, false>{row, nullptr});
        else
          run(Row<T, true>{row, where + c * job.across.where});
      }
      continue;
    }
    gather(x, job.along.x, job.across.x, where, job.along.where, job.across.where, z, pitch, job.n, count);
    if (kVjp) gather<T, C>(up, job.along.g, job.across.g, nullptr, 0, 0, g, pitch, job.n, count);
    // Of the same length as where it lies, so that its bits are the same, unless it is too short for one vector.
    const int64_t n = job.n < kLanes<C> ? kLanes<C> : job.n;
    const Means<C> means{e, false, 0, 0};
    for (int64_t c = 0; c < count; ++c) {
      const Row<C, false> row{z + c * pitch, nullptr};
      if constexpr (kVjp)
        vjp(row, Row<C, false>{g + c * pitch, nullptr}, n, out, means, job.normalized);
      else
        forward(row, n, out, means, job.normalized);
      std::memcpy(z + c * pitch, out, size_t(job.n) * sizeof(C));
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
