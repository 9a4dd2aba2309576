/* Products of float rows with INT4 or INT8 weights, as operators of ONNX Runtime.
 *
 * ONNX Runtime's own MatMulNBits keeps a packed copy of the weights and, with many rows, reaches a third of what the integer
 * units can do (docs/performance.md). Here weights, INT4 [K, N] with two columns in a byte or INT8 [K, N], are packed once, and
 * the pages of the file that they came from are given back.
 *
 * Activations are quantized to int8 group by group: 128 neighbours in a row share a scale, whole blocks of INT4. Weights are
 * made unsigned by an offset, because vpdpbusd multiplies unsigned by signed bytes; what that adds is known from the sums of the
 * activations, and sums begin with minus it.
 *
 * A unit is 64 bytes of a row of weights. Packed, a unit lies in one piece, four rows of it side by side in 32-bit lanes; this
 * shuffles columns within 128-bit lanes. Scales are kept in that order, and results are put back in order when they are stored.
 * Packed weights lie in huge pages: with small ones, finding the pages takes a quarter of the time of a token.
 */
#if defined(__x86_64__) && defined(__linux__)
#define _GNU_SOURCE
#include "interface.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { BYTES = 64, ROWS = 3, VECTORS = 4, GROUP = 128, AHEAD = 2048, TASK_ROWS = 192 };

/* ------------------------------------------------------------------------------------------ the products */

typedef struct {
  int bits;
  int64_t depth, columns;  /* K, N */
  int64_t block, blocks;   /* neighbours in K with one scale of INT4; how many of these; else as groups */
  int64_t group, groups;   /* neighbours in K with one activation scale, whole blocks; how many of these */
  int64_t unit, units;     /* columns of a unit; units of a row */
  uint8_t *packed;         /* [units, K / 4, 4, 16, 4] bytes, made unsigned */
  const float *scales;     /* int8: [N] */
  uint16_t *halves;        /* int4: scales as float16 in the order of lanes, [units, blocks, unit] */
  float shrink;            /* what these are to be multiplied with */
} Weight;

typedef struct {
  const Weight *weight;
  int64_t rows, pieces, piece; /* M; how many pieces the rows are cut into, and the rows of a piece */
  const float *input, *bias;
  float *output;
  int8_t *quantized;   /* [groups, M, group]: what is multiplied with one panel lies together */
  float *row_scales;   /* [M, groups] */
  int32_t *offsets;    /* [M, blocks]: what sums begin with */
  int64_t tasks;
} Product;

INLINE int64_t row_bytes(const Weight *w) { return w->columns * w->bits / 8; }
INLINE __mmask64 bytes_of(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

/* The place, in units of its vector's kind, of lane j of vector v. */
INLINE int place_of(int v, int j) { return (j / 4) * 16 + v * 4 + j % 4; }

WIDE static void quantize_row(const Product *p, int64_t m) {
  const Weight *w = p->weight;
  const float *row = p->input + m * w->depth;
  int32_t zero = w->bits == 4 ? 8 : 128;
  for (int64_t g = 0; g < w->groups; g++) {
    int64_t first = g * w->group, end = least(first + w->group, w->depth);
    int8_t *out = p->quantized + first * p->rows + m * (end - first) - first;
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = first; k < end; k += 16)
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_of(end - k), row + k)));
    float peak = _mm512_reduce_max_ps(most);
    __m512 inverse = _mm512_set1_ps(peak > 0 ? 127.0f / peak : 0.0f);
    p->row_scales[m * w->groups + g] = peak / 127.0f * w->shrink;
    for (int64_t from = first; from < end; from += w->block) {
      int64_t to = least(from + w->block, end);
      __m512i sum = _mm512_setzero_si512();
      for (int64_t k = from; k < to; k += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first_of(to - k), row + k), inverse));
        sum = _mm512_add_epi32(sum, whole);
        _mm_mask_storeu_epi8(out + k, first_of(to - k), _mm512_cvtepi32_epi8(whole));
      }
      p->offsets[m * w->blocks + from / w->block] = -zero * _mm512_reduce_add_epi32(sum);
    }
  }
}

