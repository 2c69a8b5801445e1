// The kernels, compiled once per instruction set: SA_SOFTMAX_ISA names the namespace, SA_SOFTMAX_VECTOR the bytes of a
// vector. The vectors are those of GCC and Clang, so one source serves SSE, AVX2, AVX-512 and NEON.
//
// Everything is in an unnamed namespace and nothing of the standard library is instantiated: see jobs.h.
#include <cstring>

#include "jobs.h"

namespace sa_softmax {
namespace {

#define INLINE __attribute__((always_inline)) inline

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <class C>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(SA_SOFTMAX_VECTOR)));
  typedef uint32_t U __attribute__((vector_size(SA_SOFTMAX_VECTOR)));
  typedef int32_t I __attribute__((vector_size(SA_SOFTMAX_VECTOR)));
  typedef uint32_t Word;
  typedef int32_t Count;
  static constexpr int mantissa = 23;
  static constexpr uint32_t bias = 127;
  static constexpr float exp_lowest = -87.33f;        // below: less than the smallest normal number (D5)
  static constexpr float ln2_high = 0.693145751953125f;  // n * ln2_high is exact
  static constexpr float ln2_low = 1.428606765330187e-06f;
  // exp(r) = 1 + r + r^2 q(r) for |r| <= ln2/2, relative error 1.1e-8
  static constexpr float q[] = {0.0013926213f, 0.008363203f, 0.041666556f, 0.16666576f, 0.5f};
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(SA_SOFTMAX_VECTOR)));
  typedef uint64_t U __attribute__((vector_size(SA_SOFTMAX_VECTOR)));
  typedef int64_t I __attribute__((vector_size(SA_SOFTMAX_VECTOR)));
  typedef uint64_t Word;
  typedef int64_t Count;
  static constexpr int mantissa = 52;
  static constexpr uint64_t bias = 1023;
  static constexpr double exp_lowest = -708.39;
  static constexpr double ln2_high = 0x1.62e42fefa3000p-1;
  static constexpr double ln2_low = 0x1.3de6af278ece6p-42;
  // relative error 3.3e-19
  static constexpr double q[] = {0x1.1f731ea5352cap-29, 0x1.af4e196027428p-26, 0x1.27e4db57442fbp-22,
                                 0x1.71de021a90822p-19, 0x1.a01a01a6dcaffp-16, 0x1.a01a01abef415p-13,
                                 0x1.6c16c16c162ccp-10, 0x1.11111111100cep-7,  0x1.5555555555556p-5,
                                 0x1.5555555555557p-3,  0.5};
};

template <class C>
using Vector = typename Simd<C>::V;
template <class C>
constexpr int kLanes = SA_SOFTMAX_VECTOR / int(sizeof(C));
template <class C>
constexpr int kChunk = 4 * kLanes<C>;  // four vectors at a time hide the latency of an addition
template <class C>
constexpr C kInfinity = C(__builtin_inf());

