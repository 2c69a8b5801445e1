// Short rows from Python: ctypes takes several times as long to make a call as the kernel takes for a row of hundreds.
// Written against Python's stable ABI, so that one build serves every version from 3.11 on.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <cstdint>

#include "sa_softmax/c_api.h"

namespace {

constexpr int64_t kSmall = 1 << 14;  // entries; giving the interpreter lock away takes as long as some hundred of them

struct Options {
  int dtype, variant, threads;
};

// The first three arguments of `count`; an exception is set if there are not that many, or they are no integers.
Options options(PyObject* const* arguments, Py_ssize_t given, Py_ssize_t count) {
  if (given != count) {
    PyErr_Format(PyExc_TypeError, "must be called with %zd arguments; got %zd", count, given);
    return {};
  }
  return {int(PyLong_AsLong(arguments[0])), int(PyLong_AsLong(arguments[1])), int(PyLong_AsLong(arguments[2]))};
}

// Whether it went well; else an exception is set.
bool run(const Options& o, int64_t rows, int64_t n, const void* x, void* y) {
  const auto call = [&] { return sa_softmax_contiguous_rows(o.dtype, o.variant, rows, n, x, y, o.threads); };
  int status;
  if (rows <= kSmall / n) {
    status = call();
  } else {
    Py_BEGIN_ALLOW_THREADS
    status = call();
    Py_END_ALLOW_THREADS
  }
  if (status != 0) PyErr_SetString(PyExc_ValueError, sa_softmax_last_error());
  return status == 0;
}

class Buffer {
 public:
  Buffer(PyObject* of, int flags) : held_(PyObject_GetBuffer(of, &view_, flags) == 0) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (held_) PyBuffer_Release(&view_);
  }
  explicit operator bool() const { return held_; }
  const Py_buffer* operator->() const { return &view_; }

 private:
  Py_buffer view_;
  bool held_;
};

PyObject* rows_of_buffers(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const Options o = options(arguments, count, 5);
  if (PyErr_Occurred()) return nullptr;
  const Buffer x(arguments[3], PyBUF_ND);  // that is, contiguous
  if (!x) {
    if (!PyErr_ExceptionMatches(PyExc_BufferError) && !PyErr_ExceptionMatches(PyExc_ValueError)) return nullptr;
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  if (x->len == 0 || x->ndim == 0 || reinterpret_cast<uintptr_t>(x->buf) % size_t(x->itemsize) != 0) Py_RETURN_FALSE;
  const Buffer y(arguments[4], PyBUF_WRITABLE);
  if (!y) return nullptr;
  if (y->len != x->len) {
    PyErr_SetString(PyExc_ValueError, "y must have the size of x");
    return nullptr;
  }
  const int64_t n = x->shape[x->ndim - 1];
  if (!run(o, x->len / x->itemsize / n, n, x->buf, y->buf)) return nullptr;
  Py_RETURN_TRUE;
}

PyObject* rows_at(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const Options o = options(arguments, count, 7);
  if (PyErr_Occurred()) return nullptr;
  const int64_t size = PyLong_AsLongLong(arguments[3]), n = PyLong_AsLongLong(arguments[4]);
  const void* const x = PyLong_AsVoidPtr(arguments[5]);
  void* const y = PyLong_AsVoidPtr(arguments[6]);
  if (PyErr_Occurred()) return nullptr;
  if (n > 0 && !run(o, size / n, n, x, y)) return nullptr;
  Py_RETURN_NONE;
}

template <class F>
PyCFunction fast(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"rows_of_buffers", fast(rows_of_buffers), METH_FASTCALL,
     "rows_of_buffers(dtype, variant, threads, x, y) -> bool: y = the row operation of x, along its last axis, or False\n"
     "if that is not what x is laid out for: contiguous, aligned, at least one entry. Both have the buffer protocol."},
    {"rows_at", fast(rows_at), METH_FASTCALL,
     "rows_at(dtype, variant, threads, size, n, x, y): the same for contiguous memory at the addresses x and y, of `size`\n"
     "entries in rows of length n."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__rows() { return PyModuleDef_Init(&module); }
