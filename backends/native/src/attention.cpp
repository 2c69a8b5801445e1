// Attention and its gradients.
//
// A block of queries keeps its rows of scores, whole, in scratch: extrema are exact, and each exp is computed once. All
// matrix products are one microkernel, c[r][.] += sum over i of a[r][i] b[i][.], which holds kRows x kColumns of c in
// registers and reads a row of b, a panel, per step:
//
//     scores      S = scale Q K^T     per panel of kColumns keys; K^T is packed into such panels once per unit of work.
//                                     For few queries packing would take longer than S: then by dot products, not packed
//     output      O = Y V             S became Y = the row operation in place; V is read as it lies, if it lies well
//
//     backward    S as above, G = dO V^T with V^T packed likewise; the row gradient turns S into dX and G into Y;
//                 dV += Y^T dO, dK += dX^T Q, dQ = dX K: again the microkernel, with a transposed
//
// Products of bfloat16 forward take pairs, and tiles of them where the processor has those: see Pairs in jobs.h.
//
// The rows of a block are as many as keep the scores in the L2 cache, so K, V and their gradients, which stream past them,
// cost little. Tiles of the products outside of causality and window are left out. A sum runs over keys, or over queries,
// in order, wherever blocks begin: bits depend on blocks and threads nowhere, except that several parts of a head, whose
// number follows from the shapes, are added up in order.
#include "attention_row.h"
#include "tiles.h"

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
static_assert(kPanel % kColumns<float> == 0 && kMostRows % kRows == 0);

// What the microkernel computes, c[r][0..U vectors) += sum over i < depth of a(r, i) b[i][.] for R rows:
//     plain       a(r, i) = a[r * pitch + i]
//     transposed  a(r, i) = a[i * pitch + r]
//     scaled      as plain, and c is multiplied by a factor in the end
//     pairs       as scaled, but an entry of a and b is two bfloat16, whose two products are added
// Not `add`: c was 0.
enum class Product { plain, transposed, scaled, pairs };

template <class C, Product kProduct>
INLINE void add_product(Vector<C>& sum, Vector<C> a, Vector<C> b) {
#if SA_SOFTMAX_VECTOR == 64
  if constexpr (kProduct == Product::pairs) {
    Vector<C> own = sum;  // or arrays of sums, whose elements were operands, would stay in memory
    asm("vdpbf16ps %2, %1, %0" : "+v"(own) : "v"(b), "v"(a));
    sum = own;
    return;
  }
#endif
  sum += a * b;
}
// A function, not part of the loop over tiles: what compilers keep of that loop takes registers from the sums.
template <class C, Product kProduct, int R, int U, class B>
__attribute__((noinline)) void multiply_tile(const C* a, int64_t a_pitch, const B* b, int64_t b_pitch, C* c,
                                             int64_t c_pitch, int64_t depth, bool add, C factor) {
  Vector<C> sums[R][U];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) sums[r][u] = add ? load(c + r * c_pitch + u * kLanes<C>) : Vector<C>{};
  for (int64_t i = 0; i < depth; ++i) {
    Vector<C> bs[U];
    for (int u = 0; u < U; ++u) bs[u] = read(b + i * b_pitch + u * kLanes<C>);
    for (int r = 0; r < R; ++r) {
      const Vector<C> as = all(kProduct == Product::transposed ? a[i * a_pitch + r] : a[r * a_pitch + i]);
      for (int u = 0; u < U; ++u) add_product<C, kProduct>(sums[r][u], as, bs[u]);
    }
  }
  constexpr bool scales = kProduct == Product::scaled || kProduct == Product::pairs;
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) store(c + r * c_pitch + u * kLanes<C>, scales ? sums[r][u] * factor : sums[r][u]);
}
template <class C, Product kProduct, int R, int U, class B>
INLINE void multiply_rest(const C* a, int64_t a_pitch, const B* b, int64_t b_pitch, C* c, int64_t c_pitch, int64_t rows,
                          int64_t depth, bool add, C factor) {
  if constexpr (R > 0) {
    if (rows == R)
      multiply_tile<C, kProduct, R, U>(a, a_pitch, b, b_pitch, c, c_pitch, depth, add, factor);
    else
      multiply_rest<C, kProduct, R - 1, U>(a, a_pitch, b, b_pitch, c, c_pitch, rows, depth, add, factor);
  }
}
template <class C, Product kProduct, int U, class B>
__attribute__((noinline)) void multiply_rows(const C* a, int64_t a_pitch, const B* b, int64_t b_pitch, C* c,
                                             int64_t c_pitch, int64_t rows, int64_t depth, bool add, C factor) {
  const int64_t a_row = kProduct == Product::transposed ? 1 : a_pitch;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    if (kProduct == Product::transposed)  // c streams by
      for (int64_t i = 0; i < kRows; ++i)
        for (int u = 0; u < U; ++u) __builtin_prefetch(c + (r + kRows + i) * c_pitch + u * kLanes<C>, 1);
    multiply_tile<C, kProduct, kRows, U>(a + r * a_row, a_pitch, b, b_pitch, c + r * c_pitch, c_pitch, depth, add,
                                         factor);
  }
  multiply_rest<C, kProduct, kRows - 1, U>(a + r * a_row, a_pitch, b, b_pitch, c + r * c_pitch, c_pitch, rows - r,
                                           depth, add, factor);
}
// The first `width` columns, rounded up to vectors.
template <class C, Product kProduct, int U = kVectors, class B>
INLINE void multiply(const C* a, int64_t a_pitch, const B* b, int64_t b_pitch, C* c, int64_t c_pitch, int64_t rows,
                     int64_t depth, int64_t width, bool add, C factor = 1) {
  if constexpr (U > 1) {
    if (width <= (U - 1) * kLanes<C>)
      return multiply<C, kProduct, U - 1>(a, a_pitch, b, b_pitch, c, c_pitch, rows, depth, width, add, factor);
  }
  multiply_rows<C, kProduct, U>(a, a_pitch, b, b_pitch, c, c_pitch, rows, depth, add, factor);
}