/* Four rows of 64 bytes, side by side. */
WIDE INLINE void interleave(const uint8_t *at, int64_t stride, __mmask64 mask, __m512i *out) {
  __m512i a = _mm512_maskz_loadu_epi8(mask, at), b = _mm512_maskz_loadu_epi8(mask, at + stride);
  __m512i c = _mm512_maskz_loadu_epi8(mask, at + 2 * stride), d = _mm512_maskz_loadu_epi8(mask, at + 3 * stride);
  __m512i ab = _mm512_unpacklo_epi8(a, b), ab2 = _mm512_unpackhi_epi8(a, b);
  __m512i cd = _mm512_unpacklo_epi8(c, d), cd2 = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(ab, cd);
  out[1] = _mm512_unpackhi_epi16(ab, cd);
  out[2] = _mm512_unpacklo_epi16(ab2, cd2);
  out[3] = _mm512_unpackhi_epi16(ab2, cd2);
}

WIDE INLINE __m512i lower_bits(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(0x0f)); }
WIDE INLINE __m512i upper_bits(__m512i x) { return lower_bits(_mm512_srli_epi16(x, 4)); }

/* sum += weights * activations, four neighbours at a time. The intrinsic does the same, with copies around it (GCC 12). */
WIDE INLINE void add_products(__m512i *sum, __m512i weights, __m512i activations) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(weights), "v"(activations));
}

/* Vectors in the order of lanes to 64 neighbours in order. */
WIDE INLINE void sort_lanes(__m512 *v) {
  __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
  __m512 c = _mm512_shuffle_f32x4(v[0], v[1], 0xee), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

WIDE INLINE void store_vector(const Product *p, int64_t m, int64_t column, __m512 value) {
  int64_t left = p->weight->columns - column;
  if (left <= 0) return;
  if (p->weight->bits == 8) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(first_of(left), p->weight->scales + column));
  if (p->bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(first_of(left), p->bias + column));
  _mm512_mask_storeu_ps(p->output + m * p->weight->columns + column, first_of(left), value);
}

/* A row of a unit: 64 totals in the order of lanes, of INT4 another 64 for the odd columns. */
WIDE static void store_row(const Product *p, int64_t m, int64_t column, const float *totals) {
  __m512 even[4], odd[4];
  for (int v = 0; v < 4; v++) even[v] = _mm512_load_ps(totals + 16 * v);
  sort_lanes(even);
  if (p->weight->bits == 8) {
    for (int v = 0; v < 4; v++) store_vector(p, m, column + 16 * v, even[v]);
    return;
  }
  for (int v = 0; v < 4; v++) odd[v] = _mm512_load_ps(totals + 64 + 16 * v);
  sort_lanes(odd);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int v = 0; v < 4; v++) {
    store_vector(p, m, column + 32 * v, _mm512_permutex2var_ps(even[v], low, odd[v]));
    store_vector(p, m, column + 32 * v + 16, _mm512_permutex2var_ps(even[v], high, odd[v]));
  }
}

/* A group of ROWS rows with 64 columns: totals += … */
WIDE INLINE void multiply_group(const Product *p, int64_t g, int64_t m, const int rows, const int bits, const uint8_t *panel,
                                const uint16_t *scales, float *totals) {
  const Weight *w = p->weight;
  int64_t first = g * w->group, end = least(first + w->group, w->depth);
  const int8_t *left = p->quantized + first * p->rows + m * (end - first) - first;
  __m512 inner[ROWS][VECTORS];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < VECTORS; v++) inner[r][v] = _mm512_setzero_ps();
  for (int64_t from = first; from < end; from += w->block) {
    int64_t to = least(from + w->block, end), b = from / w->block;
    __m512i sums[ROWS][VECTORS];
    UNROLL for (int r = 0; r < rows; r++) {
      __m512i start = _mm512_set1_epi32(p->offsets[(m + r) * w->blocks + b]);
      UNROLL for (int v = 0; v < VECTORS; v++) sums[r][v] = start;
    }
    for (int64_t k = from; k < to; k += 4, panel += 4 * BYTES) {
      __m512i right[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; v++) {
        right[v] = _mm512_load_si512(panel + 64 * v);
        __asm__("" : "+v"(right[v])); /* stays in a register; GCC 12 would load it again for every row */
      }
      UNROLL for (int r = 0; r < rows; r++) {
        int32_t four;
        memcpy(&four, left + r * (end - first) + k, 4);
        __m512i spread = _mm512_set1_epi32(four);
        UNROLL for (int v = 0; v < VECTORS; v++) add_products(&sums[r][v], right[v], spread);
      }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
      __m512 scale = _mm512_setzero_ps();
      if (bits == 4) scale = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(scales + b * w->unit + 16 * v)));
      UNROLL for (int r = 0; r < rows; r++) {
        __m512 sum = _mm512_cvtepi32_ps(sums[r][v]);
        inner[r][v] = bits == 4 ? _mm512_fmadd_ps(sum, scale, inner[r][v]) : sum;
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    __m512 row_scale = _mm512_set1_ps(p->row_scales[(m + r) * w->groups + g]);
    UNROLL for (int v = 0; v < VECTORS; v++) {
      float *total = totals + r * w->unit + 16 * v;
      _mm512_store_ps(total, _mm512_fmadd_ps(inner[r][v], row_scale, _mm512_load_ps(total)));
    }
  }
}

