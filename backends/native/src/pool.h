// Threads for callers that bring none of their own.
#pragma once

#include <cstdint>
#include <functional>

namespace sa_softmax {

// Runs task(0), ..., task(count - 1) on the calling thread and up to threads - 1 others, and returns when all have
// returned; rethrows the first exception. Many threads may call it, also from within a task, and processes may fork.
void run_parallel(int threads, int64_t count, const std::function<void(int64_t)>& task);

// The same on the threads of an OpenMP runtime, whose GOMP_parallel use_openmp() was given; in a forked child, where that
// runtime may have lost its threads, as run_parallel.
using OpenMp = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);
void use_openmp(OpenMp parallel);
bool has_openmp();
void run_openmp(int threads, int64_t count, const std::function<void(int64_t)>& task);

}  // namespace sa_softmax
