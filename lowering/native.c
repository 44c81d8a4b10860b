/* Launches straight runs of kernels: one call from Python, one cuLaunchKernel a kernel, one
   cublasLtMatmul a matrix product (see cublas.h).

   A Run holds for each kernel its function, block, shared memory and arguments, packed as the driver
   reads them. A call brings the stream and the values that change from call to call; they are read
   and checked first, then written over their places among the arguments, then all is launched. From
   the last write to the last launch no Python code runs and the GIL is held, so that threads may
   share a Run. It is not released either: a launch takes 2 us, about what releasing it may cost.

   Every place has 64 bits; a parameter of 32 reads the low half (both ends of what CUDA runs on are
   little-endian). Nothing of CUDA is needed to compile this. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>

#include "cublas.h"
#include "describe.h"
#include "driver.h"
#include "philox.h"

#define MOST_VALUES 4096 /* of a call; they lie on the stack */

/* What a value is: see runs.py. */
enum { TENSOR = 'T', ADDRESS = 'P', INT64 = 'q', INT32 = 'i', GRID = 'g' };

typedef struct {
    uint64_t *to; /* a kernel's grid or argument */
    Py_ssize_t from;
    uint64_t plus;
} Patch;

typedef struct {
    Product *product; /* NULL: a kernel */
    void *function;
    uint64_t *grid;
    void **params;
    unsigned block, shared;
    int early; /* it may be set up before the kernel ahead of it has ended, and waits itself */
} Launch;

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Driver driver;
    int device;
    PyObject *launches_given; /* holds the kernels' names */
    PyObject *kept;           /* what must live as long: the owners of the functions */
    PyObject *address_of;     /* torch.Tensor.data_ptr as the class has it */
    PyCFunction address;      /* the C function behind it */
    PyObject *empty;          /* makes a tensor of so many bytes */
    Py_ssize_t n_values, n_launches, n_patches;
    char *kinds;
    Py_ssize_t n_products;
    Launch *launches;
    Product *products;
    Patch *patches;
    uint64_t *places;
    void **params;
} Run;

/* the driver -------------------------------------------------------------------------------- */

/* A thread that made no call of CUDA's runtime has no context yet; it gets the device's. */
static int give_context(Run *run)
{
    Driver *driver = &run->driver;
    void *context = NULL;
    if (driver->current_context(&context) || context)
        return 0;
    return !driver->primary_context(&context, run->device) && !driver->set_context(context);
}

static Result launch_one(Run *run, Launch *it, void *stream)
{
    if (it->early && run->driver.launch_with) {
        Attribute early = {.id = PROGRAMMATIC_STREAM_SERIALIZATION, .value.allowed = 1};
        Config config = {{(unsigned)*it->grid, 1, 1}, {it->block, 1, 1}, it->shared, stream, &early, 1};
        return run->driver.launch_with(&config, it->function, it->params, NULL);
    }
    return run->driver.launch(it->function, (unsigned)*it->grid, 1, 1, it->block, 1, 1, it->shared,
                              stream, it->params, NULL);
}

static PyObject *failed(Run *run, Py_ssize_t place, Result result)
{
    Launch *it = &run->launches[place];
    const char *name = NULL;
    PyObject *kernel = PyTuple_GET_ITEM(PyTuple_GET_ITEM(run->launches_given, place), 0);
    if (it->product)
        return PyErr_Format(PyExc_RuntimeError, "%S failed: cublasLtMatmul returned %d, device %d",
                            kernel, result, run->device);
    if (run->driver.error_name(result, &name) || !name)
        name = "an unknown error";
    PyErr_Format(PyExc_RuntimeError,
                 "launching %S failed: %s (%d); grid (%u, 1, 1), block (%u, 1, 1), "
                 "%u bytes of shared memory, device %d",
                 kernel, name, result, (unsigned)*it->grid, it->block, it->shared, run->device);
    return NULL;
}

