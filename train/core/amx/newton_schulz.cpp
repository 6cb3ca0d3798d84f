// The Newton-Schulz iteration of Muon. Each matrix is one task and stays in its core's cache.

#include "tiles.h"

namespace {

struct Matrix {
  Matrix(int64_t rows, int64_t columns)
      : r(rows), c(columns), x_words(r * c), x_pairs(r * c), gram(r * r), gram_words(r * r), polynomial(r * r) {}

  // x = a x + (b x x^T + c (x x^T)^2) x
  void iterate(bf16* x, float a, float b, float b2) {
    for (int64_t i = 0; i < r; i += 32)
      for (int64_t k = 0; k < c; k += 32) {
        bf16* first = &x_words[(i / 16 * (c / 32) + k / 32) * TILE];
        words(x + i * c + k, c / 2, first);
        words(x + (i + 16) * c + k, c / 2, first + c / 32 * TILE);
        first = &x_pairs[(k / 16 * (r / 32) + i / 32) * TILE];
        pairs(x + i * c + k, c, first, first + r / 32 * TILE);
      }
    combine(x, c, x_words.data, r, gram.data, 1, nullptr, 0);
    for (int64_t i = 0; i < r; i += 16)
      for (int64_t k = 0; k < r; k += 32)
        words(&gram[i * r + k], r / 2, &gram_words[(i / 16 * (r / 32) + k / 32) * TILE]);
    combine(gram.data, r, gram_words.data, r, polynomial.data, b2, gram.data, b);
    combine(polynomial.data, r, x_pairs.data, c, x, 1, x, a);
  }

  // to (r, columns) = factor * (left (r, inner) times B) + other_factor * other (r, columns)
  void combine(const bf16* left, int64_t inner, const bf16* right, int64_t columns, bf16* to, float factor,
               const bf16* other, float other_factor) {
    const __m512 f = _mm512_set1_ps(factor), g = _mm512_set1_ps(other_factor);
    for (int64_t i = 0; i < r; i += 32)
      for (int64_t k = 0; k < columns; k += 32) {
        product(left + i * inner, inner, right + k / 16 * (inner / 32) * TILE, inner / 32);
        store_sums(sums, SIDE);
        for (int64_t t = 0; t < SIDE; t++) {
          __m512 first = _mm512_mul_ps(_mm512_load_ps(sums + t * SIDE), f),
                 second = _mm512_mul_ps(_mm512_load_ps(sums + t * SIDE + 16), f);
          const int64_t at = (i + t) * columns + k;
          if (other) {
            first = _mm512_fmadd_ps(load_half(other + at), g, first);
            second = _mm512_fmadd_ps(load_half(other + at + 16), g, second);
          }
          store(to + at, first, second);
        }
      }
  }

  int64_t r, c;
  Buffer<bf16> x_words, x_pairs, gram, gram_words, polynomial;
  alignas(64) float sums[SIDE * SIDE];
};

}  // namespace

extern "C" void newton_schulz(bf16* x, const float* coefficients, int64_t matrices, int64_t rows, int64_t columns,
                              int64_t steps) {
#pragma omp parallel
  {
    const Tiles tiles;
    Matrix matrix(rows, columns);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < matrices; i++)
      for (int64_t step = 0; step < steps; step++)
        matrix.iterate(x + i * rows * columns, coefficients[0], coefficients[1], coefficients[2]);
  }
}
