/* The CUDA driver, opened by name. */

#include <dlfcn.h>
#include <stdint.h>

typedef int Result; /* CUresult; 0 is success */

/* CUlaunchAttribute and CUlaunchConfig */
typedef struct {
    unsigned id;
    char pad[4];
    union {
        char pad[64];
        int allowed;
    } value;
} Attribute;

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    Attribute *attributes;
    unsigned many;
} Config;

/* The kernel may be set up before the one ahead of it in the stream has ended. */
#define PROGRAMMATIC_STREAM_SERIALIZATION 6

typedef struct {
    void *library;
    Result (*launch)(void *function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                     unsigned block_y, unsigned block_z, unsigned shared, void *stream,
                     void **params, void **extra);
    Result (*error_name)(Result, const char **);
    Result (*current_context)(void **);
    Result (*set_context)(void *);
    Result (*primary_context)(void **, int device);
    Result (*launch_with)(const Config *, void *function, void **params, void **extra); /* or NULL */
} Driver;

/* 0, or what is missing of the library */
static const char *open_driver(Driver *driver, const char *path)
{
    static const char *names[] = {"cuLaunchKernel", "cuGetErrorName", "cuCtxGetCurrent",
                                  "cuCtxSetCurrent", "cuDevicePrimaryCtxRetain"};
    void **to = (void **)&driver->launch;
    driver->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!driver->library)
        return path;
    for (size_t k = 0; k < sizeof names / sizeof *names; k++)
        if (!(to[k] = dlsym(driver->library, names[k])))
            return names[k];
    *(void **)&driver->launch_with = dlsym(driver->library, "cuLaunchKernelEx"); /* CUDA 11.8 */
    return NULL;
}
