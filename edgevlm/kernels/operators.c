/* Registers the operators of this folder with ONNX Runtime, and holds what they share. */
#if defined(__x86_64__) && defined(__linux__)
#include "interface.h"

#include <cpuid.h>
#include <pthread.h>
#include <stdlib.h>

typedef struct { void *at; size_t bytes; } Scratch;
static pthread_key_t scratch_key;

static void free_scratch(void *kept) {
  for (int n = 0; n < SCRATCHES; n++) free(((Scratch *)kept)[n].at);
  free(kept);
}

void *scratch(int which, size_t bytes) {
  Scratch *kept = pthread_getspecific(scratch_key);
  if (!kept) {
    kept = calloc(SCRATCHES, sizeof *kept);
    if (!kept || pthread_setspecific(scratch_key, kept)) return NULL;
  }
  if (kept[which].bytes < bytes) {
    free(kept[which].at);
    bytes = (bytes + 4095) & ~(size_t)4095;
    kept[which].at = aligned_alloc(64, bytes);
    kept[which].bytes = kept[which].at ? bytes : 0;
  }
  return kept[which].at;
}

size_t read_shape(const Function *api, Handle value, int64_t *dims) {
  Handle shape = NULL;
  size_t count = 0;
  api[TENSOR_SHAPE](value, &shape);
  api[DIMENSION_COUNT](shape, &count);
  api[DIMENSIONS](shape, dims, count);
  api[RELEASE_SHAPE](shape);
  return count;
}

/* Whether this processor has the instructions. */
int edgevlm_usable(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

int has_bfloat16(void) {
  static int known = -1; /* threads that find out together find the same */
  if (known < 0) {
    unsigned a = 0, b, c, d;
    known = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  }
  return known;
}

Handle RegisterCustomOps(Handle options, const OrtApiBase *base) {
  static Handle domain;
  CustomOp *operators[] = {&matmul_int4, &matmul_int8, &attention};
  const OrtApi *api = base->get(API_VERSION);
  if (!domain) {
    pthread_key_create(&scratch_key, free_scratch);
    api->at[CREATE_DOMAIN]("edgevlm", &domain);
    for (size_t n = 0; n < sizeof operators / sizeof *operators; n++) {
      Handle status = api->at[DOMAIN_ADD](domain, operators[n]);
      if (status) return status;
    }
  }
  return api->at[ADD_DOMAIN](options, domain);
}
#else
int edgevlm_usable(void) { return 0; }
#endif
