// Causal attention with rotary positions, forward and backward. `amx/__init__.py` describes the functions.
//
// Each head of each row is one task. A head has 32 dimensions, so one instruction multiplies 16 queries by 16 keys. The
// scores of a head stay in the processor's cache; backward computes them again (Dao et al. 2022).

#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace {

constexpr int64_t D = 32;             // dimensions of a head
constexpr float SCALE = 0.25503487f;  // log2(e) / sqrt(D): the weight of a score is a power of two
constexpr float LN_2 = 0.69314718f;
constexpr float MASKED = -1e30f;

// The places of a head's arrays. A token has queries, keys and values side by side: (n, 3, heads, D).
struct Head {
  int64_t n, heads, row, head;
  int64_t q(int64_t t) const { return (row * n + t) * 3 * heads * D + head * D; }
  int64_t k(int64_t t) const { return q(t) + heads * D; }
  int64_t v(int64_t t) const { return k(t) + heads * D; }
  int64_t out(int64_t t) const { return (row * n + t) * heads * D + head * D; }
};

// cos and sin of each position, (n, D) each. Both halves of a row are equal.
struct Angles {
  const float *cos, *sin;

  // Rotate a token's row (Su et al. 2021).
  void rotate(int64_t t, const bf16* from, bf16* to) const {
    const __m512 c = _mm512_loadu_ps(cos + t * D), s = _mm512_loadu_ps(sin + t * D);
    const __m512 a = load_half(from), b = load_half(from + 16);
    store(to, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }

  // The gradient of `rotate`, multiplied by a factor.
  void rotate_back(int64_t t, __m512 a, __m512 b, float factor, bf16* to) const {
    const __m512 c = scaled(cos + t * D, factor), s = scaled(sin + t * D, factor);
    store(to, _mm512_fmadd_ps(a, c, _mm512_mul_ps(b, s)), _mm512_fmsub_ps(b, c, _mm512_mul_ps(a, s)));
  }

  static __m512 scaled(const float* from, float factor) {
    return _mm512_mul_ps(_mm512_loadu_ps(from), _mm512_set1_ps(factor));
  }
};

// Turn the first n scores of a query into weights e^(score - largest). Keys from `allowed` on are masked. Return log2
// of the sum of all e^score.
float soften(float* scores, bf16* weights, int64_t n, int64_t allowed, float* inverse_sum) {
  for (int64_t c = n - SIDE; c < n; c += 16) {  // only the last square has keys after the query
    const __mmask16 mask = c + 16 <= allowed ? 0xFFFF : c >= allowed ? 0 : (1u << (allowed - c)) - 1;
    _mm512_store_ps(scores + c, _mm512_mask_mov_ps(_mm512_set1_ps(MASKED), mask, _mm512_load_ps(scores + c)));
  }
  __m512 largest = _mm512_set1_ps(MASKED), sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < n; c += 16) largest = _mm512_max_ps(largest, _mm512_load_ps(scores + c));
  const __m512 scale = _mm512_set1_ps(SCALE), shift = _mm512_set1_ps(SCALE * _mm512_reduce_max_ps(largest));
  for (int64_t c = 0; c < n; c += 32) {
    const __m512 first = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + c), scale, shift));
    const __m512 second = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + c + 16), scale, shift));
    sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
    store(weights + c, first, second);
  }
  const float total = _mm512_reduce_add_ps(sum);
  *inverse_sum = 1 / total;
  return _mm512_cvtss_f32(shift) + std::log2(total);
}

struct Forward {
  explicit Forward(int64_t n) : q(n * D), k(n * D), v(n * D), scores(SIDE * n), weights(SIDE * n) {}

  void run(const Head& head, const bf16* qkv, Angles angles, bf16* out, float* logs) {
    const int64_t n = head.n;
    for (int64_t j = 0; j < n; j += SIDE) arrange(head, j, qkv, angles);
    for (int64_t i = 0; i < n; i += SIDE) {
      for (int64_t j = 0; j <= i; j += SIDE) {
        product(&q[i * D], D, &k[j * D], 1);
        store_sums(&scores[j], n);
      }
      float inverse[SIDE];
      for (int64_t t = 0; t < SIDE; t++)
        logs[i + t] = soften(&scores[t * n], &weights[t * n], i + SIDE, i + t + 1, inverse + t);
      zero_sums();
      for (int64_t j = 0; j <= i; j += SIDE) multiply(&weights[j], n, &v[j * D], &v[j * D + TILE]);
      store_sums(square, SIDE);
      for (int64_t t = 0; t < SIDE; t++) {
        const float* sums = square + t * SIDE;
        store(out + head.out(i + t), Angles::scaled(sums, inverse[t]), Angles::scaled(sums + 16, inverse[t]));
      }
    }
  }

