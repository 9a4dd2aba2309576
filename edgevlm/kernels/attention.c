/* Attention of float32 queries, keys and values, as ONNX's Attention with a bool mask has it.
 *
 * ONNX Runtime's kernel multiplies all queries with the whole capacity of the KV cache. Here what a tile of queries cannot see
 * at either end is skipped (where a query sees nothing, the result is 0, as there), and query heads that share a key head are
 * tiles of one product. Scores of a tile are kept whole, so the softmax is the ordinary one.
 *
 * Many queries at once, of a picture or a prompt, are multiplied in bfloat16 where the processor can: pairs of neighbours at a
 * time, sums in float32. A single token's stay in float32: there reading the cache is what takes the time.
 */
#if defined(__x86_64__) && defined(__linux__)
#define _GNU_SOURCE
#include "interface.h"

#include <stdlib.h>
#include <string.h>

enum { TILE = 6, KEYS_AT_ONCE = 64, TILES_A_TASK = 8, MANY_ROWS = 24 };

typedef struct {
  int64_t batch, heads, key_heads, queries, keys, width, value_width; /* B, Hq, Hkv, S, T, D, Dv */
  int64_t padded;                                                    /* T, up to whole vectors of keys */
  float scale;
  const float *query, *key, *value;
  const uint8_t *mask;     /* of [B, Hq, S, T] by strides; null: all is seen */
  int64_t mask_strides[4];
  float *transposed;       /* keys [B, Hkv, padded / 64, D, 64] */
  int paired;              /* in bfloat16: */
  int64_t pairs, columns;  /* of neighbours in D; Dv up to whole vectors */
  uint32_t *key_pairs;     /* [B, Hkv, padded / 64, pairs, 64] */
  uint32_t *value_pairs;   /* of neighbours in T: [B, Hkv, padded / 2, columns] */
  float *output;
  int64_t tasks;           /* of a key head */
} Call;

/* e to the x, for x <= 0: a power of two times a polynomial on |r| <= ln 2 / 2 (Cephes' expf), to 1e-7. */
WIDE INLINE __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
  y = _mm512_fmadd_ps(_mm512_mul_ps(y, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(y, n);
}

/* 16 rows of 16 numbers to columns `KEYS_AT_ONCE` apart, the first `width` of them: within 128 bits, then between. */
WIDE INLINE void transpose_square(const __m512 *a, __mmask16 width, float *to) {
  __m512 b[16];
  UNROLL for (int i = 0; i < 16; i += 4) {
    __m512 t0 = _mm512_unpacklo_ps(a[i], a[i + 1]), t1 = _mm512_unpackhi_ps(a[i], a[i + 1]);
    __m512 t2 = _mm512_unpacklo_ps(a[i + 2], a[i + 3]), t3 = _mm512_unpackhi_ps(a[i + 2], a[i + 3]);
    b[i] = _mm512_shuffle_ps(t0, t2, 0x44);
    b[i + 1] = _mm512_shuffle_ps(t0, t2, 0xee);
    b[i + 2] = _mm512_shuffle_ps(t1, t3, 0x44);
    b[i + 3] = _mm512_shuffle_ps(t1, t3, 0xee);
  }
  UNROLL for (int i = 0; i < 4; i++) { /* b[i], b[i + 4], …: columns i, i + 4, i + 8, i + 12 of four rows each */
    __m512 t0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), t1 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    __m512 t2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88), t3 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    __m512 columns[4] = {_mm512_shuffle_f32x4(t0, t2, 0x88), _mm512_shuffle_f32x4(t1, t3, 0x88),
                         _mm512_shuffle_f32x4(t0, t2, 0xdd), _mm512_shuffle_f32x4(t1, t3, 0xdd)};
    UNROLL for (int q = 0; q < 4; q++)
      if (width >> (4 * q + i) & 1) _mm512_storeu_ps(to + (4 * q + i) * KEYS_AT_ONCE, columns[q]);
  }
}

