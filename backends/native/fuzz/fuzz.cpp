// Random calls of the checked interface: shapes, strides, types, attributes and values of every kind, right and wrong.
//
//     fuzz [count] [seed] [callers]
//
// Wrong calls must end in Error. Right ones must agree with the definitions evaluated here in long double, within the
// bounds of section 7 of docs/spec.md, and write nothing but their output. Memory errors are for the sanitizers: every
// buffer ends exactly where its last element does.
//
// With several callers, threads that call at the same time, each call runs alone and then on the pool, which must give
// the same bits; the calls are larger, for the pool to have tasks. Races are for ThreadSanitizer.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>

#include "pool.h"
#include "sa_softmax/kernels.h"

using namespace sa_softmax;
using Real = long double;

namespace {

thread_local std::mt19937_64 random_bits;
int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }
bool chance(int percent) { return below(100) < percent; }
double uniform() { return double(random_bits() >> 11) * 0x1p-53; }

struct Format {
  size_t bytes;
  int mantissa;          // stored bits
  Real unit, unit_compute, floor, largest, tiny_compute;
};
const Format kFormats[] = {
    {2, 10, 0x1p-11L, 0x1p-24L, 0x1p-24L, 65504.0L, FLT_MIN},
    {2, 7, 0x1p-8L, 0x1p-24L, FLT_MIN, 0x1.fep127L, FLT_MIN},
    {4, 23, 0x1p-24L, 0x1p-24L, FLT_MIN, FLT_MAX, FLT_MIN},
    {8, 52, 0x1p-53L, 0x1p-53L, DBL_MIN, DBL_MAX, DBL_MIN},
};
const Format& format(DType dtype) { return kFormats[int(dtype)]; }

Real decode(DType dtype, const void* p) {
  if (dtype == DType::float64) {
    double d;
    std::memcpy(&d, p, 8);
    return d;
  }
  uint32_t bits = 0;
  std::memcpy(&bits, p, format(dtype).bytes);
  if (dtype == DType::float16) {
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const Real sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 31) return mantissa ? std::numeric_limits<Real>::quiet_NaN() : sign * INFINITY;
    return sign * (exponent ? std::ldexp(Real(1024 + mantissa), exponent - 25) : std::ldexp(Real(mantissa), -24));
  }
  if (dtype == DType::bfloat16) bits <<= 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// Any number of the type near the value: inputs need no exact rounding.
void encode(DType dtype, double value, void* p) {
  if (dtype == DType::float64) {
    std::memcpy(p, &value, 8);
    return;
  }
  const float f = std::isnan(value) ? NAN : float(std::fmin(std::fmax(value, -DBL_MAX), DBL_MAX));
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (dtype == DType::bfloat16) bits >>= 16;
  if (dtype == DType::float16) {
    const double magnitude = std::fabs(value);
    uint32_t half = 0x7bff;
    if (std::isnan(value)) half = 0x7e01;
    else if (std::isinf(value)) half = 0x7c00;
    else if (magnitude < 0x1p-14) half = uint32_t(magnitude * 0x1p24);
    else if (magnitude < 65504) {
      int exponent;
      const double mantissa = std::frexp(magnitude, &exponent);
      half = uint32_t(exponent + 14) << 10 | (uint32_t(mantissa * 2048) & 1023);
    }
    bits = half | (std::signbit(value) ? 0x8000 : 0);
  }
  std::memcpy(p, &bits, format(dtype).bytes);
}

enum class Values { any, moderate, bounded };  // of every kind; up to 100; up to 1
double value(Values kind, DType dtype, double scale) {
  const double normal = std::sqrt(-2 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform());
  if (kind == Values::bounded) return 2 * uniform() - 1;
  if (kind == Values::any) {
    static const double special[] = {0, -0.0, 1, -1, 2, 2, -INFINITY, -INFINITY, INFINITY, NAN, 1e30, -1e30, 1e-30};
    if (chance(8)) return special[below(13)];
    if (chance(2)) return (chance(50) ? -1 : 1) * double(format(dtype).largest);
    if (chance(1)) return normal * (dtype == DType::float64 ? 1e-300 : 1e-36);
  }
  if (chance(20)) return double(below(7) - 3);
  return std::fmax(-100, std::fmin(100, normal * scale));
}

// An array in a buffer of its own, with strides of any kind.
struct Tensor {
  Array array;
  std::vector<unsigned char> bytes, before;
  size_t size;     // of an element
  int64_t first = 0;  // offset of element (0, ..., 0)

