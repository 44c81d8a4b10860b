/* cuBLAS for tests: it notes what it is asked to multiply, among what native_driver.c notes. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t type, rows, columns, ld;
} Layout;
typedef struct {
    int64_t turned[2]; /* A, B */
} Desc;
typedef struct {
    uint64_t most;
    uint32_t alignments[4]; /* A, B, C, D */
} Preference;
typedef struct {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} Choice;
typedef struct {
    int64_t launched_before; /* kernels */
    Desc desc;
    Layout a, b, d;
    uint64_t to_a, to_b, to_d, algorithm, workspace, bytes, stream;
} Multiplied;

extern int launches(void);
static Multiplied multiplied[256];
static int many, alive, choices, failing;

int products(void) { return many; }
const Multiplied *product(int k) { return &multiplied[k]; }
int living(void) { return alive; }
int asked(void) { return choices; }
void fail_blas(int status) { failing = status; }
void forget_blas(void) { many = choices = failing = 0; }

static int made(void **to, size_t size)
{
    alive++;
    *to = calloc(1, size);
    return 0;
}
static int dropped(void *it)
{
    alive--;
    free(it);
    return 0;
}

int cublasLtCreate(void **handle) { *handle = &many; return 0; }
int cublasLtMatmulDescCreate(void **desc, int compute, int scale)
{
    return compute != 68 || scale != 0 ? 7 : made(desc, sizeof(Desc));
}
int cublasLtMatmulDescSetAttribute(Desc *desc, int attribute, const int *value, size_t size)
{
    if (size != 4 || (attribute != 3 && attribute != 4))
        return 7;
    desc->turned[attribute - 3] = *value;
    return 0;
}
int cublasLtMatmulDescDestroy(void *desc) { return dropped(desc); }
int cublasLtMatrixLayoutCreate(void **to, int type, uint64_t rows, uint64_t columns, int64_t ld)
{
    made(to, sizeof(Layout));
    *(Layout *)*to = (Layout){type, (int64_t)rows, (int64_t)columns, ld};
    return 0;
}
int cublasLtMatrixLayoutDestroy(void *layout) { return dropped(layout); }
int cublasLtMatmulPreferenceCreate(void **to) { return made(to, sizeof(Preference)); }
int cublasLtMatmulPreferenceSetAttribute(Preference *it, int attribute, const void *value, size_t size)
{
    if (attribute == 1 && size == 8)
        it->most = *(uint64_t *)value;
    else if (attribute >= 5 && attribute <= 8 && size == 4)
        it->alignments[attribute - 5] = *(uint32_t *)value;
    else
        return 7;
    return 0;
}
int cublasLtMatmulPreferenceDestroy(void *it) { return dropped(it); }

/* An algorithm's number tells what addresses are multiples of; each wants 1000 bytes a column, and
   three times that for an odd A. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, Desc *desc, Layout *a, Layout *b, Layout *c,
                                   Layout *d, Preference *preference, int wanted, Choice *to,
                                   int *found)
{
    choices++;
    const uint32_t *to_be = preference->alignments;
    size_t workspace = (to_be[0] == 2 ? 3000 : 1000) * (size_t)d->columns;
    *found = handle == &many && wanted == 1 && workspace <= preference->most && to_be[2] == to_be[3];
    *to = (Choice){{(uint64_t)to_be[0] << 20 | to_be[1] << 10 | to_be[2]}, workspace};
    return 0;
}
int cublasLtMatmul(void *handle, Desc *desc, const float *alpha, const void *to_a, Layout *a,
                   const void *to_b, Layout *b, const float *beta, const void *to_c, Layout *c,
                   void *to_d, Layout *d, const uint64_t *algorithm, void *workspace, size_t bytes,
                   void *stream)
{
    if (failing || handle != &many || *alpha != 1 || *beta != 0 || to_c != to_d || c != d)
        return failing ? failing : 7;
    multiplied[many++ % 256] = (Multiplied){
        launches(), *desc, *a, *b, *d, (uint64_t)to_a, (uint64_t)to_b, (uint64_t)to_d,
        *algorithm, (uint64_t)workspace, bytes, (uint64_t)stream};
    return 0;
}