template <class C>
INLINE Vector<C> load(const C* p) {
  Vector<C> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class C>
INLINE void store(C* p, Vector<C> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class C>
INLINE Vector<C> all(C c) {
  return c - Vector<C>{};
}
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class To, class From>
INLINE To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Conversions, by integer arithmetic that the compiler vectorises. Rounding is to nearest even.

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(Bfloat x) { return as<float>(uint32_t(x.bits) << 16); }
INLINE float widen(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
  // 2^-14 (1 + m) - 2^-14: exact, and no subnormal float appears that a flushing processor would lose (D5)
  const uint32_t subnormal = as<uint32_t>(as<float>(magnitude + (113u << 23)) - as<float>(113u << 23));
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  return as<float>((magnitude >= (31u << 23) ? special : finite) | sign);
}

template <class T>
T narrow(float x);
template <>
INLINE float narrow<float>(float x) {
  return x;
}
template <>
INLINE Bfloat narrow<Bfloat>(float x) {
  const uint32_t bits = as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return Bfloat{uint16_t(nan ? 0x7fc0 : rounded)};
}
template <>
INLINE Half narrow<Half>(float x) {
  const uint32_t bits = as<uint32_t>(x), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // The ulp of numbers in [0.5, 1) is the smallest subnormal half, so the addition rounds.
  const uint32_t subnormal = as<uint32_t>(as<float>(magnitude) + 0.5f) - (126u << 23);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, or what rounds to infinity: 65520 and more
  return Half{uint16_t((magnitude >= 0x477ff000 ? large : finite) | sign)};
}
template <class T>
INLINE double narrow(double x) {
  return x;
}

template <class T>
struct ComputeType {
  using Type = float;
};
template <>
struct ComputeType<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeType<T>::Type;

// exp(z - m) for z <= m, within 2 ULP however large z and m are: the rounding error of the difference is known exactly
// and enters as a factor. -inf gives 0, NaN NaN.
template <class C>
INLINE Vector<C> exp_difference(Vector<C> z, Vector<C> m) {
  using S = Simd<C>;
  using U = typename S::U;
  const Vector<C> s = z - m;
  const Vector<C> b = s - z;
  const Vector<C> error = (z - (s - b)) - (m + b);
  const Vector<C> round = all(C(3) * C(uint64_t(1) << (S::mantissa - 1)));
  const Vector<C> shifted = s * C(1.44269504088896340736) + round;
  const Vector<C> n = shifted - round;
  const Vector<C> r = (s - n * S::ln2_high) - n * S::ln2_low;
  Vector<C> q = all(S::q[0]);
  for (unsigned i = 1; i < sizeof S::q / sizeof(C); ++i) q = q * r + S::q[i];
  const Vector<C> p = (r * r) * q + r;
  const U scale = (as<U>(shifted) << S::mantissa) + (U{} + (S::bias << S::mantissa));
  const Vector<C> e = (p + 1) * as<Vector<C>>(scale);
  return s < all(S::exp_lowest) ? Vector<C>{} : e * error + e;
}

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

// One number out of a vector, halving: f combines two vectors or two numbers.
template <class C, class V, class F>
INLINE C halve(const V& v, F f) {
  if constexpr (sizeof v > 16) {
    typedef C Part __attribute__((vector_size(sizeof v / 2)));
    Part parts[2];
    std::memcpy(parts, &v, sizeof v);
    return halve<C>(f(parts[0], parts[1]), f);
  } else if constexpr (sizeof v / sizeof(C) == 4) {
    return f(f(C(v[0]), C(v[2])), f(C(v[1]), C(v[3])));
  } else {
    return f(C(v[0]), C(v[1]));
  }
}
template <class C, class V, class F>
INLINE C reduce(const V (&v)[4], F f) {
  return halve<C>(f(f(v[0], v[1]), f(v[2], v[3])), f);
}
template <class C, class V>
INLINE C sum(const V (&v)[4]) {
  return reduce<C>(v, [](auto a, auto b) { return a + b; });
}

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

// dx of one row (section 5 of the spec); g counts as 0 where z is -inf. dx may be z or g; e holds n entries of scratch.
template <class C>
__attribute__((noinline)) void vjp_row(const C* z, const C* g, int64_t n, C* dx, C* e, bool normalized) {
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
    Vector<C> out[4];
    for (int u = 0; u < 4; ++u) {
      const Vector<C> v = load(at + u * kLanes<C>);
      const Vector<C> up = load(gs.at + u * kLanes<C>), p = load(es.at + u * kLanes<C>) * p_scale;
      const Vector<C> a = (v * unit - lo) * a_scale;
      const Vector<C> extremal = (v == low ? to_lows : zero) + (v == high ? to_highs : zero);
      const Vector<C> dx = p * (up * a - Ds) * outside + (up * p + extremal) * a_scale * inside;
      out[u] = v == excluded ? zero : dx;
    }
    store_chunk(dx, i, n, out);
  });
}

