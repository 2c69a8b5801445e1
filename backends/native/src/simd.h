// The vectors of one instruction set and the arithmetic on them. The files that include this are compiled once per
// instruction set: SA_SOFTMAX_ISA names the namespace, SA_SOFTMAX_VECTOR the bytes of a vector. The vectors are those of
// GCC and Clang, so one source serves SSE, AVX2, AVX-512 and NEON.
//
// Everything is in an unnamed namespace and nothing of the standard library is instantiated: see jobs.h.
#pragma once

#include <cstddef>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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
  typedef float Four __attribute__((vector_size(16)));
  typedef uint32_t Word;
  typedef int32_t Count;
  static constexpr int mantissa = 23;
  static constexpr uint32_t bias = 127;
  static constexpr float log2e_high = 0x1.715476p+0f, log2e_low = 0x1.4ae0cp-26f;
  static constexpr float log2e_short = 0x1.714p+0f, log2e_rest = 0x1.47652cp-12f;
  static constexpr uint32_t upper = 0xfffff000;  // 12 bits of a number
  // 2^r = 1 + r q(r) for |r| <= 1/2, relative error 3.0e-9
  static constexpr float q[] = {0.00015328523f, 0.0013390981f, 0.009618501f, 0.055503596f, 0.24022648f, 0.6931472f};
  static constexpr float lowest = -87.45f;  // exp(lowest) is less than the smallest normal number (D5)
  // 2^r for 0 <= r < 1, relative error 7.6e-8
  static constexpr float power[] = {0.001875624f, 0.008994562f, 0.055821285f, 0.24015571f, 0.6931527f, 0.99999994f};
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(SA_SOFTMAX_VECTOR)));
  typedef uint64_t U __attribute__((vector_size(SA_SOFTMAX_VECTOR)));
  typedef int64_t I __attribute__((vector_size(SA_SOFTMAX_VECTOR)));
  typedef double Four __attribute__((vector_size(32)));
  typedef uint64_t Word;
  typedef int64_t Count;
  static constexpr int mantissa = 52;
  static constexpr uint64_t bias = 1023;
  static constexpr double log2e_high = 0x1.71547652b82fep+0, log2e_low = 0x1.777d0ffda0d24p-56;
  static constexpr double log2e_short = 0x1.715476p+0, log2e_rest = 0x1.4ae0bf85ddf44p-26;
  static constexpr uint64_t upper = 0xfffffffff8000000;  // 26 bits
  // relative error 4.1e-18
  static constexpr double q[] = {0x1.e825d7a566795p-32, 0x1.e6131d817425cp-28, 0x1.b525ff452f68ep-24,
                                 0x1.62bfccf28c5d1p-20, 0x1.ffcbfbff0d465p-17, 0x1.4309130c672c5p-13,
                                 0x1.5d87fe78b29f6p-10, 0x1.3b2ab6fba0fbcp-7,  0x1.c6b08d704a0d8p-5,
                                 0x1.ebfbdff82c59dp-3,  0x1.62e42fefa39efp-1};
  static constexpr double lowest = -708.45;
  // relative error 3.4e-18
  static constexpr double power[] = {0x1.586b6d162b7fap-31, 0x1.c2b5d2fc6fcecp-28, 0x1.b86179d5a0860p-24,
                                     0x1.628f04d8f7ff6p-20, 0x1.ffcfcbe0f1db4p-17, 0x1.4308f9ef8c7efp-13,
                                     0x1.5d87ff4f35e0dp-10, 0x1.3b2ab6f72514bp-7,  0x1.c6b08d7066034p-5,
                                     0x1.ebfbdff82c028p-3,  0x1.62e42fefa39f5p-1,  1};
};

template <class C>
using Vector = typename Simd<C>::V;
template <class C>
using Four = typename Simd<C>::Four;
template <class C>
constexpr int kLanes = SA_SOFTMAX_VECTOR / int(sizeof(C));
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
  return Bfloat{uint16_t(x == x ? rounded : 0x7fc0)};
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

// Vectors of the compute type from memory of type T.
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

// v where the bytes from p on are true, else -inf. By intrinsics: GCC converts bytes one by one.
template <class C>
INLINE Vector<C> where_true(const uint8_t* p, Vector<C> v) {
  const Vector<C> no = all(-kInfinity<C>);
#if defined(__AVX512F__)
  if constexpr (kSame<C, float>) {
    const __m128i on = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_mask_mov_ps(no, _mm_test_epi8_mask(on, on), v);
  } else {
    const __m128i on = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm512_mask_mov_pd(no, __mmask8(_mm_test_epi8_mask(on, on)), v);
  }
#elif defined(__AVX2__)
  if constexpr (kSame<C, float>) {
    const __m128i on = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return as<typename Simd<C>::I>(_mm256_cvtepu8_epi32(on)) != 0 ? v : no;
  } else {
    int32_t on;
    std::memcpy(&on, p, sizeof on);
    return as<typename Simd<C>::I>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(on))) != 0 ? v : no;
  }