template <class T>
constexpr bool kMayPair = kSame<T, Bfloat> && SA_SOFTMAX_VECTOR == 64;

// to[i * to_pitch + c] = from[c * from_pitch + i]: 16 rows of 16 words.
#if SA_SOFTMAX_VECTOR == 64
INLINE void transpose_words(const void* from, int64_t from_pitch, void* to, int64_t to_pitch) {
  __m512i a[16], b[16];
  for (int c = 0; c < 16; ++c) a[c] = _mm512_loadu_si512(static_cast<const uint32_t*>(from) + c * from_pitch);
  for (int c = 0; c < 16; c += 2) {
    b[c] = _mm512_unpacklo_epi32(a[c], a[c + 1]);
    b[c + 1] = _mm512_unpackhi_epi32(a[c], a[c + 1]);
  }
  for (int c = 0; c < 16; c += 4)  // a[c + k]: word k of each quarter, of rows c to c + 3
    for (int k = 0; k < 2; ++k) {
      a[c + 2 * k] = _mm512_unpacklo_epi64(b[c + k], b[c + k + 2]);
      a[c + 2 * k + 1] = _mm512_unpackhi_epi64(b[c + k], b[c + k + 2]);
    }
  for (int k = 0; k < 4; ++k) {  // the quarters in order
    const __m512i low02 = _mm512_shuffle_i32x4(a[k], a[k + 4], 0x88);
    const __m512i low13 = _mm512_shuffle_i32x4(a[k], a[k + 4], 0xdd);
    const __m512i high02 = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0x88);
    const __m512i high13 = _mm512_shuffle_i32x4(a[k + 8], a[k + 12], 0xdd);
    const __m512i rows[4] = {_mm512_shuffle_i32x4(low02, high02, 0x88), _mm512_shuffle_i32x4(low13, high13, 0x88),
                             _mm512_shuffle_i32x4(low02, high02, 0xdd), _mm512_shuffle_i32x4(low13, high13, 0xdd)};
    for (int q = 0; q < 4; ++q) _mm512_storeu_si512(static_cast<uint32_t*>(to) + (4 * q + k) * to_pitch, rows[q]);
  }
}
#endif

// Two bfloat16 in a word of the size of C.
[[maybe_unused]] INLINE float pair(Bfloat low, Bfloat high) { return as<float>(uint32_t(low.bits) | uint32_t(high.bits) << 16); }

// A matrix in the caller's memory.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
  INLINE Compute<T> at(int64_t i, int64_t j) const { return widen(data[i * row + j * column]); }
};

// The n <= kLanes entries from p on, then zeros.
template <class T>
INLINE Vector<Compute<T>> read_some(const T* p, int64_t n) {
  T entries[kLanes<Compute<T>>] = {};
  for (int64_t i = 0; i < n; ++i) entries[i] = p[i];
  return read(entries);
}
// c[r][j] = factor a[r] . m[j] for R rows, padded by zeros, and the keys [begin, end), whose n entries lie side by side.
template <class T, int R>
__attribute__((noinline)) void dot_keys(const Compute<T>* a, int64_t a_pitch, const Matrix<T>& m, int64_t n,
                                        int64_t begin, int64_t end, Compute<T> factor, Compute<T>* c, int64_t c_pitch) {
  using C = Compute<T>;
  const int64_t whole = n / kLanes<C> * kLanes<C>;
  for (int64_t j = begin; j < end; j += 4) {  // four sums share their last vectors
    const int64_t count = least(4, end - j);
    const T* keys[4];
    for (int64_t k = 0; k < 4; ++k) keys[k] = m.data + (j + least(k, count - 1)) * m.row;
    Vector<C> sums[R][4] = {}, b[4];
    const auto add = [&](int64_t i) {
      for (int r = 0; r < R; ++r) {
        const Vector<C> row = load(a + r * a_pitch + i);
        for (int k = 0; k < 4; ++k) sums[r][k] += row * b[k];
      }
    };
    for (int64_t i = 0; i < whole; i += kLanes<C>) {
      for (int k = 0; k < 4; ++k) b[k] = read(keys[k] + i);
      add(i);
    }
    if (whole < n) {
      for (int k = 0; k < 4; ++k) b[k] = read_some(keys[k] + whole, n - whole);
      add(whole);
    }
    for (int r = 0; r < R; ++r) {
      const Four<C> dots = halve_four<C>(sums[r], plus) * factor;
      for (int64_t k = 0; k < count; ++k) c[r * c_pitch + j + k] = dots[k];
    }
  }
}
constexpr int kDotRows = kRows * kVectors >= 24 ? 6 : 2;
template <class T, int R = kDotRows>
INLINE void dot_rows(const Compute<T>* a, int64_t a_pitch, const Matrix<T>& m, int64_t n, int64_t begin, int64_t end,
                     Compute<T> factor, Compute<T>* c, int64_t c_pitch, int64_t rows) {
  if constexpr (R > 0) {
    if (rows == R)
      dot_keys<T, R>(a, a_pitch, m, n, begin, end, factor, c, c_pitch);
    else
      dot_rows<T, R - 1>(a, a_pitch, m, n, begin, end, factor, c, c_pitch, rows);
  }
}