  Tensor(Shape shape, size_t size, bool output) : size(size) {
    const size_t rank = shape.size();
    std::vector<size_t> order(rank);
    std::iota(order.begin(), order.end(), 0);
    if (chance(50)) std::shuffle(order.begin(), order.end(), random_bits);
    Shape strides(rank);
    int64_t step = chance(80) ? 1 : 1 + below(3), last = 0;
    for (size_t i = rank; i-- > 0;) {
      const size_t axis = order[i];
      const int64_t length = std::max<int64_t>(shape[axis], 1);
      const bool repeated = !output && chance(5), reversed = chance(10);
      strides[axis] = repeated ? 0 : reversed ? -step : step;
      if (reversed && !repeated) first += step * (length - 1);
      if (!repeated) last += step * (length - 1), step *= length;
      if (chance(15)) step += below(4);
    }
    int64_t count = 1;
    for (const int64_t length : shape) count *= length;
    bytes.resize(count == 0 ? 0 : size_t(last + 1) * size);
    bytes.shrink_to_fit();
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(below(256));
    array = Array(count == 0 ? nullptr : bytes.data() + first * int64_t(size), std::move(shape), std::move(strides));
  }
  void* at(const Shape& index) {
    int64_t offset = first;
    const size_t skip = index.size() - array.shape.size();  // broadcasting aligns the last axes
    for (size_t i = 0; i < array.shape.size(); ++i)
      if (array.shape[i] != 1) offset += index[skip + i] * array.strides[i];
    return bytes.data() + offset * int64_t(size);
  }
};

template <class F>
void each(const Shape& shape, const F& f) {
  Shape index(shape.size(), 0);
  for (const int64_t length : shape)
    if (length == 0) return;
  for (;;) {
    f(index);
    size_t axis = shape.size();
    while (axis > 0 && ++index[axis - 1] == shape[axis - 1]) index[--axis] = 0;
    if (axis == 0) return;
  }
}

Tensor numbers(Shape shape, DType dtype, Values kind) {
  static const double scales[] = {1e-3, 1, 1, 10, 30};
  const double scale = scales[below(5)];
  Tensor t(std::move(shape), format(dtype).bytes, false);
  each(t.array.shape, [&](const Shape& index) { encode(dtype, value(kind, dtype, scale), t.at(index)); });
  return t;
}
Tensor booleans(Shape shape) {
  Tensor t(std::move(shape), 1, false);
  const int share = int(below(101));
  each(t.array.shape, [&](const Shape& index) { *static_cast<unsigned char*>(t.at(index)) = chance(share) ? 1 + below(255) : 0; });
  return t;
}

[[noreturn]] void fail(const std::string& what);

uint64_t seed = 1, callers = 1;
std::atomic<uint64_t> compared{0};
// What is needed to repeat the call that went wrong.
thread_local uint64_t iteration = 0;
thread_local std::string call_text;
void fail(const std::string& what) {
  std::fprintf(stderr, "iteration %llu, seed %llu: %s\n  %s\n", static_cast<unsigned long long>(iteration),
               static_cast<unsigned long long>(seed), what.c_str(), call_text.c_str());
  std::abort();
}