// Copies `count` rows of a tile to scratch: dst[c * pitch + i] = element i of row c, and -inf where `where` is false.
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
    if constexpr (kSame<T, C>) {
      if (where == nullptr && job.along.x == 1 && job.along.y == 1 && (!kVjp || job.along.g == 1)) {
        for (int64_t c = 0; c < count; ++c) {
          C* const out = y + c * job.across.y;
          if (kVjp)
            vjp_row<C>(x + c * job.across.x, up + c * job.across.g, job.n, out, out, job.normalized);
          else
            forward_row<C>(x + c * job.across.x, job.n, out, out, job.normalized);
        }
        continue;
      }
    }
    gather(x, job.along.x, job.across.x, where, job.along.where, job.across.where, z, pitch, job.n, count);
    if (kVjp) gather<T, C>(up, job.along.g, job.across.g, nullptr, 0, 0, g, pitch, job.n, count);
    for (int64_t c = 0; c < count; ++c) {
      C* const row = z + c * pitch;
      if (kVjp)
        vjp_row<C>(row, g + c * pitch, job.n, row, e, job.normalized);
      else
        forward_row<C>(row, job.n, row, e, job.normalized);
    }
    scatter(z, pitch, y, job.along.y, job.across.y, job.n, count);
  }
}

// Attention. A block of queries keeps its whole rows of scores in scratch, so extrema are exact and each exp is
// computed once.

#if SA_SOFTMAX_VECTOR == 64 || defined(__aarch64__)
constexpr int kRows = 6, kVectors = 4;  // 32 registers
#elif SA_SOFTMAX_VECTOR == 32
constexpr int kRows = 6, kVectors = 2;  // 16 registers
#else
constexpr int kRows = 4, kVectors = 2;
#endif
template <class C>
constexpr int64_t kColumns = kVectors * kLanes<C>;
static_assert(kColumns<float> <= kPanel);

// c[r][0..kColumns) (+)= sum over i of a[r][i] b[i][0..kColumns), for R rows.
template <class C, int R>
INLINE void multiply_rows(const C* a, int64_t a_pitch, const C* b, int64_t b_pitch, C* c, int64_t c_pitch,
                          int64_t depth, bool add) {
  Vector<C> sums[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < kVectors; ++u) sums[r][u] = add ? load(c + r * c_pitch + u * kLanes<C>) : Vector<C>{};
  for (int64_t i = 0; i < depth; ++i) {
    Vector<C> bs[kVectors];
    for (int u = 0; u < kVectors; ++u) bs[u] = load(b + i * b_pitch + u * kLanes<C>);
    for (int r = 0; r < R; ++r) {
      const Vector<C> as = all(a[r * a_pitch + i]);
      for (int u = 0; u < kVectors; ++u) sums[r][u] += as * bs[u];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < kVectors; ++u) store(c + r * c_pitch + u * kLanes<C>, sums[r][u]);
}
template <class C>
void multiply(const C* a, int64_t a_pitch, const C* b, int64_t b_pitch, C* c, int64_t c_pitch, int64_t rows,
              int64_t depth, bool add) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    multiply_rows<C, kRows>(a + r * a_pitch, a_pitch, b, b_pitch, c + r * c_pitch, c_pitch, depth, add);
  for (; r < rows; ++r)
    multiply_rows<C, 1>(a + r * a_pitch, a_pitch, b, b_pitch, c + r * c_pitch, c_pitch, depth, add);
}

template <class T>
struct Block {
  using C = Compute<T>;
  const AttentionJob& job;
  AttentionStrides base;  // offsets of the batch and the key/value head
  int64_t first, count;   // rows of the block; row r is query r % tq of head r / tq of the group
  int64_t keys;           // the first keys, which causality lets some row see
  int64_t pitch;
  C *scores, *e, *queries, *panel, *output, *poisoned;

  // Offsets of row r in q, bias, mask and o.
  AttentionStrides row(int64_t r) const {
    const int64_t h = (first + r) / job.tq, i = (first + r) % job.tq;
    return {base.q + h * job.head.q + i * job.row.q,          0, 0, base.bias + h * job.head.bias + i * job.row.bias,
            base.mask + h * job.head.mask + i * job.row.mask, base.o + h * job.head.o + i * job.row.o};
  }
  // The number of keys that causality lets row r see.
  int64_t visible(int64_t r) const {
    if (!job.causal) return job.tk;
    // q_offset is any integer: compare without adding to it.
    const int64_t i = (first + r) % job.tq;
    if (job.q_offset >= job.tk - 1 - i) return job.tk;
    return job.q_offset < -i ? 0 : i + job.q_offset + 1;
  }
  const T* element(const void* data, int64_t offset) const { return static_cast<const T*>(data) + offset; }