/* 64 keys [64, D] → [D, 64], what is beyond the last one as zeros. */
WIDE static void transpose_keys(void *data, size_t number) {
  const Call *c = data;
  int64_t blocks = c->padded / KEYS_AT_ONCE, head = (int64_t)number / blocks, first = (int64_t)number % blocks * KEYS_AT_ONCE;
  const float *from = c->key + (head * c->keys + first) * c->width;
  float *to = c->transposed + (head * blocks + first / KEYS_AT_ONCE) * c->width * KEYS_AT_ONCE;
  for (int64_t t = 0; t < KEYS_AT_ONCE; t += 16)
    for (int64_t d = 0; d < c->width; d += 16) {
      __mmask16 mask = first_of(c->width - d);
      __m512 rows[16];
      UNROLL for (int i = 0; i < 16; i++)
        rows[i] = first + t + i < c->keys ? _mm512_maskz_loadu_ps(mask, from + (t + i) * c->width + d) : _mm512_setzero_ps();
      transpose_square(rows, mask, to + d * KEYS_AT_ONCE + t);
    }
}

/* ------------------------------------------------------------------------------------------ in bfloat16 */

/* Compilers want a flag for these instructions, for the whole function and all that it calls. */
WIDE INLINE __m256i to_bfloat16(__m512 x) {
  __m256i out;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(out) : "v"(x));
  return out;
}
WIDE INLINE __m512 two_to_bfloat16(__m512 low, __m512 high) {
  __m512 out;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(low), "v"(high));
  return out;
}
WIDE INLINE void add_pairs(__m512 *sum, __m512i a, __m512i b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
}

WIDE INLINE __m512 row_of(const float *from, int64_t stride, int64_t row, int64_t rows, int64_t d, int64_t width) {
  return row < rows && d < width ? _mm512_maskz_loadu_ps(first_of(width - d), from + row * stride + d) : _mm512_setzero_ps();
}

