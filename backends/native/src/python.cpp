// Short rows from Python: ctypes takes several times as long to make a call as the kernel takes for a row of hundreds.
// Written against Python's stable ABI, so that one build serves every version from 3.11 on.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <cstdint>

#include "dlpack_abi.h"
#include "sa_softmax/c_api.h"

namespace {

constexpr int64_t kSmall = 1 << 14;  // entries, of one thread; giving the interpreter lock away takes as long as some hundred

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
// 1, 0, or -1 with an exception set.
int is_true(const Owned& object) { return object ? PyObject_IsTrue(object) : -1; }

// Names, made once.
PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// What PyTorch is asked before the memory of a tensor is handed to a kernel: see rows_of_tensor in `methods`.
enum How { tensor, exchange, questions, grad_enabled, forward_ad, variants, threads, empty_like, how_many };

// 1 if nothing follows x and it is what it seems to be, 0, or -1 with an exception set.
int is_plain(PyObject* const* how, PyObject* x) {
  static PyObject* const requires_grad = name("requires_grad");
  static PyObject* const is_neg = name("is_neg");
  static PyObject* const current_level = name("_current_level");
  if (reinterpret_cast<PyObject*>(Py_TYPE(x)) != how[tensor]) return 0;
  const Py_ssize_t count = PyTuple_Size(how[questions]);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (const int yes = is_true(Owned(PyObject_CallNoArgs(PyTuple_GetItem(how[questions], i)))); yes != 0)
      return yes < 0 ? -1 : 0;
  const Owned level(PyObject_GetAttr(how[forward_ad], current_level));
  if (!level) return -1;
  const long number = PyLong_AsLong(level);
  if (PyErr_Occurred()) return -1;
  if (number >= 0) return 0;
  if (const int needs = is_true(Owned(PyObject_GetAttr(x, requires_grad))); needs != 0) {
    if (needs < 0) return -1;
    if (const int recorded = is_true(Owned(PyObject_CallNoArgs(how[grad_enabled]))); recorded != 0)
      return recorded < 0 ? -1 : 0;
  }
  const int negated = is_true(Owned(PyObject_CallMethodObjArgs(x, is_neg, nullptr)));  // its memory holds -x
  return negated < 0 ? -1 : !negated;
}

// The number of a dtype that has kernels, or -1.
int kernel_dtype(const dlpack::Dtype& dtype) {
  if (dtype.lanes != 1) return -1;
  if (dtype.code == dlpack::bfloat) return dtype.bits == 16 ? SA_SOFTMAX_BFLOAT16 : -1;
  if (dtype.code != dlpack::ieee) return -1;
  switch (dtype.bits) {
    case 16: return SA_SOFTMAX_FLOAT16;
    case 32: return SA_SOFTMAX_FLOAT32;
    case 64: return SA_SOFTMAX_FLOAT64;
    default: return -1;
  }
}

void* memory(const dlpack::Tensor& x) { return static_cast<char*>(x.data) + x.byte_offset; }

// The functions in a capsule; null, with an exception set, if it is another.
const dlpack::Exchange* functions_of(PyObject* capsule) {
  return static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
}

bool is_contiguous(const dlpack::Tensor& x) {
  int64_t step = 1;
  for (int32_t i = x.rank; i-- > 0; step *= x.shape[i])
    if (x.shape[i] != 1 && x.strides[i] != step) return false;
  return true;
}

PyObject* rows_of_tensor(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(arguments[0]) || PyTuple_Size(arguments[0]) != how_many) {
    PyErr_SetString(PyExc_TypeError, "must be called with what to ask, a variant and a tensor");
    return nullptr;
  }
  PyObject* how[how_many];
  for (int i = 0; i < how_many; ++i) how[i] = PyTuple_GetItem(arguments[0], i);
  PyObject* const x = arguments[2];
  const dlpack::Exchange* const api = functions_of(how[exchange]);
  if (api == nullptr) return nullptr;
  if (const int plain = is_plain(how, x); plain <= 0) {
    if (plain < 0) return nullptr;
    Py_RETURN_NONE;
  }
  if (!PyUnicode_CheckExact(arguments[1])) Py_RETURN_NONE;
  PyObject* const variant = PyDict_GetItemWithError(how[variants], arguments[1]);  // borrowed
  if (variant == nullptr) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  dlpack::Tensor from;
  if (api->look(x, &from) != 0) {  // of a layout, a device or a dtype that has no place in DLPack
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const int dtype = kernel_dtype(from.dtype);
  if (from.device_type != dlpack::cpu || dtype < 0 || from.rank == 0 || !is_contiguous(from)) Py_RETURN_NONE;
  int64_t rows = 1;
  for (int32_t i = 0; i < from.rank - 1; ++i) rows *= from.shape[i];
  const int64_t n = from.shape[from.rank - 1];
  if (from.data == nullptr || rows * n == 0) Py_RETURN_NONE;  // zeros that take no memory, the functionalized, the empty
  int many = 1;
  if (rows > kSmall / n) {
    const Owned number(PyObject_CallNoArgs(how[threads]));
    if (!number) return nullptr;
    many = int(PyLong_AsLong(number));
  }
  Owned y(PyObject_CallFunctionObjArgs(how[empty_like], x, nullptr));
  dlpack::Tensor to;
  if (!y || api->look(y, &to) != 0) return nullptr;
  const Options o{dtype, int(PyLong_AsLong(variant)), many};
  if (PyErr_Occurred() || !run(o, rows, n, memory(from), memory(to))) return nullptr;
  return y.release();
}

PyObject* speaks_dlpack(PyObject*, PyObject* capsule) {
  const dlpack::Exchange* const api = functions_of(capsule);
  if (api == nullptr) return nullptr;
  return PyBool_FromLong(api->major == 1 && api->look != nullptr);
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
     "rows_of_tensor(how, variant, x): the row operation of a tensor of PyTorch along its last axis, or None if that is not\n"
     "for a kernel to compute: x is not contiguous, empty, of another kind, dtype or device; or the variant is unknown; or\n"
     "anything follows x: a derivative, a transformation, a tracer. `how` is what to ask: the type of tensors; the capsule\n"
     "of its functions for DLPack; functions that all answer no; whether gradients are recorded; the module of forward\n"
     "mode; the numbers of variants; how many threads; empty_like."},
    {"speaks_dlpack", speaks_dlpack, METH_O,
     "speaks_dlpack(capsule) -> bool: whether rows_of_tensor can call the functions of this capsule."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__rows() { return PyModuleDef_Init(&module); }