// One row and its bounds, by section 5 and 7 of the spec: values, and errors in units of the compute type's roundoff.
struct Row {
  std::vector<Real> y, y_error, dx, dx_error;
};
Row row(const std::vector<Real>& x, const std::vector<Real>& g, const std::vector<char>& on, Variant variant, Real tiny,
        const std::vector<Real>& ex, const std::vector<Real>& eg, Real unit) {
  const size_t n = x.size();
  const Real zero = 0;
  Row out{std::vector<Real>(n, 0), std::vector<Real>(n, 0), std::vector<Real>(n, 0), std::vector<Real>(n, 0)};
  Real low = INFINITY, high = -INFINITY, members = 0, ex_low = 0, ex_high = 0;
  bool finite = true;
  for (size_t i = 0; i < n; ++i)
    if (on[i]) {
      finite = finite && std::isfinite(x[i]);
      low = std::fmin(low, x[i]), high = std::fmax(high, x[i]), members += 1;
    }
  if (members == 0) return out;
  if (!finite) {
    for (size_t i = 0; i < n; ++i)
      if (on[i]) out.y[i] = out.dx[i] = NAN;
    return out;
  }
  for (size_t i = 0; i < n; ++i)
    if (on[i]) {
      if (x[i] == low) ex_low = std::fmax(ex_low, ex[i]);
      if (x[i] == high) ex_high = std::fmax(ex_high, ex[i]);
    }
  // A score that is not exact may exceed the one at an extremum.
  if (*std::max_element(ex.begin(), ex.end()) > 0) ex_low = ex_high = *std::max_element(ex.begin(), ex.end());
  std::vector<Real> p(n, 0), p_error(n, 0), stretch(n, 0);
  Real l = 0, spread = 0;
  for (size_t i = 0; i < n; ++i)
    if (on[i]) l += p[i] = std::exp(x[i] - high), stretch[i] = high - x[i] + ex[i] + ex_high;
  for (size_t i = 0; i < n; ++i) p[i] /= l, spread += p[i] > 0 ? p[i] * stretch[i] : 0;
  const Real root = std::sqrt(members);
  for (size_t i = 0; i < n; ++i)
    p_error[i] = (p[i] > 0 ? p[i] * (stretch[i] + spread + 2 + root) : 0) + std::fmin(tiny, p[i] / unit);
  const Real lo = variant == Variant::normalized ? std::fmin(low, zero) : 0;
  const Real R = variant == Variant::normalized ? std::fmax(high, zero) - lo : 1;
  if (R == 0) {
    for (size_t i = 0; i < n; ++i)
      if (on[i] && std::any_of(g.begin(), g.end(), [](Real up) { return std::isnan(up); })) out.dx[i] = NAN;
    return out;
  }
  ex_low = low < 0 ? ex_low : 0, ex_high = high > 0 ? ex_high : 0;
  Real D = 0, D_error = 0, D_size = 0, S = 0, S_error = 0, S_size = 0, ties_low = 0, ties_high = 0;
  std::vector<Real> a(n, 0), a_error(n, 0);
  for (size_t i = 0; i < n; ++i) {
    if (!on[i]) continue;
    a[i] = (x[i] - lo) / R;
    a_error[i] = variant == Variant::product
                     ? ex[i] + std::fabs(x[i])
                     : (ex[i] + ex_low + a[i] * (ex_low + ex_high)) / R + 3 * (std::fabs(x[i]) + std::fabs(lo)) / R;
    out.y[i] = a[i] * p[i];
    out.y_error[i] = std::fabs(a[i]) * p_error[i] + p[i] * a_error[i] + std::fabs(out.y[i]);
    D += g[i] * out.y[i], D_error += std::fabs(g[i]) * out.y_error[i] + std::fabs(out.y[i]) * eg[i], D_size += std::fabs(g[i] * out.y[i]);
    S += g[i] * p[i], S_error += std::fabs(g[i]) * p_error[i] + p[i] * eg[i], S_size += std::fabs(g[i] * p[i]);
    ties_low += x[i] == low, ties_high += x[i] == high;
  }
  D_error += root * D_size, S_error += root * S_size;
  const Real R_error = (ex_low + ex_high) / R;
  // Scores that are not exact may be tied, or be 0, where these here are not: an extremal term may then go elsewhere.
  const auto may_tie = [&](size_t i, Real extremum, Real ex_extremum) {
    return ex[i] + ex_extremum > 0 && std::fabs(x[i] - extremum) <= 4 * unit * (ex[i] + ex_extremum);
  };
  const auto may_be_zero = [&](Real extremum, Real ex_extremum) { return std::fabs(extremum) <= 4 * unit * ex_extremum; };
  Real close_low = 0, close_high = 0;
  const Real ex_all = *std::max_element(ex.begin(), ex.end());
  for (size_t i = 0; i < n; ++i) close_low += on[i] && may_tie(i, low, ex_all), close_high += on[i] && may_tie(i, high, ex_all);
  for (size_t i = 0; i < n; ++i) {
    if (!on[i]) continue;
    const Real ga = std::fabs(g[i] * a[i]), direct = std::fabs(g[i]) / R;
    out.dx[i] = p[i] * (g[i] * a[i] - D) + g[i] * p[i] / R;
    out.dx_error[i] = p_error[i] * (ga + std::fabs(D) + direct) +
                      p[i] * (std::fabs(g[i]) * a_error[i] + D_error + 2 * (ga + std::fabs(D)) + 3 * direct) +
                      p[i] * (std::fabs(a[i]) * eg[i] + direct * R_error + eg[i] / R);
    if (variant == Variant::product) continue;
    if (x[i] == low && low < 0) {
      out.dx[i] += (D - S) / R / ties_low;
      out.dx_error[i] += (D_error + S_error + (2 + R_error) * (std::fabs(D) + std::fabs(S))) / R / ties_low;
    }
    if (close_low > 1 || may_be_zero(low, ex_all))
      if (may_tie(i, low, ex_all)) out.dx_error[i] += (std::fabs(D) + std::fabs(S)) / R / unit;
    if (close_high > 1 || may_be_zero(high, ex_all))
      if (may_tie(i, high, ex_all)) out.dx_error[i] += std::fabs(D) / R / unit;
    if (x[i] == high && high > 0) {
      out.dx[i] -= D / R / ties_high;
      out.dx_error[i] += (D_error + (2 + R_error) * std::fabs(D)) / R / ties_high;
    }
  }
  return out;
}