#else
  return __builtin_convertvector(load_pack<uint8_t, kLanes<C>>(p), typename Simd<C>::I) != 0 ? v : no;
#endif
}

// What a row's exponentials are multiples of. Softmax is the same for exp(z - s) whatever s is; with s = origin + power ln 2,
// where z - origin is exact and `power` whole, exp(z - s) = 2^(n - power) 2^r and nothing is rounded but r:
//     n + r = (z - origin) log2(e), n whole, |r| <= 1/2
template <class C>
struct Shift {
  C origin;
  C round;   // what is added to a number to round it and to subtract `power`
  C lowest;  // smaller z - origin have exponentials below the smallest normal number, even over their sum
};
template <class C>
INLINE bool is_huge(C high) {  // it is subtracted before anything is rounded
  return !(high >= -2048 && high <= 2048);
}
template <class C>
constexpr C kRound = C(3) * C(uint64_t(1) << (Simd<C>::mantissa - 1));
// For a row with the maximum `high`, whose exponential is between 2.8 and 5.7. Where scores are huge, those that count are
// so near that high is subtracted exactly (Sterbenz).
template <class C>
INLINE Shift<C> shift(C high) {
  using S = Simd<C>;
  const C origin = is_huge(high) ? high : C(0);
  const C top = high - origin;
  return {origin, kRound<C> + 2 - ((top * S::log2e_high + kRound<C>) - kRound<C>), top + S::lowest};
}
// For any row whose maximum is in [kLeast, kMost], without knowing it: the exponential of the maximum is at least 2, and
// the sum of 2^32 finite.
template <class C>
constexpr C kLeast = -20;
template <class C>
constexpr C kMost = 40;
constexpr int kCommonPower = 30;
template <class C>
INLINE Shift<C> common_shift() {
  return {0, kRound<C>, kLeast<C> + Simd<C>::lowest};
}

// x, or 0 where v is less than `lowest`; where v is NaN, x.
template <class C>
INLINE Vector<C> unless_below(Vector<C> v, C lowest, Vector<C> x) {
#if defined(__AVX512F__)
  if constexpr (kSame<C, float>)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, all(lowest), _CMP_NLT_UQ), x);
  else
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(v, all(lowest), _CMP_NLT_UQ), x);
#else
  return v < all(lowest) ? Vector<C>{} : x;
#endif
}
// a b + c, rounded once. Elsewhere compilers may choose; here the one rounding is what counts.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
template <class C>
INLINE Vector<C> fused(Vector<C> a, Vector<C> b, Vector<C> c) {
#if defined(__AVX512F__)
  if constexpr (kSame<C, float>)
    return _mm512_fmadd_ps(a, b, c);
  else
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  if constexpr (kSame<C, float>)
    return _mm256_fmadd_ps(a, b, c);
  else
    return _mm256_fmadd_pd(a, b, c);
#else
  if constexpr (kSame<C, float>)
    return vfmaq_f32(c, a, b);
  else
    return vfmaq_f64(c, a, b);
#endif
}
#endif
// v log2(e) - n, n whole: only the difference is rounded.
template <class C>
INLINE Vector<C> remainder_of(Vector<C> v, Vector<C> n) {
  using S = Simd<C>;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fused<C>(v, all(S::log2e_low), fused<C>(v, all(S::log2e_high), -n));
#else
  const Vector<C> upper = as<Vector<C>>(as<typename S::U>(v) & S::upper);  // times log2e_short: exact, as the rest is
  return ((upper * S::log2e_short - n) + (v - upper) * S::log2e_short) + v * S::log2e_rest;
#endif
}
// p 2^n for the whole number n = floor(power) or, without an instruction for that, n = shifted - kRound + extra.
template <class C>
INLINE Vector<C> scaled(Vector<C> p, [[maybe_unused]] Vector<C> power, [[maybe_unused]] Vector<C> shifted,
                        [[maybe_unused]] int extra) {
#if defined(__AVX512F__)
  if constexpr (kSame<C, float>)
    return _mm512_scalef_ps(p, power);
  else
    return _mm512_scalef_pd(p, power);
#else
  using S = Simd<C>;
  using U = typename S::U;
  const typename S::Word bias = S::bias + typename S::Word(extra);
  return p * as<Vector<C>>((as<U>(shifted) << S::mantissa) + (U{} + (bias << S::mantissa)));
#endif
}
// exp(z - s) of `shift`, where v = z - origin, within 2 ULP. -inf gives 0, NaN NaN. kCommon: of common_shift, whose power
// is a factor of the polynomial, or of what multiplies it.
template <class C, bool kCommon = false>
INLINE Vector<C> exp_shifted(Vector<C> v, const Shift<C>& shift) {
  using S = Simd<C>;
  const Vector<C> shifted = v * S::log2e_high + shift.round;
  const Vector<C> n = shifted - shift.round;
  const Vector<C> r = remainder_of<C>(v, n);
#if defined(__AVX512F__)
  constexpr C factor = kCommon ? C(1 << kCommonPower) : C(1);
#else
  constexpr C factor = 1;
#endif
  Vector<C> p = all(S::q[0] * factor);
  for (unsigned i = 1; i < sizeof S::q / sizeof(C); ++i) p = p * r + S::q[i] * factor;
  p = p * r + factor;
  p = scaled<C>(p, kCommon ? n : shifted - kRound<C>, shifted, kCommon ? kCommonPower : 0);
  return unless_below(v, shift.lowest, p);
}

