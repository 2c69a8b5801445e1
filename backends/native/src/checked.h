// What the checked functions share: validation, broadcasting, and the division of the work among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "sa_softmax/kernels.h"

namespace sa_softmax {

inline std::string text(const Shape& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

// The number of elements; 0 is a valid one.
inline int64_t count(const Shape& shape) {
  int64_t n = 1;
  for (const int64_t length : shape)
    if (length == 0) return 0;
  for (const int64_t length : shape) n *= length;
  return n;
}

inline void check_memory(const char* name, const void* data, const int64_t* lengths, size_t rank) {
  const auto shape = [&] { return text(Shape(lengths, lengths + rank)); };
  int64_t n = 8;  // bytes of the widest element
  bool empty = false;
  for (size_t i = 0; i < rank; ++i) {
    if (lengths[i] < 0) throw Error(std::string(name) + " must not have a negative length; got the shape " + shape());
    if (lengths[i] != 0 && __builtin_mul_overflow(n, lengths[i], &n))
      throw Error(std::string(name) + " must have fewer than 2^60 elements; got the shape " + shape());
    empty = empty || lengths[i] == 0;
  }
  if (data == nullptr && !empty)
    throw Error(std::string(name) + " must have data; got a null pointer for the shape " + shape());
}

inline void check_array(const char* name, const Array& a) {
  if (a.shape.size() != a.strides.size())
    throw Error(std::string(name) + " must have one stride for each axis; got the shape " + text(a.shape) + " and " +
                std::to_string(a.strides.size()) + " strides");
  check_memory(name, a.data, a.shape.data(), a.shape.size());
}

inline void check_output(const char* name, const Array& a) {
  if (count(a.shape) == 0) return;
  for (size_t i = 0; i < a.shape.size(); ++i)
    if (a.strides[i] == 0 && a.shape[i] > 1)
      throw Error(std::string(name) + " must not repeat along an axis; got the stride 0 at axis " + std::to_string(i) +
                  " of the shape " + text(a.shape) + ". Pass an array with room for every element");
}

inline void check_same(const char* name, const Array& a, const char* other, const Shape& shape) {
  if (a.shape != shape)
    throw Error(std::string(name) + " must have the shape of " + other + ", " + text(shape) + "; got " + text(a.shape));
}

// The strides of `a` along the axes of `shape`, 0 where it is repeated.
inline Shape broadcast(const char* name, const Array& a, const Shape& shape, const char* target) {
  Shape strides(shape.size(), 0);
  bool fits = a.shape.size() <= shape.size();
  for (size_t i = 0; fits && i < a.shape.size(); ++i) {
    const size_t axis = shape.size() - a.shape.size() + i;
    fits = a.shape[i] == 1 || a.shape[i] == shape[axis];
    strides[axis] = a.shape[i] == 1 ? 0 : a.strides[i];
  }
  if (!fits)
    throw Error(std::string(name) + " must broadcast to the shape of " + target + ", " + text(shape) + "; got " +
                text(a.shape) + ". Align the last axes, and give those that repeat the length 1");
  return strides;
}

inline size_t compute_size(DType dtype) { return dtype == DType::float64 ? sizeof(double) : sizeof(float); }

// Memory aligned to cache lines; null for 0 bytes. Much of it comes in huge pages, where there are any, since the kernels
// touch a new page every few rows, and goes back to the system at once.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  Scratch(Scratch&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), mapped_(std::exchange(other.mapped_, 0)) {}
  Scratch& operator=(Scratch&&) = delete;
  ~Scratch();
  void* get() const { return data_; }

 private:
  void* data_;
  size_t mapped_ = 0;  // bytes, if they are the system's
};

// The scratch of the tasks of one call: as many pieces as run at a time.
class Scratches {
 public:
  explicit Scratches(size_t bytes) : bytes_(bytes) {}
  Scratch take() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        Scratch last = std::move(free_.back());
        free_.pop_back();
        return last;
      }
    }
    return Scratch(bytes_);
  }
  void give(Scratch&& scratch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(scratch));
  }

 private:
  const size_t bytes_;
  std::mutex mutex_;
  std::vector<Scratch> free_;
};

// Whether the page at `address` has memory already; true where the system does not say.
bool was_touched(const void* address);

// The bytes of the largest cache that a core has to itself: at least 1 MiB, where it does not say.
int64_t cache_of_core();

// Calls run(begin, end, scratch) for disjoint ranges that make up [0, units), with `elements` of scratch each.
template <class Run>
void divide(const Parallel& parallel, int64_t units, double work, int64_t elements, DType dtype, const Run& run) {
  constexpr double kWork = 1 << 15;  // entries that are worth a task: some 20 microseconds
  constexpr int64_t kTasks = 256;
  const double wanted = std::ceil(std::fmin(work / kWork, double(kTasks)));
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(units, int64_t(wanted)));
  const size_t bytes = size_t(elements) * compute_size(dtype);
  constexpr size_t kSmall = 4096;  // to allocate as much takes as long as a row of some hundred entries
  if (tasks == 1 && bytes <= kSmall) {
    alignas(64) unsigned char scratch[kSmall];
    run(0, units, scratch);
    return;
  }
  Scratches scratches(bytes);
  std::atomic<bool> failed{false};
  const auto task = [&](int64_t index) {
    const auto at = [&](int64_t i) { return units / tasks * i + std::min(i, units % tasks); };
    try {
      Scratch scratch = scratches.take();
      run(at(index), at(index + 1), scratch.get());
      scratches.give(std::move(scratch));
    } catch (const std::bad_alloc&) {
      failed = true;  // an exception must not leave a thread that is not ours
    }
  };
  if (tasks == 1)
    task(0);
  else
    parallel(tasks, task);
  if (failed) throw Error("the scratch of a thread needs " + std::to_string(bytes) + " bytes, which it did not get");
}

inline void check_variant(Variant variant) {
  if (variant != Variant::normalized && variant != Variant::product)
    throw Error("variant must be normalized or product; got " + std::to_string(int(variant)));
}

inline void check_dtype(DType dtype) {
  if (dtype < DType::float16 || dtype > DType::float64)
    throw Error("dtype must be float16, bfloat16, float32 or float64; got " + std::to_string(int(dtype)));
}

}  // namespace sa_softmax