std::string text(Real value) {
  char out[40];
  std::snprintf(out, sizeof out, "%.20Lg", value);
  return out;
}

void compare(DType dtype, Real got, Real expected, Real error, const char* name) {
  const Format& f = format(dtype);
  ++compared;
  if (std::isnan(expected) || std::isnan(got)) {
    if (std::isnan(expected) != std::isnan(got)) fail(std::string(name) + " has a NaN too many or too few");
    return;
  }
  const Real bound = f.unit * std::fabs(expected) + 4 * f.unit_compute * error + f.floor;
  if (std::fabs(expected) + bound >= f.largest && std::fabs(got) >= f.largest) return;
  if (!(std::fabs(got - expected) <= bound))
    fail(std::string(name) + " is " + text(got) + ", not " + text(expected) + " within " + text(bound));
}

// The output must be written where it belongs and nowhere else.
template <class F>
void check_written(Tensor& out, const F& expected) {
  std::vector<unsigned char> untouched = out.before;
  each(out.array.shape, [&](const Shape& index) {
    expected(index);
    const size_t offset = size_t(static_cast<unsigned char*>(out.at(index)) - out.bytes.data());
    std::memcpy(untouched.data() + offset, out.bytes.data() + offset, out.size);
  });
  if (untouched != out.bytes) fail("something beside the output was written");
}

const Parallel kAlone = [](int64_t count, const std::function<void(int64_t)>& task) {
  for (int64_t i = count; i-- > 0;) task(i);
};
const Parallel kPool = [](int64_t count, const std::function<void(int64_t)>& task) { run_parallel(3, count, task); };

// The outputs hold what the call gave alone: on the pool it must give the same.
template <class F>
void check_pool(const std::vector<Tensor*>& outputs, const F& call) {
  std::vector<std::vector<unsigned char>> alone;
  for (Tensor* const t : outputs) {
    alone.push_back(t->bytes);
    std::copy(t->before.begin(), t->before.end(), t->bytes.begin());
  }
  call(kPool);
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i]->bytes != alone[i]) fail("the pool changes the bits of output " + std::to_string(i));
    compared += alone[i].size() / outputs[i]->size;
  }
}

// Tasks that use the pool themselves, the last of which may throw: every task ran once, or an exception arrives.
void check_tasks() {
  const int64_t count = 1 + below(20), first_to_throw = below(2 * count);
  std::vector<int> runs(size_t(count), 0);
  bool thrown = false;
  call_text = std::to_string(count) + " tasks";
  try {
    run_parallel(3, count, [&](int64_t i) {
      int inner[4] = {};
      run_parallel(3, 4, [&](int64_t j) { ++inner[j]; });
      if (i >= first_to_throw) throw i;
      runs[size_t(i)] += inner[0] * inner[1] * inner[2] * inner[3];
    });
  } catch (int64_t i) {
    thrown = i >= first_to_throw;
  }
  if (thrown != (first_to_throw < count)) fail("an exception was lost");
  if (!thrown && runs != std::vector<int>(size_t(count), 1)) fail("a task did not run once");
}

Shape random_shape(size_t rank, int64_t most) {
  Shape shape(rank);
  int64_t count = 1;
  for (int64_t& length : shape) {
    length = chance(3) ? 0 : 1 + below(chance(20) ? most : 5);
    if (count * std::max<int64_t>(length, 1) > most) length = 1;
    count *= std::max<int64_t>(length, 1);
  }
  std::shuffle(shape.begin(), shape.end(), random_bits);
  return shape;
}
// A shape that broadcasts to `shape`.
Shape smaller(const Shape& shape) {
  Shape out(shape.begin() + below(int64_t(shape.size()) + 1), shape.end());
  if (chance(60)) out = shape;
  for (int64_t& length : out)
    if (chance(20)) length = 1;
  return out;
}
std::string text(const Shape& shape) {
  std::string out;
  for (const int64_t length : shape) out += std::to_string(length) + " ";
  return "(" + out + ")";
}

