/* What the operators share: the C interface of ONNX Runtime as far as it is used, and memory.
 *
 * The interface is a table of functions whose order never changes (include/onnxruntime/core/session/onnxruntime_c_api.h, and
 * NativeMethods.shared.cs beside it in C#, of https://github.com/microsoft/onnxruntime); so no header of ONNX Runtime is needed.
 */
#ifndef EDGEVLM_INTERFACE_H
#define EDGEVLM_INTERFACE_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INLINE __attribute__((always_inline)) static inline
#define UNROLL _Pragma("GCC unroll 8")

typedef struct OrtApi OrtApi;
typedef void *Handle;
typedef Handle (*Function)();
struct OrtApi { Function at[400]; };
/* Places in the table. */
enum {
  CREATE_DOMAIN = 26, DOMAIN_ADD = 27, ADD_DOMAIN = 28, TENSOR_DATA = 51, DIMENSION_COUNT = 61, DIMENSIONS = 62,
  TENSOR_SHAPE = 65, ATTRIBUTE_FLOAT = 85, ATTRIBUTE_INT = 86, INPUT_COUNT = 88, GET_INPUT = 90, GET_OUTPUT = 91,
  RELEASE_SHAPE = 99, CONSTANT_INPUT = 249, PARALLEL_FOR = 274, API_VERSION = 17
};
typedef struct { const OrtApi *(*get)(uint32_t); const char *(*version)(void); } OrtApiBase;

typedef struct CustomOp CustomOp;
struct CustomOp {
  uint32_t version;
  void *(*create)(const CustomOp *, const OrtApi *, Handle);
  const char *(*name)(const CustomOp *);
  const char *(*provider)(const CustomOp *);
  int (*input_type)(const CustomOp *, size_t);
  size_t (*input_count)(const CustomOp *);
  int (*output_type)(const CustomOp *, size_t);
  size_t (*output_count)(const CustomOp *);
  void (*compute)(void *, Handle);
  void (*destroy)(void *);
  int (*input_kind)(const CustomOp *, size_t);
  int (*output_kind)(const CustomOp *, size_t);
  int bits; /* behind what ONNX Runtime reads at this version */
  void *room[32];
};
enum { OP_VERSION = 12, FLOAT = 1, UINT8 = 2, INT8 = 3, BOOL = 9, REQUIRED = 0, OPTIONAL = 1 };

/* The operators: MatMulInt4, MatMulInt8, Attention. */
extern CustomOp matmul_int4, matmul_int8, attention;

/* The shape of a tensor, into at most 16 dims; returns how many there are. */
size_t read_shape(const Function *api, Handle value, int64_t *dims);

/* Memory of this thread, kept from call to call and freed with the thread. */
enum { PANEL, TOTALS, ACTIVATIONS, SCORES, QUERIES, KEYS, VALUES, SCRATCHES };
void *scratch(int which, size_t bytes);

/* Whether the processor multiplies bfloat16. */
int has_bfloat16(void);

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE __mmask16 first_of(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

#endif
