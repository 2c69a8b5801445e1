// The checked functions of attention.
#include <cstring>

#include "checked.h"

namespace sa_softmax {
namespace {

// In elements. In the backward pass, which reads and writes the gradients of all keys for each block, blocks are worth
// more the more columns those have, even beyond the cache. A part is so many rows that packing the keys costs little. What
// the parts of a gradient take in all is bounded.
constexpr int64_t kSmallestBlock = 24, kUnits = 16, kForwardPart = 192, kVjpPart = 512, kPartial = 1 << 22;

}  // namespace

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

namespace {

struct Call {
  const AttentionOptions& options;
  const Array &q, &k, &v;
  const Array *bias, *mask;
  const Array* o;  // or else the gradients
  const Array *o_grad, *q_grad, *k_grad, *v_grad, *bias_grad;
};

// Empty or without keys: what is to be written is 0.
void fill_zero(DType dtype, const Array& a) {
  const size_t size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  Shape index(a.shape.size(), 0);
  for (int64_t left = count(a.shape); left > 0; --left) {
    int64_t offset = 0;
    for (size_t i = 0; i < index.size(); ++i) offset += index[i] * a.strides[i];
    std::memset(static_cast<unsigned char*>(a.data) + offset * int64_t(size), 0, size);
    for (size_t i = index.size(); i-- > 0 && ++index[i] == a.shape[i];) index[i] = 0;
  }
}

// What a call says, checked, and all that does not depend on how the work is divided. The arrays of the job refer to
// `batch_shape` and `batch`.
struct Problem {
  AttentionJob job{};
  Shape batch_shape;
  std::vector<AttentionStrides> batch;
  bool empty = false;

  explicit Problem(const Call& call) {
    const AttentionOptions& options = call.options;
    const Shape &q = call.q.shape, &k = call.k.shape;
    check_variant(options.variant);
    check_dtype(options.dtype);
    check_array("q", call.q);
    check_array("k", call.k);
    check_array("v", call.v);
    const Shape shape = attention_shape(q, k, call.v.shape);
    const size_t rank = shape.size() - 3;
    if (!options.is_causal && options.q_offset != 0)
      throw Error("q_offset shifts the causal mask and needs is_causal; got q_offset=" +
                  std::to_string(options.q_offset) + " without it");
    if (options.left < -1)
      throw Error("left must be at least 0, or -1 for no window; got " + std::to_string(options.left));
    if (options.scale && !std::isfinite(*options.scale))
      throw Error("scale must be finite; got " + std::to_string(*options.scale) + ". Leave it out for 1/sqrt(D)");
    if (!options.scale && q.back() == 0)
      throw Error("the default scale 1/sqrt(D) needs D >= 1; got q " + text(q) + ". Pass scale");
    Shape scores = q;
    scores.back() = k[rank + 1];
    const auto broadcast_strides = [&](const char* name, const Array* a) {
      if (a == nullptr) return Shape(scores.size(), 0);
      check_array(name, *a);
      return broadcast(name, *a, scores, "the scores (..., Hq, Tq, Tk)");
    };
    const Shape bias = broadcast_strides("bias", call.bias), mask = broadcast_strides("mask", call.mask);
    const auto output = [&](const char* name, const Array* a, const char* other, const Shape& expected) {
      if (a == nullptr) return Shape(scores.size(), 0);
      check_array(name, *a);
      check_same(name, *a, other, expected);
      check_output(name, *a);
      return a->strides;
    };
    const Shape o = output("o", call.o, "the output", shape), q_grad = output("q_grad", call.q_grad, "q", q),
                k_grad = output("k_grad", call.k_grad, "k", k),
                v_grad = output("v_grad", call.v_grad, "v", call.v.shape);
    Shape o_grad(scores.size(), 0), bias_grad(scores.size(), 0);
    if (call.o_grad != nullptr) {
      check_array("o_grad", *call.o_grad);
      check_same("o_grad", *call.o_grad, "the output", shape);
      o_grad = call.o_grad->strides;
    }
    if (call.bias_grad != nullptr) {
      if (call.bias == nullptr) throw Error("bias_grad needs a bias; got none. Pass bias, or leave bias_grad out");
      output("bias_grad", call.bias_grad, "bias", call.bias->shape);
      bias_grad = broadcast_strides("bias_grad", call.bias_grad);
    }

    const auto strides = [&](size_t i) {
      return AttentionStrides{call.q.strides[i], call.k.strides[i], call.v.strides[i], bias[i],   mask[i],     o[i],
                              o_grad[i],         q_grad[i],         k_grad[i],         v_grad[i], bias_grad[i]};
    };
    // An empty array may have no memory. Its address is moved along and never read, which null forbids.
    static unsigned char nothing;
    const auto data = [](const Array* a) -> void* {
      return a == nullptr ? nullptr : a->data == nullptr ? &nothing : a->data;
    };
    batch_shape.assign(q.begin(), q.begin() + int64_t(rank));
    for (size_t i = 0; i < rank; ++i) batch.push_back(strides(i));
    job.q = data(&call.q);
    job.k = data(&call.k);
    job.v = data(&call.v);
    job.bias = data(call.bias);
    job.mask = static_cast<const uint8_t*>(data(call.mask));
    job.o = data(call.o);
    job.o_grad = data(call.o_grad);
    job.q_grad = data(call.q_grad);
    job.k_grad = data(call.k_grad);
    job.v_grad = data(call.v_grad);
    job.bias_grad = data(call.bias_grad);
    job.batch_rank = int64_t(rank);
    job.batch_shape = batch_shape.data();
    job.batch = batch.data();
    job.head = strides(rank);
    job.row = strides(rank + 1);
    job.column = strides(rank + 2);
    job.batches = count(batch_shape);
    job.heads = k[rank];
    job.group = q[rank] / k[rank];
    job.tq = q[rank + 1];
    job.tk = k[rank + 1];
    job.d = q[rank + 2];
    job.dv = shape[rank + 2];
    // q_offset and left are any integers: beyond [-tq, tk] they change nothing.
    const auto shift = [&](int64_t n) { return std::max(-job.tq, std::min(n, job.tk)); };
    int64_t first;
    if (options.left < 0 || __builtin_sub_overflow(options.q_offset, options.left, &first)) first = -job.tq;
    job.from = shift(first);
    job.to = options.is_causal ? shift(options.q_offset) : job.tk;
    job.scale = options.scale ? *options.scale : 1 / std::sqrt(double(job.d));
    job.normalized = options.variant == Variant::normalized;
    // Not multiples of a large power of two: rows must not share the sets of a cache.
    job.pitch = padded(job.tk) + kPad / 4;
    const auto pitch = [](int64_t n) { return (n + 15) / 16 * 16 + (n % 128 == 0 ? 16 : 0); };
    job.d_pitch = pitch(job.d);
    job.dv_pitch = pitch(job.dv);
    empty = count(q) == 0 && count(shape) == 0;
    empty = empty || job.batches * job.heads * job.group * job.tq * job.tk == 0;
  }