void fuzz_row() {
  const DType dtype = DType(below(4));
  const bool vjp = chance(50);
  const Shape shape = callers > 1 && chance(50)
                          ? Shape{1 + below(16), 1 + below(64), 1 + below(500)}
                          : random_shape(size_t(1 + below(5)), chance(1) && chance(5) ? 200000 : chance(5) ? 2000 : 150);
  const int64_t rank = int64_t(shape.size());
  RowOptions options{dtype, below(2 * rank) - rank, Variant(below(2))};
  Tensor x = numbers(shape, dtype, Values::any), g = numbers(shape, dtype, Values::bounded);
  Tensor where = booleans(smaller(shape)), y(shape, format(dtype).bytes, true);
  const bool masked = chance(50);
  y.before = y.bytes;
  call_text = std::string(vjp ? "vjp" : "forward") + " shape " + text(shape) + " axis " + std::to_string(options.axis) +
              " dtype " + std::to_string(int(dtype)) + " variant " + std::to_string(int(options.variant)) + " masked " +
              std::to_string(masked);

  bool wrong = chance(10);
  if (wrong) switch (below(8)) {
      case 0: options.axis = chance(50) ? rank + below(3) : -rank - 1 - below(3); break;
      case 1: options.variant = Variant(2 + below(5)); break;
      case 2: options.dtype = DType(4 + below(5)); break;
      case 3: y.array.shape.push_back(2), y.array.strides.push_back(1); break;
      case 4: y.array.strides.pop_back(); break;
      case 5: x.array.shape[size_t(below(rank))] = -1 - below(3); break;
      case 6: x.array.shape[size_t(below(rank))] = std::numeric_limits<int64_t>::max() / (1 + below(4)); break;
      case 7: x.array = Array(x.array.data, {}), y.array = Array(y.array.data, {}); break;
    }
  const auto call = [&](const Parallel& parallel) {
    const Array* const mask = masked ? &where.array : nullptr;
    if (vjp)
      softmax_vjp(options, x.array, g.array, mask, y.array, parallel);
    else
      softmax(options, x.array, mask, y.array, parallel);
  };
  bool refused = false;
  try {
    call(kAlone);
  } catch (const Error&) {
    refused = true;
  }
  if (wrong) {
    if (!refused) fail("a wrong call was not refused");
    return;
  }
  if (refused) fail("a right call was refused");
  if (callers > 1) return check_pool({&y}, call);
  const size_t axis = size_t(options.axis < 0 ? options.axis + rank : options.axis);
  const size_t n = size_t(shape[axis]);
  Shape rows = shape;
  rows[axis] = std::min<int64_t>(1, shape[axis]);
  std::vector<std::pair<Shape, Row>> expected;
  each(rows, [&](Shape index) {
    std::vector<Real> xs(n), gs(n), exact(n, 0);
    std::vector<char> on(n);
    for (size_t i = 0; i < n; ++i) {
      index[axis] = int64_t(i);
      xs[i] = decode(dtype, x.at(index)), gs[i] = decode(dtype, g.at(index));
      on[i] = xs[i] != -INFINITY && (!masked || *static_cast<unsigned char*>(where.at(index)) != 0);
    }
    const Format& f = format(dtype);
    const Row r = row(xs, gs, on, options.variant, f.tiny_compute / f.unit_compute, exact, exact, f.unit_compute);
    for (size_t i = 0; i < n; ++i) {
      index[axis] = int64_t(i);
      const Real got = decode(dtype, y.at(index));
      if (!on[i] && got != 0) fail("an excluded entry is not 0");
      compare(dtype, got, vjp ? r.dx[i] : r.y[i], vjp ? r.dx_error[i] : r.y_error[i], vjp ? "dx" : "y");
    }
  });
  check_written(y, [](const Shape&) {});
}