  void multiply_keys() {
    if (job.d == 0)
      for (int64_t r = 0; r < count; ++r) std::memset(scores + r * pitch, 0, size_t(pitch) * sizeof(C));
    for (int64_t d = 0; d < job.d; d += kDepth) {
      const int64_t depth = least(kDepth, job.d - d);
      for (int64_t r = 0; r < count; ++r) {
        const T* const q = element(job.q, row(r).q + d * job.column.q);
        for (int64_t i = 0; i < depth; ++i) queries[r * kDepth + i] = widen(q[i * job.column.q]);
      }
      for (int64_t j = 0; j < keys; j += kColumns<C>) {
        const int64_t width = least(kColumns<C>, keys - j);
        const T* const k = element(job.k, base.k + j * job.row.k + d * job.column.k);
        if (width < kColumns<C>) std::memset(panel, 0, size_t(depth * kColumns<C>) * sizeof(C));
        for (int64_t c = 0; c < width; ++c)
          for (int64_t i = 0; i < depth; ++i)
            panel[i * kColumns<C> + c] = widen(k[c * job.row.k + i * job.column.k]);
        multiply<C>(queries, kDepth, panel, kColumns<C>, scores + j, pitch, count, depth, d > 0);
      }
    }
  }
  // scale, bias, mask and causality; -inf marks what does not participate.
  void finish_scores() {
    const C scale = C(job.scale);
    for (int64_t r = 0; r < count; ++r) {
      C* const s = scores + r * pitch;
      const AttentionStrides at = row(r);
      const int64_t seen = visible(r);
      if (job.bias == nullptr)
        for (int64_t j = 0; j < seen; ++j) s[j] *= scale;
      else if (const T* const bias = element(job.bias, at.bias); job.column.bias == 1)
        for (int64_t j = 0; j < seen; ++j) s[j] = s[j] * scale + widen(bias[j]);
      else
        for (int64_t j = 0; j < seen; ++j) s[j] = s[j] * scale + widen(bias[j * job.column.bias]);
      if (job.mask != nullptr) {
        const uint8_t* const mask = job.mask + at.mask;
        if (job.column.mask == 1)
          for (int64_t j = 0; j < seen; ++j) s[j] = mask[j] ? s[j] : -kInfinity<C>;
        else
          for (int64_t j = 0; j < seen; ++j) s[j] = mask[j * job.column.mask] ? s[j] : -kInfinity<C>;
      }
      for (int64_t j = seen; j < padded(keys); ++j) s[j] = -kInfinity<C>;
    }
  }
  // Columns [d, d + width) of the output. With `careful`, entries of v that are not finite count as 0: poison() has
  // seen where they belong.
  void multiply_values(int64_t d, int64_t width, bool careful) {
    for (int64_t r = 0; r < count; ++r) std::memset(output + r * kPanel, 0, sizeof(C) * kColumns<C>);
    for (int64_t j = 0; j < keys; j += kDepth) {
      const int64_t depth = least(kDepth, keys - j);
      const T* const v = element(job.v, base.v + j * job.row.v + d * job.column.v);
      if constexpr (kSame<T, C>) {
        if (width == kColumns<C> && job.column.v == 1 && !careful) {
          multiply<C>(scores + j, pitch, v, job.row.v, output, kPanel, count, depth, true);
          continue;
        }
      }
      if (width < kColumns<C>) std::memset(panel, 0, size_t(depth * kColumns<C>) * sizeof(C));
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t c = 0; c < width; ++c) {
          const C value = widen(v[i * job.row.v + c * job.column.v]);
          panel[i * kColumns<C> + c] = !careful || value - value == 0 ? value : C(0);
        }
      multiply<C>(scores + j, pitch, panel, kColumns<C>, output, kPanel, count, depth, true);
    }
  }
  // Marks the outputs in columns [d, d + width) that a participating entry of v that is not finite makes NaN (A6).
  void poison(int64_t d, int64_t width) {
    for (int64_t r = 0; r < count; ++r) std::memset(poisoned + r * kPanel, 0, sizeof(C) * kPanel);
    for (int64_t j = 0; j < keys; ++j) {
      const T* const v = element(job.v, base.v + j * job.row.v + d * job.column.v);
      for (int64_t c = 0; c < width; ++c) {
        const C value = widen(v[c * job.column.v]);
        if (value - value == 0) continue;
        for (int64_t r = 0; r < count; ++r)
          if (scores[r * pitch + j] != -kInfinity<C>) poisoned[r * kPanel + c] = 1;
      }
    }
  }
  void score() {
    multiply_keys();
    finish_scores();
  }
  void weigh() {
    for (int64_t r = 0; r < count; ++r)
      forward_row<C>(scores + r * pitch, padded(keys), scores + r * pitch, e, job.normalized);
  }
  bool finite(int64_t width) const {
    C sum = 0;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < width; ++c) sum += output[r * kPanel + c] * 0;
    return sum == 0;
  }
  void write(int64_t d, int64_t width) {
    for (int64_t r = 0; r < count; ++r) {
      T* const o = static_cast<T*>(job.o) + row(r).o + d * job.column.o;
      for (int64_t c = 0; c < width; ++c) o[c * job.column.o] = narrow<T>(output[r * kPanel + c]);
    }
  }
  void run() {
    score();
    weigh();
    for (int64_t d = 0; d < job.dv; d += kColumns<C>) {
      const int64_t width = least(kColumns<C>, job.dv - d);
      multiply_values(d, width, false);
      if (!finite(width)) {
        // A value that is not finite, wherever it stands, shows in the product, if only as 0 * inf: so the search for
        // it costs nothing where all is well. The scores are gone and must be computed again.
        score();
        poison(d, width);
        weigh();
        multiply_values(d, width, true);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = 0; c < width; ++c)
            if (poisoned[r * kPanel + c] != 0) output[r * kPanel + c] = C(__builtin_nan(""));
      }
      write(d, width);
    }
  }
};

