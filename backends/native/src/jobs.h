// What the checked interface hands to the kernels. Plain data only: the kernels are compiled once per instruction set, and
// an inline function of the standard library compiled there could be linked into code that runs on any processor.
#pragma once

#include <cstdint>

namespace sa_softmax {

// Rows are padded to a multiple of this many elements in scratch: four of the widest vectors.
constexpr int64_t kPad = 64;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

constexpr int64_t kShortest = 16;  // the most lanes of a vector
// So many rows are processed together, whose sums share vectors, if they stay in the first cache with what they become.
constexpr int64_t kTogether = 4;

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
  int64_t together() const { return n > (g == nullptr ? 1024 : 512) ? 1 : columns < kTogether ? columns : kTogether; }
  // e, or z and g of a tile, e and output rows, in elements of the compute type.
  int64_t scratch() const { return (direct ? together() : 2 * width + 2 * together()) * padded(n); }
};

// Strides in elements of the arrays of attention; o_grad is the upstream gradient.
struct AttentionStrides {
  int64_t q, k, v, bias, mask, o, o_grad, q_grad, k_grad, v_grad, bias_grad;
};

constexpr int64_t kDepth = 256;    // how much of D one product takes
constexpr int64_t kKeysAtOnce = 64, kPairsAtOnce = 128;  // keys, and pairs of them: few whose values stay in the first cache
constexpr int64_t kPanel = 64;     // the most columns of a panel
constexpr int64_t kMostRows = 96;  // of a block
constexpr int64_t kFew = 6;        // rows for which packing does not pay

// How many numbers of 16 bits a product takes at once: one that was widened, or a pair of bfloat16 in each lane of a vector
// (AVX512_BF16), or in each word of a tile (AMX-BF16).
enum class Pairs { none, vectors, tiles };
constexpr int64_t kTile = 16, kTileRows = 2 * kTile;  // rows and words of a tile; rows that a product takes

// Where the buffers of a thread begin in its scratch; attention.cpp says what they hold. In elements of the compute type.
struct AttentionScratch {
  int64_t scores, upstream, e, queries, o_grad, output, poisoned, panel, keys, values, rows, k_grad, v_grad, size;
};

// Rows are the group * tq queries that read one key/value head, in blocks of up to `block`. The blocks of a head are
// divided into `parts`; a unit of work is one part of one head.
struct AttentionJob {
  const void *q, *k, *v, *bias;
  const uint8_t* mask;
  void* o;
  const void* o_grad;
  void *q_grad, *k_grad, *v_grad, *bias_grad;
  int64_t batch_rank;
  const int64_t* batch_shape;
  const AttentionStrides* batch;
  AttentionStrides head, row, column;  // k and v: head counts key/value heads; bias, mask: row is a query, column a key
  int64_t batches, heads, group, tq, tk, d, dv;
  int64_t from, to;  // query i sees the keys i + from <= j <= i + to; both lie in [-tq, tk]
  double scale;
  bool normalized;
  Pairs pairs;
  int64_t words;  // of a key, if in pairs
  bool few;       // queries of a key/value head: forward, keys are read where they lie, and values if they lie well
  int64_t block, parts;
  int64_t pitch, d_pitch, dv_pitch;  // of rows of scores, and of rows of D and Dv entries, in scratch
  AttentionScratch at;
  void* partial;  // (units, k_grad and v_grad as in scratch): the gradients of each part, if there are several
  int64_t slots;  // of the bias, where batches, heads or queries share entries: the lines with entries of their own; or 0

  int64_t blocks() const { return (group * tq + block - 1) / block; }
  int64_t units() const { return batches * heads * parts; }
};

// The kernels of one instruction set, by DType: process the tiles or units [begin, end). `scratch` holds as many elements
// of the compute type as the job says, aligned to 64 bytes.
struct RowKernels {
  void (*forward[4])(const RowJob& job, int64_t begin, int64_t end, void* scratch);
  void (*vjp[4])(const RowJob& job, int64_t begin, int64_t end, void* scratch);
};
struct AttentionKernels {
  using Kernel = void (*)(const AttentionJob& job, int64_t begin, int64_t end, void* scratch);
  Kernel forward[4];
  Kernel vjp[4];
  Kernel merge[4];     // adds up the parts: `end` counts batches * heads
  Kernel bias_vjp[4];  // the gradient of a bias with slots: `end` counts slots * blocks of queries
};

}  // namespace sa_softmax
