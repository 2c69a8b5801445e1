// Threads for callers that bring none of their own.
#pragma once

#include <cstdint>
#include <functional>

namespace sa_softmax {

// Runs task(0), ..., task(count - 1) on the calling thread and up to threads - 1 others, and returns when all have
// returned; rethrows the first exception. Many threads may call it, also from within a task, and processes may fork.
void run_parallel(int threads, int64_t count, const std::function<void(int64_t)>& task);

}  // namespace sa_softmax
