// The custom ops SASoftmax, SASoftmaxGrad and SAAttention of the domain sa_softmax for onnxruntime's CPU provider, once
// for each element type. docs/operators.md describes them; here attributes and tensors become calls of kernels.h.
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <list>
#include <memory>
#include <mutex>
#include <string>

#include "onnxruntime_abi.h"
#include "sa_softmax/c_api.h"
#include "sa_softmax/kernels.h"

namespace sa_softmax {
namespace {

enum class Kind { softmax, softmax_grad, attention };

struct Input {
  const char* name;
  bool mask;  // boolean, and optional like the bias; other inputs have the op's element type
  bool optional;
};
struct Signature {
  const char* name;
  size_t inputs;
  Input input[5];
};
constexpr Signature kSignatures[] = {
    {"SASoftmax", 2, {{"X", false, false}, {"where", true, true}}},
    {"SASoftmaxGrad", 3, {{"X", false, false}, {"G", false, false}, {"where", true, true}}},
    {"SAAttention",
     5,
     {{"Q", false, false}, {"K", false, false}, {"V", false, false}, {"bias", false, true}, {"mask", true, true}}},
};

struct ElementType {
  DType dtype;
  ONNXTensorElementDataType onnx;
  const char* name;
};
constexpr ElementType kTypes[] = {
    {DType::float32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float"},
    {DType::float64, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, "double"},
    {DType::float16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "float16"},
    {DType::bfloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, "bfloat16"},
};

struct Op : OrtCustomOp {
  const OrtApi* api;
  Kind kind;
  ElementType type;
  const Signature& signature() const { return kSignatures[int(kind)]; }
};

// onnxruntime refused a call; the status travels on to the caller.
struct Refusal {
  OrtStatus* status;
};
void check(OrtStatus* status) {
  if (status != nullptr) throw Refusal{status};
}

// No exception crosses the C interface: every one ends as a status.
template <class F>
OrtStatus* guarded(const OrtApi* api, const char* op, const F& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const Refusal& refusal) {
    return refusal.status;
  } catch (const Error& error) {
    try {
      return api->CreateStatus(ORT_INVALID_ARGUMENT, (std::string(op) + ": " + error.what()).c_str());
    } catch (...) {
      return api->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
    }
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api->CreateStatus(ORT_FAIL, "an unknown exception");
  }
}

// Attributes. onnxruntime answers "missing" and "of another type" alike, so what is missing is asked for under every type:
// a misspelt type must not silently become the default.
class Attributes {
 public:
  Attributes(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  std::optional<float> number(const char* name) const {
    float value = 0;
    if (accepted(api_->KernelInfoGetAttribute_float(info_, name, &value))) return value;
    check_absent(name, "a float");
    return {};
  }
  int64_t integer(const char* name, int64_t absent) const {
    int64_t value = 0;
    if (accepted(api_->KernelInfoGetAttribute_int64(info_, name, &value))) return value;
    check_absent(name, "an int");
    return absent;
  }
  std::string string(const char* name, const char* absent) const {
    size_t size = 0;
    if (accepted(api_->KernelInfoGetAttribute_string(info_, name, nullptr, &size))) {
      std::string value(size, '\0');
      check(api_->KernelInfoGetAttribute_string(info_, name, value.data(), &size));
      value.resize(size > 0 ? size - 1 : 0);  // the terminating zero
      return value;
    }
    check_absent(name, "a string");
    return absent;
  }

 private:
  bool accepted(OrtStatus* status) const {
    if (status == nullptr) return true;
    api_->ReleaseStatus(status);
    return false;
  }
  void check_absent(const char* name, const char* type) const {
    float f = 0;
    int64_t i = 0;
    size_t sizes[3] = {};
    const char* const found =
        accepted(api_->KernelInfoGetAttribute_float(info_, name, &f))                        ? "a float"
        : accepted(api_->KernelInfoGetAttribute_int64(info_, name, &i))                      ? "an int"
        : accepted(api_->KernelInfoGetAttribute_string(info_, name, nullptr, &sizes[0]))     ? "a string"
        : accepted(api_->KernelInfoGetAttributeArray_float(info_, name, nullptr, &sizes[1])) ? "a list"
        : accepted(api_->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &sizes[2])) ? "a list"
                                                                                             : nullptr;
    if (found != nullptr)
      throw Error("the attribute " + std::string(name) + " must be " + type + "; got " + found +
                  ". Leave it out for its default");
  }

  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

struct Kernel {
  const Op* op;
  RowOptions row;
  AttentionOptions attention;
};

Kernel make_kernel(const Op& op, const Attributes& attributes) {
  Kernel kernel{&op, {}, {}};
  const std::string variant = attributes.string("variant", "normalized");
  if (variant != "normalized" && variant != "product")
    throw Error("variant must be one of 'normalized', 'product'; got '" + variant + "'");
  kernel.row.variant = kernel.attention.variant = variant == "product" ? Variant::product : Variant::normalized;
  kernel.row.dtype = kernel.attention.dtype = op.type.dtype;
  if (op.kind != Kind::attention) {
    kernel.row.axis = attributes.integer("axis", -1);
    return kernel;
  }
  const int64_t is_causal = attributes.integer("is_causal", 0);
  if (is_causal != 0 && is_causal != 1)
    throw Error("is_causal must be 0 or 1; got " + std::to_string(is_causal) + ". A mask goes to the input mask");
  kernel.attention.is_causal = is_causal == 1;
  kernel.attention.q_offset = attributes.integer("q_offset", 0);
  if (const std::optional<float> scale = attributes.number("scale")) kernel.attention.scale = *scale;
  return kernel;
}

// Tensors.

struct TypeAndShape {
  ONNXTensorElementDataType type;
  Shape shape;
};
TypeAndShape describe(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
  TypeAndShape out{};
  size_t rank = 0;
  check(api->GetTensorElementType(info, &out.type));
  check(api->GetDimensionsCount(info, &rank));
  out.shape.resize(rank);
  check(api->GetDimensions(info, out.shape.data(), rank));
  return out;
}
TypeAndShape describe(const OrtApi* api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api->ReleaseTensorTypeAndShapeInfo)> owner(
      info, api->ReleaseTensorTypeAndShapeInfo);
  return describe(api, info);
}

// The tensors of one call: inputs by their position, null where an optional one is absent.
class Call {
 public:
  Call(const Op& op, OrtKernelContext* context) : op_(op), api_(op.api), context_(context) {
    size_t given = 0;
    check(api_->KernelContext_GetInputCount(context_, &given));
    for (size_t i = 0; i < std::min(given, op.signature().inputs); ++i) read(i);
    for (size_t i = 0; i < op.signature().inputs; ++i)
      if (!op.signature().input[i].optional && !present_[i])
        throw Error(std::string(op.signature().input[i].name) + " must be given; got no tensor");
  }

