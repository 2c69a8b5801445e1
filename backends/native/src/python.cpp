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

// A reference that is given back.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  explicit operator bool() const { return object_ != nullptr; }
  operator PyObject*() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};
PyObject* call(PyObject* f, PyObject* argument = nullptr) { return PyObject_CallFunctionObjArgs(f, argument, nullptr); }
// 1, 0, or -1 with an exception set.
int is_true(const Owned& object) { return object ? PyObject_IsTrue(object) : -1; }

// Names, made once.
PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// What PyTorch is asked of a tensor before its memory is handed to a kernel: see rows_of_tensor in `methods`.
enum How { tensor, keys_of, plain_keys, questions, grad_enabled, forward_ad, dtypes, variants, threads, empty_like, how_many };

// 1 if nothing follows x and it is what it seems to be, 0, or -1 with an exception set.
int is_plain(PyObject* const* how, PyObject* x) {
  static PyObject* const raw_repr = name("raw_repr");
  static PyObject* const requires_grad = name("requires_grad");
  static PyObject* const current_level = name("_current_level");
  const Owned keys(call(how[keys_of], x));
  if (!keys) return -1;
  const Owned bits(PyObject_CallMethodObjArgs(keys, raw_repr, nullptr));
  if (!bits) return -1;
  if (const int known = PySet_Contains(how[plain_keys], bits); known <= 0) return known;
  if (const int needs = is_true(Owned(PyObject_GetAttr(x, requires_grad))); needs != 0) {
    if (needs < 0) return -1;
    if (const int recorded = is_true(Owned(call(how[grad_enabled]))); recorded != 0) return recorded < 0 ? -1 : 0;
  }
  const Py_ssize_t count = PyTuple_Size(how[questions]);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (const int yes = is_true(Owned(call(PyTuple_GetItem(how[questions], i)))); yes != 0) return yes < 0 ? -1 : 0;
  const Owned level(PyObject_GetAttr(how[forward_ad], current_level));
  if (!level) return -1;
  const long number = PyLong_AsLong(level);
  if (PyErr_Occurred()) return -1;
  return number < 0;
}

PyObject* rows_of_tensor(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static PyObject* const dtype = name("dtype");
  static PyObject* const shape = name("shape");
  static PyObject* const is_contiguous = name("is_contiguous");
  static PyObject* const data_ptr = name("data_ptr");
  if (count != 3 || !PyTuple_Check(arguments[0]) || PyTuple_Size(arguments[0]) != how_many) {
    PyErr_SetString(PyExc_TypeError, "must be called with what to ask, a variant and a tensor");
    return nullptr;
  }
  PyObject* how[how_many];
  for (int i = 0; i < how_many; ++i) how[i] = PyTuple_GetItem(arguments[0], i);
  PyObject* const variant = arguments[1];
  PyObject* const x = arguments[2];
  if (reinterpret_cast<PyObject*>(Py_TYPE(x)) != how[tensor] || !PyUnicode_CheckExact(variant)) Py_RETURN_NONE;
  if (const int plain = is_plain(how, x); plain <= 0) {
    if (plain < 0) return nullptr;
    Py_RETURN_NONE;
  }
  const Owned type(PyObject_GetAttr(x, dtype));
  if (!type) return nullptr;
  PyObject* const dtype_number = PyDict_GetItemWithError(how[dtypes], type);  // borrowed, as the next
  PyObject* const variant_number = dtype_number ? PyDict_GetItemWithError(how[variants], variant) : nullptr;
  if (variant_number == nullptr) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  const Owned lengths(PyObject_GetAttr(x, shape));
  if (!lengths) return nullptr;
  const Py_ssize_t rank = PyTuple_Size(lengths);
  if (rank <= 0) {
    if (rank < 0) return nullptr;
    Py_RETURN_NONE;
  }
  int64_t rows = 1, n = 1;
  for (Py_ssize_t i = 0; i < rank; ++i) {
    rows *= i > 0 ? n : 1;
    n = PyLong_AsLongLong(PyTuple_GetItem(lengths, i));
  }
  if (PyErr_Occurred()) return nullptr;
  if (const int lies_well = is_true(Owned(PyObject_CallMethodObjArgs(x, is_contiguous, nullptr))); lies_well <= 0) {
    if (lies_well < 0) return nullptr;
    Py_RETURN_NONE;
  }
  const Owned many(call(how[threads]));
  if (!many) return nullptr;
  Owned y(call(how[empty_like], x));
  if (!y || rows * n == 0) return y.release();
  const Owned from(PyObject_CallMethodObjArgs(x, data_ptr, nullptr));
  const Owned to(PyObject_CallMethodObjArgs(y, data_ptr, nullptr));
  if (!from || !to) return nullptr;
  const Options o{int(PyLong_AsLong(dtype_number)), int(PyLong_AsLong(variant_number)), int(PyLong_AsLong(many))};
  const void* const x_data = PyLong_AsVoidPtr(from);
  void* const y_data = PyLong_AsVoidPtr(to);
  if (PyErr_Occurred() || !run(o, rows, n, x_data, y_data)) return nullptr;
  return y.release();
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
    {"rows_of_tensor", fast(rows_of_tensor), METH_FASTCALL,
     "rows_of_tensor(how, variant, x): the row operation of a tensor of PyTorch along its last axis, or None if x is not\n"
     "contiguous, or anything follows it: a derivative, a transformation, a tracer; or if the variant is unknown. `how` is\n"
     "what to ask: the type of tensors; the function of their dispatch keys; the keys that are plain; functions that all\n"
     "answer no; whether gradients are recorded; the module of forward mode; the numbers of dtypes and of variants; how\n"
     "many threads; empty_like."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__rows() { return PyModuleDef_Init(&module); }