template <class C>
constexpr C kLowestPower = 1 - C(Simd<C>::bias);
// 2^v for v <= 0, by the polynomial `power` of v - floor(v); 0 where that is not a normal number.
template <class C, unsigned kTerms>
INLINE Vector<C> power_of_2(Vector<C> v, const C (&power)[kTerms]) {
#if defined(__AVX512DQ__)
  const Vector<C> shifted = v;  // not read
  Vector<C> r;
  if constexpr (kSame<C, float>)
    r = _mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  else
    r = _mm512_reduce_pd(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  const Vector<C> shifted = (v - C(0.5)) + kRound<C>;
  const Vector<C> r = v - (shifted - kRound<C>);
#endif
  Vector<C> p = all(power[0]);
  for (unsigned i = 1; i < kTerms; ++i) p = p * r + power[i];
  return unless_below(v, kLowestPower<C>, scaled<C>(p, v, shifted, 0));
}

constexpr auto smaller = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto plus = [](auto a, auto b) { return a + b; };
template <class V, class F>
INLINE V combine(const V (&v)[4], F f) {
  return f(f(v[0], v[1]), f(v[2], v[3]));
}

// One number out of a vector, halving: f combines two vectors or two numbers.
template <class C, class V, class F>
INLINE auto fold(const V& v, F f) {  // to 16 bytes
  if constexpr (sizeof v > 16) {
    typedef C Part __attribute__((vector_size(sizeof v / 2)));
    Part parts[2];
    std::memcpy(parts, &v, sizeof v);
    return fold<C>(f(parts[0], parts[1]), f);
  } else {
    return v;
  }
}
template <class C, class V, class F>
INLINE C halve(const V& v, F f) {
  const auto part = fold<C>(v, f);
  if constexpr (sizeof part / sizeof(C) == 4)
    return f(f(C(part[0]), C(part[2])), f(C(part[1]), C(part[3])));
  else
    return f(C(part[0]), C(part[1]));
}
// One number out of each of four vectors: on the way the four share vectors.
template <class C, class V, class F>
INLINE auto halve_four(const V (&v)[4], F f) {
  typedef C Out __attribute__((vector_size(4 * sizeof(C))));
  Out out;
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    const auto two = [&](V a, V b) {
      const __m512 x = as<__m512>(a), y = as<__m512>(b);
      return f(as<V>(_mm512_unpacklo_ps(x, y)), as<V>(_mm512_unpackhi_ps(x, y)));
    };
    const __m512d ab = as<__m512d>(two(v[0], v[1])), cd = as<__m512d>(two(v[2], v[3]));
    const auto part = fold<C>(f(as<V>(_mm512_unpacklo_pd(ab, cd)), as<V>(_mm512_unpackhi_pd(ab, cd))), f);
    std::memcpy(&out, &part, sizeof out);
    return out;
  } else {
    const auto two = [&](V a, V b) {
      const __m512d x = as<__m512d>(a), y = as<__m512d>(b);
      return fold<C>(f(as<V>(_mm512_unpacklo_pd(x, y)), as<V>(_mm512_unpackhi_pd(x, y))), f);
    };
    const auto ab = two(v[0], v[1]), cd = two(v[2], v[3]);
    std::memcpy(&out, &ab, sizeof ab);
    std::memcpy(reinterpret_cast<char*>(&out) + sizeof ab, &cd, sizeof cd);
    return out;
  }
#else
  for (int c = 0; c < 4; ++c) out[c] = halve<C>(v[c], f);
  return out;
#endif
}
template <class C, class V, class F>
INLINE C reduce(const V (&v)[4], F f) {
  return halve<C>(f(f(v[0], v[1]), f(v[2], v[3])), f);
}
template <class C, class V>
INLINE C sum(const V (&v)[4]) {
  return reduce<C>(v, [](auto a, auto b) { return a + b; });
}

}  // namespace
}  // namespace sa_softmax