/* Many rows: a unit of columns and a piece of the rows. */
WIDE INLINE void multiply_piece(const Product *p, int64_t u, int64_t from, int64_t end, const int bits) {
  const Weight *w = p->weight;
  float *totals = scratch(TOTALS, (size_t)((end - from) * w->unit) * sizeof(float));
  uint8_t *unpacked = scratch(PANEL, (size_t)w->group * 2 * BYTES);
  if (!totals || !unpacked) abort(); /* as ONNX Runtime's own allocations end: there is no memory left */
  memset(totals, 0, (size_t)((end - from) * w->unit) * sizeof(float));
  for (int64_t g = 0; g < w->groups; g++) {
    int64_t depth = least(w->group, w->depth - g * w->group);
    const uint8_t *panel = w->packed + (u * w->depth + g * w->group) * BYTES;
    if (bits == 4) {
      for (int64_t at = 0; at < depth * BYTES; at += 64) {
        __m512i both = _mm512_load_si512(panel + at);
        _mm512_store_si512(unpacked + at, lower_bits(both));
        _mm512_store_si512(unpacked + depth * BYTES + at, upper_bits(both));
      }
      panel = unpacked;
    }
    for (int half = 0; half < (bits == 4 ? 2 : 1); half++) {
      const uint8_t *right = panel + half * depth * BYTES;
      const uint16_t *scales = w->halves + u * w->blocks * w->unit + 64 * half;
      int64_t m = from;
      float *at = totals + 64 * half;
      for (; m + ROWS <= end; m += ROWS, at += ROWS * w->unit) multiply_group(p, g, m, ROWS, bits, right, scales, at);
      if (end - m == 2) multiply_group(p, g, m, 2, bits, right, scales, at);
      if (end - m == 1) multiply_group(p, g, m, 1, bits, right, scales, at);
    }
  }
  for (int64_t m = from; m < end; m++) store_row(p, m, u * w->unit, totals + (m - from) * w->unit);
}

WIDE static void multiply_unit(void *data, size_t number) {
  const Product *p = data;
  int64_t u = (int64_t)number / p->pieces, from = (int64_t)number % p->pieces * p->piece, end = least(from + p->piece, p->rows);
  if (p->weight->bits == 4) multiply_piece(p, u, from, end, 4);
  else multiply_piece(p, u, from, end, 8);
}

/* One row with one unit: the weights are unpacked on their way from memory. */
WIDE INLINE void multiply_one(const Product *p, int64_t u, const int bits) {
  const Weight *w = p->weight;
  const int vectors = bits == 4 ? 8 : 4;
  const uint8_t *at = w->packed + u * w->depth * BYTES;
  const uint16_t *scales = w->halves + u * w->blocks * w->unit;
  float totals[128] __attribute__((aligned(64)));
  memset(totals, 0, sizeof totals);
  for (int64_t g = 0; g < w->groups; g++) {
    int64_t first = g * w->group, end = least(first + w->group, w->depth);
    __m512 row_scale = _mm512_set1_ps(p->row_scales[g]);
    for (int64_t from = first; from < end; from += w->block, scales += w->unit) {
      int64_t to = least(from + w->block, end);
      __m512i sums[8];
      UNROLL for (int v = 0; v < vectors; v++) sums[v] = _mm512_set1_epi32(p->offsets[from / w->block]);
      for (int64_t k = from; k < to; k += 4, at += 4 * BYTES) {
        int32_t left;
        memcpy(&left, p->quantized + k, 4);
        __m512i spread = _mm512_set1_epi32(left);
        UNROLL for (int v = 0; v < 4; v++) {
          __m512i right = _mm512_load_si512(at + 64 * v);
          _mm_prefetch((const char *)(at + 64 * v + AHEAD), _MM_HINT_T0);
          add_products(&sums[v], bits == 4 ? lower_bits(right) : right, spread);
          if (bits == 4) add_products(&sums[v + 4], upper_bits(right), spread);
        }
      }
      UNROLL for (int v = 0; v < vectors; v++) {
        __m512 both = row_scale;
        if (bits == 4) both = _mm512_mul_ps(both, _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(scales + 16 * v))));
        __m512 total = _mm512_load_ps(totals + 16 * v);
        _mm512_store_ps(totals + 16 * v, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[v]), both, total));
      }
    }
  }
  store_row(p, 0, u * w->unit, totals);
}

