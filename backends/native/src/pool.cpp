// The caller of a batch works on it itself, and helpers that are free join it. So a call never waits for one that has not
// begun, whoever makes it: many callers, calls within tasks, and a process without a thread to spare all come to an end.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace sa_softmax {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until done() or for a short while: about as long as it takes to put a thread to sleep and wake it again.
template <class F>
void spin(const F& done) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::microseconds(50);
  while (!done() && Clock::now() < end)
    for (int i = 0; i < 16 && !done(); ++i) relax();
}

struct Batch {
  const std::function<void(int64_t)>& task;
  const int64_t count;
  int64_t openings;  // helpers that may still join; like `helpers`, guarded by the pool's mutex
  std::atomic<int64_t> helpers{0};
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) try {
        task(i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next = count;
      }
  }
};

class Pool {
 public:
  void run(Batch& batch) {
    std::unique_lock<std::mutex> lock(mutex);
    batches_.push_back(&batch);
    waiting_ = int64_t(batches_.size());
    const int64_t openings = batch.openings;
    for (; started_ < openings; ++started_) try {
        std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) {
        break;  // no more threads to be had: those there are do the work
      }
    lock.unlock();
    for (int64_t i = 0; i < openings; ++i) wake_.notify_one();
    batch.work();
    lock.lock();
    if (batch.openings > 0) close(batch);
    lock.unlock();
    spin([&] { return batch.helpers == 0; });
    lock.lock();
    left_.wait(lock, [&] { return batch.helpers == 0; });
  }

  std::mutex mutex;

 private:
  void help() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake_.wait(lock, [&] { return !batches_.empty(); });
      Batch& batch = *batches_.front();
      ++batch.helpers;
      if (--batch.openings == 0) close(batch);
      lock.unlock();
      batch.work();
      lock.lock();
      if (--batch.helpers == 0) left_.notify_all();
      if (!batches_.empty()) continue;
      lock.unlock();
      spin([&] { return waiting_ > 0; });
      lock.lock();
    }
  }
  // Nobody joins any more.
  void close(Batch& batch) {
    batch.openings = 0;
    for (auto at = batches_.begin(); at != batches_.end(); ++at)
      if (*at == &batch) {
        batches_.erase(at);
        waiting_ = int64_t(batches_.size());
        return;
      }
  }

  std::condition_variable wake_, left_;
  std::deque<Batch*> batches_;
  std::atomic<int64_t> waiting_{0};  // the length of batches_, for those who look without the mutex
  int64_t started_ = 0;
};

// Its threads run until the process ends, so it is never destroyed.
Pool* current = nullptr;

Pool& pool() {
  static const bool made = [] {
    current = new Pool;
#if !defined(_WIN32)
    // A child has none of its parent's threads: it begins with a pool of its own.
    pthread_atfork([] { current->mutex.lock(); }, [] { current->mutex.unlock(); }, [] { current = new Pool; });
#endif
    return true;
  }();
  static_cast<void>(made);
  return *current;
}

OpenMp openmp = nullptr;
bool forked = false;  // set where there is one thread

}  // namespace

void run_parallel(int threads, int64_t count, const std::function<void(int64_t)>& task) {
  Batch batch{task, count, std::min<int64_t>(threads, count) - 1};
  if (batch.openings <= 0)
    batch.work();
  else
    pool().run(batch);
  if (batch.error) std::rethrow_exception(batch.error);
}

void use_openmp(OpenMp parallel) {
#if !defined(_WIN32)
  static const bool watched = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;
  static_cast<void>(watched);
#endif
  openmp = parallel;
}

bool has_openmp() { return openmp != nullptr; }

void run_openmp(int threads, int64_t count, const std::function<void(int64_t)>& task) {
  if (threads == 1 || forked) return run_parallel(threads, count, task);
  Batch batch{task, count, 0};
  // As many threads as the runtime's other users take, even for fewer tasks: it ends those that a team leaves out.
  openmp([](void* of) { static_cast<Batch*>(of)->work(); }, &batch, unsigned(threads), 0);
  if (batch.error) std::rethrow_exception(batch.error);
}

}  // namespace sa_softmax