/* ``workspace``: for the products' algorithms, which come one after the other. */
static PyObject *launch_all(Run *run, void *stream, uint64_t workspace)
{
    for (Py_ssize_t k = 0; k < run->n_launches; k++) {
        Launch *it = &run->launches[k];
        if (!*it->grid)
            continue;
        Result result;
        if (it->product) {
            result = multiply(it->product, it->params, (void *)(uintptr_t)workspace, stream);
        } else {
            result = launch_one(run, it, stream);
            if (result && give_context(run))
                result = launch_one(run, it, stream);
        }
        if (result)
            return failed(run, k, result);
    }
    Py_RETURN_NONE;
}

/* How much workspace the products want, by the addresses they have now; -1: cuBLAS has none. */
static Py_ssize_t choose_all(Run *run)
{
    size_t most = 0;
    for (Py_ssize_t k = 0; run->n_products && k < run->n_launches; k++) {
        Launch *it = &run->launches[k];
        if (!it->product)
            continue;
        Status status = choose_for(it->product, it->params);
        if (status) {
            failed(run, k, status);
            return -1;
        }
        if (it->product->chosen->workspace > most)
            most = it->product->chosen->workspace;
    }
    return (Py_ssize_t)most;
}

/* a call -------------------------------------------------------------------------------------- */