// The row operation of contiguous memory: the values of the general one.
void fuzz_contiguous() {
  const DType dtype = DType(below(4));
  const Variant variant = Variant(below(2));
  const Shape shape = random_shape(2, chance(5) ? 3000 : 100);
  Tensor x = numbers(shape, dtype, Values::any), y(shape, format(dtype).bytes, true);
  call_text = "contiguous shape " + text(shape) + " dtype " + std::to_string(int(dtype)) + " variant " +
              std::to_string(int(variant));
  softmax({dtype, 1, variant}, x.array, nullptr, y.array, kAlone);
  std::vector<unsigned char> in, general;
  each(shape, [&](const Shape& index) {
    const auto* const from = static_cast<unsigned char*>(x.at(index));
    const auto* const to = static_cast<unsigned char*>(y.at(index));
    in.insert(in.end(), from, from + x.size);
    general.insert(general.end(), to, to + y.size);
  });
  std::vector<unsigned char> out(in.size());
  in.shrink_to_fit();
  softmax_contiguous(dtype, variant, shape[0], shape[1], in.data(), out.data(), callers > 1 ? kPool : kAlone);
  for (size_t i = 0; i < out.size(); i += y.size) {
    const Real got = decode(dtype, &out[i]), expected = decode(dtype, &general[i]);
    if (got != expected && !(std::isnan(got) && std::isnan(expected)))
      fail("contiguous rows give " + std::to_string(double(got)) + ", not " + std::to_string(double(expected)));
    ++compared;
  }
}

// What is expected of one output, element by element in the order of each().
struct Expected {
  Shape shape;
  std::vector<Real> value, error;
  explicit Expected(Shape s) : shape(std::move(s)) {
    int64_t count = 1;
    for (const int64_t length : shape) count *= length;
    value.resize(size_t(count)), error.resize(size_t(count));
  }
  // Adds a term at an index that broadcasting may have made longer.
  void add(const Shape& index, Real term, Real its_error) {
    size_t at = 0;
    const size_t skip = index.size() - shape.size();
    for (size_t i = 0; i < shape.size(); ++i) at = at * size_t(shape[i]) + (shape[i] == 1 ? 0 : size_t(index[skip + i]));
    value[at] += term, error[at] += its_error;
  }
  void compare_with(DType dtype, Tensor& got, const char* name) const {
    size_t at = 0;
    each(shape, [&](const Shape& index) {
      compare(dtype, decode(dtype, got.at(index)), value[at], error[at], name);
      ++at;
    });
  }
};

