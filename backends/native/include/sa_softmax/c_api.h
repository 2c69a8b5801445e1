/* SA-Softmax on the CPU: the C interface of the kernels, for callers that load the library by its path. What is computed
 * is docs/spec.md; kernels.h says the rest.
 *
 * Every function may be called from any thread, and from a process that was forked. Those that return an int return 0, or
 * 1 if the call has no right answer: then sa_softmax_last_error() is the message of this thread's last such call. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define SA_SOFTMAX_EXPORT __declspec(dllexport)
#else
#define SA_SOFTMAX_EXPORT __attribute__((visibility("default")))
#endif

enum { SA_SOFTMAX_FLOAT16, SA_SOFTMAX_BFLOAT16, SA_SOFTMAX_FLOAT32, SA_SOFTMAX_FLOAT64 };
enum { SA_SOFTMAX_NORMALIZED, SA_SOFTMAX_PRODUCT };

/* Masks are bytes, of which any but 0 is true. An array that is not given is a null pointer. */
typedef struct {
  void* data;
  int64_t rank;
  const int64_t* shape;
  const int64_t* strides; /* in elements, of any sign; 0 repeats, which outputs must not */
} sa_softmax_array;

/* `threads` >= 1: the most threads that work, the calling one included. Small work stays on that one.
 * `threads` < 0: -threads of the OpenMP runtime of sa_softmax_use_openmp(). Where a caller computes by that runtime, too, its
 * threads wait busily for what comes next, and others would have to share their processors. */

SA_SOFTMAX_EXPORT int sa_softmax_row(int dtype, int variant, int64_t axis, const sa_softmax_array* x,
                                     const sa_softmax_array* where, const sa_softmax_array* y, int threads);

/* The same for `rows` contiguous rows of length n. */
SA_SOFTMAX_EXPORT int sa_softmax_contiguous_rows(int dtype, int variant, int64_t rows, int64_t n, const void* x, void* y,
                                                 int threads);

SA_SOFTMAX_EXPORT int sa_softmax_row_vjp(int dtype, int variant, int64_t axis, const sa_softmax_array* x,
                                         const sa_softmax_array* g, const sa_softmax_array* where,
                                         const sa_softmax_array* dx, int threads);

/* q_offset is read if is_causal; left is that of the sliding window, or -1. */
SA_SOFTMAX_EXPORT int sa_softmax_attention(int dtype, int variant, int is_causal, int64_t q_offset, int64_t left,
                                           double scale, const sa_softmax_array* q, const sa_softmax_array* k,
                                           const sa_softmax_array* v, const sa_softmax_array* bias,
                                           const sa_softmax_array* mask, const sa_softmax_array* o, int threads);

/* bias_grad may be null. */
SA_SOFTMAX_EXPORT int sa_softmax_attention_vjp(int dtype, int variant, int is_causal, int64_t q_offset, int64_t left,
                                               double scale, const sa_softmax_array* q, const sa_softmax_array* k,
                                               const sa_softmax_array* v, const sa_softmax_array* bias,
                                               const sa_softmax_array* mask, const sa_softmax_array* o_grad,
                                               const sa_softmax_array* q_grad, const sa_softmax_array* k_grad,
                                               const sa_softmax_array* v_grad, const sa_softmax_array* bias_grad,
                                               int threads);

/* `parallel` is the GOMP_parallel of a runtime of GCC or LLVM. */
typedef void (*sa_softmax_openmp)(void (*run)(void*), void* data, unsigned threads, unsigned flags);
SA_SOFTMAX_EXPORT void sa_softmax_use_openmp(sa_softmax_openmp parallel);

/* The instruction set of the kernels, or null if SA_SOFTMAX_INSTRUCTION_SET names one that this processor lacks. */
SA_SOFTMAX_EXPORT const char* sa_softmax_instruction_set(void);

SA_SOFTMAX_EXPORT const char* sa_softmax_last_error(void);

#ifdef __cplusplus
}
#endif
