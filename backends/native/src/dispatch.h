#pragma once

#include "jobs.h"

namespace sa_softmax {

// The kernels that this process uses; see instruction_set() in kernels.h.
const Kernels& kernels();

}  // namespace sa_softmax
