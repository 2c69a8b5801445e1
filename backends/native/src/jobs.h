// What the checked interface hands to the kernels. Plain data only: the kernels are compiled once per instruction set, and
// an inline function of the standard library compiled there could be linked into code that runs on any processor.
#pragma once

#include <cstdint>

namespace sa_softmax {

// Rows are padded to a multiple of this many elements in scratch: four of the widest vectors.
constexpr int64_t kPad = 64;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

constexpr int64_t kShortest = 16;  // the most lanes of a vector

// Strides in elements of x, g, where and y.
struct RowStrides {
  int64_t x, g, where, y;
};

// Rows of length n lie side by side, `columns` of them; `outer` counts such groups. A tile is up to `width` columns.
struct RowJob {
  const void* x;
  const void* g;
  const uint8_t* where;  // null: every entry
  void* y;
  int64_t n, columns, width;
  RowStrides along, across;
  int64_t outer_rank;
  const int64_t* outer_shape;
  const RowStrides* outer;
  bool normalized;
  bool direct;   // rows are read and written where they lie: n >= kShortest, and they are contiguous
  bool streams;  // if direct: the output goes past the caches

  int64_t tiles_across() const { return (columns + width - 1) / width; }
  // e, or z, g and e of a tile, in elements of the compute type.
  int64_t scratch() const { return direct ? padded(n) : (2 * width + 1) * padded(n); }
};

// Strides in elements of q, k, v, bias, mask and o.
struct AttentionStrides {
  int64_t q, k, v, bias, mask, o;
};

constexpr int64_t kDepth = 256;  // how much of D or of the keys one packed panel holds
constexpr int64_t kPanel = 64;   // the most columns a panel has

// A block is up to `block` of the group * tq query rows that read one key/value head.
struct AttentionJob {
  const void* q;
  const void* k;
  const void* v;
  const void* bias;
  const uint8_t* mask;
  void* o;
  int64_t batch_rank;
  const int64_t* batch_shape;
  const AttentionStrides* batch;
  AttentionStrides head, row, column;  // k and v: head counts key/value heads; bias, mask: row is a query, column a key
  int64_t heads, group, tq, tk, d, dv, block;
  bool causal;
  int64_t q_offset;
  double scale;
  bool normalized;

  int64_t blocks() const { return (group * tq + block - 1) / block; }
  // Scores, e, queries, a panel, the output, which of its entries are poisoned, in elements of the compute type.
  int64_t scratch() const { return (block + 1) * padded(tk) + block * kDepth + kDepth * kPanel + 2 * block * kPanel; }
};

// The kernels of one instruction set, by DType: process the tiles or blocks [begin, end). `scratch` holds job.scratch()
// elements of the compute type, aligned to 64 bytes.
struct RowKernels {
  void (*forward[4])(const RowJob& job, int64_t begin, int64_t end, void* scratch);
  void (*vjp[4])(const RowJob& job, int64_t begin, int64_t end, void* scratch);
};
struct AttentionKernels {
  void (*forward[4])(const AttentionJob& job, int64_t begin, int64_t end, void* scratch);
};

}  // namespace sa_softmax