  // As many rows as `bytes` of scores are, but multiples of the smallest block.
  void choose_block(DType dtype, int64_t bytes, int64_t smallest) {
    const int64_t rows = job.group * job.tq;
    const int64_t fitting = bytes / (job.pitch * int64_t(compute_size(dtype))) / smallest * smallest;
    job.block = std::min({rows, kMostRows, std::max(smallest, fitting)});
  }
  double work() const {  // in entries of a row operation
    return double(job.batches * job.heads * job.group * job.tq) * double(job.tk) * double(job.d + job.dv + 8) / 16;
  }
};

// Sets the offset of a buffer, and makes room for it on a cache line of its own.
class Layout {
 public:
  void add(int64_t& offset, int64_t elements) {
    offset = size;
    size += (elements + kPad - 1) / kPad * kPad;
  }
  int64_t size = 0;
};

}  // namespace

void attention(const AttentionOptions& options, const Array& q, const Array& k, const Array& v, const Array* bias,
               const Array* mask, const Array& o, const Parallel& parallel) {
  Problem problem(Call{options, q, k, v, bias, mask, &o, nullptr, nullptr, nullptr, nullptr, nullptr});
  AttentionJob& job = problem.job;
  if (problem.empty) return fill_zero(options.dtype, o);
  job.few = job.group * job.tq <= kFew && job.column.k == 1;
  job.pairs = options.dtype == DType::bfloat16 && !job.few ? kernels().pairs : Pairs::none;
  const bool tiles = job.pairs == Pairs::tiles;
  job.words = tiles ? (job.d + 2 * kTile - 1) / (2 * kTile) * kTile : (job.d + 1) / 2;
  // Scores share the second cache with keys and values that fit into half of it; others stream past, the less often the
  // more rows a block has.
  const int64_t cache = cache_of_core();
  const int64_t entries = job.pairs == Pairs::none ? job.d + job.dv_pitch : job.words + job.dv_pitch / 2;
  const int64_t read = padded(job.tk) * entries * int64_t(compute_size(options.dtype));
  problem.choose_block(options.dtype, read <= cache / 2 ? cache / 2 : cache / 5 * 4, tiles ? kTileRows : kSmallestBlock);
  const int64_t rows = tiles ? (job.block + kTileRows - 1) / kTileRows * kTileRows : job.block;
  const int64_t heads = job.batches * job.heads;
  job.parts = std::max<int64_t>(1, std::min((kUnits + heads - 1) / heads, job.group * job.tq / kForwardPart));
  Layout layout;
  layout.add(job.at.scores, rows * job.pitch);
  layout.add(job.at.e, job.pitch);
  layout.add(job.at.queries, rows * job.d_pitch);
  layout.add(job.at.output, rows * job.dv_pitch);
  layout.add(job.at.poisoned, rows * job.dv_pitch);
  layout.add(job.at.panel, kPairsAtOnce * kPanel);
  layout.add(job.at.keys, job.few ? 0 : padded(job.tk) * std::max(job.d, job.words));
  const bool read_in_place = job.few && job.column.v == 1 && job.dv % kShortest == 0;
  layout.add(job.at.rows, read_in_place ? 0 : padded(job.tk) * job.dv_pitch);
  const auto run = kernels().attention.forward[int(options.dtype)];
  divide(parallel, job.units(), problem.work(), layout.size, options.dtype,
         [&](int64_t begin, int64_t end, void* scratch) { run(job, begin, end, scratch); });
}

void attention_vjp(const AttentionOptions& options, const Array& q, const Array& k, const Array& v, const Array* bias,
                   const Array* mask, const Array& o_grad, const Array& q_grad, const Array& k_grad,
                   const Array& v_grad, const Array* bias_grad, const Parallel& parallel) {
  Problem problem(Call{options, q, k, v, bias, mask, nullptr, &o_grad, &q_grad, &k_grad, &v_grad, bias_grad});
  AttentionJob& job = problem.job;
  if (problem.empty) {
    for (const Array* const a : {&q_grad, &k_grad, &v_grad, bias_grad})
      if (a != nullptr) fill_zero(options.dtype, *a);
    return;
  }
  problem.choose_block(options.dtype, cache_of_core() / 128 * (job.d + job.dv), kSmallestBlock);
  const int64_t heads = job.batches * job.heads, size = padded(job.tk) * (job.d_pitch + job.dv_pitch);
  job.parts = std::max<int64_t>(
      1, std::min({(kUnits / 2 + heads - 1) / heads, job.group * job.tq / kVjpPart, kPartial / (heads * size)}));
  Layout layout;
  layout.add(job.at.scores, job.block * job.pitch);
  layout.add(job.at.upstream, job.block * job.pitch);
  layout.add(job.at.e, job.pitch);
  layout.add(job.at.queries, job.block * job.d_pitch);
  layout.add(job.at.o_grad, job.block * job.dv_pitch);
  layout.add(job.at.output, job.block * job.d_pitch);
  layout.add(job.at.panel, kKeysAtOnce * kPanel);
  layout.add(job.at.keys, padded(job.tk) * job.d);
  layout.add(job.at.values, padded(job.tk) * job.dv);
  layout.add(job.at.rows, padded(job.tk) * job.d_pitch);
  // Before the gradients, which bias_vjp does not compute: it has its sums there.
  const bool several = job.parts > 1;
  layout.add(job.at.k_grad, several ? 0 : size);
  const Scratch partial(several ? size_t(heads * job.parts * size) * compute_size(options.dtype) : 0);
  job.partial = partial.get();
  if (bias_grad != nullptr) {
    const auto repeated = [](int64_t length, int64_t stride) { return length > 1 && stride == 0; };
    bool shared = repeated(job.tq, job.row.bias_grad);
    int64_t slots = 1;
    for (size_t axis = 0; axis <= problem.batch.size(); ++axis) {
      const bool is_head = axis == problem.batch.size();
      const int64_t length = is_head ? job.heads * job.group : problem.batch_shape[axis];
      const int64_t stride = is_head ? job.head.bias_grad : problem.batch[axis].bias_grad;
      shared = shared || repeated(length, stride);
      if (stride != 0) slots *= length;
    }
    job.slots = shared ? slots : 0;
  }
  const AttentionKernels& table = kernels().attention;
  const int dtype = int(options.dtype);
  divide(parallel, job.units(), 3 * problem.work(), layout.size, options.dtype,
         [&](int64_t begin, int64_t end, void* scratch) { table.vjp[dtype](job, begin, end, scratch); });
  if (several)
    divide(parallel, heads, double(heads * job.parts * size), 0, options.dtype,
           [&](int64_t begin, int64_t end, void* scratch) { table.merge[dtype](job, begin, end, scratch); });
  if (job.slots > 0) {
    job.block = std::min(job.block, job.tq);
    layout.add(job.at.k_grad, job.block * job.pitch);
    const int64_t blocks = job.row.bias_grad == 0 ? 1 : (job.tq + job.block - 1) / job.block;
    divide(parallel, job.slots * blocks, 2 * problem.work(), layout.size, options.dtype,
           [&](int64_t begin, int64_t end, void* scratch) { table.bias_vjp[dtype](job, begin, end, scratch); });
  }
}

}  // namespace sa_softmax
