// The choice of kernels for this processor. CMake defines SA_SOFTMAX_X86 where it compiles three instruction sets.
#include "dispatch.h"

#include <cstdlib>
#include <string>

#include "sa_softmax/kernels.h"

namespace sa_softmax {

#ifdef SA_SOFTMAX_X86
namespace v2 {
extern const RowKernels row_kernels;
extern const AttentionKernels attention_kernels;
}
namespace v3 {
extern const RowKernels row_kernels;
extern const AttentionKernels attention_kernels;
}
namespace v4 {
extern const RowKernels row_kernels;
extern const AttentionKernels attention_kernels;
}
#else
namespace generic {
extern const RowKernels row_kernels;
extern const AttentionKernels attention_kernels;
}
#endif

namespace {

struct Choice {
  Kernels kernels;
  bool runs;
};

Kernels choose() {
#ifdef SA_SOFTMAX_X86
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Choice choices[] = {{{"x86-64-v4", v4::row_kernels, v4::attention_kernels, bool(__builtin_cpu_supports("avx512bf16"))}, has_v4},
                            {{"x86-64-v3", v3::row_kernels, v3::attention_kernels, false}, has_v3},
                            {{"x86-64-v2", v2::row_kernels, v2::attention_kernels, false}, true}};
#else
  const Choice choices[] = {{{"generic", generic::row_kernels, generic::attention_kernels, false}, true}};
#endif
  const char* const wanted = std::getenv("SA_SOFTMAX_INSTRUCTION_SET");
  std::string runnable;
  for (const Choice& choice : choices) {
    if (!choice.runs) continue;
    if (wanted == nullptr || std::string(wanted) == choice.kernels.name) return choice.kernels;
    runnable += (runnable.empty() ? "" : ", ") + std::string(choice.kernels.name);
  }
  throw Error("SA_SOFTMAX_INSTRUCTION_SET must name what this processor runs (" + runnable + "); got " + wanted +
              ". Unset it for the best one");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

const char* instruction_set() { return kernels().name; }

}  // namespace sa_softmax
