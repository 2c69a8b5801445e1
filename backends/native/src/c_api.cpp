// The C interface: plain arguments become those of kernels.h, exceptions become messages, and the pool's threads work.
#include "sa_softmax/c_api.h"

#include <string>

#include "pool.h"
#include "sa_softmax/kernels.h"

namespace sa_softmax {
namespace {

std::string& last_error() {
  static thread_local std::string message;
  return message;
}

template <class F>
int guarded(const F& f) noexcept {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    try {
      last_error() = error.what();
    } catch (...) {
      last_error().clear();
    }
    return 1;
  }
}

Array array(const char* name, const sa_softmax_array* a) {
  if (a == nullptr) throw Error(std::string(name) + " must be given; got a null pointer");
  if (a->rank < 0 || (a->rank > 0 && (a->shape == nullptr || a->strides == nullptr)))
    throw Error(std::string(name) + " must have a rank of at least 0, a shape and strides; got the rank " +
                std::to_string(a->rank));
  return {a->data, Shape(a->shape, a->shape + a->rank), Shape(a->strides, a->strides + a->rank)};
}

// An array that may be absent, as kernels.h takes it.
class Optional {
 public:
  Optional(const char* name, const sa_softmax_array* a) : given_(a != nullptr) {
    if (given_) array_ = array(name, a);
  }
  operator const Array*() const { return given_ ? &array_ : nullptr; }

 private:
  bool given_;
  Array array_;
};

AttentionOptions options(int dtype, int variant, int is_causal, int64_t q_offset, int64_t left, double scale) {
  return {DType(dtype), Variant(variant), is_causal != 0, is_causal ? q_offset : 0, scale, left};
}

Parallel parallel(int threads) {
  if (threads < 0 && has_openmp())
    return [threads](int64_t count, const std::function<void(int64_t)>& task) { run_openmp(-threads, count, task); };
  if (threads < 1)
    throw Error("threads must be at least 1, or below 0 after sa_softmax_use_openmp(); got " + std::to_string(threads));
  return [threads](int64_t count, const std::function<void(int64_t)>& task) { run_parallel(threads, count, task); };
}

}  // namespace
}  // namespace sa_softmax

using namespace sa_softmax;

int sa_softmax_row(int dtype, int variant, int64_t axis, const sa_softmax_array* x, const sa_softmax_array* where,
                   const sa_softmax_array* y, int threads) {
  return guarded([&] {
    softmax({DType(dtype), axis, Variant(variant)}, array("x", x), Optional("where", where), array("y", y),
            parallel(threads));
  });
}

int sa_softmax_contiguous_rows(int dtype, int variant, int64_t rows, int64_t n, const void* x, void* y, int threads) {
  return guarded([&] { softmax_contiguous(DType(dtype), Variant(variant), rows, n, x, y, parallel(threads)); });
}

int sa_softmax_row_vjp(int dtype, int variant, int64_t axis, const sa_softmax_array* x, const sa_softmax_array* g,
                       const sa_softmax_array* where, const sa_softmax_array* dx, int threads) {
  return guarded([&] {
    softmax_vjp({DType(dtype), axis, Variant(variant)}, array("x", x), array("g", g), Optional("where", where),
                array("dx", dx), parallel(threads));
  });
}

int sa_softmax_attention(int dtype, int variant, int is_causal, int64_t q_offset, int64_t left, double scale,
                         const sa_softmax_array* q, const sa_softmax_array* k, const sa_softmax_array* v,
                         const sa_softmax_array* bias, const sa_softmax_array* mask, const sa_softmax_array* o,
                         int threads) {
  return guarded([&] {
    attention(options(dtype, variant, is_causal, q_offset, left, scale), array("q", q), array("k", k), array("v", v),
              Optional("bias", bias), Optional("mask", mask), array("o", o), parallel(threads));
  });
}

int sa_softmax_attention_vjp(int dtype, int variant, int is_causal, int64_t q_offset, int64_t left, double scale,
                             const sa_softmax_array* q, const sa_softmax_array* k, const sa_softmax_array* v,
                             const sa_softmax_array* bias, const sa_softmax_array* mask,
                             const sa_softmax_array* o_grad, const sa_softmax_array* q_grad,
                             const sa_softmax_array* k_grad, const sa_softmax_array* v_grad,
                             const sa_softmax_array* bias_grad, int threads) {
  return guarded([&] {
    attention_vjp(options(dtype, variant, is_causal, q_offset, left, scale), array("q", q), array("k", k),
                  array("v", v), Optional("bias", bias), Optional("mask", mask), array("o_grad", o_grad),
                  array("q_grad", q_grad), array("k_grad", k_grad), array("v_grad", v_grad),
                  Optional("bias_grad", bias_grad), parallel(threads));
  });
}

void sa_softmax_use_openmp(sa_softmax_openmp parallel) { use_openmp(parallel); }

const char* sa_softmax_instruction_set() {
  const char* name = nullptr;
  guarded([&] { name = instruction_set(); });
  return name;
}

const char* sa_softmax_last_error() { return last_error().c_str(); }
