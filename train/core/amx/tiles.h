// Bfloat16 matrices in the tiles of AMX: what the other files of this directory share.
//
// A tile has 16 rows of 64 bytes. `tdpbf16ps` adds A (16 x 32) times B (32 x 16) to sums of 16 x 16 float32. A lies row
// by row. B lies as 16 rows of 16 words: word n of row r is the pair B[2r][n], B[2r + 1][n]. There are two ways to make
// a B:
//   words(X): B = X^T for X (16 x 32), by transposing X's words, 16 x 16.
//   pairs(X): B = X for X (32 x 16), by interleaving rows 2r and 2r + 1. words(pairs(X)) is X^T as an A.
// The code works on squares of 32 x 32: two tiles of A, two of B, and the four tiles of their product.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>

namespace {

using bf16 = uint16_t;

constexpr int64_t SIDE = 32;   // of a square
constexpr int64_t TILE = 512;  // bfloat16 numbers of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tiles of one thread, from construction to destruction.
struct Tiles {
  Tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

template <typename T>
struct Buffer {
  explicit Buffer(int64_t n) : data(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  T& operator[](int64_t i) { return data[i]; }
  T* data;
};

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load_half(const bf16* row) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))); }
inline __m512i round_both(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
inline void store(bf16* row, __m512 first, __m512 second) { _mm512_storeu_si512(row, round_both(first, second)); }

// 2^x, with a relative error below 3e-6.
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, whole);
}

// Interleave two rows of 32 numbers: 16 words of their first halves, and 16 of their second halves.
inline void pair_rows(__m512i even, __m512i odd, bf16* first, bf16* second) {
  const auto half = [](__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  };
  _mm512_store_si512(first, half(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
  _mm512_store_si512(second, half(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1)));
}

// A square of rows `stride` numbers apart -> pairs of its first 16 columns, and of its last 16.
inline void pairs(const bf16* square, int64_t stride, bf16* first, bf16* second) {
  for (int64_t r = 0; r < 16; r++) {
    const bf16* even = square + 2 * r * stride;
    pair_rows(_mm512_loadu_si512(even), _mm512_loadu_si512(even + stride), first + r * 32, second + r * 32);
  }
}

// Transpose 16 x 16 words. The rows of `from` are `stride` words apart.
inline void words(const void* from, int64_t stride, void* to) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i rows = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride));
  for (int64_t r = 0; r < 16; r++)
    _mm512_store_si512(static_cast<int32_t*>(to) + r * 16,
                       _mm512_i32gather_epi32(rows, static_cast<const int32_t*>(from) + r, 4));
}

// A square -> its transpose as A: its first 16 columns, and its last 16.
inline void transpose(const bf16* square, int64_t stride, bf16* first, bf16* second) {
  alignas(64) bf16 tiles[2 * TILE];
  pairs(square, stride, tiles, tiles + TILE);
  words(tiles, 16, first);
  words(tiles + TILE, 16, second);
}

// The sums += A, a square of rows `stride` numbers apart, times B, two tiles.
inline void multiply(const bf16* a, int64_t stride, const bf16* b0, const bf16* b1) {
  _tile_loadd(0, a, stride * 2);
  _tile_loadd(1, a + 16 * stride, stride * 2);
  _tile_loadd(2, b0, 64);
  _tile_loadd(3, b1, 64);
  _tile_dpbf16ps(4, 0, 2);
  _tile_dpbf16ps(5, 0, 3);
  _tile_dpbf16ps(6, 1, 2);
  _tile_dpbf16ps(7, 1, 3);
}

inline void zero_sums() {
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

// Read the sums from rows `stride` numbers apart.
inline void load_sums(const float* from, int64_t stride) {
  _tile_loadd(4, from, stride * 4);
  _tile_loadd(5, from + 16, stride * 4);
  _tile_loadd(6, from + 16 * stride, stride * 4);
  _tile_loadd(7, from + 16 * stride + 16, stride * 4);
}

inline void store_sums(float* to, int64_t stride) {
  _tile_stored(4, to, stride * 4);
  _tile_stored(5, to + 16, stride * 4);
  _tile_stored(6, to + 16 * stride, stride * 4);
  _tile_stored(7, to + 16 * stride + 16, stride * 4);
}

// The sums = A, 32 rows of 32 * steps numbers, times B, two columns of `steps` tiles each.
inline void product(const bf16* a, int64_t stride, const bf16* b, int64_t steps) {
  zero_sums();
  for (int64_t k = 0; k < steps; k++) multiply(a + k * 32, stride, b + k * TILE, b + (steps + k) * TILE);
}

}  // namespace