template <class C>
INLINE bool is_finite(C x) {
  return x - x == 0;
}
// Of n entries, a multiple of kPad / 4.
template <class C>
bool all_finite(const C* p, int64_t n) {
  Vector<C> sum{};
  for (int64_t i = 0; i < n; i += kLanes<C>) sum += load(p + i) * C(0);
  return halve<C>(sum, [](auto a, auto b) { return a + b; }) == 0;
}
template <class C>
void clean(C* p, int64_t n) {
  if (!all_finite(p, n))
    for (int64_t i = 0; i < n; ++i) p[i] = is_finite(p[i]) ? p[i] : C(0);
}

// Keys [begin, end).
struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  bool meets(Range other) const { return begin < other.end && other.begin < end; }
  void include(Range other) {
    if (other.empty()) return;
    *this = empty() ? other : Range{least(begin, other.begin), end > other.end ? end : other.end};
  }
};
INLINE int64_t between(int64_t low, int64_t n, int64_t high) { return n < low ? low : n > high ? high : n; }

// One key/value head, and what is packed of it.
template <class T>
struct Head {
  using C = Compute<T>;
  const AttentionJob& job;
  C* const scratch;
  AttentionStrides base;            // offsets of the head and of its first query head
  Range packed{0, 0};               // of the keys, in whole panels of kPad
  Matrix<T> k{}, v{};

  void open(const AttentionStrides& at) {
    base = at;
    packed = {0, 0};
    k = {static_cast<const T*>(job.k) + base.k, job.row.k, job.column.k};
    v = {static_cast<const T*>(job.v) + base.v, job.row.v, job.column.v};
  }
  // Whether the microkernel reads rows of n entries where they lie. To widen those of 16 bits pays for many queries.
  bool direct(const Matrix<T>& m, int64_t n) const {
    return (kSame<T, C> || job.few) && m.column == 1 && n % kLanes<C> == 0;
  }

  // panels[j / kColumns][i][j % kColumns] = m[j][i] for the keys in `keys`
  void pack_transposed(const Matrix<T>& m, int64_t n, Range keys, C* panels) const {
    for (int64_t j = keys.begin; j < keys.end; j += kColumns<C>) {
      C* const panel = panels + j * n;
      const int64_t width = between(0, job.tk - j, kColumns<C>);
      if (width < kColumns<C>) std::memset(panel, 0, size_t(n * kColumns<C>) * sizeof(C));
      int64_t done = 0;
#if SA_SOFTMAX_VECTOR == 64
      if (kSame<T, float> && m.column == 1 && width == kColumns<C>)
        for (; done + 16 <= n; done += 16)
          for (int64_t c = 0; c < width; c += 16)
            transpose_words(m.data + (j + c) * m.row + done, m.row, panel + done * kColumns<C> + c, kColumns<C>);
#endif
      for (int64_t c = 0; c < width; ++c)
        for (int64_t i = done; i < n; ++i) panel[i * kColumns<C> + c] = m.at(j + c, i);
    }
  }
  // rows[j][i] = m[j][i] for the keys in `keys`
  void pack_rows(const Matrix<T>& m, int64_t n, Range keys, C* rows, int64_t pitch) const {
    for (int64_t j = keys.begin; j < least(keys.end, job.tk); ++j) {
      C* const row = rows + j * pitch;
      for (int64_t i = 0; i < n; ++i) row[i] = m.at(j, i);
      for (int64_t i = n; i < pitch; ++i) row[i] = 0;
    }
  }
  // The same with two bfloat16 in a word: neighbours of a row in pack_transposed, neighbouring rows in pack_rows.
  void pack_paired(Range keys) const {
    for (int64_t j = keys.begin; j < keys.end; j += kColumns<C>) {
      C* const panel = scratch + job.at.keys + j * job.words;
      const int64_t width = between(0, job.tk - j, kColumns<C>);
      if (width < kColumns<C> || job.words > job.d / 2) std::memset(panel, 0, size_t(job.words * kColumns<C>) * sizeof(C));
      int64_t done = 0;
#if SA_SOFTMAX_VECTOR == 64
      if (k.column == 1 && k.row % 2 == 0 && width == kColumns<C>)
        for (; done + 16 <= job.d / 2; done += 16)
          for (int64_t c = 0; c < width; c += 16)
            transpose_words(k.data + (j + c) * k.row + 2 * done, k.row / 2, panel + done * kColumns<C> + c, kColumns<C>);
#endif
      for (int64_t i = done; i < job.d / 2; ++i)  // neighbours are stored
        for (int64_t c = 0; c < width; ++c) {
          const Bfloat* const row = k.data + (j + c) * k.row + 2 * i * k.column;
          panel[i * kColumns<C> + c] = pair(row[0], row[k.column]);
        }
      if (job.d % 2)
        for (int64_t c = 0; c < width; ++c)
          panel[job.d / 2 * kColumns<C> + c] = pair(k.data[(j + c) * k.row + (job.d - 1) * k.column], Bfloat{0});
    }
    for (int64_t j = keys.begin; j < keys.end; j += 2)
      pair_rows(j, 0, job.dv_pitch, scratch + job.at.rows + j / 2 * job.dv_pitch, false);
  }
  // words[c] = v[j][first + c], v[j + 1][first + c]; 0 beyond v, and with `careful` for what is not finite
  void pair_rows(int64_t j, int64_t first, int64_t width, C* words, bool careful) const {
    const auto at = [&](int64_t row, int64_t c) {
      const Bfloat value = row < job.tk ? v.data[row * v.row + c * v.column] : Bfloat{0};
      return careful && !is_finite(widen(value)) ? Bfloat{0} : value;
    };
    const int64_t inside = least(width, job.dv - first);
    if (v.column == 1 && j + 1 < job.tk && !careful) {  // what a compiler can vectorise
      const Bfloat* const low = v.data + j * v.row + first;
      const Bfloat* const high = low + v.row;
      for (int64_t c = 0; c < inside; ++c) words[c] = pair(low[c], high[c]);
    } else {
      for (int64_t c = 0; c < inside; ++c) words[c] = pair(at(j, first + c), at(j + 1, first + c));
    }
    for (int64_t c = inside; c < width; ++c) words[c] = 0;
  }
  template <bool kVjp>
  void pack_more(Range keys) {
    if constexpr (kMayPair<T> && !kVjp) {
      if (job.pairs != Pairs::none) return pack_paired(keys);
    }
    if (!job.few) pack_transposed(k, job.d, keys, scratch + job.at.keys);
    if (kVjp) pack_transposed(v, job.dv, keys, scratch + job.at.values);
    if (const Matrix<T>& m = kVjp ? k : v; !direct(m, kVjp ? job.d : job.dv))
      pack_rows(m, kVjp ? job.d : job.dv, keys, scratch + job.at.rows, kVjp ? job.d_pitch : job.dv_pitch);
  }
  template <bool kVjp>
  void pack(Range keys) {
    if (keys.empty()) return;
    keys = {keys.begin / kPad * kPad, padded(keys.end)};
    if (packed.empty()) packed = {keys.begin, keys.begin};
    if (keys.begin < packed.begin) pack_more<kVjp>({keys.begin, packed.begin});
    if (keys.end > packed.end) pack_more<kVjp>({packed.end, keys.end});
    packed.include(keys);
  }
};

