// The attention kernels. A block of queries keeps its whole rows of scores in scratch, so extrema are exact and each exp
// is computed once.
#include "row.h"

namespace sa_softmax {
namespace {

#if SA_SOFTMAX_VECTOR == 64 || defined(__aarch64__)
constexpr int kRows = 6, kVectors = 4;  // 32 registers
#elif SA_SOFTMAX_VECTOR == 32
constexpr int kRows = 6, kVectors = 2;  // 16 registers
#else
constexpr int kRows = 4, kVectors = 2;
#endif
template <class C>
constexpr int64_t kColumns = kVectors * kLanes<C>;
static_assert(kColumns<float> <= kPanel);

// c[r][0..kColumns) (+)= sum over i of a[r][i] b[i][0..kColumns), for R rows.
template <class C, int R>
INLINE void multiply_rows(const C* a, int64_t a_pitch, const C* b, int64_t b_pitch, C* c, int64_t c_pitch,
                          int64_t depth, bool add) {
  Vector<C> sums[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < kVectors; ++u) sums[r][u] = add ? load(c + r * c_pitch + u * kLanes<C>) : Vector<C>{};
  for (int64_t i = 0; i < depth; ++i) {
    Vector<C> bs[kVectors];
    for (int u = 0; u < kVectors; ++u) bs[u] = load(b + i * b_pitch + u * kLanes<C>);
    for (int r = 0; r < R; ++r) {
      const Vector<C> as = all(a[r * a_pitch + i]);
      for (int u = 0; u < kVectors; ++u) sums[r][u] += as * bs[u];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < kVectors; ++u) store(c + r * c_pitch + u * kLanes<C>, sums[r][u]);
}
template <class C>
void multiply(const C* a, int64_t a_pitch, const C* b, int64_t b_pitch, C* c, int64_t c_pitch, int64_t rows,
              int64_t depth, bool add) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    multiply_rows<C, kRows>(a + r * a_pitch, a_pitch, b, b_pitch, c + r * c_pitch, c_pitch, depth, add);
  for (; r < rows; ++r)
    multiply_rows<C, 1>(a + r * a_pitch, a_pitch, b, b_pitch, c + r * c_pitch, c_pitch, depth, add);
}

template <class T>
struct Block {
  using C = Compute<T>;
  const AttentionJob& job;
  AttentionStrides base;  // offsets of the batch and the key/value head
  int64_t first, count;   // rows of the block; row r is query r % tq of head r / tq of the group
  int64_t keys;           // the first keys, which causality lets some row see
  int64_t pitch;
  C *scores, *e, *queries, *panel, *output, *poisoned;

  // Offsets of row r in q, bias, mask and o.
  AttentionStrides row(int64_t r) const {
    const int64_t h = (first + r) / job.tq, i = (first + r) % job.tq;
    return {base.q + h * job.head.q + i * job.row.q,          0, 0, base.bias + h * job.head.bias + i * job.row.bias,
            base.mask + h * job.head.mask + i * job.row.mask, base.o + h * job.head.o + i * job.row.o};
  }
  // The number of keys that causality lets row r see.
  int64_t visible(int64_t r) const {
    if (!job.causal) return job.tk;
    // q_offset is any integer: compare without adding to it.
    const int64_t i = (first + r) % job.tq;
    if (job.q_offset >= job.tk - 1 - i) return job.tk;
    return job.q_offset < -i ? 0 : i + job.q_offset + 1;
  }
  const T* element(const void* data, int64_t offset) const { return static_cast<const T*>(data) + offset; }

