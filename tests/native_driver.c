/* A driver for tests: it notes what it is asked to launch. */
#include <stdint.h>
#include <string.h>

typedef struct {
    uint64_t function, stream, n_args, args[64];
    uint32_t grid[3], block[3], shared, early;
} Noted;

static char types[8][65]; /* by function: what the kernel's parameters are, 'q' or 'i' */
static Noted notes[4096];
static int many, failing, left, wants_context;
static __thread void *context;

int launches(void) { return many; }
const Noted *launched(int k) { return &notes[k]; }
void takes(int function, const char *given) { strcpy(types[function], given); }
void fail(int result, int after) { failing = result, left = after; }
void want_context(int wanted) { wants_context = wanted; }
void forget(void) { many = 0, failing = 0, wants_context = 0; }

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **params, void **extra)
{
    if (wants_context && !context)
        return 201;
    if (failing && left-- <= 0)
        return failing;
    Noted *it = &notes[many++ % 4096];
    const char *kinds = types[(uintptr_t)function];
    *it = (Noted){(uintptr_t)function, (uintptr_t)stream, strlen(kinds)};
    memcpy(it->grid, (uint32_t[]){x, y, z}, 12);
    memcpy(it->block, (uint32_t[]){bx, by, bz}, 12);
    it->shared = shared;
    for (uint64_t k = 0; k < it->n_args; k++)
        it->args[k] = kinds[k] == 'i' ? (uint64_t)(int64_t)*(int32_t *)params[k] : *(uint64_t *)params[k];
    return extra != 0;
}

typedef struct {
    uint32_t id, pad, allowed;
} Attribute;

typedef struct {
    uint32_t grid[3], block[3], shared;
    void *stream;
    const Attribute *attributes;
    uint32_t many;
} Config;

int cuLaunchKernelEx(const Config *c, void *function, void **params, void **extra)
{
    int result = cuLaunchKernel(function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1],
                                c->block[2], c->shared, c->stream, params, extra);
    if (!result)
        notes[(many - 1) % 4096].early = c->many == 1 && c->attributes->id == 6 && c->attributes->allowed;
    return result;
}

int cuGetErrorName(int result, const char **name)
{
    *name = result == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : 0;
    return !*name;
}

int cuCtxGetCurrent(void **found) { *found = context; return 0; }
int cuCtxSetCurrent(void *given) { context = given; return 0; }
int cuDevicePrimaryCtxRetain(void **found, int device) { *found = (void *)(uintptr_t)(device + 1); return 0; }
