/* Python module: kernels as functions of a Pool and arrays, numbers or None, parsed by the
   kernel's signature (kernel.h). */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "blas.h"
#include "tables.h"

BlasSgemm *minillm_sgemm = NULL;

enum { MOST_ARGUMENTS = 64, MOST_ARRAYS = 16 };

/* ---- Pool(num_threads) */

typedef struct {
    PyObject_HEAD
    Pool *pool;
} PoolObject;

static PyObject *pool_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    int num_threads;
    if (!PyArg_ParseTuple(args, "i:Pool", &num_threads)) return NULL;
    if (num_threads < 1)
        return PyErr_Format(
            PyExc_ValueError, "the number of threads is %d; it must be at least 1", num_threads
        );
    PoolObject *self = (PoolObject *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->pool = pool_create(num_threads);
    if (!self->pool) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void pool_dealloc(PoolObject *self) {
    if (self->pool) {
        Py_BEGIN_ALLOW_THREADS;
        pool_destroy(self->pool);
        Py_END_ALLOW_THREADS;
    }
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *pool_threads(PyObject *self, void *nothing) {
    return PyLong_FromLong(pool_running(((PoolObject *)self)->pool));
}

static PyGetSetDef pool_fields[] = {
    {"threads", pool_threads, NULL,
     "Threads that run: fewer than asked for if the system starts no more.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject PoolType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "minillm.kernels.native._c.Pool",
    .tp_doc = "Pool(num_threads): threads for kernels to run on, the calling one included. "
              "One call at a time.",
    .tp_basicsize = sizeof(PoolObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_getset = pool_fields,
    .tp_new = pool_new,
    .tp_dealloc = (destructor)pool_dealloc,
};

/* ---- arguments */

typedef struct {
    Py_buffer views[MOST_ARRAYS];
    int count;
} Views;

static void release(Views *views) {
    while (views->count) PyBuffer_Release(&views->views[--views->count]);
}

/* Return the element formats (letters of the struct module) of a signature letter, and set its
   size. */
static const char *formats_of(char letter, Py_ssize_t *itemsize) {
    switch (letter) {
        case 'f': case 'F': case 'm': case 'M': case 'h': case 'H': *itemsize = 4; return "f";
        case 'D': *itemsize = 8; return "d";
        case 'q': case 'Q': *itemsize = 8; return "lq";
        case 'u': case 'I': *itemsize = 4; return "I";
        case 'U': *itemsize = 8; return "LQ";
        case 'b': *itemsize = 1; return "?B";
        default: return NULL;
    }
}

/* Return the number of dims of an array passed with its strides; 0 for other letters. */
static int dims_of(char letter) {
    switch (letter) {
        case 'm': case 'M': return 2;
        case 'h': case 'H': return 4;
        default: return 0;
    }
}

/* Write the strides of a view, in elements, after its address. */
static int read_strides(
    const Kernel *kernel, int number, int dims, const Py_buffer *view, Argument *to
) {
    if (view->ndim != dims) {
        PyErr_Format(
            PyExc_TypeError, "%s: argument %d has %d dims, not %d", kernel->name, number,
            view->ndim, dims
        );
        return -1;
    }
    for (int i = 0; i < dims; i++) {
        if (view->strides[i] % view->itemsize) {
            PyErr_Format(
                PyExc_ValueError, "%s: argument %d has strides that are no whole elements",
                kernel->name, number
            );
            return -1;
        }
        to[1 + i].integer = view->strides[i] / view->itemsize;
    }
    return 0;
}

static int read_array(
    const Kernel *kernel, int number, char letter, PyObject *object, Views *views, Argument *to
) {
    Py_ssize_t itemsize;
    const char *formats = formats_of(letter, &itemsize);
    if (!formats || views->count == MOST_ARRAYS) {
        PyErr_Format(PyExc_SystemError, "%s: bad signature", kernel->name);
        return -1;
    }
    const int dims = dims_of(letter), written = strchr("FDMHIQ", letter) != NULL;
    const int flags =
        PyBUF_FORMAT | (dims ? PyBUF_STRIDES : PyBUF_C_CONTIGUOUS) | (written ? PyBUF_WRITABLE : 0);
    Py_buffer *view = &views->views[views->count];
    if (PyObject_GetBuffer(object, view, flags)) return -1;
    views->count++;
    if (view->itemsize != itemsize || !strchr(formats, view->format[0]) || view->format[1]) {
        PyErr_Format(
            PyExc_TypeError, "%s: argument %d has elements of format '%s', not '%c'", kernel->name,
            number, view->format, formats[0]
        );
        return -1;
    }
    to->array = view->buf;
    return dims ? read_strides(kernel, number, dims, view, to) : 0;
}

static int read_argument(
    const Kernel *kernel, int number, char letter, int optional, PyObject *object, Views *views,
    Argument *to
) {
    if (letter == 'i') {
        to->integer = (int64_t)PyLong_AsUnsignedLongLongMask(object);
        return PyErr_Occurred() ? -1 : 0;
    }
    if (letter == 'd') {
        to->number = PyFloat_AsDouble(object);
        return PyErr_Occurred() ? -1 : 0;
    }
    if (optional && object == Py_None) {
        to->array = NULL;
        return 0;
    }
    return read_array(kernel, number, letter, object, views, to);
}

static int read_arguments(
    const Kernel *kernel, PyObject *const *objects, Py_ssize_t count, Views *views,
    Argument *arguments
) {
    int number = 0, filled = 0;
    for (const char *letter = kernel->signature; *letter; letter++, number++) {
        const char type = *letter;
        const int optional = letter[1] == '?', dims = dims_of(type);
        letter += optional;
        if (number >= count || filled + 1 + dims > MOST_ARGUMENTS) break;
        if (read_argument(
                kernel, number, type, optional, objects[number], views, &arguments[filled]
            ))
            return -1;
        filled += 1 + dims;
        if (!letter[1] && number + 1 == count) return 0;
    }
    PyErr_Format(
        PyExc_TypeError, "%s takes a pool and the arguments '%s', not %zd of them", kernel->name,
        kernel->signature, count
    );
    return -1;
}

/* Run kernel(pool, *arguments); `self` is a capsule that holds the Kernel. */
static PyObject *call(PyObject *self, PyObject *const *objects, Py_ssize_t count) {
    const Kernel *kernel = PyCapsule_GetPointer(self, NULL);
    if (!kernel) return NULL;
    if (count < 1 || !PyObject_TypeCheck(objects[0], &PoolType))
        return PyErr_Format(PyExc_TypeError, "%s: the first argument is a Pool", kernel->name);
    Pool *pool = ((PoolObject *)objects[0])->pool;
    Argument arguments[MOST_ARGUMENTS];
    Views views = {.count = 0};
    if (read_arguments(kernel, objects + 1, count - 1, &views, arguments)) {
        release(&views);
        return NULL;
    }
    if (!pool_acquire(pool)) {
        release(&views);
        return PyErr_Format(
            PyExc_RuntimeError, "%s: another thread is using this pool", kernel->name
        );
    }
    Py_BEGIN_ALLOW_THREADS;
    kernel->function(pool, arguments);
    Py_END_ALLOW_THREADS;
    const int short_of_memory = pool_take_error(pool);
    pool_release(pool);
    release(&views);
    if (short_of_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* ---- the module */

static PyMethodDef call_method = {
    "kernel", (PyCFunction)(void (*)(void))call, METH_FASTCALL, "kernel(pool, *arguments)"
};

static int add_kernels(PyObject *functions, const Kernel *kernel) {
    for (; kernel->name; kernel++) {
        PyObject *capsule = PyCapsule_New((void *)kernel, NULL, NULL);
        PyObject *function = capsule ? PyCFunction_New(&call_method, capsule) : NULL;
        const int failed = !function || PyDict_SetItemString(functions, kernel->name, function);
        Py_XDECREF(function);
        Py_XDECREF(capsule);
        if (failed) return -1;
    }
    return 0;
}

typedef struct {
    const char *name;
    const Kernel *kernels;
    int runs_here;
} Variant;

static PyObject *variants(PyObject *self, PyObject *nothing) {
    const Variant all[] = {
#if defined(__x86_64__)
        {"avx512", minillm_kernels_avx512,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma")},
        {"avx2", minillm_kernels_avx2,
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {"baseline", minillm_kernels_baseline, 1},
    };
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < sizeof all / sizeof *all; i++) {
        PyObject *functions = PyDict_New();
        PyObject *entry =
            functions ? Py_BuildValue("(sOi)", all[i].name, functions, all[i].runs_here) : NULL;
        if (!entry || add_kernels(functions, all[i].kernels) ||
            add_kernels(functions, minillm_kernels_exact) || PyList_Append(list, entry))
            Py_CLEAR(list);
        Py_XDECREF(entry);
        Py_XDECREF(functions);
    }
    return list;
}

static PyObject *load_blas(PyObject *self, PyObject *args) {
    const char *path, *sgemm, *set_threads;
    if (!PyArg_ParseTuple(args, "sss:load_blas", &path, &sgemm, &set_threads)) return NULL;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL); /* stays open: kernels point into it */
    if (!library) return PyErr_Format(PyExc_OSError, "%s", dlerror());
    void *function = dlsym(library, sgemm), *setter = dlsym(library, set_threads);
    if (!function || !setter)
        return PyErr_Format(PyExc_OSError, "%s has no %s or no %s", path, sgemm, set_threads);
    void (*limit)(int);
    memcpy(&limit, &setter, sizeof limit);
    limit(1);
    memcpy(&minillm_sgemm, &function, sizeof minillm_sgemm);
    Py_RETURN_NONE;
}

/* Keep freed memory in the process. A step frees and allocates the same arrays again. By default
   the C library returns large ones to the system, which zeroes the pages of the next allocation:
   a tenth of a step's time. */
static PyObject *keep_freed_memory(PyObject *self, PyObject *nothing) {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 32 << 20); /* the maximum of glibc */
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    mallopt(M_TOP_PAD, 64 << 20);
#endif
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"variants", variants, METH_NOARGS,
     "[(name, {kernel name: function}, whether this processor can run it)], fastest first."},
    {"load_blas", load_blas, METH_VARARGS,
     "load_blas(path, sgemm, set_threads): use the 64-bit cblas_sgemm of a library, on one "
     "thread."},
    {"keep_freed_memory", keep_freed_memory, METH_NOARGS,
     "Let freed arrays stay with the process, to be allocated again."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_c", .m_doc = "C kernels.", .m_size = -1, .m_methods = methods
};

PyMODINIT_FUNC PyInit__c(void) {
    if (PyType_Ready(&PoolType)) return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddObjectRef(module, "Pool", (PyObject *)&PoolType)) Py_CLEAR(module);
    return module;
}