void fuzz_attention() {
  const DType dtype = DType(below(4));
  const bool vjp = chance(50);
  Shape batch = random_shape(size_t(below(3)), 4);
  const int64_t heads = 1 + below(3), group = chance(3) ? 0 : 1 + below(3);
  const int more = callers > 1 ? 10 : 1;
  const auto length = [&](int64_t most) { return chance(3) ? 0 : chance(10 * more) ? 1 + below(most) : 1 + below(8); };
  const int64_t tq = length(chance(3 * more) ? 1400 : 40), tk = length(chance(5 * more) ? 600 : 90);
  const int64_t d = length(chance(3) ? 600 : 20);
  const int64_t dv = length(90);
  const auto shaped = [&](int64_t a, int64_t b, int64_t c) {
    Shape shape = batch;
    shape.insert(shape.end(), {a, b, c});
    return shape;
  };
  const Shape scores = shaped(heads * group, tq, tk);
  AttentionOptions options{dtype, Variant(below(2)), chance(40), 0, {}};
  if (options.is_causal && chance(60)) options.q_offset = chance(3) ? int64_t(random_bits()) : below(2 * (tk + tq + 1)) - tk - tq;
  if (chance(25)) options.left = chance(3) ? int64_t(random_bits() >> 1) : below(tk + 3);
  if (d == 0 || chance(30)) options.scale = chance(20) ? 0.0 : 4 * uniform() - 2;
  const Values kind = chance(80) ? Values::moderate : Values::bounded;
  const size_t size = format(dtype).bytes;
  Tensor q = numbers(shaped(heads * group, tq, d), dtype, Values::bounded), k = numbers(shaped(heads, tk, d), dtype, kind);
  Tensor v = numbers(shaped(heads, tk, dv), dtype, Values::moderate), o(shaped(heads * group, tq, dv), size, true);
  Tensor o_grad = numbers(o.array.shape, dtype, Values::bounded);
  Tensor bias = numbers(smaller(scores), dtype, Values::moderate), mask = booleans(smaller(scores));
  Tensor q_grad(q.array.shape, size, true), k_grad(k.array.shape, size, true), v_grad(v.array.shape, size, true);
  Tensor bias_grad(bias.array.shape, size, true);
  const bool biased = chance(40), masked = chance(50), wants_bias = chance(80);
  // What is not finite, here and there.
  for (Tensor* const t : {&q, &k, &v, &bias, &o_grad})
    if (chance(10) && !t->bytes.empty())
      each(t->array.shape, [&](const Shape& index) {
        static const double special[] = {NAN, INFINITY, -INFINITY};
        // What an infinite value does to a gradient is not specified.
        if (chance(3)) encode(dtype, special[t == &v && !vjp ? below(3) : t == &bias && chance(70) ? 2 : 0], t->at(index));
      });
  for (Tensor* const t : {&o, &q_grad, &k_grad, &v_grad, &bias_grad}) t->before = t->bytes;
  call_text = std::string(vjp ? "attention_vjp" : "attention") + " batch " + text(batch) + " heads " + std::to_string(heads) +
              " group " + std::to_string(group) + " tq " + std::to_string(tq) + " tk " + std::to_string(tk) + " d " +
              std::to_string(d) + " dv " + std::to_string(dv) + " dtype " + std::to_string(int(dtype)) + " variant " +
              std::to_string(int(options.variant)) + " causal " + std::to_string(options.is_causal) + " offset " +
              std::to_string(options.q_offset) + " left " + std::to_string(options.left) + " biased " +
              std::to_string(biased) + text(bias.array.shape) + " masked " + std::to_string(masked) + text(mask.array.shape);

  const bool wrong = chance(10);
  const size_t b = batch.size();
  Tensor& output = vjp ? v_grad : o;
  if (wrong) switch (below(10)) {
      case 0: options.scale = chance(50) ? NAN : INFINITY; break;
      case 1: options.is_causal = false, options.q_offset = 1; break;
      case 2: k.array.shape[b + 2] += 1; break;
      case 3: v.array.shape[b + 1] += 1; break;
      case 4: k.array.shape[b] = v.array.shape[b] = 0; break;
      case 5: q.array.shape[b] = heads * group + 1, k.array.shape[b] = v.array.shape[b] = heads + 1 + heads * group; break;
      case 6: v.array.shape.insert(v.array.shape.begin(), 1), v.array.strides.insert(v.array.strides.begin(), 1); break;
      case 7: output.array.shape[b + 1] += 1; break;
      case 8: options.variant = Variant(7); break;
      case 9: options.left = -2 - below(5); break;
    }
  const auto call = [&](const Parallel& parallel) {
    const Array* const bias_array = biased ? &bias.array : nullptr;
    const Array* const mask_array = masked ? &mask.array : nullptr;
    if (vjp)
      attention_vjp(options, q.array, k.array, v.array, bias_array, mask_array, o_grad.array, q_grad.array, k_grad.array,
                    v_grad.array, biased && wants_bias ? &bias_grad.array : nullptr, parallel);
    else
      attention(options, q.array, k.array, v.array, bias_array, mask_array, o.array, parallel);
  };
  bool refused = false;
  try {
    call(kAlone);
  } catch (const Error&) {
    refused = true;
  }
  if (wrong) {
    if (!refused) fail("a wrong call was not refused");
    return;
  }
  if (refused) fail("a right call was refused");
  if (callers > 1) return check_pool({&o, &q_grad, &k_grad, &v_grad, &bias_grad}, call);
  const Format& f = format(dtype);
  const Real scale = options.scale ? Real(*options.scale) : 1 / std::sqrt(Real(d));
  const auto root = [](int64_t n) { return std::sqrt(Real(std::max<int64_t>(n, 1))) + 1; };
  const Real root_d = root(d) + 1, root_dv = root(dv) + 1, root_k = root(tk), root_q = root(tq * std::max<int64_t>(group, 1));
  Expected o_expected(o.array.shape), q_expected(q.array.shape), k_expected(k.array.shape), v_expected(v.array.shape);
  Expected bias_expected(bias.array.shape);
  const Real root_copies = root(int64_t(o_expected.value.size()) * tk);  // at least the summands of a bias gradient
  // A10: the weights of bfloat16 may be rounded to it.
  const Real rounded = dtype == DType::bfloat16 ? f.unit / f.unit_compute / 4 : 0;
  const auto finite = [](Real value) { return std::isfinite(value) ? value : Real(0); };
  const size_t n = size_t(tk);
  each(shaped(heads * group, tq, 1), [&](const Shape& query) {
    const int64_t i = query[b + 1];
    std::vector<Real> x(n, 0), ex(n, 0), g(n, 0), eg(n, 0);
    std::vector<char> on(n, 0);
    Shape key = query, score = query, at = query;
    key[b] = query[b] / group;
    const auto indexed = [&](Shape& index, int64_t last) -> const Shape& { return index[b + 2] = last, index; };
    for (size_t j = 0; j < n; ++j) {
      score[b + 2] = key[b + 1] = int64_t(j);
      on[j] = !options.is_causal || Real(j) <= Real(i) + Real(options.q_offset);
      if (options.left >= 0) on[j] = on[j] && Real(j) >= Real(i) + Real(options.q_offset) - Real(options.left);
      if (masked) on[j] = on[j] && *static_cast<unsigned char*>(mask.at(score)) != 0;
      if (!on[j]) continue;
      for (int64_t e = 0; e < d; ++e) {
        const Real term = scale * decode(dtype, q.at(indexed(at, e))) * decode(dtype, k.at(indexed(key, e)));
        x[j] += term, ex[j] += root_d * std::fabs(term);
      }
      if (biased) x[j] += decode(dtype, bias.at(score)), ex[j] += std::fabs(x[j]) + std::fabs(decode(dtype, bias.at(score)));
      on[j] = x[j] != -INFINITY;
      if (!on[j] || !std::isfinite(x[j])) ex[j] = 0;
      if (vjp && on[j])
        for (int64_t c = 0; c < dv; ++c) {
          const Real term = decode(dtype, o_grad.at(indexed(at, c))) * decode(dtype, v.at(indexed(key, c)));
          g[j] += term, eg[j] += root_dv * std::fabs(term);
        }
    }
    const Row r = row(x, g, on, options.variant, f.tiny_compute / f.unit_compute, ex, eg, f.unit_compute);
    for (size_t j = 0; j < n; ++j) {
      if (!on[j]) continue;
      score[b + 2] = key[b + 1] = int64_t(j);
      const Real y = r.y[j], y_error = r.y_error[j], dx = r.dx[j], dx_error = r.dx_error[j];
      for (int64_t c = 0; c < dv; ++c) {
        const Real value = decode(dtype, v.at(indexed(key, c))), up = decode(dtype, o_grad.at(indexed(at, c)));
        o_expected.add(at, std::isfinite(value) ? y * value : Real(NAN), std::fabs(value) * (y_error + std::fabs(y) * (root_k + rounded)));
        v_expected.add(key, std::isfinite(up) ? y * up : Real(NAN), std::fabs(up) * (y_error + std::fabs(y) * root_q));
      }
      for (int64_t e = 0; e < d; ++e) {
        const Real to_q = scale * finite(decode(dtype, k.at(indexed(key, e))));
        const Real to_k = scale * finite(decode(dtype, q.at(indexed(at, e))));
        q_expected.add(at, dx * to_q, std::fabs(to_q) * (dx_error + std::fabs(dx) * (root_k + 1)));
        k_expected.add(key, dx * to_k, std::fabs(to_k) * (dx_error + std::fabs(dx) * (root_q + 1)));
      }
      bias_expected.add(score, dx, dx_error + std::fabs(dx) * root_copies);
    }
  });
  const auto check = [&](const Expected& expected, Tensor& got, const char* name) {
    expected.compare_with(dtype, got, name);
    check_written(got, [](const Shape&) {});
  };
  if (!vjp) return check(o_expected, o, "o");
  check(q_expected, q_grad, "q_grad");
  check(k_expected, k_grad, "k_grad");
  check(v_expected, v_grad, "v_grad");
  if (biased && wants_bias) check(bias_expected, bias_grad, "bias_grad");
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  callers = argc > 3 ? std::max(1ULL, std::strtoull(argv[3], nullptr, 10)) : 1;
  const auto calls = [&](uint64_t first) {
    for (iteration = first; iteration < count; iteration += callers) {
      random_bits.seed(seed * 0x9e3779b97f4a7c15 + iteration);
      if (callers > 1) check_tasks();
      chance(70) ? fuzz_row() : chance(90) ? fuzz_attention() : fuzz_contiguous();
    }
  };
  std::vector<std::thread> others;
  for (uint64_t first = 1; first < callers; ++first) others.emplace_back(calls, first);
  calls(0);
  for (std::thread& other : others) other.join();
  std::printf("%llu calls on %s, %llu values compared: no difference\n", static_cast<unsigned long long>(count),
              instruction_set(), static_cast<unsigned long long>(compared.load()));
}
