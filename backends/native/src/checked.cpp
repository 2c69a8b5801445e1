// The checked interface: validation, broadcasting, and the division of the work among threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "dispatch.h"
#include "jobs.h"
#include "sa_softmax/kernels.h"

namespace sa_softmax {
namespace {

std::string text(const Shape& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

// The number of elements; 0 is a valid one.
int64_t count(const Shape& shape) {
  int64_t n = 1;
  for (const int64_t length : shape)
    if (length == 0) return 0;
  for (const int64_t length : shape) n *= length;
  return n;
}

void check_array(const char* name, const Array& a) {
  if (a.shape.size() != a.strides.size())
    throw Error(std::string(name) + " must have one stride for each axis; got the shape " + text(a.shape) + " and " +
                std::to_string(a.strides.size()) + " strides");
  int64_t n = 8;  // bytes of the widest element
  for (const int64_t length : a.shape) {
    if (length < 0) throw Error(std::string(name) + " must not have a negative length; got the shape " + text(a.shape));
    if (length != 0 && __builtin_mul_overflow(n, length, &n))
      throw Error(std::string(name) + " must have fewer than 2^60 elements; got the shape " + text(a.shape));
  }
  if (a.data == nullptr && count(a.shape) != 0)
    throw Error(std::string(name) + " must have data; got a null pointer for the shape " + text(a.shape));
}

void check_output(const char* name, const Array& a) {
  for (size_t i = 0; i < a.shape.size(); ++i)
    if (a.strides[i] == 0 && a.shape[i] > 1)
      throw Error(std::string(name) + " must not repeat along an axis; got the stride 0 at axis " + std::to_string(i) +
                  " of the shape " + text(a.shape) + ". Pass an array with room for every element");
}

void check_same(const char* name, const Array& a, const char* other, const Shape& shape) {
  if (a.shape != shape)
    throw Error(std::string(name) + " must have the shape of " + other + ", " + text(shape) + "; got " + text(a.shape));
}

// The strides of `a` along the axes of `shape`, 0 where it is repeated.
Shape broadcast(const char* name, const Array& a, const Shape& shape, const char* target) {
  Shape strides(shape.size(), 0);
  bool fits = a.shape.size() <= shape.size();
  for (size_t i = 0; fits && i < a.shape.size(); ++i) {
    const size_t axis = shape.size() - a.shape.size() + i;
    fits = a.shape[i] == 1 || a.shape[i] == shape[axis];
    strides[axis] = a.shape[i] == 1 ? 0 : a.strides[i];
  }
  if (!fits)
    throw Error(std::string(name) + " must broadcast to the shape of " + target + ", " + text(shape) + "; got " +
                text(a.shape) + ". Align the last axes, and give those that repeat the length 1");
  return strides;
}

size_t compute_size(DType dtype) { return dtype == DType::float64 ? sizeof(double) : sizeof(float); }

// Calls run(begin, end, scratch) for disjoint ranges that make up [0, units), with `elements` of scratch each.
template <class Run>
void divide(const Parallel& parallel, int64_t units, double work, int64_t elements, DType dtype, const Run& run) {
  constexpr double kWork = 1 << 15;  // entries that are worth a task: some 20 microseconds
  constexpr int64_t kTasks = 256;
  const double wanted = std::ceil(std::fmin(work / kWork, double(kTasks)));
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(units, int64_t(wanted)));
  const size_t bytes = size_t(elements) * compute_size(dtype);
  std::atomic<bool> failed{false};
  const auto task = [&](int64_t index) {
    const auto at = [&](int64_t i) { return units / tasks * i + std::min(i, units % tasks); };
    try {
      const auto release = [](void* p) { ::operator delete(p, std::align_val_t(64)); };
      const std::unique_ptr<void, decltype(release)> scratch(::operator new(bytes, std::align_val_t(64)), release);
      run(at(index), at(index + 1), scratch.get());
    } catch (const std::bad_alloc&) {
      failed = true;  // an exception must not leave a thread that is not ours
    }
  };
  if (tasks == 1)
    task(0);
  else
    parallel(tasks, task);
  if (failed) throw Error("the scratch of a thread needs " + std::to_string(bytes) + " bytes, which it did not get");
}

void check_variant(Variant variant) {
  if (variant != Variant::normalized && variant != Variant::product)
    throw Error("variant must be normalized or product; got " + std::to_string(int(variant)));
}

void check_dtype(DType dtype) {
  if (dtype < DType::float16 || dtype > DType::float64)
    throw Error("dtype must be float16, bfloat16, float32 or float64; got " + std::to_string(int(dtype)));
}

void run_rows(const RowOptions& options, const Array& x, const Array* g, const Array* where, const Array& y,
              const char* y_name, const Parallel& parallel) {
  check_variant(options.variant);
  check_dtype(options.dtype);
  check_array("x", x);
  check_array(y_name, y);
  check_output(y_name, y);
  const int64_t rank = int64_t(x.shape.size());
  if (rank == 0) throw Error("x must have at least one axis; got a 0-d array. Reshape it to (1,) first");
  if (options.axis < -rank || options.axis >= rank)
    throw Error("axis must be in [" + std::to_string(-rank) + ", " + std::to_string(rank - 1) +
                "] for an array of shape " + text(x.shape) + "; got " + std::to_string(options.axis));
  check_same(y_name, y, "x", x.shape);
  if (g != nullptr) {
    check_array("g", *g);
    check_same("g", *g, "x", x.shape);
  }
  Shape where_strides(size_t(rank), 0);
  if (where != nullptr) {
    check_array("where", *where);
    where_strides = broadcast("where", *where, x.shape, "x");
  }
  if (count(x.shape) == 0) return;

  const auto strides = [&](int64_t axis) {
    const size_t i = size_t(axis);
    return RowStrides{x.strides[i], g != nullptr ? g->strides[i] : 0, where_strides[i], y.strides[i]};
  };
  const int64_t axis = options.axis < 0 ? options.axis + rank : options.axis;
  // Tiles run along the axis on which x is densest, so that strided rows share cache lines.
  int64_t across = -1;
  for (int64_t i = 0; i < rank; ++i)
    if (i != axis && x.shape[size_t(i)] > 1 &&
        (across < 0 || std::abs(x.strides[size_t(i)]) <= std::abs(x.strides[size_t(across)])))
      across = i;
  Shape outer_shape;
  std::vector<RowStrides> outer;
  for (int64_t i = 0; i < rank; ++i)
    if (i != axis && i != across && x.shape[size_t(i)] > 1) {
      outer_shape.push_back(x.shape[size_t(i)]);
      outer.push_back(strides(i));
    }
  RowJob job{};
  job.x = x.data;
  job.g = g != nullptr ? g->data : nullptr;
  job.where = where != nullptr ? static_cast<const uint8_t*>(where->data) : nullptr;
  job.y = y.data;
  job.n = x.shape[size_t(axis)];
  job.along = strides(axis);
  job.columns = across < 0 ? 1 : x.shape[size_t(across)];
  job.across = across < 0 ? RowStrides{} : strides(across);
  // A tile stays in the cache. A strided tile is as wide as a cache line, if that does not take too much of it.
  constexpr int64_t kCached = 1 << 15, kLine = 16;
  const int64_t fitting = std::max<int64_t>(1, std::min(kPad, kCached / padded(job.n)));
  const bool strided = job.along.x != 1 && job.n <= kCached;
  job.width = std::min(job.columns, strided ? std::max(fitting, kLine) : fitting);
  job.outer_rank = int64_t(outer.size());
  job.outer_shape = outer_shape.data();
  job.outer = outer.data();
  job.normalized = options.variant == Variant::normalized;

  const Kernels& table = kernels();
  const auto run = (g != nullptr ? table.vjp : table.forward)[int(options.dtype)];
  divide(parallel, count(outer_shape) * job.tiles_across(), double(count(x.shape)), job.scratch(), options.dtype,
         [&](int64_t begin, int64_t end, void* scratch) { run(job, begin, end, scratch); });
}

}  // namespace

Array::Array(void* data, Shape shape) : data(data), shape(std::move(shape)), strides(this->shape.size()) {
  int64_t stride = 1;
  for (size_t i = strides.size(); i-- > 0;) {
    strides[i] = stride;
    // A shape that overflows is refused by the functions.
    if (__builtin_mul_overflow(stride, std::max<int64_t>(1, this->shape[i]), &stride)) stride = 0;
  }
}

void softmax(const RowOptions& options, const Array& x, const Array* where, const Array& y, const Parallel& parallel) {
  run_rows(options, x, nullptr, where, y, "y", parallel);
}

void softmax_vjp(const RowOptions& options, const Array& x, const Array& g, const Array* where, const Array& dx,
                 const Parallel& parallel) {
  run_rows(options, x, &g, where, dx, "dx", parallel);
}

Shape attention_shape(const Shape& q, const Shape& k, const Shape& v) {
  const std::string shapes = "q " + text(q) + ", k " + text(k) + ", v " + text(v);
  const auto check_rank = [](const char* name, const Shape& shape) {
    if (shape.size() < 3)
      throw Error(std::string(name) + " must be (..., heads, length, dimension), at least 3-d; got the shape " +
                  text(shape) + ". Add a heads axis of length 1 for a single head");
  };
  check_rank("q", q);
  check_rank("k", k);
  check_rank("v", v);
  const size_t batch = q.size() - 3;
  if (k.size() != q.size() || v.size() != q.size() || !std::equal(q.begin(), q.begin() + batch, k.begin()) ||
      !std::equal(q.begin(), q.begin() + batch, v.begin()))
    throw Error("q, k and v must have the same batch axes; got " + shapes + ". Expand them to one batch shape");
  if (q[batch + 2] != k[batch + 2]) throw Error("q and k must have the same last axis D; got " + shapes);
  if (k[batch] != v[batch] || k[batch + 1] != v[batch + 1])
    throw Error("k and v must have the same heads Hkv and length Tk; got " + shapes);
  if (k[batch] == 0 || q[batch] % k[batch] != 0)
    throw Error("the number of query heads must be a multiple of the number of key/value heads; got " +
                std::to_string(q[batch]) + " and " + std::to_string(k[batch]) + " (" + shapes + ")");
  Shape out = q;
  out.back() = v.back();
  return out;
}

void attention(const AttentionOptions& options, const Array& q, const Array& k, const Array& v, const Array* bias,
               const Array* mask, const Array& o, const Parallel& parallel) {
  check_variant(options.variant);
  check_dtype(options.dtype);
  check_array("q", q);
  check_array("k", k);
  check_array("v", v);
  check_array("o", o);
  check_output("o", o);
  const Shape shape = attention_shape(q.shape, k.shape, v.shape);
  check_same("o", o, "the output", shape);
  const size_t batch = shape.size() - 3;
  if (!options.is_causal && options.q_offset != 0)
    throw Error("q_offset shifts the causal mask and needs is_causal; got q_offset=" +
                std::to_string(options.q_offset) + " without it");
  if (options.scale && !std::isfinite(*options.scale))
    throw Error("scale must be finite; got " + std::to_string(*options.scale) + ". Leave it out for 1/sqrt(D)");
  if (!options.scale && q.shape.back() == 0)
    throw Error("the default scale 1/sqrt(D) needs D >= 1; got q " + text(q.shape) + ". Pass scale");
  Shape scores = q.shape;
  scores.back() = k.shape[batch + 1];
  Shape bias_strides(scores.size(), 0), mask_strides(scores.size(), 0);
  const char* const target = "the scores (..., Hq, Tq, Tk)";
  if (bias != nullptr) {
    check_array("bias", *bias);
    bias_strides = broadcast("bias", *bias, scores, target);
  }
  if (mask != nullptr) {
    check_array("mask", *mask);
    mask_strides = broadcast("mask", *mask, scores, target);
  }
  if (count(shape) == 0) return;

  const auto strides = [&](size_t i) {
    return AttentionStrides{q.strides[i], k.strides[i], v.strides[i], bias_strides[i], mask_strides[i], o.strides[i]};
  };
  const Shape batch_shape(q.shape.begin(), q.shape.begin() + batch);
  std::vector<AttentionStrides> batch_strides;
  for (size_t i = 0; i < batch; ++i) batch_strides.push_back(strides(i));
  AttentionJob job{};
  job.q = q.data;
  job.k = k.data;
  job.v = v.data;
  job.bias = bias != nullptr ? bias->data : nullptr;
  job.mask = mask != nullptr ? static_cast<const uint8_t*>(mask->data) : nullptr;
  job.o = o.data;
  job.batch_rank = int64_t(batch);
  job.batch_shape = batch_shape.data();
  job.batch = batch_strides.data();
  job.head = strides(batch);
  job.row = strides(batch + 1);
  job.column = strides(batch + 2);
  job.heads = k.shape[batch];
  job.group = q.shape[batch] / k.shape[batch];
  job.tq = q.shape[batch + 1];
  job.tk = k.shape[batch + 1];
  job.d = q.shape[batch + 2];
  job.dv = v.shape[batch + 2];
  job.causal = options.is_causal;
  job.q_offset = options.q_offset;
  job.scale = options.scale ? *options.scale : 1 / std::sqrt(double(job.d));
  job.normalized = options.variant == Variant::normalized;
  // Large blocks read keys and values less often; the scores of a block stay in the cache, and blocks suffice for threads.
  constexpr int64_t kCached = 1 << 17, kRows = 96, kSmallest = 12, kBlocks = 32;
  const int64_t rows = job.group * job.tq, heads = count(batch_shape) * job.heads;
  const int64_t cached = std::max<int64_t>(1, kCached / padded(std::max<int64_t>(1, job.tk)));
  const int64_t shared = std::max(kSmallest, (rows * std::min(heads, kBlocks) + kBlocks - 1) / kBlocks);
  job.block = std::min({rows, kRows, cached, shared});

  const Kernels& table = kernels();
  const double work = double(count(shape)) / double(job.dv) * double(job.tk) * double(job.d + job.dv + 8) / 16;
  divide(parallel, heads * job.blocks(), work, job.scratch(), options.dtype,
         [&](int64_t begin, int64_t end, void* scratch) {
           table.attention[int(options.dtype)](job, begin, end, scratch);
         });
}

}  // namespace sa_softmax