  const Array* input(size_t i) const { return present_[i] ? &inputs_[i] : nullptr; }

  Array output(const Shape& shape) const {
    OrtValue* value = nullptr;
    void* data = nullptr;
    check(api_->KernelContext_GetOutput(context_, 0, shape.data(), shape.size(), &value));
    check(api_->GetTensorMutableData(value, &data));
    return Array(data, shape);
  }

  // The session's own threads.
  void parallel(int64_t count, const std::function<void(int64_t)>& task) const {
    const auto run = [](void* data, size_t i) { (*static_cast<const std::function<void(int64_t)>*>(data))(int64_t(i)); };
    check(api_->KernelContext_ParallelFor(context_, run, size_t(count), 0,
                                          const_cast<std::function<void(int64_t)>*>(&task)));
  }

 private:
  void read(size_t i) {
    const OrtValue* value = nullptr;
    check(api_->KernelContext_GetInput(context_, i, &value));
    if (value == nullptr) return;
    const Input& input = op_.signature().input[i];
    const TypeAndShape found = describe(api_, value);
    if (found.type != (input.mask ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL : op_.type.onnx))
      throw Error(std::string(input.name) + " must have the element type " + (input.mask ? "bool" : op_.type.name) +
                  "; got the ONNX type " + std::to_string(int(found.type)) + ". Cast it first");
    void* data = nullptr;
    check(api_->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    inputs_[i] = Array(data, found.shape);
    present_[i] = true;
  }

  const Op& op_;
  const OrtApi* api_;
  OrtKernelContext* context_;
  Array inputs_[5];
  bool present_[5] = {};
};

void compute(const Kernel& kernel, OrtKernelContext* context) {
  const Call call(*kernel.op, context);
  const Parallel parallel = [&](int64_t count, const std::function<void(int64_t)>& task) { call.parallel(count, task); };
  const Array& first = *call.input(0);
  switch (kernel.op->kind) {
    case Kind::softmax:
      return softmax(kernel.row, first, call.input(1), call.output(first.shape), parallel);
    case Kind::softmax_grad:
      return softmax_vjp(kernel.row, first, *call.input(1), call.input(2), call.output(first.shape), parallel);
    case Kind::attention:
      return attention(kernel.attention, first, *call.input(1), *call.input(2), call.input(3), call.input(4),
                       call.output(attention_shape(first.shape, call.input(1)->shape, call.input(2)->shape)), parallel);
  }
}

// Shape inference. A shape that is not known entirely, by lengths or names, is left open: onnxruntime would take an unknown
// length for the length -1.
struct SymbolicShape {
  ONNXTensorElementDataType type;
  Shape lengths;  // -1 where the name counts
  std::vector<const char*> names;

