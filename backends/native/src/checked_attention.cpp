// The checked functions of attention.
#include "checked.h"

namespace sa_softmax {

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

  const AttentionKernels& table = kernels().attention;
  const double work = double(count(shape)) / double(job.dv) * double(job.tk) * double(job.d + job.dv + 8) / 16;
  divide(parallel, heads * job.blocks(), work, job.scratch(), options.dtype,
         [&](int64_t begin, int64_t end, void* scratch) {
           table.forward[int(options.dtype)](job, begin, end, scratch);
         });
}

}  // namespace sa_softmax