template <class T>
void attention(const AttentionJob& job, int64_t begin, int64_t end, void* scratch) {
  using C = Compute<T>;
  const int64_t pitch = padded(job.tk);
  C* const scores = static_cast<C*>(scratch);
  C* const e = scores + job.block * pitch;
  C* const queries = e + pitch;
  C* const panel = queries + job.block * kDepth;
  C* const output = panel + kDepth * kPanel;
  C* const poisoned = output + job.block * kPanel;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % job.blocks(), head = task / job.blocks() % job.heads;
    int64_t rest = task / job.blocks() / job.heads;
    AttentionStrides base{head * job.group * job.head.q,    head * job.head.k,
                          head * job.head.v,                head * job.group * job.head.bias,
                          head * job.group * job.head.mask, head * job.group * job.head.o};
    for (int64_t axis = job.batch_rank - 1; axis >= 0; --axis) {
      const int64_t index = rest % job.batch_shape[axis];
      rest /= job.batch_shape[axis];
      base.q += index * job.batch[axis].q;
      base.k += index * job.batch[axis].k;
      base.v += index * job.batch[axis].v;
      base.bias += index * job.batch[axis].bias;
      base.mask += index * job.batch[axis].mask;
      base.o += index * job.batch[axis].o;
    }
    const int64_t first = block * job.block, count = least(job.block, job.group * job.tq - first);
    Block<T> rows{job, base, first, count, 0, pitch, scores, e, queries, panel, output, poisoned};
    for (int64_t r = 0; r < count; ++r)
      if (const int64_t seen = rows.visible(r); seen > rows.keys) rows.keys = seen;
    rows.run();
  }
}

}  // namespace

namespace SA_SOFTMAX_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    SA_SOFTMAX_NAME,
    {rows<Half, false>, rows<Bfloat, false>, rows<float, false>, rows<double, false>},
    {rows<Half, true>, rows<Bfloat, true>, rows<float, true>, rows<double, true>},
    {attention<Half>, attention<Bfloat>, attention<float>, attention<double>},
};

}  // namespace SA_SOFTMAX_ISA
}  // namespace sa_softmax
