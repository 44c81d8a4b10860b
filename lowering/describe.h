/* What a kernel of one eager call is compiled for: as describe() in gems_compile/calls/operands.py,
   which takes a microsecond a tensor for it. Getters and methods of tensors are called as the C functions
   that they are, as nothing is looked up then. */

#define DESCRIBER "gems_native.describer"

typedef struct {
    PyTypeObject *base, *plain[2]; /* that of all tensors; those whose calls are ours */
    PyGetSetDef *dtype, *shape;
    PyCFunction stride, device, address; /* the first of arguments, of which it is given none */
    PyObject *none, *hex;
} Describer;

static PyGetSetDef *getter_of(PyTypeObject *type, const char *name)
{
    PyObject *found = PyObject_GetAttrString((PyObject *)type, name);
    PyGetSetDef *known = NULL;
    if (found && Py_IS_TYPE(found, &PyGetSetDescr_Type))
        known = ((PyGetSetDescrObject *)found)->d_getset;
    else if (found)
        PyErr_Format(PyExc_TypeError, "%s is no getter in C", name);
    Py_XDECREF(found); /* the type holds it */
    return known;
}

static PyCFunction method_of(PyTypeObject *type, const char *name, int flags)
{
    PyObject *found = PyObject_GetAttrString((PyObject *)type, name);
    PyCFunction known = NULL;
    if (found && Py_IS_TYPE(found, &PyMethodDescr_Type) &&
        ((PyMethodDescrObject *)found)->d_method->ml_flags == flags)
        known = ((PyMethodDescrObject *)found)->d_method->ml_meth;
    else if (found)
        PyErr_Format(PyExc_TypeError, "%s is no method in C of the expected kind", name);
    Py_XDECREF(found);
    return known;
}

/* Append what it takes over. */
static int append(PyObject *list, PyObject *given)
{
    int bad = given ? PyList_Append(list, given) : -1;
    Py_XDECREF(given);
    return bad;
}

static int describe_tensor(const Describer *it, PyObject *tensor, PyObject *parts)
{
    PyObject *at = NULL;
    if (append(parts, it->dtype->get(tensor, it->dtype->closure)) ||
        append(parts, it->shape->get(tensor, it->shape->closure)) ||
        append(parts, ((PyCFunctionWithKeywords)(void (*)(void))it->stride)(tensor, it->none, NULL)) ||
        append(parts, it->device(tensor, NULL)) || !(at = it->address(tensor, NULL)))
        return -1;
    unsigned long low = PyLong_AsUnsignedLongMask(at) & 15;
    Py_DECREF(at);
    return append(parts, PyLong_FromUnsignedLong(low));
}

/* 1: described; 0: a value is no plain tensor; -1: an error */
static int describe_all(const Describer *it, PyObject *values, PyObject *parts, PyObject *tensors)
{
    PyObject *items = PySequence_Fast(values, "values are wanted");
    int good = items ? 1 : -1;
    for (Py_ssize_t k = 0; good > 0 && k < PySequence_Fast_GET_SIZE(items); k++) {
        PyObject *value = PySequence_Fast_GET_ITEM(items, k);
        PyTypeObject *kind = Py_TYPE(value);
        if (kind == it->plain[0] || kind == it->plain[1]) {
            if (describe_tensor(it, value, parts) || PyList_Append(tensors, value))
                good = -1;
        } else if (kind == &PyFloat_Type) {
            if (append(parts, PyObject_CallMethodNoArgs(value, it->hex)))
                good = -1;
        } else if (kind == &PyList_Type || kind == &PyTuple_Type) {
            if (append(parts, PyLong_FromSsize_t(PySequence_Fast_GET_SIZE(value))))
                good = -1;
            else
                good = describe_all(it, value, parts, tensors);
        } else if (PyType_IsSubtype(kind, it->base)) {
            good = 0;
        } else if (PyList_Append(parts, (PyObject *)kind) || PyList_Append(parts, value)) {
            good = -1;
        }
    }
    Py_XDECREF(items);
    return good;
}

/* describe(values, parts, tensors) of a describer */
static PyObject *describe(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    const Describer *it = PyCapsule_GetPointer(self, DESCRIBER);
    if (!it)
        return NULL;
    if (given != 3 || !PyList_CheckExact(args[1]) || !PyList_CheckExact(args[2])) {
        PyErr_SetString(PyExc_TypeError, "values and two lists are wanted");
        return NULL;
    }
    int good = describe_all(it, args[0], args[1], args[2]);
    return good < 0 ? NULL : PyBool_FromLong(good);
}

static PyMethodDef describe_method = {
    "describe", (PyCFunction)(void (*)(void))describe, METH_FASTCALL, "See operands.describe."};

/* describer(TensorBase, Tensor, Parameter): the function; it lives as long as the process. */
static PyObject *describer(PyObject *self, PyObject *args)
{
    Describer *it = PyMem_Calloc(1, sizeof(Describer));
    if (!it)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "O!O!O!", &PyType_Type, &it->base, &PyType_Type, &it->plain[0],
                          &PyType_Type, &it->plain[1]) ||
        !(it->dtype = getter_of(it->base, "dtype")) || !(it->shape = getter_of(it->base, "shape")) ||
        !(it->stride = method_of(it->base, "stride", METH_VARARGS | METH_KEYWORDS)) ||
        !(it->device = method_of(it->base, "get_device", METH_NOARGS)) ||
        !(it->address = method_of(it->base, "data_ptr", METH_NOARGS)) ||
        !(it->none = PyTuple_New(0)) || !(it->hex = PyUnicode_InternFromString("hex"))) {
        PyMem_Free(it);
        return NULL;
    }
    Py_INCREF(it->base), Py_INCREF(it->plain[0]), Py_INCREF(it->plain[1]);
    PyObject *held = PyCapsule_New(it, DESCRIBER, NULL);
    PyObject *made = held ? PyCFunction_New(&describe_method, held) : NULL;
    Py_XDECREF(held);
    return made;
}