// With kTiles, products of bfloat16 are those of tiles.
template <class T, bool kTiles>
struct Block {
  using C = Compute<T>;
  static constexpr int64_t kGroup = kTiles ? kTileRows : kRows;  // rows that a product takes at once
  const AttentionJob& job;
  Head<T>& head;
  int64_t first, count;  // rows; row r is query (first + r) % tq of head (first + r) / tq of the group
  C* const scratch = head.scratch;
  C* const scores = scratch + job.at.scores;
  C* const upstream = scratch + job.at.upstream;
  C* const queries = scratch + job.at.queries;
  C* const o_grad = scratch + job.at.o_grad;
  C* const output = scratch + job.at.output;
  const int64_t pitch = job.pitch;
  Range row_keys[kMostRows], group_keys[kMostRows / kGroup], keys{0, 0};  // visible to a row, to a group, to all

  Block(const AttentionJob& job, Head<T>& head, int64_t first, int64_t count)
      : job(job), head(head), first(first), count(count) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = (first + r) % job.tq;
      row_keys[r] = {between(0, i + job.from, job.tk), between(0, i + job.to + 1, job.tk)};
      if (r % kGroup == 0) group_keys[r / kGroup] = {0, 0};
      group_keys[r / kGroup].include(row_keys[r]);
      keys.include(row_keys[r]);
    }
  }
  int64_t groups() const { return (count + kGroup - 1) / kGroup; }
  int64_t rows_of(int64_t group) const { return least(kGroup, count - group * kGroup); }
  // The columns of scores that hold numbers: of whole panels.
  Range columns(int64_t r) const {
    const Range g = group_keys[r / kGroup];
    return g.empty() ? g : Range{g.begin / kPad * kPad, padded(g.end)};
  }
  int64_t row_offset(int64_t r, const AttentionStrides& head_stride, const AttentionStrides& row_stride,
                     int64_t AttentionStrides::*array) const {
    return head.base.*array + (first + r) / job.tq * head_stride.*array + (first + r) % job.tq * row_stride.*array;
  }
  int64_t offset(int64_t r, int64_t AttentionStrides::*array) const {
    return row_offset(r, job.head, job.row, array);
  }

  void load_rows(const void* data, int64_t AttentionStrides::*array, int64_t n, C* rows,
                 int64_t rows_pitch) const {
    for (int64_t r = 0; r < count; ++r) {
      const T* const from = static_cast<const T*>(data) + offset(r, array);
      const int64_t step = job.column.*array;
      C* const row = rows + r * rows_pitch;
      if (step == 1)
        for (int64_t i = 0; i < n; ++i) row[i] = widen(from[i]);
      else
        for (int64_t i = 0; i < n; ++i) row[i] = widen(from[i * step]);
      for (int64_t i = n; i < rows_pitch; ++i) row[i] = 0;
    }
  }
  void store_rows(const C* rows, int64_t rows_pitch, int64_t n, C factor, void* data,
                  int64_t AttentionStrides::*array) const {
    for (int64_t r = 0; r < count; ++r) {
      T* const to = static_cast<T*>(data) + offset(r, array);
      const int64_t step = job.column.*array;
      const C* const row = rows + r * rows_pitch;
      if (step == 1)
        for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(row[i] * factor);
      else
        for (int64_t i = 0; i < n; ++i) to[i * step] = narrow<T>(row[i] * factor);
    }
  }

  // A group's rows times b, by the microkernel; or by tiles, which compute all rows of a group whether they count or not.
  template <Product kProduct, class B>
  void product(const C* a, int64_t a_pitch, const B* b, int64_t b_pitch, C* c, int64_t c_pitch, int64_t rows,
               int64_t depth, int64_t width, bool add, C factor = 1) const {
    if constexpr (kTiles && kProduct == Product::pairs)
      for (int64_t j = 0; j < width; j += 2 * kTile)
        (width - j > kTile ? multiply_tiles<2> : multiply_tiles<1>)(a, a_pitch, b + j, b_pitch, c + j, c_pitch, depth, add,
                                                                    factor);
    else
      multiply<C, kProduct>(a, a_pitch, b, b_pitch, c, c_pitch, rows, depth, width, add, factor);
  }
  // c[r][j] = factor rows[r] . panel of keys, where row r's group sees keys of the panel
  template <Product kProduct>
  void multiply_panels(const C* rows, int64_t rows_pitch, const C* panels, int64_t n, C factor, C* c) const {
    for (int64_t j = keys.begin / kPad * kPad; j < keys.end; j += kColumns<C>) {
      const Range pad{j / kPad * kPad, j / kPad * kPad + kPad};
      for (int64_t d = 0; d == 0 || d < n; d += kDepth)
        for (int64_t g = 0; g < groups(); ++g)
          if (group_keys[g].meets(pad))
            product<kProduct>(rows + g * kGroup * rows_pitch + d, rows_pitch, panels + j * n + d * kColumns<C>,
                              kColumns<C>, c + g * kGroup * pitch + j, pitch, rows_of(g), least(kDepth, n - d),
                              kColumns<C>, d > 0, d + kDepth < n ? C(1) : factor);
    }
  }
  void multiply_keys() const {
    if (job.few) {
      for (int64_t r = 0; r < count; r += kDotRows)
        dot_rows<T>(queries + r * job.d_pitch, job.d_pitch, head.k, job.d, keys.begin, keys.end, C(job.scale),
                    scores + r * pitch, pitch, least(kDotRows, count - r));
      return;
    }
    const C* const panels = scratch + job.at.keys;
    if constexpr (kMayPair<T>) {
      if (job.pairs != Pairs::none)
        return multiply_panels<Product::pairs>(queries, job.d_pitch, panels, job.words,
                                               late_scale() == 1 ? C(job.scale) : C(1), scores);
    }
    multiply_panels<Product::scaled>(queries, job.d_pitch, panels, job.d, C(job.scale), scores);
  }
  // What is left to multiply the scores by: tiles are best stored as they are.
  C late_scale() const {
    return kTiles && job.bias == nullptr && job.scale > 0 ? C(job.scale) : C(1);
  }
  // -inf marks what does not participate.
  void score() {
    multiply_keys();
    for (int64_t r = 0; r < count; ++r) {
      C* const s = scores + r * pitch;
      const Range all = columns(r), seen = row_keys[r];
      if (job.bias != nullptr) {
        const T* const bias = static_cast<const T*>(job.bias) + offset(r, &AttentionStrides::bias);
        if (job.column.bias == 1)
          for (int64_t j = seen.begin; j < seen.end; ++j) s[j] += widen(bias[j]);
        else
          for (int64_t j = seen.begin; j < seen.end; ++j) s[j] += widen(bias[j * job.column.bias]);
      }
      if (job.mask != nullptr) {
        const uint8_t* const mask = job.mask + offset(r, &AttentionStrides::mask);
        if (job.column.mask == 1)
          for (int64_t j = seen.begin; j < seen.end; ++j) s[j] = mask[j] ? s[j] : -kInfinity<C>;
        else
          for (int64_t j = seen.begin; j < seen.end; ++j) s[j] = mask[j * job.column.mask] ? s[j] : -kInfinity<C>;
      }
      const Range held = seen.empty() ? Range{all.begin, all.begin} : seen;
      for (int64_t j = all.begin; j < held.begin; ++j) s[j] = -kInfinity<C>;
      for (int64_t j = held.end; j < all.end; ++j) s[j] = -kInfinity<C>;
    }
  }
  void load_queries() const {
    if constexpr (kMayPair<T>) {
      if (job.pairs != Pairs::none) {  // as they are: two in a word
        for (int64_t r = 0; r < count; ++r) {
          const T* const from = static_cast<const T*>(job.q) + offset(r, &AttentionStrides::q);
          const int64_t step = job.column.q;
          T* const row = reinterpret_cast<T*>(queries + r * job.d_pitch);
          if (step == 1)
            std::memcpy(row, from, size_t(job.d) * sizeof(T));
          else
            for (int64_t i = 0; i < job.d; ++i) row[i] = from[i * step];
          for (int64_t i = job.d; i < 2 * job.words; ++i) row[i] = T{0};
        }
        return;
      }
    }
    load_rows(job.q, &AttentionStrides::q, job.d, queries, job.d_pitch);
  }
  // The weights Y, in place of the scores, and what to multiply the rows of Y V by.
  template <class Y>
  void weights(C* inverses) const {
    for (int64_t r = 0; r < count; r += 4) {
      const C* z[4] = {};
      Y* y[4] = {};
      int64_t n[4] = {};
      const int64_t several = least(4, count - r);
      for (int64_t c = 0; c < several; ++c) {
        const Range all = columns(r + c);
        C* const s = scores + (r + c) * pitch;
        z[c] = s + all.begin;
        y[c] = reinterpret_cast<Y*>(s) + all.begin;  // a pair of keys stands where the one with half its number would
        n[c] = all.end - all.begin;
      }
      weights_rows(z, n, several, job.normalized, late_scale(), y, inverses + r);
    }
  }
  // output = Y V
  void weigh(bool careful) {
    C inverses[kMostRows + 4];
    bool paired = false;
    if constexpr (kMayPair<T>) {
      paired = job.pairs != Pairs::none;
      if (paired) weights<T>(inverses);
    }
    if (!paired) weights<C>(inverses);
    multiply_values(careful);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < job.dv_pitch; ++c) output[r * job.dv_pitch + c] *= inverses[r];
  }
  void multiply_values(bool careful) const {
    if constexpr (kMayPair<T>) {
      if (job.pairs != Pairs::none) return multiply_paired_values(careful);
    }
    multiply_scores(head.v, job.dv, job.dv_pitch, careful);
  }
  // As multiply_scores, with the scores rounded to bfloat16.
  void multiply_paired_values(bool careful) const {
    std::memset(output, 0, size_t(count * job.dv_pitch) * sizeof(C));
    // Whole panels of keys: the others have no weight.
    const Range pairs{keys.begin / kPad * kPad / 2, padded(keys.end) / 2};
    for (int64_t j = pairs.begin; j < pairs.end; j += kPairsAtOnce) {
      const Range chunk{j, least(j + kPairsAtOnce, pairs.end)};
      for (int64_t d = 0; d < job.dv; d += kColumns<C>) {
        const int64_t width = least(kColumns<C>, job.dv - d);
        const C* b = scratch + job.at.rows + j * job.dv_pitch + d;
        if (careful) {
          C* const panel = scratch + job.at.panel;
          for (int64_t i = chunk.begin; i < chunk.end; ++i)
            head.pair_rows(2 * i, d, kColumns<C>, panel + (i - j) * kColumns<C>, true);
          b = panel;
        }
        const int64_t b_pitch = careful ? kColumns<C> : job.dv_pitch;
        for (int64_t g = 0; g < groups(); ++g) {
          const Range all = columns(g * kGroup);
          const Range seen{all.begin / 2 > j ? all.begin / 2 : j, least(all.end / 2, chunk.end)};
          if (!seen.empty())
            product<Product::pairs>(scores + g * kGroup * pitch + seen.begin, pitch, b + (seen.begin - j) * b_pitch,
                                    b_pitch, output + g * kGroup * job.dv_pitch + d, job.dv_pitch, rows_of(g),
                                    seen.end - seen.begin, width, true);
        }
      }
    }
  }
  // output = scores m, for m of n columns. With `careful`, entries of m that are not finite count as 0.
  void multiply_scores(const Matrix<T>& m, int64_t n, int64_t n_pitch, bool careful) const {
    for (int64_t r = 0; r < count; ++r) std::memset(output + r * n_pitch, 0, size_t(n_pitch) * sizeof(C));
    const bool direct = head.direct(m, n);
    for (int64_t j = keys.begin; j < keys.end; j += kKeysAtOnce) {
      const Range chunk{j, least(j + kKeysAtOnce, keys.end)};
      for (int64_t d = 0; d < n; d += kColumns<C>) {
        const int64_t width = least(kColumns<C>, n - d);
        const auto multiply_chunk = [&](const auto* b, int64_t b_pitch) {
          for (int64_t g = 0; g < groups(); ++g) {
            const Range seen{group_keys[g].begin > j ? group_keys[g].begin : j, least(group_keys[g].end, chunk.end)};
            if (!seen.empty())
              product<Product::plain>(scores + g * kGroup * pitch + seen.begin, pitch, b + (seen.begin - j) * b_pitch,
                                      b_pitch, output + g * kGroup * n_pitch + d, n_pitch, rows_of(g),
                                      seen.end - seen.begin, width, true);
          }
        };
        if (careful) {
          C* const panel = scratch + job.at.panel;
          for (int64_t i = chunk.begin; i < chunk.end; ++i)
            for (int64_t c = 0; c < kColumns<C>; ++c) {
              const C value = c < width ? m.at(i, d + c) : C(0);
              panel[(i - j) * kColumns<C> + c] = is_finite(value) ? value : C(0);
            }
          multiply_chunk(panel, kColumns<C>);
        } else if (direct) {
          multiply_chunk(m.data + j * m.row + d, m.row);
        } else {
          multiply_chunk(scratch + job.at.rows + j * n_pitch + d, n_pitch);
        }
      }
    }
  }

  // Marks the outputs that a participating entry of v that is not finite makes NaN (A6).
  void poison() const {
    C* const poisoned = scratch + job.at.poisoned;
    std::memset(poisoned, 0, size_t(count * job.dv_pitch) * sizeof(C));
    for (int64_t j = keys.begin; j < keys.end; ++j)
      for (int64_t c = 0; c < job.dv; ++c) {
        if (is_finite(head.v.at(j, c))) continue;
        for (int64_t r = 0; r < count; ++r)
          if (participates(r, j)) poisoned[r * job.dv_pitch + c] = 1;
      }
  }
  bool participates(int64_t r, int64_t j) const {
    return j >= row_keys[r].begin && j < row_keys[r].end && scores[r * pitch + j] != -kInfinity<C>;
  }
  void forward() {
    head.template pack<false>(keys);
    load_queries();
    score();
    weigh(false);
    if (!all_finite(output, count * job.dv_pitch)) {
      // A value that is not finite, wherever it stands, shows in the product, if only as 0 * inf: so the search for it
      // costs nothing where all is well. The scores are gone and must be computed again.
      score();
      poison();
      weigh(true);
      const C* const poisoned = scratch + job.at.poisoned;
      for (int64_t i = 0; i < count * job.dv_pitch; ++i)
        if (poisoned[i] != 0) output[i] = C(__builtin_nan(""));
    }
    store_rows(output, job.dv_pitch, job.dv, 1, job.o, &AttentionStrides::o);
  }

  // scores = dX, upstream = Y; queries and o_grad become finite. Where a participating entry of dO is not, v_grad (if
  // any) becomes NaN.
  void gradient(C* v_grad) {
    head.template pack<true>(keys);
    load_queries();
    load_rows(job.o_grad, &AttentionStrides::o_grad, job.dv, o_grad, job.dv_pitch);
    score();
    multiply_panels<Product::scaled>(o_grad, job.dv_pitch, scratch + job.at.values, job.dv, 1, upstream);
    clean(queries, count * job.d_pitch);
    if (!all_finite(o_grad, count * job.dv_pitch)) {
      for (int64_t r = 0; v_grad != nullptr && r < count; ++r)
        for (int64_t c = 0; c < job.dv; ++c)
          if (!is_finite(o_grad[r * job.dv_pitch + c]))
            for (int64_t j = row_keys[r].begin; j < row_keys[r].end; ++j)
              if (participates(r, j)) v_grad[j * job.dv_pitch + c] = C(__builtin_nan(""));
      clean(o_grad, count * job.dv_pitch);
    }
    for (int64_t r = 0; r < count; ++r)
      if (const Range all = columns(r); !all.empty()) {
        C* const s = scores + r * pitch + all.begin;
        C* const g = upstream + r * pitch + all.begin;
        vjp_row<C>(s, g, all.end - all.begin, s, scratch + job.at.e, job.normalized, g);
      }
  }
  // grad[j][.] += sum over rows of weights[r][j] rows[r][.]
  void multiply_transposed(const C* weights, const C* rows, int64_t n, int64_t n_pitch, C* grad) const {
    for (int64_t j = keys.begin / kPad * kPad; j < keys.end; j += kPad)
      for (int64_t g = 0; g < groups();) {
        const Range pad{j, j + kPad};
        const int64_t from = g;
        while (g < groups() && group_keys[g].meets(pad)) ++g;
        if (from == g) {
          ++g;
          continue;
        }
        const int64_t begin = from * kGroup, end = least(count, g * kGroup);
        for (int64_t d = 0; d < n; d += kColumns<C>)
          multiply<C, Product::transposed>(weights + begin * pitch + j, pitch, rows + begin * n_pitch + d, n_pitch, grad + j * n_pitch + d,
                            n_pitch, kPad, end - begin, least(kColumns<C>, n - d), true);
      }
  }
  void vjp(C* k_grad, C* v_grad) {
    gradient(v_grad);
    multiply_transposed(upstream, o_grad, job.dv, job.dv_pitch, v_grad);
    multiply_transposed(scores, queries, job.d, job.d_pitch, k_grad);
    multiply_scores(head.k, job.d, job.d_pitch, false);
    // dX carries the NaN of participating entries: k counts where it is finite.
    if (!all_finite(output, count * job.d_pitch)) multiply_scores(head.k, job.d, job.d_pitch, true);
    store_rows(output, job.d_pitch, job.d, C(job.scale), job.q_grad, &AttentionStrides::q_grad);
    if (job.bias_grad != nullptr && job.slots == 0)
      for (int64_t r = 0; r < count; ++r) {
        complete(r);
        store_bias(scores + r * pitch, offset(r, &AttentionStrides::bias_grad));
      }
  }
  // Row r of scores with the zeros that were left out.
  void complete(int64_t r) const {
    const Range held = columns(r).empty() ? Range{0, 0} : columns(r);
    C* const s = scores + r * pitch;
    for (int64_t j = 0; j < held.begin; ++j) s[j] = 0;
    for (int64_t j = held.end; j < job.tk; ++j) s[j] = 0;
  }
  void store_bias(const C* row, int64_t offset) const {
    T* const grad = static_cast<T*>(job.bias_grad) + offset;
    if (job.column.bias_grad != 0) {
      for (int64_t j = 0; j < job.tk; ++j) grad[j * job.column.bias_grad] = narrow<T>(row[j]);
    } else if (job.tk > 0) {
      C sum = 0;
      for (int64_t j = 0; j < job.tk; ++j) sum += row[j];
      *grad = narrow<T>(sum);
    }
  }
};

