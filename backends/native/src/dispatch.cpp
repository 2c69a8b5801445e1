// The choice of kernels for this processor. CMake defines SA_SOFTMAX_X86 where it compiles three instruction sets.
#include "dispatch.h"

#include <cstdlib>
#include <string>

#if defined(SA_SOFTMAX_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#ifdef SA_SOFTMAX_X86
// Whether the processor multiplies tiles of bfloat16 and the system lets this process.
bool may_use_tiles() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16) == 0 || (d & tile) == 0) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}
#endif

Kernels choose() {
#ifdef SA_SOFTMAX_X86
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Pairs pairs = __builtin_cpu_supports("avx512bf16") ? Pairs::vectors : Pairs::none;
  const Choice choices[] = {
      {{"x86-64-v4+amx", v4::row_kernels, v4::attention_kernels, Pairs::tiles},
       has_v4 && pairs == Pairs::vectors && may_use_tiles()},
      {{"x86-64-v4", v4::row_kernels, v4::attention_kernels, pairs}, has_v4},
      {{"x86-64-v3", v3::row_kernels, v3::attention_kernels, Pairs::none}, has_v3},
      {{"x86-64-v2", v2::row_kernels, v2::attention_kernels, Pairs::none}, true}};
#else
  const Choice choices[] = {{{"generic", generic::row_kernels, generic::attention_kernels, Pairs::none}, true}};
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
