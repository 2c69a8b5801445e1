// SA-Softmax on the CPU: the checked C++ interface of the kernels. What is computed is docs/spec.md.
//
// Arrays may have any strides. Results do not depend on the thread count, nor a row's bits on its neighbours, its
// position or the strides (clauses R1, R6). Nothing is kept between calls; every function may run on many threads.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <vector>

namespace sa_softmax {

enum class DType { float16, bfloat16, float32, float64 };
enum class Variant { normalized, product };

using Shape = std::vector<int64_t>;

// Input that has no right answer. The message states the rule, the value received and the likely fix.
struct Error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct Array {
  void* data = nullptr;  // aligned to the element; masks are bytes, of which any but 0 is true
  Shape shape;
  Shape strides;  // in elements, of any sign; 0 repeats (outputs must not)

  Array() = default;
  Array(void* data, Shape shape);  // contiguous
  Array(void* data, Shape shape, Shape strides) : data(data), shape(std::move(shape)), strides(std::move(strides)) {}
};

// Runs task(0), ..., task(count - 1), in any order and on any threads, and returns when all have returned.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& task)>;

struct RowOptions {
  DType dtype = DType::float32;
  int64_t axis = -1;
  Variant variant = Variant::normalized;
};

// y = the row operation of x along axis; x, y: equal shapes of rank >= 1; where (may be null) broadcasts to them.
// y must not overlap x.
void softmax(const RowOptions& options, const Array& x, const Array* where, const Array& y, const Parallel& parallel);

// The same for contiguous rows of length n, where a call must cost little: one short row takes less than to describe it.
void softmax_contiguous(DType dtype, Variant variant, int64_t rows, int64_t n, const void* x, void* y,
                        const Parallel& parallel);

// dx = the gradient of sum(g * softmax(x)) by clauses G; all of x's shape.
void softmax_vjp(const RowOptions& options, const Array& x, const Array& g, const Array* where, const Array& dx,
                 const Parallel& parallel);

struct AttentionOptions {
  DType dtype = DType::float32;
  Variant variant = Variant::normalized;
  bool is_causal = false;
  int64_t q_offset = 0;           // query i sees keys j <= i + q_offset
  std::optional<double> scale{};  // 1/sqrt(D) if absent
  int64_t left = -1;              // sliding window: query i sees keys j >= i + q_offset - left; -1: all
};

// The shape (..., Hq, Tq, Dv) of the output, or Error.
Shape attention_shape(const Shape& q, const Shape& k, const Shape& v);

// o = softmax(scale q k^T + bias) v under mask and causality, clauses A. bias and mask may be null; they broadcast to
// (..., Hq, Tq, Tk). o must not overlap an input.
void attention(const AttentionOptions& options, const Array& q, const Array& k, const Array& v, const Array* bias,
               const Array* mask, const Array& o, const Parallel& parallel);

// The gradients of sum(o_grad * attention(q, k, v)) by clause A7, each of the shape of its input; bias_grad needs a bias,
// and may be null.
void attention_vjp(const AttentionOptions& options, const Array& q, const Array& k, const Array& v, const Array* bias,
                   const Array* mask, const Array& o_grad, const Array& q_grad, const Array& k_grad,
                   const Array& v_grad, const Array* bias_grad, const Parallel& parallel);

// The instruction set that the kernels use on this processor: "x86-64-v4", "x86-64-v3", "x86-64-v2" or "generic".
// The environment variable SA_SOFTMAX_INSTRUCTION_SET chooses a lower one; Error if this processor lacks it.
const char* instruction_set();

}  // namespace sa_softmax