  void multiply_keys() {
    if (job.d == 0)
      for (int64_t r = 0; r < count; ++r) std::memset(scores + r * pitch, 0, size_t(pitch) * sizeof(C));
    for (int64_t d = 0; d < job.d; d += kDepth) {
      const int64_t depth = least(kDepth, job.d - d);
      for (int64_t r = 0; r < count; ++r) {
        const T* const q = element(job.q, row(r).q + d * job.column.q);
        for (int64_t i = 0; i < depth; ++i) queries[r * kDepth + i] = widen(q[i * job.column.q]);
      }
      for (int64_t j = 0; j < keys; j += kColumns<C>) {
        const int64_t width = least(kColumns<C>, keys - j);
        const T* const k = element(job.k, base.k + j * job.row.k + d * job.column.k);
        if (width < kColumns<C>) std::memset(panel, 0, size_t(depth * kColumns<C>) * sizeof(C));
        for (int64_t c = 0; c < width; ++c)
          for (int64_t i = 0; i < depth; ++i)
            panel[i * kColumns<C> + c] = widen(k[c * job.row.k + i * job.column.k]);
        multiply<C>(queries, kDepth, panel, kColumns<C>, scores + j, pitch, count, depth, d > 0);
      }
    }
  }
  // scale, bias, mask and causality; -inf marks what does not participate.
  void finish_scores() {
    const C scale = C(job.scale);
    for (int64_t r = 0; r < count; ++r) {
      C* const s = scores + r * pitch;
      const AttentionStrides at = row(r);
      const int64_t seen = visible(r);
      if (job.bias == nullptr)
        for (int64_t j = 0; j < seen; ++j) s[j] *= scale;
      else if (const T* const bias = element(job.bias, at.bias); job.column.bias == 1)
        for (int64_t j = 0; j < seen; ++j) s[j] = s[j] * scale + widen(bias[j]);
      else
        for (int64_t j = 0; j < seen; ++j) s[j] = s[j] * scale + widen(bias[j * job.column.bias]);
      if (job.mask != nullptr) {
        const uint8_t* const mask = job.mask + at.mask;
        if (job.column.mask == 1)
          for (int64_t j = 0; j < seen; ++j) s[j] = mask[j] ? s[j] : -kInfinity<C>;
        else
          for (int64_t j = 0; j < seen; ++j) s[j] = mask[j * job.column.mask] ? s[j] : -kInfinity<C>;
      }
      for (int64_t j = seen; j < padded(keys); ++j) s[j] = -kInfinity<C>;
    }
  }
  // Columns [d, d + width) of the output. With `careful`, entries of v that are not finite count as 0: poison() has
  // seen where they belong.
  void multiply_values(int64_t d, int64_t width, bool careful) {
    for (int64_t r = 0; r < count; ++r) std::memset(output + r * kPanel, 0, sizeof(C) * kColumns<C>);
    for (int64_t j = 0; j < keys; j += kDepth) {
      const int64_t depth = least(kDepth, keys - j);
      const T* const v = element(job.v, base.v + j * job.row.v + d * job.column.v);
      if constexpr (kSame<T, C>) {
        if (width == kColumns<C> && job.column.v == 1 && !careful) {
          multiply<C>(scores + j, pitch, v, job.row.v, output, kPanel, count, depth, true);
          continue;
        }
      }
      if (width < kColumns<C>) std::memset(panel, 0, size_t(depth * kColumns<C>) * sizeof(C));
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t c = 0; c < width; ++c) {
          const C value = widen(v[i * job.row.v + c * job.column.v]);
          panel[i * kColumns<C> + c] = !careful || value - value == 0 ? value : C(0);
        }
      multiply<C>(scores + j, pitch, panel, kColumns<C>, output, kPanel, count, depth, true);
    }
  }
  // Marks the outputs in columns [d, d + width) that a participating entry of v that is not finite makes NaN (A6).
  void poison(int64_t d, int64_t width) {
    for (int64_t r = 0; r < count; ++r) std::memset(poisoned + r * kPanel, 0, sizeof(C) * kPanel);
    for (int64_t j = 0; j < keys; ++j) {
      const T* const v = element(job.v, base.v + j * job.row.v + d * job.column.v);
      for (int64_t c = 0; c < width; ++c) {
        const C value = widen(v[c * job.column.v]);
        if (value - value == 0) continue;
        for (int64_t r = 0; r < count; ++r)
          if (scores[r * pitch + j] != -kInfinity<C>) poisoned[r * kPanel + c] = 1;
      }
    }
  }
  void score() {
    multiply_keys();
    finish_scores();
  }
  void weigh() {
    for (int64_t r = 0; r < count; ++r)
      forward_row<C>(scores + r * pitch, padded(keys), scores + r * pitch, e, job.normalized);
  }
  bool finite(int64_t width) const {
    C sum = 0;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < width; ++c) sum += output[r * kPanel + c] * 0;
    return sum == 0;
  }
  void write(int64_t d, int64_t width) {
    for (int64_t r = 0; r < count; ++r) {
      T* const o = static_cast<T*>(job.o) + row(r).o + d * job.column.o;
      for (int64_t c = 0; c < width; ++c) o[c * job.column.o] = narrow<T>(output[r * kPanel + c]);
    }
  }
  void run() {
    score();
    weigh();
    for (int64_t d = 0; d < job.dv; d += kColumns<C>) {
      const int64_t width = least(kColumns<C>, job.dv - d);
      multiply_values(d, width, false);
      if (!finite(width)) {
        // A value that is not finite, wherever it stands, shows in the product, if only as 0 * inf: so the search for
        // it costs nothing where all is well. The scores are gone and must be computed again.
        score();
        poison(d, width);
        weigh();
        multiply_values(d, width, true);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = 0; c < width; ++c)
            if (poisoned[r * kPanel + c] != 0) output[r * kPanel + c] = C(__builtin_nan(""));
      }
      write(d, width);
    }
  }
};

template <class T>
void attention(const AttentionJob& job, int64_t begin, int64_t end, void* scratch) {
  using C = Compute<T>;
  const int64_t pitch = padded(job.tk);
  C* const scores = static_cast<C*>(scratch);
  C* const e = scores + job.block * pitch;
  C* const queries = e + pitch;
  C* const panel = queries + job.block * kDepth;
  C* const output = panel + kDepth * kPanel;
  C* const poisoned = output + job.block * kPanel;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % job.blocks(), head = task / job.blocks() % job.heads;
    int64_t rest = task / job.blocks() / job.heads;
    AttentionStrides base{head * job.group * job.head.q,    head * job.head.k,
                          head * job.head.v,                head * job.group * job.head.bias,
                          head * job.group * job.head.mask, head * job.group * job.head.o};
    for (int64_t axis = job.batch_rank - 1; axis >= 0; --axis) {
      const int64_t index = rest % job.batch_shape[axis];
      rest /= job.batch_shape[axis];
      base.q += index * job.batch[axis].q;
      base.k += index * job.batch[axis].k;
      base.v += index * job.batch[axis].v;
      base.bias += index * job.batch[axis].bias;
      base.mask += index * job.batch[axis].mask;
      base.o += index * job.batch[axis].o;
    }
    const int64_t first = block * job.block, count = least(job.block, job.group * job.tq - first);
    Block<T> rows{job, base, first, count, 0, pitch, scores, e, queries, panel, output, poisoned};
    for (int64_t r = 0; r < count; ++r)
      if (const int64_t seen = rows.visible(r); seen > rows.keys) rows.keys = seen;
    rows.run();
  }
}

}  // namespace

namespace SA_SOFTMAX_ISA {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    {attention<Half>, attention<Bfloat>, attention<float>, attention<double>},
};

}  // namespace SA_SOFTMAX_ISA
}  // namespace sa_softmax