  // q of 32 tokens as A, k^T and v as B.
  void arrange(const Head& head, int64_t j, const bf16* qkv, Angles angles) {
    alignas(64) bf16 rows[SIDE * D];
    for (int64_t t = 0; t < SIDE; t++) {
      angles.rotate(j + t, qkv + head.q(j + t), &q[(j + t) * D]);
      angles.rotate(j + t, qkv + head.k(j + t), rows + t * D);
    }
    words(rows, 16, &k[j * D]);
    words(rows + TILE, 16, &k[j * D + TILE]);
    pairs(qkv + head.v(j), 3 * head.heads * D, &v[j * D], &v[j * D + TILE]);
  }

  Buffer<bf16> q, k, v;
  Buffer<float> scores;  // (SIDE, n)
  Buffer<bf16> weights;  // (SIDE, n)
  alignas(64) float square[SIDE * D];
};

struct Backward {
  explicit Backward(int64_t n)
      : q(n * D),
        q_t(n * D),
        k(n * D),
        k_pairs(n * D),
        v(n * D),
        d_out(n * D),
        d_out_t(n * D),
        dk_t(n * D),
        dv_t(n * D),
        deltas(n) {}

  void run(const Head& head, const bf16* qkv, Angles angles, const bf16* out, const float* logs, const bf16* d,
           bf16* d_qkv) {
    const int64_t n = head.n;
    for (int64_t j = 0; j < n; j += SIDE) arrange(head, j, qkv, angles, out, d);
    for (int64_t i = 0; i < n; i += SIDE) {
      std::fill_n(dq, SIDE * D, 0.0f);
      for (int64_t j = 0; j <= i; j += SIDE) add_square(i, j, logs);
      for (int64_t t = 0; t < SIDE; t++) {
        const float* row = dq + t * D;
        angles.rotate_back(i + t, _mm512_load_ps(row), _mm512_load_ps(row + 16), SCALE * LN_2, d_qkv + head.q(i + t));
      }
    }
    alignas(64) float turned[SIDE * D];  // (dimensions 0-15, then 16-31) x tokens
    for (int64_t j = 0; j < n; j += SIDE) {
      turn(&dk_t[j * D], turned);
      for (int64_t t = 0; t < SIDE; t++)
        angles.rotate_back(j + t, _mm512_load_ps(turned + t * 16), _mm512_load_ps(turned + 512 + t * 16), SCALE * LN_2,
                           d_qkv + head.k(j + t));
      turn(&dv_t[j * D], turned);
      for (int64_t t = 0; t < SIDE; t++)
        store(d_qkv + head.v(j + t), _mm512_load_ps(turned + t * 16), _mm512_load_ps(turned + 512 + t * 16));
    }
  }

  // The inputs of 32 tokens in all the forms that `add_square` needs. deltas: the sum of out * d_out of each token.
  void arrange(const Head& head, int64_t j, const bf16* qkv, Angles angles, const bf16* out, const bf16* d) {
    alignas(64) bf16 rows[SIDE * D];
    for (int64_t t = j; t < j + SIDE; t++) {
      angles.rotate(t, qkv + head.q(t), &q[t * D]);
      angles.rotate(t, qkv + head.k(t), rows + (t - j) * D);
      const bf16 *o = out + head.out(t), *g = d + head.out(t);
      _mm512_store_si512(&d_out[t * D], _mm512_loadu_si512(g));
      const __m512 first = _mm512_mul_ps(load_half(o), load_half(g));
      deltas[t] = _mm512_reduce_add_ps(_mm512_fmadd_ps(load_half(o + 16), load_half(g + 16), first));
    }
    transpose(&q[j * D], D, &q_t[j * D], &q_t[j * D + TILE]);
    transpose(&d_out[j * D], D, &d_out_t[j * D], &d_out_t[j * D + TILE]);
    words(rows, 16, &k[j * D]);
    words(rows + TILE, 16, &k[j * D + TILE]);
    pairs(rows, D, &k_pairs[j * D], &k_pairs[j * D + TILE]);
    const int64_t stride = 3 * head.heads * D;
    words(qkv + head.v(j), stride / 2, &v[j * D]);
    words(qkv + head.v(j + 16), stride / 2, &v[j * D + TILE]);
    std::fill_n(&dk_t[j * D], SIDE * D, 0.0f);
    std::fill_n(&dv_t[j * D], SIDE * D, 0.0f);
  }

