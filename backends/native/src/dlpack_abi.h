// The part of DLPack's exchange interface (version 1) that the Python extension uses, declared by hand: a table of
// functions that the type of a framework's arrays carries as `__dlpack_c_exchange_api__`.
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstddef>
#include <cstdint>

namespace dlpack {

constexpr int32_t cpu = 1;
enum Code : uint8_t { ieee = 2, bfloat = 4 };

struct Dtype {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t rank;
  Dtype dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;  // of another major version, or null
  void (*allocate)();
  void (*export_managed)();
  void (*import_managed)();
  int (*look)(void* object, Tensor* out);  // what is there, for as long as the object lives; else an exception is set
  void (*current_stream)();
};

static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24));
static_assert(sizeof(void*) != 8 || offsetof(Exchange, look) == 40);

}  // namespace dlpack