/* 64 keys, as pairs of neighbours in D; 64 values, as pairs of neighbours in T. */
WIDE static void pair_block(void *data, size_t number) {
  const Call *c = data;
  int64_t blocks = c->padded / KEYS_AT_ONCE, head = (int64_t)number / blocks, first = (int64_t)number % blocks * KEYS_AT_ONCE;
  int64_t count = c->keys - first;
  const float *from = c->key + (head * c->keys + first) * c->width;
  uint32_t *to = c->key_pairs + (int64_t)number * c->pairs * KEYS_AT_ONCE;
  for (int64_t t = 0; t < KEYS_AT_ONCE; t += 16)
    for (int64_t d = 0; d < c->width; d += 32) {
      __m512 rows[16];
      UNROLL for (int i = 0; i < 16; i++)
        rows[i] = two_to_bfloat16(row_of(from, c->width, t + i, count, d, c->width),
                                  row_of(from, c->width, t + i, count, d + 16, c->width));
      transpose_square(rows, first_of(c->pairs - d / 2), (float *)to + d / 2 * KEYS_AT_ONCE + t);
    }
  from = c->value + (head * c->keys + first) * c->value_width;
  to = c->value_pairs + (int64_t)number * (KEYS_AT_ONCE / 2) * c->columns;
  for (int64_t t = 0; t < KEYS_AT_ONCE; t += 2, to += c->columns)
    for (int64_t d = 0; d < c->value_width; d += 16) {
      __m512i low = _mm512_cvtepu16_epi32(to_bfloat16(row_of(from, c->value_width, t, count, d, c->value_width)));
      __m512i high = _mm512_cvtepu16_epi32(to_bfloat16(row_of(from, c->value_width, t + 1, count, d, c->value_width)));
      _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

/* Numbers [first, last) of a row as bfloat16, in their place or elsewhere; zeros around them. */
WIDE INLINE void halve(const float *from, int64_t first, int64_t last, uint16_t *to) {
  for (int64_t t = first & ~(int64_t)1; t < last; t += 16) {
    __mmask16 mask = first_of(last - t) & (t < first ? 0xfffe : 0xffff);
    _mm256_storeu_si256((__m256i *)(to + t), to_bfloat16(_mm512_maskz_loadu_ps(mask, from + t)));
  }
}

/* Scores of some rows with 64 keys. */
WIDE INLINE void score_pairs(const uint32_t *const *rows, const int count, int64_t pairs, const uint32_t *keys, float scale,
                             float *out, int64_t stride) {
  __m512 sums[TILE][4];
  UNROLL for (int r = 0; r < count; r++)
    UNROLL for (int v = 0; v < 4; v++) sums[r][v] = _mm512_setzero_ps();
  for (int64_t d = 0; d < pairs; d++, keys += KEYS_AT_ONCE) {
    __m512i right[4];
    UNROLL for (int v = 0; v < 4; v++) {
      right[v] = _mm512_loadu_si512(keys + 16 * v);
      __asm__("" : "+v"(right[v]));
    }
    UNROLL for (int r = 0; r < count; r++) {
      __m512i left = _mm512_set1_epi32((int)rows[r][d]);
      UNROLL for (int v = 0; v < 4; v++) add_pairs(&sums[r][v], left, right[v]);
    }
  }
  UNROLL for (int r = 0; r < count; r++)
    UNROLL for (int v = 0; v < 4; v++)
      _mm512_storeu_ps(out + r * stride + 16 * v, _mm512_mul_ps(sums[r][v], _mm512_set1_ps(scale)));
}

/* Weights, pairs [first, last), with at most 64 columns of values. `stride` in pairs. */
WIDE INLINE void mix_pairs(const uint32_t *weights, int64_t stride, const int count, int64_t first, int64_t last,
                           const uint32_t *values, int64_t width, int64_t columns, const float *shares, float *const *out) {
  __m512 sums[TILE][4];
  __mmask16 masks[4];
  UNROLL for (int v = 0; v < 4; v++) masks[v] = columns > 16 * v ? first_of(columns - 16 * v) : 0;
  UNROLL for (int r = 0; r < count; r++)
    UNROLL for (int v = 0; v < 4; v++) sums[r][v] = _mm512_setzero_ps();
  for (int64_t t = first; t < last; t++) {
    __m512i right[4];
    UNROLL for (int v = 0; v < 4; v++) {
      right[v] = _mm512_maskz_loadu_epi32(masks[v], values + t * width + 16 * v);
      __asm__("" : "+v"(right[v]));
    }
    UNROLL for (int r = 0; r < count; r++) {
      __m512i left = _mm512_set1_epi32((int)weights[r * stride + t]);
      UNROLL for (int v = 0; v < 4; v++) add_pairs(&sums[r][v], left, right[v]);
    }
  }
  UNROLL for (int r = 0; r < count; r++)
    UNROLL for (int v = 0; v < 4; v++)
      _mm512_mask_storeu_ps(out[r] + 16 * v, masks[v], _mm512_mul_ps(sums[r][v], _mm512_set1_ps(shares[r])));
}

/* ------------------------------------------------------------------------------------------ in float32 */

/* Scores of some rows with 64 keys. */
WIDE INLINE void score(const float *const *rows, const int count, int64_t width, const float *keys, float scale, float *out,
                       int64_t stride) {
  __m512 sums[TILE][4];
  UNROLL for (int r = 0; r < count; r++)
    UNROLL for (int v = 0; v < 4; v++) sums[r][v] = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d++, keys += KEYS_AT_ONCE) {
    __m512 right[4];
    UNROLL for (int v = 0; v < 4; v++) {
      right[v] = _mm512_loadu_ps(keys + 16 * v);
      __asm__("" : "+v"(right[v]));
    }
    UNROLL for (int r = 0; r < count; r++) {
      __m512 left = _mm512_set1_ps(rows[r][d]);
      UNROLL for (int v = 0; v < 4; v++) sums[r][v] = _mm512_fmadd_ps(left, right[v], sums[r][v]);
    }
  }
  UNROLL for (int r = 0; r < count; r++)
    UNROLL for (int v = 0; v < 4; v++)
      _mm512_storeu_ps(out + r * stride + 16 * v, _mm512_mul_ps(sums[r][v], _mm512_set1_ps(scale)));
}

/* Weights [rows, T] with values [T, at most 64 columns]. */
WIDE INLINE void mix(const float *weights, int64_t stride, const int count, int64_t first, int64_t last, const float *values,
                     int64_t width, int64_t columns, const float *shares, float *const *out) {
  __m512 sums[TILE][4];
  __mmask16 masks[4];
  UNROLL for (int v = 0; v < 4; v++) masks[v] = columns > 16 * v ? first_of(columns - 16 * v) : 0;
  UNROLL for (int r = 0; r < count; r++)
    UNROLL for (int v = 0; v < 4; v++) sums[r][v] = _mm512_setzero_ps();
  for (int64_t t = first; t < last; t++) {
    __m512 right[4];
    UNROLL for (int v = 0; v < 4; v++) {
      right[v] = _mm512_maskz_loadu_ps(masks[v], values + t * width + 16 * v);
      __asm__("" : "+v"(right[v]));
    }
    UNROLL for (int r = 0; r < count; r++) {
      __m512 left = _mm512_set1_ps(weights[r * stride + t]);
      UNROLL for (int v = 0; v < 4; v++) sums[r][v] = _mm512_fmadd_ps(left, right[v], sums[r][v]);
    }
  }
  UNROLL for (int r = 0; r < count; r++)
    UNROLL for (int v = 0; v < 4; v++)
      _mm512_mask_storeu_ps(out[r] + 16 * v, masks[v], _mm512_mul_ps(sums[r][v], _mm512_set1_ps(shares[r])));
}

/* Scores to weights of a row, in place; returns one over their sum. */
WIDE static float weigh(float *scores, const uint8_t *seen, int64_t first, int64_t last) {
  __m512 most = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
  for (int64_t t = first; t < last; t += 16) {
    __mmask16 mask = first_of(last - t);
    if (seen) mask = _mm_mask_test_epi8_mask(mask, _mm_maskz_loadu_epi8(mask, seen + t), _mm_set1_epi8(-1));
    most = _mm512_mask_max_ps(most, mask, most, _mm512_maskz_loadu_ps(mask, scores + t));
  }
  __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t t = first; t < last; t += 16) {
    __mmask16 all = first_of(last - t), mask = all;
    if (seen) mask = _mm_mask_test_epi8_mask(mask, _mm_maskz_loadu_epi8(mask, seen + t), _mm_set1_epi8(-1));
    __m512 weight = _mm512_maskz_mov_ps(mask, exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + t), peak)));
    sum = _mm512_add_ps(sum, weight);
    _mm512_mask_storeu_ps(scores + t, all, weight);
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

