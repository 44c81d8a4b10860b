/* Matrix products among the launches of a Run: cublasLtMatmul with the algorithm that cuBLAS itself
   would choose, which is looked up once and not in every call.

   Row-major matrices are column-major ones transposed, and cuBLAS knows those alone: it is asked for
   result^T = right^T left^T, so its A is the right factor and its B the left one. */

#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

#define BLAS "gems_native.blas" /* a capsule's name */
#define CHOICES 4   /* of algorithms: one for each set of alignments that addresses come with */
#define ALIGNED 256 /* bytes; more makes no difference */

/* from cublasLt.h and library_types.h, whose numbers do not change */
enum { COMPUTE_32F = 68, R_32F = 0 };
enum { DESC_TRANSA = 3, DESC_TRANSB = 4 };
enum { PREF_MAX_WORKSPACE_BYTES = 1, PREF_MIN_ALIGNMENT_A_BYTES = 5 };

typedef int Status; /* cublasStatus_t; 0 is success */
typedef struct {
    uint64_t algorithm[8];
    size_t workspace;
    Status state;
    float waves;
    int reserved[4];
} Choice; /* cublasLtMatmulHeuristicResult_t */

typedef struct {
    size_t most; /* bytes of workspace */
    void *library, *handle;
    Status (*create)(void **handle);
    Status (*new_desc)(void **, int compute, int scale);
    Status (*set_desc)(void *, int attribute, const void *, size_t);
    Status (*drop_desc)(void *);
    Status (*new_layout)(void **, int type, uint64_t rows, uint64_t columns, int64_t ld);
    Status (*drop_layout)(void *);
    Status (*new_preference)(void **);
    Status (*set_preference)(void *, int attribute, const void *, size_t);
    Status (*drop_preference)(void *);
    Status (*choose)(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference,
                     int wanted, Choice *, int *found);
    Status (*multiply)(void *handle, void *desc, const void *alpha, const void *a, void *layout_a,
                       const void *b, void *layout_b, const void *beta, const void *c,
                       void *layout_c, void *d, void *layout_d, const void *algorithm,
                       void *workspace, size_t bytes, void *stream);
} Blas;

typedef struct {
    const Blas *blas;
    void *desc, *left, *right, *result;
    Choice choices[CHOICES], *chosen; /* ``chosen``: the one for this call's addresses */
    uint32_t alignments[CHOICES][3];  /* of left, right, result; 0: nothing is chosen yet */
    int next;
} Product;

/* 0, or what is missing of the library */
static const char *open_blas(Blas *blas, const char *path)
{
    static const char *names[] = {
        "cublasLtCreate", "cublasLtMatmulDescCreate", "cublasLtMatmulDescSetAttribute",
        "cublasLtMatmulDescDestroy", "cublasLtMatrixLayoutCreate", "cublasLtMatrixLayoutDestroy",
        "cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceSetAttribute",
        "cublasLtMatmulPreferenceDestroy", "cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmul",
    };
    void **to = (void **)&blas->create;
    blas->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!blas->library)
        return path;
    for (size_t k = 0; k < sizeof names / sizeof *names; k++)
        if (!(to[k] = dlsym(blas->library, names[k])))
            return names[k];
    return blas->create(&blas->handle) ? "a handle" : NULL;
}

/* The algorithm for addresses that are multiples of so many bytes. It takes the place of the one
   that was chosen first, if there are many. */
static Status choose(Product *product, const uint32_t alignments[3])
{
    const Blas *blas = product->blas;
    uint32_t left = alignments[0], right = alignments[1], result = alignments[2];
    uint32_t given[] = {right, left, result, result}; /* A, B, C, D */
    int place = product->next;
    void *preference = NULL;
    int found = 0;
    Status status = blas->new_preference(&preference);
    if (status)
        return status;
    status = blas->set_preference(preference, PREF_MAX_WORKSPACE_BYTES, &blas->most,
                                  sizeof blas->most);
    for (int k = 0; k < 4 && !status; k++)
        status = blas->set_preference(preference, PREF_MIN_ALIGNMENT_A_BYTES + k, &given[k],
                                      sizeof given[k]);
    if (!status)
        status = blas->choose(blas->handle, product->desc, product->right, product->left,
                              product->result, product->result, preference, 1,
                              &product->choices[place], &found);
    blas->drop_preference(preference);
    if (!status && !found)
        status = 15; /* CUBLAS_STATUS_NOT_SUPPORTED */
    memset(product->alignments[place], 0, sizeof product->alignments[place]);
    if (status)
        return status;
    memcpy(product->alignments[place], alignments, sizeof product->alignments[place]);
    product->next = (place + 1) % CHOICES;
    product->chosen = &product->choices[place];
    return 0;
}

static void unmake_product(Product *product)
{
    if (product->desc)
        product->blas->drop_desc(product->desc);
    void *layouts[] = {product->left, product->right, product->result};
    for (int k = 0; k < 3; k++)
        if (layouts[k])
            product->blas->drop_layout(layouts[k]);
}

/* (rows, inner) times (inner, columns) of one type. A factor is turned where its columns lie
   together, not its rows; ``ld`` is how far the others are apart. */
static Status make_product(Product *product, const Blas *blas, int type, const uint64_t sizes[3],
                           const int turned[2], const int64_t ld[2])
{
    uint64_t rows = sizes[0], columns = sizes[1], inner = sizes[2];
    product->blas = blas;
    Status status = blas->new_desc(&product->desc, COMPUTE_32F, R_32F);
    if (!status)
        status = blas->set_desc(product->desc, DESC_TRANSA, &turned[1], sizeof(int));
    if (!status)
        status = blas->set_desc(product->desc, DESC_TRANSB, &turned[0], sizeof(int));
    if (!status)
        status = blas->new_layout(&product->left, type, turned[0] ? rows : inner,
                                  turned[0] ? inner : rows, ld[0]);
    if (!status)
        status = blas->new_layout(&product->right, type, turned[1] ? inner : columns,
                                  turned[1] ? columns : inner, ld[1]);
    if (!status)
        status = blas->new_layout(&product->result, type, columns, rows, (int64_t)columns);
    const uint32_t aligned[] = {ALIGNED, ALIGNED, ALIGNED};
    return status ? status : choose(product, aligned);
}

/* Finds the algorithm for what ``params`` point to: the addresses of left, right and result. */
static Status choose_for(Product *product, void **params)
{
    uint32_t alignments[3];
    for (int k = 0; k < 3; k++)
        alignments[k] = 1u << __builtin_ctzll(*(uint64_t *)params[k] | ALIGNED);
    for (int k = 0; k < CHOICES; k++)
        if (!memcmp(product->alignments[k], alignments, sizeof alignments)) {
            product->chosen = &product->choices[k];
            return 0;
        }
    return choose(product, alignments);
}

/* By the algorithm that was found, with as much workspace as that wants. */
static Status multiply(Product *product, void **params, void *workspace, void *stream)
{
    const float one = 1, zero = 0;
    void *left = *(void **)params[0], *right = *(void **)params[1], *result = *(void **)params[2];
    return product->blas->multiply(product->blas->handle, product->desc, &one, right,
                                   product->right, left, product->left, &zero, result,
                                   product->result, result, product->result,
                                   product->chosen->algorithm, workspace,
                                   product->chosen->workspace, stream);
}