INLINE AttentionStrides head_offsets(const AttentionJob& job, int64_t head) {
  const int64_t h = head % job.heads, group = job.group;
  int64_t rest = head / job.heads;
  const AttentionStrides& by = job.head;
  AttentionStrides at{h * group * by.q,      h * by.k,      h * by.v,      h * group * by.bias,     h * group * by.mask,
                      h * group * by.o,      h * group * by.o_grad,        h * group * by.q_grad,   h * by.k_grad,
                      h * by.v_grad,         h * group * by.bias_grad};
  for (int64_t axis = job.batch_rank - 1; axis >= 0; --axis) {
    const int64_t index = rest % job.batch_shape[axis];
    rest /= job.batch_shape[axis];
    const AttentionStrides& by = job.batch[axis];
    at.q += index * by.q, at.k += index * by.k, at.v += index * by.v, at.bias += index * by.bias;
    at.mask += index * by.mask, at.o += index * by.o, at.o_grad += index * by.o_grad;
    at.q_grad += index * by.q_grad, at.k_grad += index * by.k_grad, at.v_grad += index * by.v_grad;
    at.bias_grad += index * by.bias_grad;
  }
  return at;
}

// The blocks of a unit. The first has its head's last rows: if attention is causal, they take longest, and what threads do
// last should be short.
template <bool kTiles, class T, class F>
INLINE void each_block(const AttentionJob& job, Head<T>& head, int64_t unit, F&& f) {
  const int64_t blocks = job.blocks(), rows = job.group * job.tq, part = job.parts - 1 - unit % job.parts;
  for (int64_t i = blocks * part / job.parts; i < blocks * (part + 1) / job.parts; ++i) {
    Block<T, kTiles> block{job, head, i * job.block, least(job.block, rows - i * job.block)};
    f(block);
  }
}

