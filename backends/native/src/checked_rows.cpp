// The checked functions of the row operation.
#include "checked.h"

namespace sa_softmax {
namespace {

size_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// An output of this many bytes would push what else there is out of a last cache of usual size. (What the system says of
// that cache is no help: on virtual machines it is often the host's.)
constexpr double kLargest = 1 << 23;

// Whether the output has memory already, judged by its middle.
bool is_old(const RowJob& job, size_t entry) {
  int64_t at = job.n / 2 * job.along.y + job.columns / 2 * job.across.y;
  for (int64_t i = 0; i < job.outer_rank; ++i) at += job.outer_shape[i] / 2 * job.outer[i].y;
  return was_touched(static_cast<const unsigned char*>(job.y) + at * int64_t(entry));
}

// Runs a job whose arrays and strides are set, in groups of `outer` entries.
void run_job(RowJob& job, const RowOptions& options, int64_t outer, const Parallel& parallel) {
  const double entries = double(outer) * double(job.columns) * double(job.n);
  // A tile stays in the cache. A strided tile is as wide as a cache line, if that does not take too much of it.
  constexpr int64_t kCached = 1 << 15, kLine = 16;
  const int64_t fitting = std::max<int64_t>(1, std::min(kPad, kCached / padded(job.n)));
  const bool strided = job.along.x != 1 && job.n <= kCached;
  job.width = std::min(job.columns, strided ? std::max(fitting, kLine) : fitting);
  job.normalized = options.variant == Variant::normalized;
  job.direct = job.n >= kShortest && job.along.x == 1 && job.along.y == 1 && (job.g == nullptr || job.along.g == 1) &&
               (job.where == nullptr || job.along.where == 1);
  // New pages pass through the caches, since the system has just written zeros there.
  const size_t entry = element_size(options.dtype);
  job.streams = job.direct && entries * double(entry) >= kLargest && is_old(job, entry);

  const RowKernels& table = kernels().rows;
  const auto run = (job.g != nullptr ? table.vjp : table.forward)[int(options.dtype)];
  divide(parallel, outer * job.tiles_across(), entries, job.scratch(), options.dtype,
         [&](int64_t begin, int64_t end, void* scratch) { run(job, begin, end, scratch); });
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
  job.outer_rank = int64_t(outer.size());
  job.outer_shape = outer_shape.data();
  job.outer = outer.data();
  run_job(job, options, count(outer_shape), parallel);
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

void softmax_contiguous(DType dtype, Variant variant, int64_t rows, int64_t n, const void* x, void* y,
                        const Parallel& parallel) {
  check_variant(variant);
  check_dtype(dtype);
  const int64_t shape[] = {rows, n};
  check_memory("x", x, shape, 2);
  check_memory("y", y, shape, 2);
  if (rows == 0 || n == 0) return;
  RowJob job{};
  job.x = x;
  job.y = y;
  job.n = n;
  job.columns = rows;
  job.along = {1, 0, 0, 1};
  job.across = {n, 0, 0, n};
  run_job(job, {dtype, 1, variant}, 1, parallel);
}

void softmax_vjp(const RowOptions& options, const Array& x, const Array& g, const Array* where, const Array& dx,
                 const Parallel& parallel) {
  run_rows(options, x, &g, where, dx, "dx", parallel);
}

}  // namespace sa_softmax