WIDE INLINE void attend_tile(const Call *c, int64_t head, int64_t row, const int count, const int paired) {
  /* Rows of a key head: the queries of its first query head, of its second, … */
  int64_t group = c->heads / c->key_heads, b = head / c->key_heads, blocks = c->padded / KEYS_AT_ONCE;
  const float *rows[TILE];
  const uint8_t *seen[TILE] = {0};
  float *out[TILE], *columns[TILE], shares[TILE];
  int64_t first = c->mask ? c->keys : 0, last = c->mask ? 0 : c->keys;
  int blind[TILE] = {0};
  for (int r = 0; r < count; r++) {
    int64_t h = head % c->key_heads * group + (row + r) / c->queries, s = (row + r) % c->queries;
    int64_t at = (b * c->heads + h) * c->queries + s;
    rows[r] = c->query + at * c->width;
    out[r] = c->output + at * c->value_width;
    if (!c->mask) continue;
    seen[r] = c->mask + b * c->mask_strides[0] + h * c->mask_strides[1] + s * c->mask_strides[2];
    const uint8_t *begin = memchr(seen[r], 1, (size_t)c->keys);
    blind[r] = !begin;
    if (blind[r]) continue;
    const uint8_t *end = memrchr(seen[r], 1, (size_t)c->keys) + 1;
    first = least(first, begin - seen[r]);
    last = end - seen[r] > last ? end - seen[r] : last;
  }
  float *scores = scratch(SCORES, (size_t)(TILE * c->padded) * sizeof(float));
  if (!scores) abort();
  const uint32_t *pairs[TILE];
  if (paired) {
    int64_t room = (c->width + 31) / 32 * 16;
    uint32_t *queries = scratch(QUERIES, (size_t)(TILE * room) * sizeof *queries);
    if (!queries) abort();
    for (int r = 0; r < count; r++) {
      halve(rows[r], 0, c->width, (uint16_t *)(queries + r * room));
      pairs[r] = queries + r * room;
    }
  }
  for (int64_t block = first / KEYS_AT_ONCE; block * KEYS_AT_ONCE < last; block++) {
    float *out = scores + block * KEYS_AT_ONCE;
    int64_t at = (head * blocks + block) * KEYS_AT_ONCE;
    if (paired) score_pairs(pairs, count, c->pairs, c->key_pairs + at * c->pairs, c->scale, out, c->padded);
    else score(rows, count, c->width, c->transposed + at * c->width, c->scale, out, c->padded);
  }
  for (int r = 0; r < count; r++) {
    float *row_scores = scores + r * c->padded;
    shares[r] = blind[r] ? 0.0f : weigh(row_scores, seen[r], first, last);
    if (paired) halve(row_scores, first, last, (uint16_t *)row_scores);
  }
  const float *values = c->value + head * c->keys * c->value_width;
  const uint32_t *value_pairs = c->value_pairs + head * c->padded / 2 * c->columns;
  for (int64_t d = 0; d < c->value_width; d += 64) {
    int64_t width = least(64, c->value_width - d);
    for (int r = 0; r < count; r++) columns[r] = out[r] + d;
    if (paired)
      mix_pairs((uint32_t *)scores, c->padded, count, first / 2, (last + 1) / 2, value_pairs + d, c->columns, width, shares, columns);
    else
      mix(scores, c->padded, count, first, last, values + d, c->value_width, width, shares, columns);
  }
}

