#pragma once

#include "jobs.h"

namespace sa_softmax {

struct Kernels {
  const char* name;
  const RowKernels& rows;
  const AttentionKernels& attention;
  Pairs pairs;  // the best that the processor does
};

// The kernels that this process uses; see instruction_set() in kernels.h.
const Kernels& kernels();

}  // namespace sa_softmax
