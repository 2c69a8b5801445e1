// Where scratch comes from, and what the system says of memory and caches.
#include "checked.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sa_softmax {

Scratch::Scratch(size_t bytes) : data_(nullptr) {
  if (bytes == 0) return;
#if defined(__linux__)
  constexpr size_t huge = size_t(2) << 20;
  if (bytes >= huge) {
    // A mapping begins at any page: so much more that a huge page's edge lies within the first of them.
    const size_t size = (bytes + huge - 1) / huge * huge;
    void* const map = mmap(nullptr, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    unsigned char* const begin = static_cast<unsigned char*>(map);
    const size_t before = (huge - reinterpret_cast<uintptr_t>(begin) % huge) % huge;
    if (before > 0) munmap(begin, before);
    if (before < huge) munmap(begin + before + size, huge - before);
    data_ = begin + before;
    mapped_ = size;
    madvise(data_, size, MADV_HUGEPAGE);  // a wish: small pages serve, too
    return;
  }
#endif
  data_ = ::operator new(bytes, std::align_val_t(64));
}

Scratch::~Scratch() {
#if defined(__linux__)
  if (mapped_ > 0) {
    munmap(data_, mapped_);
    return;
  }
#endif
  ::operator delete(data_, std::align_val_t(64));
}

bool was_touched(const void* address) {
#if defined(__linux__)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  unsigned char resident = 1;
  if (mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(address) / page * page), 1, &resident) == 0)
    return (resident & 1) != 0;
#else
  static_cast<void>(address);
#endif
  return true;
}

int64_t cache_of_core() {
  static const int64_t bytes = [] {
    int64_t told = 0;
#if defined(__linux__)
    told = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::max<int64_t>(told, 1 << 20);
  }();
  return bytes;
}

}  // namespace sa_softmax