WIDE static void multiply_row(void *data, size_t number) {
  const Product *p = data;
  int64_t n = (int64_t)number, begin = n * p->weight->units / p->tasks, end = (n + 1) * p->weight->units / p->tasks;
  for (int64_t u = begin; u < end; u++) {
    if (p->weight->bits == 4) multiply_one(p, u, 4);
    else multiply_one(p, u, 8);
  }
}

static void quantize_rows(void *data, size_t number) { quantize_row(data, (int64_t)number); }

/* Memory in huge pages, taken in chunks that weights of one graph share; a chunk goes when its last weight does. */
typedef struct Chunk { struct Chunk *next; uint8_t *base; size_t size, used, users; } Chunk;
static Chunk *chunks;
static pthread_mutex_t chunks_lock = PTHREAD_MUTEX_INITIALIZER;
enum { CHUNK_BYTES = 64 << 20, HUGE_PAGE = 2 << 20 };

static void *take(size_t bytes) {
  bytes = (bytes + 63) & ~(size_t)63;
  pthread_mutex_lock(&chunks_lock);
  Chunk *c = chunks;
  if (!c || c->size - c->used < bytes) {
    size_t size = (bytes > CHUNK_BYTES ? bytes + HUGE_PAGE : CHUNK_BYTES) & ~(size_t)(HUGE_PAGE - 1);
    uint8_t *base = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    c = base == MAP_FAILED ? NULL : malloc(sizeof *c);
    if (c) {
      size_t before = (size_t)(-(uintptr_t)base & (HUGE_PAGE - 1));
      if (before) munmap(base, before);
      if (before < HUGE_PAGE) munmap(base + before + size, HUGE_PAGE - before);
      madvise(base + before, size, MADV_HUGEPAGE);
      *c = (Chunk){chunks, base + before, size, 0, 0};
      chunks = c;
    }
  }
  void *found = NULL;
  if (c) {
    found = c->base + c->used;
    c->used += bytes;
    c->users++;
  }
  pthread_mutex_unlock(&chunks_lock);
  return found;
}

static void give_back(void *at) {
  if (!at) return;
  pthread_mutex_lock(&chunks_lock);
  for (Chunk **link = &chunks; *link; link = &(*link)->next) {
    Chunk *c = *link;
    if ((uint8_t *)at < c->base || (uint8_t *)at >= c->base + c->size) continue;
    if (!--c->users) {
      *link = c->next;
      munmap(c->base, c->size);
      free(c);
    }
    break;
  }
  pthread_mutex_unlock(&chunks_lock);
}

/* Pages that are mapped from a file need not stay: what is not read again is not paid for. */
static void forget_pages(const void *at, size_t bytes) {
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = ((uintptr_t)at + page - 1) & ~(page - 1);
  uintptr_t last = ((uintptr_t)at + bytes) & ~(page - 1);
  if (last > first) madvise((void *)first, last - first, MADV_DONTNEED);
}

/* Rows that are packed at once: few, so that the pages they lie in are met once. */
enum { PACKED_ROWS = 64, PACKERS = 4, WORTH_A_THREAD = 1 << 20 };

typedef struct {
  const Weight *weight;
  const uint8_t *bytes;
  const float *scales;
  float grow;
  int64_t begin, end; /* units */
} Packing;

