// The choice of kernels for this processor. CMake defines SA_SOFTMAX_X86 where it compiles three instruction sets.
#include "dispatch.h"

#include <cstdlib>
#include <string>

#include "sa_softmax/kernels.h"

namespace sa_softmax {

#ifdef SA_SOFTMAX_X86
namespace v2 {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
#else
namespace generic {
extern const Kernels kernels;
}
#endif

namespace {

struct Choice {
  const Kernels* kernels;
  bool runs;
};

const Kernels& choose() {
#ifdef SA_SOFTMAX_X86
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Choice choices[] = {{&v4::kernels, has_v4}, {&v3::kernels, has_v3}, {&v2::kernels, true}};
#else
  const Choice choices[] = {{&generic::kernels, true}};
#endif
  const char* const wanted = std::getenv("SA_SOFTMAX_INSTRUCTION_SET");
  std::string runnable;
  for (const Choice& choice : choices) {
    if (!choice.runs) continue;
    if (wanted == nullptr || std::string(wanted) == choice.kernels->name) return *choice.kernels;
    runnable += (runnable.empty() ? "" : ", ") + std::string(choice.kernels->name);
  }
  throw Error("SA_SOFTMAX_INSTRUCTION_SET must name what this processor runs (" + runnable + "); got " + wanted +
              ". Unset it for the best one");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* instruction_set() { return kernels().name; }

}  // namespace sa_softmax