static int as_address(PyObject *given, uint64_t *value)
{
    *value = PyLong_AsUnsignedLongLong(given);
    return *value == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static int read_tensor(Run *run, PyObject *given, uint64_t *value)
{
    if (!PyObject_TypeCheck(given, PyDescr_TYPE(run->address_of))) {
        PyErr_Format(PyExc_TypeError, "a tensor is wanted, not %R", (PyObject *)Py_TYPE(given));
        return -1;
    }
    PyObject *found = run->address(given, NULL);
    if (!found)
        return -1;
    int bad = as_address(found, value);
    Py_DECREF(found);
    return bad;
}

static int read_value(Run *run, char kind, PyObject *given, uint64_t *value)
{
    if (kind == TENSOR)
        return read_tensor(run, given, value);
    if (!PyLong_Check(given)) {
        PyErr_Format(PyExc_TypeError, "an int is wanted, not %R", (PyObject *)Py_TYPE(given));
        return -1;
    }
    if (kind == ADDRESS)
        return as_address(given, value);
    int64_t number = PyLong_AsLongLong(given);
    if (number == -1 && PyErr_Occurred())
        return -1;
    if ((kind == INT32 && number != (int32_t)number) ||
        (kind == GRID && (number < 0 || number > INT32_MAX))) {
        PyErr_Format(PyExc_OverflowError, "%S is out of range for %s", given,
                     kind == GRID ? "a grid" : "32 bits");
        return -1;
    }
    *value = (uint64_t)number;
    return 0;
}

/* Write a call's values to their places; how much workspace is wanted then, or -1. */
static Py_ssize_t write_all(Run *run, const uint64_t *values)
{
    for (Py_ssize_t k = 0; k < run->n_patches; k++)
        *run->patches[k].to = values[run->patches[k].from] + run->patches[k].plus;
    return choose_all(run);
}

/* A tensor of so many bytes, in place of a smaller one. */
static int make_room(Run *run, Py_ssize_t bytes, PyObject **room, uint64_t *at)
{
    Py_XDECREF(*room);
    *room = PyObject_CallFunction(run->empty, "n", bytes);
    return *room ? read_tensor(run, *room, at) : -1;
}

static PyObject *call(PyObject *self, PyObject *const *args, size_t flagged, PyObject *names)
{
    Run *run = (Run *)self;
    Py_ssize_t given = PyVectorcall_NARGS(flagged);
    if (given != run->n_values + 1 || (names && PyTuple_GET_SIZE(names))) {
        PyErr_Format(PyExc_TypeError, "a stream and %zd values are wanted, not %zd arguments%s",
                     run->n_values, given, names ? ", and none by name" : "");
        return NULL;
    }
    void *stream = PyLong_AsVoidPtr(args[0]);
    if (!stream && PyErr_Occurred())
        return NULL;
    uint64_t values[run->n_values + 1];
    for (Py_ssize_t k = 0; k < run->n_values; k++)
        if (read_value(run, run->kinds[k], args[k + 1], &values[k]))
            return NULL;
    PyObject *room = NULL;
    uint64_t workspace = 0;
    Py_ssize_t has = 0, wants;
    while ((wants = write_all(run, values)) > has) { /* again: to allocate may run Python code */
        has = wants;
        if (make_room(run, has, &room, &workspace)) {
            wants = -1;
            break;
        }
    }
    PyObject *done = wants < 0 ? NULL : launch_all(run, stream, workspace);
    Py_XDECREF(room); /* its memory serves what comes later in the stream */
    return done;
}

/* repeat(stream, times): what the last call launched, again and again, with nothing read from
   Python in between. What a launch costs at least, for benchmarks. */
static PyObject *repeat(Run *run, PyObject *args)
{
    unsigned long long stream;
    Py_ssize_t times;
    if (!PyArg_ParseTuple(args, "Kn", &stream, &times))
        return NULL;
    PyObject *room = NULL, *done = Py_NewRef(Py_None);
    uint64_t workspace = 0;
    Py_ssize_t wants = choose_all(run);
    if (wants < 0 || (wants && make_room(run, wants, &room, &workspace)))
        Py_CLEAR(done);
    for (Py_ssize_t k = 0; done && k < times; k++) {
        Py_DECREF(done);
        done = launch_all(run, (void *)(uintptr_t)stream, workspace);
    }
    Py_XDECREF(room);
    return done;
}

/* making one -------------------------------------------------------------------------------- */

/* ``given`` is a number, or (which value of the call, what is added to it). */
static int place(Run *run, PyObject *given, uint64_t *to)
{
    Py_ssize_t from;
    PyObject *plus;
    if (PyLong_Check(given)) {
        *to = PyLong_AsUnsignedLongLongMask(given);
        return PyErr_Occurred() ? -1 : 0;
    }
    if (!PyTuple_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "an argument is an int or a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(given, "nO!", &from, &PyLong_Type, &plus))
        return -1;
    if (from < 0 || from >= run->n_values) {
        PyErr_Format(PyExc_ValueError, "there is no value %zd", from);
        return -1;
    }
    Patch *patch = &run->patches[run->n_patches++];
    patch->to = to;
    patch->from = from;
    patch->plus = PyLong_AsUnsignedLongLongMask(plus);
    return PyErr_Occurred() ? -1 : 0;
}

/* (name, function, grid, threads, shared bytes, early, arguments) of a kernel, or of a product
   (name, library, problem, arguments); how many arguments, or -1 */
static Py_ssize_t arguments_of(PyObject *given)
{
    Py_ssize_t many = PyTuple_Check(given) ? PyTuple_GET_SIZE(given) : 0;
    if ((many != 7 && many != 4) || !PyTuple_Check(PyTuple_GET_ITEM(given, many - 1))) {
        PyErr_SetString(PyExc_TypeError,
                        "a launch is (name, function, grid, threads, shared, early, arguments) "
                        "or (name, library, problem, arguments)");
        return -1;
    }
    return PyTuple_GET_SIZE(PyTuple_GET_ITEM(given, many - 1));
}

static int fill_product(Run *run, Launch *it, PyObject *given)
{
    uint64_t sizes[3];
    int64_t ld[2];
    int type, turned[2];
    PyObject *name, *library, *args;
    if (!PyArg_ParseTuple(given, "UO(iKKKppLL)O", &name, &library, &type, &sizes[0], &sizes[1],
                          &sizes[2], &turned[0], &turned[1], &ld[0], &ld[1], &args))
        return -1;
    if (PyTuple_GET_SIZE(args) != 3) {
        PyErr_SetString(PyExc_TypeError, "a product takes two factors and a result");
        return -1;
    }
    const Blas *blas = PyCapsule_GetPointer(library, BLAS);
    if (!blas)
        return -1;
    it->product = &run->products[run->n_products++];
    Status status = make_product(it->product, blas, type, sizes, turned, ld);
    if (status) {
        PyErr_Format(PyExc_OSError, "cuBLAS has no algorithm for it (status %d)", status);
        return -1;
    }
    return 0;
}

static int fill_kernel(Run *run, Launch *it, PyObject *given)
{
    PyObject *name, *function, *grid, *args;
    if (!PyArg_ParseTuple(given, "UOOIIpO", &name, &function, &grid, &it->block, &it->shared,
                          &it->early, &args))
        return -1;
    it->function = PyLong_AsVoidPtr(function);
    return PyErr_Occurred() ? -1 : place(run, grid, it->grid);
}

static int fill(Run *run, PyObject *launches)
{
    Py_ssize_t total = 0;
    for (Py_ssize_t k = 0; k < run->n_launches; k++) {
        Py_ssize_t many = arguments_of(PyTuple_GET_ITEM(launches, k));
        if (many < 0)
            return -1;
        total += many + 1; /* and the grid */
    }
    run->launches = PyMem_Calloc(run->n_launches + 1, sizeof(Launch));
    run->products = PyMem_Calloc(run->n_launches + 1, sizeof(Product));
    run->patches = PyMem_Calloc(total + 1, sizeof(Patch));
    run->places = PyMem_Calloc(total + 1, sizeof(uint64_t));
    run->params = PyMem_Calloc(total + 1, sizeof(void *));
    if (!run->launches || !run->products || !run->patches || !run->places || !run->params) {
        PyErr_NoMemory();
        return -1;
    }
    uint64_t *next = run->places;
    void **param = run->params;
    for (Py_ssize_t k = 0; k < run->n_launches; k++) {
        Launch *it = &run->launches[k];
        PyObject *given = PyTuple_GET_ITEM(launches, k);
        PyObject *args = PyTuple_GET_ITEM(given, PyTuple_GET_SIZE(given) - 1);
        it->grid = next++;
        *it->grid = 1;
        it->params = param;
        if (PyTuple_GET_SIZE(given) == 7 ? fill_kernel(run, it, given)
                                         : fill_product(run, it, given))
            return -1;
        for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(args); n++, next++) {
            *param++ = next;
            if (place(run, PyTuple_GET_ITEM(args, n), next))
                return -1;
        }
    }
    return 0;
}

static int learn_address(Run *run, PyObject *method)
{
    if (!Py_IS_TYPE(method, &PyMethodDescr_Type) ||
        ((PyMethodDescrObject *)method)->d_method->ml_flags != METH_NOARGS) {
        PyErr_SetString(PyExc_TypeError, "data_ptr is not a method without arguments");
        return -1;
    }
    run->address_of = Py_NewRef(method);
    run->address = ((PyMethodDescrObject *)method)->d_method->ml_meth;
    return 0;
}

static PyObject *make(PyTypeObject *type, PyObject *args, PyObject *names)
{
    const char *library, *kinds;
    Py_ssize_t n_values;
    int device;
    PyObject *launches, *kept, *method, *empty;
    if ((names && PyDict_GET_SIZE(names)) ||
        !PyArg_ParseTuple(args, "sis#O!OOO", &library, &device, &kinds, &n_values, &PyTuple_Type,
                          &launches, &kept, &method, &empty)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "Run takes no arguments by name");
        return NULL;
    }
    if (n_values > MOST_VALUES)
        return PyErr_Format(PyExc_ValueError, "%zd values; a call takes %d", n_values, MOST_VALUES);
    for (Py_ssize_t k = 0; k < n_values; k++)
        if (!strchr("TPqig", kinds[k]) || !kinds[k])
            return PyErr_Format(PyExc_ValueError, "there is no kind of value %c", kinds[k]);
    Run *run = (Run *)type->tp_alloc(type, 0);
    if (!run)
        return NULL;
    run->call = call;
    run->device = device;
    run->n_values = n_values;
    run->n_launches = PyTuple_GET_SIZE(launches);
    run->launches_given = Py_NewRef(launches);
    run->kept = Py_NewRef(kept);
    run->empty = Py_NewRef(empty);
    run->kinds = PyMem_Malloc(n_values + 1);
    if (!run->kinds) {
        Py_DECREF(run);
        return PyErr_NoMemory();
    }
    memcpy(run->kinds, kinds, n_values + 1);
    const char *missing = open_driver(&run->driver, library);
    if (missing)
        PyErr_Format(PyExc_OSError, "%s is no CUDA driver: there is no %s", library, missing);
    if (missing || learn_address(run, method) || fill(run, launches)) {
        Py_DECREF(run);
        return NULL;
    }
    return (PyObject *)run;
}