WIDE static void *pack_units(void *data) {
  const Packing *p = data;
  const Weight *w = p->weight;
  int64_t stride = row_bytes(w);
  const __m512i flip = _mm512_set1_epi8(w->bits == 4 ? (char)0x88 : (char)0x80);
  for (int64_t from = 0; from < w->depth; from += PACKED_ROWS)
    for (int64_t u = p->begin; u < p->end; u++) {
      __mmask64 mask = bytes_of(stride - u * BYTES);
      for (int64_t k = from; k < least(from + PACKED_ROWS, w->depth); k += 4) {
        __m512i four[4];
        interleave(p->bytes + k * stride + u * BYTES, stride, mask, four);
        uint8_t *to = w->packed + (u * w->depth + k) * BYTES;
        for (int v = 0; v < 4; v++) _mm512_stream_si512((__m512i *)(to + 64 * v), _mm512_xor_si512(four[v], flip));
      }
    }
  _mm_sfence();
  float line[16];
  for (int64_t u = p->begin; w->bits == 4 && u < p->end; u++)
    for (int64_t g = 0; g < w->blocks; g++)
      for (int v = 0; v < 8; v++) {
        for (int j = 0; j < 16; j++) {
          int64_t n = u * w->unit + 2 * place_of(v % 4, j) + v / 4;
          line[j] = n < w->columns ? p->scales[g * w->columns + n] * p->grow : 0.0f;
        }
        __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(line), 0);
        _mm256_store_si256((__m256i *)(w->halves + (u * w->blocks + g) * w->unit + 16 * v), halves);
      }
  return NULL;
}

/* ONNX Runtime makes operators one after the other, so each divides its work: most of it is waiting for fresh memory. */
static void pack_all(const Packing *whole) {
  const Weight *w = whole->weight;
  cpu_set_t allowed;
  int64_t count = sched_getaffinity(0, sizeof allowed, &allowed) ? 1 : CPU_COUNT(&allowed);
  count = least(least(count, PACKERS), 1 + row_bytes(w) * w->depth / WORTH_A_THREAD);
  Packing parts[PACKERS];
  pthread_t threads[PACKERS];
  int64_t started = 1;
  for (int64_t n = 0; n < count; n++) {
    parts[n] = *whole;
    parts[n].begin = n * w->units / count;
    parts[n].end = (n + 1) * w->units / count;
  }
  while (started < count && !pthread_create(&threads[started], NULL, pack_units, &parts[started])) started++;
  pack_units(&parts[0]);
  for (int64_t n = started; n < count; n++) pack_units(&parts[n]); /* no more threads: here, then */
  for (int64_t n = 1; n < started; n++) pthread_join(threads[n], NULL);
}

static int pack(Weight *w, const uint8_t *bytes, const float *scales) {
  w->packed = take((size_t)(w->units * w->depth) * BYTES);
  w->shrink = 1.0f;
  w->scales = scales;
  Packing whole = {w, bytes, scales, 1.0f, 0, w->units};
  if (w->bits == 4) { /* scales as float16 in the order of lanes; a power of two keeps them in its range */
    w->halves = take((size_t)(w->units * w->blocks * w->unit) * 2);
    float peak = 0.0f;
    for (int64_t n = 0; n < w->blocks * w->columns; n++) peak = __builtin_fmaxf(peak, __builtin_fabsf(scales[n]));
    if (peak > 0 && peak < __builtin_inff()) {
      int exponent;
      __builtin_frexpf(peak, &exponent);
      whole.grow = __builtin_ldexpf(1.0f, 15 - exponent);
      w->shrink = __builtin_ldexpf(1.0f, exponent - 15);
    }
  }
  if (!w->packed || (w->bits == 4 && !w->halves)) return 0;
  pack_all(&whole);
  forget_pages(bytes, (size_t)(row_bytes(w) * w->depth));
  if (w->bits == 4) forget_pages(scales, (size_t)(w->blocks * w->columns) * sizeof(float));
  return 1;
}

/* ------------------------------------------------------------------------------------------ the operators */

typedef struct { const OrtApi *api; Weight weight; int ready; } Kernel;

/* Weights and scales are constants of the graph. */
static void *create(const CustomOp *op, const OrtApi *api, Handle info) {
  Kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return NULL;
  const Function *call = api->at;
  Weight *w = &kernel->weight;
  Handle values[2] = {0};
  void *data[2] = {0};
  int constant = 0;
  int64_t dims[16], block = GROUP;
  kernel->api = api;
  if (op->bits == 4) call[ATTRIBUTE_INT](info, "block_size", &block);
  for (size_t n = 0; n < 2; n++) {
    call[CONSTANT_INPUT](info, n + 1, &constant, &values[n]);
    if (!constant || !values[n]) return kernel;
    call[TENSOR_DATA](values[n], &data[n]);
  }
  read_shape(call, values[0], dims);
  w->bits = op->bits;
  w->depth = dims[0];
  w->columns = dims[1] * 8 / w->bits;
  w->block = least(block, w->depth);
  w->blocks = (w->depth + w->block - 1) / w->block;
  w->group = w->block * (w->block < GROUP ? GROUP / w->block : 1);
  w->groups = (w->depth + w->group - 1) / w->group;
  w->unit = BYTES * 8 / w->bits;
  w->units = (w->columns + w->unit - 1) / w->unit;
  kernel->ready = pack(w, data[0], data[1]);
  return kernel;
}

