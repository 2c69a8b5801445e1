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

// p 2^n, where n = shifted - round is whole: a normal number, or not asked for.
template <class C>
INLINE Vector<C> scaled(Vector<C> p, [[maybe_unused]] Vector<C> n, [[maybe_unused]] Vector<C> shifted) {
#if defined(__AVX512F__)
  if constexpr (kSame<C, float>)
    return _mm512_scalef_ps(p, n);
  else
    return _mm512_scalef_pd(p, n);
#else
  using S = Simd<C>;
  using U = typename S::U;
  return p * as<Vector<C>>((as<U>(shifted) << S::mantissa) + (U{} + (S::bias << S::mantissa)));
#endif
}

// exp(z - m) for z <= m, within 2 ULP however large z and m are: the rounding error of the difference is known exactly
// and enters as a factor. -inf gives 0, NaN NaN. Not kExact: the difference as it is rounded.
template <class C, bool kExact = true>
INLINE Vector<C> exp_difference(Vector<C> z, Vector<C> m) {
  using S = Simd<C>;
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
  const Vector<C> e = scaled<C>(p + 1, n, shifted);
  return s < all(S::exp_lowest) ? Vector<C>{} : kExact ? e * error + e : e;
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

}  // namespace
}  // namespace sa_softmax