static void unmake(Run *run)
{
    Py_XDECREF(run->launches_given);
    Py_XDECREF(run->kept);
    Py_XDECREF(run->empty);
    Py_XDECREF(run->address_of);
    PyMem_Free(run->kinds);
    for (Py_ssize_t k = 0; k < run->n_products; k++)
        unmake_product(&run->products[k]);
    PyMem_Free(run->products);
    PyMem_Free(run->launches);
    PyMem_Free(run->patches);
    PyMem_Free(run->places);
    PyMem_Free(run->params);
    if (run->driver.library)
        dlclose(run->driver.library);
    Py_TYPE(run)->tp_free((PyObject *)run);
}

static PyMethodDef methods[] = {
    {"repeat", (PyCFunction)repeat, METH_VARARGS,
     "repeat(stream, times): what the last call launched, again."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject RunType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "gems_native.Run",
    .tp_doc = "Run(driver, device, kinds, launches, kept, data_ptr, empty): see native.py: made.",
    .tp_basicsize = sizeof(Run),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Run, call),
    .tp_call = PyVectorcall_Call,
    .tp_new = make,
    .tp_dealloc = (destructor)unmake,
    .tp_methods = methods,
};

/* number_drawn(seed, offset): see philox.h. */
static PyObject *number_drawn(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    if (given != 2 || !PyLong_Check(args[0]) || !PyLong_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "two ints are wanted");
        return NULL;
    }
    uint64_t seed = PyLong_AsUnsignedLongLongMask(args[0]);
    return PyLong_FromLongLong(drawn(seed, PyLong_AsUnsignedLongLongMask(args[1])));
}