static void destroy(void *opaque) {
  Kernel *kernel = opaque;
  give_back(kernel->weight.packed);
  give_back(kernel->weight.halves);
  free(kernel);
}

static const char *name(const CustomOp *op) { return op->bits == 4 ? "MatMulInt4" : "MatMulInt8"; }
static const char *provider(const CustomOp *op) { (void)op; return "CPUExecutionProvider"; }
static int input_type(const CustomOp *op, size_t index) { return index == 1 ? (op->bits == 4 ? UINT8 : INT8) : FLOAT; }
static size_t input_count(const CustomOp *op) { (void)op; return 4; }
static int output_type(const CustomOp *op, size_t index) { (void)op; (void)index; return FLOAT; }
static size_t output_count(const CustomOp *op) { (void)op; return 1; }
static int input_kind(const CustomOp *op, size_t index) { (void)op; return index == 3 ? OPTIONAL : REQUIRED; }
static int output_kind(const CustomOp *op, size_t index) { (void)op; (void)index; return REQUIRED; }

static void compute(void *opaque, Handle context) {
  Kernel *kernel = opaque;
  const Function *api = kernel->api->at;
  Handle inputs[4] = {0}, output = NULL;
  int64_t dims[16];
  void *data = NULL;
  size_t given = 0;
  api[INPUT_COUNT](context, &given);
  for (size_t n = 0; n < given && n < 4; n++) api[GET_INPUT](context, n, &inputs[n]);
  const Weight *w = &kernel->weight;
  if (!kernel->ready) abort(); /* a weight that is no constant, or no memory for it */
  Product p = {.weight = w, .rows = 1};
  size_t count = read_shape(api, inputs[0], dims);
  for (size_t d = 0; d + 1 < count; d++) p.rows *= dims[d];
  dims[count - 1] = w->columns;
  api[GET_OUTPUT](context, (size_t)0, dims, count, &output);
  api[TENSOR_DATA](output, &data);
  p.output = data;
  if (!p.rows) return;
  api[TENSOR_DATA](inputs[0], &data);
  p.input = data;
  if (inputs[3]) {
    api[TENSOR_DATA](inputs[3], &data);
    p.bias = data;
  }
  size_t bytes = ((size_t)(p.rows * w->depth) + 63) & ~(size_t)63;
  p.quantized = scratch(ACTIVATIONS, bytes + 4 * (size_t)(p.rows * (w->groups + w->blocks)));
  if (!p.quantized) abort();
  p.row_scales = (float *)(p.quantized + bytes);
  p.offsets = (int32_t *)(p.row_scales + p.rows * w->groups);
  if (p.rows == 1) {
    quantize_row(&p, 0);
    p.tasks = least(w->units, 8);
    api[PARALLEL_FOR](context, multiply_row, (size_t)p.tasks, (size_t)0, &p);
    return;
  }
  /* Pieces of the rows, so that totals stay in cache, and few units divide among threads. */
  p.pieces = (p.rows + TASK_ROWS - 1) / TASK_ROWS;
  p.piece = ((p.rows + p.pieces - 1) / p.pieces + ROWS - 1) / ROWS * ROWS;
  api[PARALLEL_FOR](context, quantize_rows, (size_t)p.rows, (size_t)0, &p);
  api[PARALLEL_FOR](context, multiply_unit, (size_t)(w->units * p.pieces), (size_t)0, &p);
}

CustomOp matmul_int4 = {OP_VERSION, create, name, provider, input_type, input_count, output_type, output_count, compute, destroy,
                        input_kind, output_kind, 4, {0}};
CustomOp matmul_int8 = {OP_VERSION, create, name, provider, input_type, input_count, output_type, output_count, compute, destroy,
                        input_kind, output_kind, 8, {0}};
#endif