  bool known() const {
    for (size_t i = 0; i < lengths.size(); ++i)
      if (lengths[i] < 0 && names[i][0] == '\0') return false;
    return !lengths.empty();  // onnxruntime shows an unknown rank as rank 0
  }
};
SymbolicShape symbolic_shape(const OrtApi* api, const OrtShapeInferContext* context, size_t index) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
  check(api->ShapeInferContext_GetInputTypeShape(context, index, &info));
  TypeAndShape found = describe(api, info);
  SymbolicShape out{found.type, std::move(found.shape), {}};
  out.names.resize(out.lengths.size());
  check(api->GetSymbolicDimensions(info, out.names.data(), out.names.size()));
  return out;
}

void infer_shape(const Op& op, OrtShapeInferContext* context) {
  const OrtApi* const api = op.api;
  SymbolicShape out = symbolic_shape(api, context, 0);
  if (op.kind == Kind::attention) {
    const SymbolicShape v = symbolic_shape(api, context, 2);
    if (out.lengths.size() < 3 || v.lengths.size() != out.lengths.size()) return;
    out.lengths.back() = v.lengths.back();
    out.names.back() = v.names.back();
  }
  if (!out.known()) return;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->CreateTensorTypeAndShapeInfo(&info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api->ReleaseTensorTypeAndShapeInfo)> owner(
      info, api->ReleaseTensorTypeAndShapeInfo);
  check(api->SetTensorElementType(info, out.type));
  check(api->SetDimensions(info, out.lengths.data(), out.lengths.size()));
  check(api->SetSymbolicDimensions(info, out.names.data(), out.names.size()));
  check(api->ShapeInferContext_SetOutputTypeShape(context, 0, info));
}

// The table of functions of one op.

const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

Op make_op(const OrtApi* api, Kind kind, const ElementType& type, bool infers_shapes) {
  Op op{};
  op.api = api;
  op.kind = kind;
  op.type = type;
  op.version = kOrtApiVersion;
  op.GetName = [](const OrtCustomOp* op) { return self(op).signature().name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).signature().inputs; };
  op.GetInputType = [](const OrtCustomOp* op, size_t i) {
    return self(op).signature().input[i].mask ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL : self(op).type.onnx;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) {
    return self(op).signature().input[i].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
  op.GetOutputType = [](const OrtCustomOp* op, size_t) { return self(op).type.onnx; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, self(op).signature().name,
                   [&] { *kernel = new Kernel(make_kernel(self(op), Attributes(api, info))); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Kernel& own = *static_cast<const Kernel*>(kernel);
    return guarded(own.op->api, own.op->signature().name, [&] { compute(own, context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  if (infers_shapes)
    op.InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
      return guarded(self(op).api, self(op).signature().name, [&] { infer_shape(self(op), context); });
    };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

// The ops and their domain must outlive every session, and nobody tells when the last one ends: one set for each
// onnxruntime in the process, made once and kept.
struct Registration {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
  std::list<Op> ops;
};

// Before 1.24, onnxruntime reads the type of every input before it calls a shape inference, also of an absent one, and
// crashes (its pull request 26199). There the output's shape comes from the model's value_info, or is open.
bool can_infer_shapes(const OrtApiBase* base) {
  int major = 0, minor = 0;
  return std::sscanf(base->GetVersionString(), "%d.%d", &major, &minor) == 2 && (major > 1 || minor >= 24);
}

OrtCustomOpDomain* domain_for(const OrtApi* api, bool infers_shapes) {
  static std::mutex mutex;
  static std::list<Registration>& registrations = *new std::list<Registration>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Registration& known : registrations)
    if (known.api == api) return known.domain;
  Registration fresh{api, nullptr, {}};
  for (const Kind kind : {Kind::softmax, Kind::softmax_grad, Kind::attention})
    for (const ElementType& type : kTypes) fresh.ops.push_back(make_op(api, kind, type, infers_shapes));
  check(api->CreateCustomOpDomain("sa_softmax", &fresh.domain));
  std::unique_ptr<OrtCustomOpDomain, decltype(api->ReleaseCustomOpDomain)> owner(fresh.domain,
                                                                                 api->ReleaseCustomOpDomain);
  for (const Op& op : fresh.ops) check(api->CustomOpDomain_Add(fresh.domain, &op));
  registrations.push_back(std::move(fresh));
  return owner.release();
}

}  // namespace
}  // namespace sa_softmax

// What onnxruntime calls when the library is registered with session options.
extern "C" SA_SOFTMAX_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace sa_softmax;
  const OrtApi* const api = base->GetApi(kOrtApiVersion);
  if (api == nullptr)
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "sa_softmax needs onnxruntime 1.19 or newer; this one is older");
  return guarded(api, "sa_softmax", [&] {
    instruction_set();  // so that a bad choice fails here, not in the first run
    check(api->AddCustomOpDomain(options, domain_for(api, can_infer_shapes(base))));
  });
}