/* open_blas(path, most): cuBLAS with a handle for the current device, which may use ``most`` bytes to
   work in. They are never given back: at the process's end CUDA may be gone before. */
static PyObject *blas_opened(PyObject *self, PyObject *args)
{
    const char *name;
    Py_ssize_t most;
    if (!PyArg_ParseTuple(args, "sn", &name, &most))
        return NULL;
    Blas *blas = PyMem_Calloc(1, sizeof(Blas));
    if (!blas)
        return PyErr_NoMemory();
    blas->most = (size_t)most;
    const char *missing = open_blas(blas, name);
    if (missing) {
        PyMem_Free(blas);
        return PyErr_Format(PyExc_OSError, "%s has no %s", name, missing);
    }
    return PyCapsule_New(blas, BLAS, NULL);
}

static PyMethodDef functions[] = {
    {"describer", describer, METH_VARARGS, "describer(TensorBase, Tensor, Parameter): see describe.h."},
    {"open_blas", blas_opened, METH_VARARGS, "open_blas(path, most): cuBLAS, on this device."},
    {"number_drawn", (PyCFunction)(void (*)(void))number_drawn, METH_FASTCALL,
     "number_drawn(seed, offset): what a GPU's generator draws."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "gems_native", .m_size = -1, .m_methods = functions};

PyMODINIT_FUNC PyInit_gems_native(void)
{
    PyObject *made = PyType_Ready(&RunType) ? NULL : PyModule_Create(&module);
    if (made && PyModule_AddObjectRef(made, "Run", (PyObject *)&RunType)) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