  // Add what queries i to i + 31 and keys j to j + 31 contribute to dq, dk and dv.
  void add_square(int64_t i, int64_t j, const float* logs) {
    product(&q[i * D], D, &k[j * D], 1);
    store_sums(scores, SIDE);
    product(&d_out[i * D], D, &v[j * D], 1);
    store_sums(d_weights, SIDE);
    for (int64_t t = 0; t < SIDE; t += 2) {
      __m512i weights[2], gradient[2];
      for (int64_t u = 0; u < 2; u++) {
        const uint32_t allowed = i > j ? ~0u : ~0u >> (31 - t - u);
        row(t + u, logs[i + t + u], deltas[i + t + u], allowed, weights + u, gradient + u);
        _mm512_store_si512(ds + (t + u) * SIDE, gradient[u]);
      }
      pair_rows(weights[0], weights[1], weight_pairs + t * 16, weight_pairs + TILE + t * 16);
      pair_rows(gradient[0], gradient[1], ds_pairs + t * 16, ds_pairs + TILE + t * 16);
    }
    load_sums(&dk_t[j * D], SIDE);
    multiply(&q_t[i * D], 32, ds_pairs, ds_pairs + TILE);
    store_sums(&dk_t[j * D], SIDE);
    load_sums(&dv_t[j * D], SIDE);
    multiply(&d_out_t[i * D], 32, weight_pairs, weight_pairs + TILE);
    store_sums(&dv_t[j * D], SIDE);
    load_sums(dq, D);
    multiply(ds, SIDE, &k_pairs[j * D], &k_pairs[j * D + TILE]);
    store_sums(dq, D);
  }

  // A query's weights in a square, and the gradient of its scores.
  void row(int64_t t, float log, float delta, uint32_t allowed, __m512i* weights, __m512i* gradient) const {
    __m512 w[2], g[2];
    for (int64_t half = 0; half < 2; half++) {
      const int64_t at = t * SIDE + half * 16;
      const __m512 weight =
          exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + at), _mm512_set1_ps(SCALE), _mm512_set1_ps(log)));
      w[half] = _mm512_maskz_mov_ps(allowed >> (half * 16), weight);
      g[half] = _mm512_mul_ps(w[half], _mm512_sub_ps(_mm512_load_ps(d_weights + at), _mm512_set1_ps(delta)));
    }
    *weights = round_both(w[0], w[1]);
    *gradient = round_both(g[0], g[1]);
  }

  // Transpose a square, (D, tokens), to (2, tokens, D / 2).
  static void turn(const float* square, float* to) {
    for (int64_t r = 0; r < 2; r++)
      for (int64_t c = 0; c < 2; c++) words(square + r * 16 * SIDE + c * 16, SIDE, to + r * 512 + c * 256);
  }

  Buffer<bf16> q, q_t, k, k_pairs, v, d_out, d_out_t;
  Buffer<float> dk_t, dv_t, deltas;  // a square (D, 32 tokens) after the other
  alignas(64) float scores[SIDE * SIDE], d_weights[SIDE * SIDE], dq[SIDE * D];
  alignas(64) bf16 ds[SIDE * SIDE], ds_pairs[SIDE * SIDE], weight_pairs[SIDE * SIDE];
};

}  // namespace

extern "C" {

void attention_forward(const bf16* qkv, const float* cos, const float* sin, bf16* out, float* logs, int64_t rows,
                       int64_t n, int64_t heads) {
#pragma omp parallel
  {
    const Tiles tiles;
    Forward forward(n);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < rows * heads; task++)
      forward.run({n, heads, task / heads, task % heads}, qkv, {cos, sin}, out, logs + task * n);
  }
}

void attention_backward(const bf16* qkv, const float* cos, const float* sin, const bf16* out, const float* logs,
                        const bf16* d_out, bf16* d_qkv, int64_t rows, int64_t n, int64_t heads) {
#pragma omp parallel
  {
    const Tiles tiles;
    Backward backward(n);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < rows * heads; task++)
      backward.run({n, heads, task / heads, task % heads}, qkv, {cos, sin}, out, logs + task * n, d_out, d_qkv);
  }
}
}
