/* x / (1 + e^(-alpha x)), and that times a second input: SiLU and its gate (alpha 1), CLIP's GELU (alpha 1.702).
 *
 * ONNX Runtime fuses the first two of the operators that it is written with and leaves the gate to a pass of its own.
 */
#if defined(__x86_64__) && defined(__linux__)
#include "interface.h"

#include <stdlib.h>

enum { AT_ONCE = 16384 };

typedef struct { const OrtApi *api; float alpha; } Kernel;
typedef struct { const float *x, *gate; float *out; int64_t count; float alpha; } Call;

WIDE static void piece(void *data, size_t number) {
  const Call *c = data;
  int64_t first = (int64_t)number * AT_ONCE, last = least(first + AT_ONCE, c->count);
  __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-c->alpha);
  for (int64_t n = first; n < last; n += 16) {
    __mmask16 mask = first_of(last - n);
    __m512 x = _mm512_maskz_loadu_ps(mask, c->x + n);
    __m512 y = _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_mul_ps(minus, x))));
    if (c->gate) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, c->gate + n));
    _mm512_mask_storeu_ps(c->out + n, mask, y);
  }
}

static void *create(const CustomOp *op, const OrtApi *api, Handle info) {
  (void)op;
  Kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return NULL;
  kernel->api = api;
  api->at[ATTRIBUTE_FLOAT](info, "alpha", &kernel->alpha);
  return kernel;
}

static void compute(void *opaque, Handle context) {
  const Kernel *kernel = opaque;
  const Function *api = kernel->api->at;
  Handle inputs[2] = {0}, output = NULL;
  int64_t dims[16];
  void *data[3] = {0};
  size_t given = 0, rank = 0;
  api[INPUT_COUNT](context, &given);
  for (size_t n = 0; n < given && n < 2; n++) {
    api[GET_INPUT](context, n, &inputs[n]);
    if (inputs[n]) api[TENSOR_DATA](inputs[n], &data[n]);
  }
  rank = read_shape(api, inputs[0], dims);
  api[GET_OUTPUT](context, (size_t)0, dims, rank, &output);
  api[TENSOR_DATA](output, &data[2]);
  Call c = {.x = data[0], .gate = data[1], .out = data[2], .count = 1, .alpha = kernel->alpha};
  for (size_t d = 0; d < rank; d++) c.count *= dims[d];
  if (c.count) api[PARALLEL_FOR](context, piece, (size_t)((c.count + AT_ONCE - 1) / AT_ONCE), (size_t)0, &c);
}

static void destroy(void *kernel) { free(kernel); }
static const char *name(const CustomOp *op) { (void)op; return "Swish"; }
static const char *provider(const CustomOp *op) { (void)op; return "CPUExecutionProvider"; }
static int input_type(const CustomOp *op, size_t index) { (void)op; (void)index; return FLOAT; }
static size_t input_count(const CustomOp *op) { (void)op; return 2; }
static int output_type(const CustomOp *op, size_t index) { (void)op; (void)index; return FLOAT; }
static size_t output_count(const CustomOp *op) { (void)op; return 1; }
static int input_kind(const CustomOp *op, size_t index) { (void)op; return index == 1 ? OPTIONAL : REQUIRED; }
static int output_kind(const CustomOp *op, size_t index) { (void)op; (void)index; return REQUIRED; }

CustomOp swish = {OP_VERSION, create, name, provider, input_type, input_count, output_type, output_count, compute, destroy,
                  input_kind, output_kind, 0, {0}};
#endif