template <class T, bool kTiles>
void forward(const AttentionJob& job, int64_t begin, int64_t end, void* scratch) {
  const Tiles tiles(kTiles);
  Head<T> head{job, static_cast<Compute<T>*>(scratch), {}};
  for (int64_t unit = begin; unit < end; ++unit) {
    if (unit == begin || unit % job.parts == 0) head.open(head_offsets(job, unit / job.parts));
    each_block<kTiles>(job, head, unit, [](auto& block) { block.forward(); });
  }
}
template <class T>
void forward(const AttentionJob& job, int64_t begin, int64_t end, void* scratch) {
  if constexpr (kMayPair<T>) {
    if (job.pairs == Pairs::tiles) return forward<T, true>(job, begin, end, scratch);
  }
  forward<T, false>(job, begin, end, scratch);
}

// k_grad, which lacks the scale, and v_grad of a head.
template <class T>
void store_gradients(const AttentionJob& job, const AttentionStrides& at, const Compute<T>* k_grad,
                     const Compute<T>* v_grad) {
  const Compute<T> scale = Compute<T>(job.scale);
  for (int64_t j = 0; j < job.tk; ++j) {
    T* const k = static_cast<T*>(job.k_grad) + at.k_grad + j * job.row.k_grad;
    T* const v = static_cast<T*>(job.v_grad) + at.v_grad + j * job.row.v_grad;
    for (int64_t i = 0; i < job.d; ++i) k[i * job.column.k_grad] = narrow<T>(k_grad[j * job.d_pitch + i] * scale);
    for (int64_t i = 0; i < job.dv; ++i) v[i * job.column.v_grad] = narrow<T>(v_grad[j * job.dv_pitch + i]);
  }
}

