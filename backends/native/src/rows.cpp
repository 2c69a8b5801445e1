// The row kernels: rows of any stride and dtype, brought to contiguous ones of the compute type where they are not.
#include "row.h"

namespace sa_softmax {
namespace {

// Copies `count` rows of a tile to scratch: dst[c * pitch + i] = element i of row c, and -inf where `where` is false.
template <class T, class C>
INLINE void gather(const T* src, int64_t along, int64_t across, const uint8_t* where, int64_t where_along,
                   int64_t where_across, C* dst, int64_t pitch, int64_t n, int64_t count) {
  const auto copy = [&](int64_t i, int64_t c) { dst[c * pitch + i] = widen(src[i * along + c * across]); };
  if (along == 1)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t i = 0; i < n; ++i) dst[c * pitch + i] = widen(src[i + c * across]);
  else
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < count; ++c) copy(i, c);
  if (where == nullptr) return;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = 0; i < n; ++i) {
      C& z = dst[c * pitch + i];
      z = where[i * where_along + c * where_across] ? z : -kInfinity<C>;
    }
}

template <class T, class C>
INLINE void scatter(const C* src, int64_t pitch, T* dst, int64_t along, int64_t across, int64_t n, int64_t count) {
  if (along == 1)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t i = 0; i < n; ++i) dst[i + c * across] = narrow<T>(src[c * pitch + i]);
  else
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < count; ++c) dst[i * along + c * across] = narrow<T>(src[c * pitch + i]);
}

template <class T, bool kVjp>
void rows(const RowJob& job, int64_t begin, int64_t end, void* scratch) {
  using C = Compute<T>;
  const int64_t pitch = padded(job.n), across = job.tiles_across();
  C* const z = static_cast<C*>(scratch);
  C* const g = z + job.width * pitch;
  C* const e = g + job.width * pitch;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile % across * job.width, count = least(job.width, job.columns - first);
    RowStrides at{first * job.across.x, first * job.across.g, first * job.across.where, first * job.across.y};
    int64_t rest = tile / across;
    for (int64_t axis = job.outer_rank - 1; axis >= 0; --axis) {
      const int64_t index = rest % job.outer_shape[axis];
      rest /= job.outer_shape[axis];
      at.x += index * job.outer[axis].x;
      at.g += index * job.outer[axis].g;
      at.where += index * job.outer[axis].where;
      at.y += index * job.outer[axis].y;
    }
    const T* const x = static_cast<const T*>(job.x) + at.x;
    const T* const up = kVjp ? static_cast<const T*>(job.g) + at.g : nullptr;
    T* const y = static_cast<T*>(job.y) + at.y;
    const uint8_t* const where = job.where ? job.where + at.where : nullptr;
    if constexpr (kSame<T, C>) {
      if (where == nullptr && job.along.x == 1 && job.along.y == 1 && (!kVjp || job.along.g == 1)) {
        for (int64_t c = 0; c < count; ++c) {
          C* const out = y + c * job.across.y;
          if (kVjp)
            vjp_row<C>(x + c * job.across.x, up + c * job.across.g, job.n, out, out, job.normalized);
          else
            forward_row<C>(x + c * job.across.x, job.n, out, out, job.normalized);
        }
        continue;
      }
    }
    gather(x, job.along.x, job.across.x, where, job.along.where, job.across.where, z, pitch, job.n, count);
    if (kVjp) gather<T, C>(up, job.along.g, job.across.g, nullptr, 0, 0, g, pitch, job.n, count);
    for (int64_t c = 0; c < count; ++c) {
      C* const row = z + c * pitch;
      if (kVjp)
        vjp_row<C>(row, g + c * pitch, job.n, row, e, job.normalized);
      else
        forward_row<C>(row, job.n, row, e, job.normalized);
    }
    scatter(z, pitch, y, job.along.y, job.across.y, job.n, count);
  }
}

}  // namespace

namespace SA_SOFTMAX_ISA {

extern const RowKernels row_kernels;
const RowKernels row_kernels = {
    {rows<Half, false>, rows<Bfloat, false>, rows<float, false>, rows<double, false>},
    {rows<Half, true>, rows<Bfloat, true>, rows<float, true>, rows<double, true>},
};

}  // namespace SA_SOFTMAX_ISA
}  // namespace sa_softmax
