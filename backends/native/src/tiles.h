// Products of tiles of bfloat16 (AMX-BF16): 16 rows of 16 words, where a word holds two numbers. The instructions are
// written out, so that the file's other code stays within its instruction set.
#pragma once

#include "simd.h"

namespace sa_softmax {
namespace {

// The calling thread's tiles are in use while one of these lives.
class Tiles {
 public:
  explicit Tiles(bool used) : used_(used) {
    if (!used_) return;
    struct alignas(64) {
      uint8_t palette, start, unused[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = kTile;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() {
    if (used_) asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  const bool used_;
};

// Registers are part of an instruction's text.
#define LOAD_TILE(number, at, pitch) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #number : : "r"(at), "r"((pitch) * int64_t(sizeof(float))) : "memory")
#define STORE_TILE(number, at, pitch) \
  asm volatile("tilestored %%tmm" #number ", (%0,%1,1)" : : "r"(at), "r"((pitch) * int64_t(sizeof(float))) : "memory")
#define ZERO_TILE(number) asm volatile("tilezero %%tmm" #number : : : "memory")
#define MULTIPLY_TILES(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : : : "memory")

// c[r][j] += sum over i < depth of a[r][i] . b[i][j] for 2 x kWide tiles of c, where . adds the products of two pairs;
// then c *= factor. Not `add`: c was 0.
template <int kWide>
INLINE void multiply_tiles(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, float* c, int64_t c_pitch,
                           int64_t depth, bool add, float factor) {
  constexpr bool kTwo = kWide == 2;
  float* const below = c + kTile * c_pitch;
  if (add) {
    LOAD_TILE(0, c, c_pitch);
    LOAD_TILE(1, below, c_pitch);
    if (kTwo) LOAD_TILE(2, c + kTile, c_pitch);
    if (kTwo) LOAD_TILE(3, below + kTile, c_pitch);
  } else {
    ZERO_TILE(0);
    ZERO_TILE(1);
    if (kTwo) ZERO_TILE(2);
    if (kTwo) ZERO_TILE(3);
  }
  for (int64_t i = 0; i < depth; i += kTile) {
    LOAD_TILE(4, a + i, a_pitch);
    LOAD_TILE(6, b + i * b_pitch, b_pitch);
    MULTIPLY_TILES(0, 4, 6);
    LOAD_TILE(5, a + kTile * a_pitch + i, a_pitch);
    MULTIPLY_TILES(1, 5, 6);
    if (kTwo) LOAD_TILE(7, b + i * b_pitch + kTile, b_pitch);
    if (kTwo) MULTIPLY_TILES(2, 4, 7);
    if (kTwo) MULTIPLY_TILES(3, 5, 7);
  }
  STORE_TILE(0, c, c_pitch);
  STORE_TILE(1, below, c_pitch);
  if (kTwo) STORE_TILE(2, c + kTile, c_pitch);
  if (kTwo) STORE_TILE(3, below + kTile, c_pitch);
  if (factor == 1) return;
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t j = 0; j < kWide * kTile; j += kLanes<float>) {
      float* const at = c + r * c_pitch + j;
      store(at, load(at) * factor);
    }
}

#undef LOAD_TILE
#undef STORE_TILE
#undef ZERO_TILE
#undef MULTIPLY_TILES

}  // namespace
}  // namespace sa_softmax