template <class T>
void vjp(const AttentionJob& job, int64_t begin, int64_t end, void* scratch) {
  using C = Compute<T>;
  const int64_t k_size = padded(job.tk) * job.d_pitch, v_size = padded(job.tk) * job.dv_pitch;
  Head<T> head{job, static_cast<C*>(scratch), {}};
  for (int64_t unit = begin; unit < end; ++unit) {
    if (unit == begin || unit % job.parts == 0) head.open(head_offsets(job, unit / job.parts));
    C* const k_grad = job.partial ? static_cast<C*>(job.partial) + unit * (k_size + v_size) : head.scratch + job.at.k_grad;
    C* const v_grad = k_grad + k_size;
    std::memset(k_grad, 0, size_t(k_size + v_size) * sizeof(C));
    each_block<false>(job, head, unit, [&](auto& block) { block.vjp(k_grad, v_grad); });
    if (job.partial == nullptr) store_gradients<T>(job, head.base, k_grad, v_grad);
  }
}

template <class T>
void merge(const AttentionJob& job, int64_t begin, int64_t end, void*) {
  using C = Compute<T>;
  const int64_t k_size = padded(job.tk) * job.d_pitch, size = k_size + padded(job.tk) * job.dv_pitch;
  for (int64_t head = begin; head < end; ++head) {
    C* const sum = static_cast<C*>(job.partial) + head * job.parts * size;
    for (int64_t part = 1; part < job.parts; ++part)
      for (int64_t i = 0; i < size; ++i) sum[i] += sum[part * size + i];
    store_gradients<T>(job, head_offsets(job, head), sum, sum + k_size);
  }
}