WIDE INLINE void attend_rows(const Call *c, size_t number, const int paired) {
  int64_t head = (int64_t)number / c->tasks, rows = c->heads / c->key_heads * c->queries;
  int64_t row = (int64_t)number % c->tasks * TILE * TILES_A_TASK, end = least(row + TILE * TILES_A_TASK, rows);
  for (; row + TILE <= end; row += TILE) attend_tile(c, head, row, TILE, paired);
  for (; row + 3 <= end; row += 3) attend_tile(c, head, row, 3, paired);
  for (; row < end; row++) attend_tile(c, head, row, 1, paired);
}

WIDE static void attend(void *data, size_t number) { attend_rows(data, number, 0); }
WIDE static void attend_paired(void *data, size_t number) { attend_rows(data, number, 1); }

/* ------------------------------------------------------------------------------------------ the operator */

typedef struct { const OrtApi *api; float scale; } Kernel;

static void *create(const CustomOp *op, const OrtApi *api, Handle info) {
  (void)op;
  Kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return NULL;
  kernel->api = api;
  api->at[ATTRIBUTE_FLOAT](info, "scale", &kernel->scale);
  return kernel;
}

static void compute(void *opaque, Handle context) {
  const Kernel *kernel = opaque;
  const Function *api = kernel->api->at;
  Handle inputs[4] = {0}, output = NULL;
  int64_t dims[4][16], shape[4];
  void *data[4] = {0}, *made = NULL;
  size_t given = 0, rank = 0;
  api[INPUT_COUNT](context, &given);
  for (size_t n = 0; n < given && n < 4; n++) {
    api[GET_INPUT](context, n, &inputs[n]);
    if (!inputs[n]) continue;
    rank = read_shape(api, inputs[n], dims[n]);
    api[TENSOR_DATA](inputs[n], &data[n]);
  }
  Call c = {.batch = dims[0][0], .heads = dims[0][1], .queries = dims[0][2], .width = dims[0][3], .key_heads = dims[1][1],
            .keys = dims[1][2], .value_width = dims[2][3], .scale = kernel->scale, .query = data[0], .key = data[1],
            .value = data[2], .mask = data[3]};
  if (c.mask) { /* dimensions are aligned at the right; one of 1 is repeated */
    int64_t stride = 1;
    for (size_t d = 0; d < 4 && d < rank; d++) {
      int64_t size = dims[3][rank - 1 - d];
      c.mask_strides[3 - d] = size == 1 ? 0 : stride;
      stride *= size;
    }
  }
  memcpy(shape, dims[0], 3 * sizeof *shape);
  shape[3] = c.value_width;
  api[GET_OUTPUT](context, (size_t)0, shape, (size_t)4, &output);
  api[TENSOR_DATA](output, &made);
  c.output = made;
  c.padded = (c.keys + KEYS_AT_ONCE - 1) / KEYS_AT_ONCE * KEYS_AT_ONCE;
  if (!c.batch || !c.queries || !c.keys) return;
  int64_t heads = c.batch * c.key_heads, blocks = heads * c.padded / KEYS_AT_ONCE, rows = c.heads / c.key_heads * c.queries;
  c.paired = rows >= MANY_ROWS && has_bfloat16();
  c.pairs = (c.width + 1) / 2;
  c.columns = (c.value_width + 15) / 16 * 16;
  if (c.paired) {
    c.key_pairs = scratch(KEYS, (size_t)(heads * c.padded * c.pairs) * sizeof *c.key_pairs);
    c.value_pairs = scratch(VALUES, (size_t)(heads * c.padded / 2 * c.columns) * sizeof *c.value_pairs);
  } else {
    c.transposed = scratch(KEYS, (size_t)(heads * c.padded * c.width) * sizeof(float));
  }
  if (c.paired ? !c.key_pairs || !c.value_pairs : !c.transposed) abort();
  c.tasks = (rows + TILE * TILES_A_TASK - 1) / (TILE * TILES_A_TASK);
  api[PARALLEL_FOR](context, c.paired ? pair_block : transpose_keys, (size_t)blocks, (size_t)0, &c);
  api[PARALLEL_FOR](context, c.paired ? attend_paired : attend, (size_t)(heads * c.tasks), (size_t)0, &c);
}

static void destroy(void *kernel) { free(kernel); }
static const char *name(const CustomOp *op) { (void)op; return "Attention"; }
static const char *provider(const CustomOp *op) { (void)op; return "CPUExecutionProvider"; }
static int input_type(const CustomOp *op, size_t index) { (void)op; return index == 3 ? BOOL : FLOAT; }
static size_t input_count(const CustomOp *op) { (void)op; return 4; }
static int output_type(const CustomOp *op, size_t index) { (void)op; (void)index; return FLOAT; }
static size_t output_count(const CustomOp *op) { (void)op; return 1; }
static int input_kind(const CustomOp *op, size_t index) { (void)op; return index == 3 ? OPTIONAL : REQUIRED; }
static int output_kind(const CustomOp *op, size_t index) { (void)op; (void)index; return REQUIRED; }

CustomOp attention = {OP_VERSION, create, name, provider, input_type, input_count, output_type, output_count, compute, destroy,
                      input_kind, output_kind, 0, {0}};
#endif