// dX is computed again, and summed over the lines that share their bias.
template <class T>
void bias_vjp(const AttentionJob& job, int64_t begin, int64_t end, void* scratch) {
  using C = Compute<T>;
  Head<T> head{job, static_cast<C*>(scratch), {}};
  const int64_t heads = job.heads * job.group;
  const bool one_row = job.row.bias_grad == 0;
  const int64_t blocks = one_row ? 1 : (job.tq + job.block - 1) / job.block;
  C* const total = head.scratch + job.at.k_grad;  // block or 1 rows of scores
  const auto shared = [&](int64_t axis) {
    return axis < job.batch_rank ? job.batch[axis].bias_grad == 0 : job.head.bias_grad == 0;
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t slot = unit / blocks, start = unit % blocks * job.block;
    const int64_t rows = one_row ? 1 : least(job.block, job.tq - start);
    std::memset(total, 0, size_t(rows * job.pitch) * sizeof(C));
    int64_t store = 0;
    for (int64_t share = 0; share < job.batches * heads / job.slots; ++share) {
      // The line's batch and query head: shared axes count in `share`, the others in `slot`.
      int64_t rest[2] = {slot, share}, line = 0, step = 1;
      for (int64_t axis = job.batch_rank; axis >= 0; --axis) {
        const int64_t length = axis < job.batch_rank ? job.batch_shape[axis] : heads;
        int64_t& number = rest[shared(axis)];
        line += number % length * step;
        number /= length;
        step *= length;
      }
      const int64_t h = line % heads;
      head.open(head_offsets(job, line / heads * job.heads + h / job.group));
      for (int64_t i = start; i < (one_row ? job.tq : start + rows); i += job.block) {
        const int64_t query = h % job.group * job.tq + i;
        Block<T, false> block{job, head, query, least(job.block, job.tq - i)};
        block.gradient(nullptr);
        for (int64_t r = 0; r < block.count; ++r) {
          const Range held = block.columns(r);
          C* const sum = total + (one_row ? 0 : r * job.pitch);
          for (int64_t j = held.begin; j < held.end; ++j) sum[j] += block.scores[r * job.pitch + j];
        }
        store = block.offset(0, &AttentionStrides::bias_grad);
        if (i + job.block < (one_row ? job.tq : start + rows) || share + 1 < job.batches * heads / job.slots) continue;
        for (int64_t r = 0; r < rows; ++r) block.store_bias(total + r * job.pitch, store + r * job.row.bias_grad);
      }
    }
  }
}

}  // namespace

namespace SA_SOFTMAX_ISA {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    {forward<Half>, forward<Bfloat>, forward<float>, forward<double>},
    {vjp<Half>, vjp<Bfloat>, vjp<float>, vjp<double>},
    {merge<Half>, merge<Bfloat>, merge<float>, merge<double>},
    {bias_vjp<Half>, bias_vjp<Bfloat>, bias_vjp<float>, bias_vjp<double>},
};

}  // namespace SA_SOFTMAX_ISA
}  // namespace sa_softmax
