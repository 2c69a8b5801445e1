// The part of onnxruntime's C interface that the custom ops use, declared by hand: its wheel carries no headers.
//
// OrtApi is a table of function pointers to which releases only append, so a position never changes. The numbers below
// are positions; the assertions at the end hold for these declarations and for the official header, which the CMake
// option SA_SOFTMAX_ONNXRUNTIME_INCLUDE takes instead.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef SA_SOFTMAX_OFFICIAL_HEADERS
#include <onnxruntime_c_api.h>
#else

#ifdef _WIN32
#define ORT_API_CALL __stdcall
#else
#define ORT_API_CALL
#endif

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;
struct OrtCustomOp;

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum OrtCustomOpInputOutputCharacteristic { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };
enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL = 9,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE = 11,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16
};

struct OrtApi {
  OrtStatus*(ORT_API_CALL* CreateStatus)(OrtErrorCode code, const char* message);  // 0
  void* unused_1[25];
  OrtStatus*(ORT_API_CALL* CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);              // 26
  OrtStatus*(ORT_API_CALL* CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);           // 27
  OrtStatus*(ORT_API_CALL* AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);       // 28
  void* unused_29[22];
  OrtStatus*(ORT_API_CALL* GetTensorMutableData)(OrtValue* value, void** out);  // 51
  void* unused_52[5];
  OrtStatus*(ORT_API_CALL* CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo** out);                  // 57
  OrtStatus*(ORT_API_CALL* SetTensorElementType)(OrtTensorTypeAndShapeInfo* info,
                                                 ONNXTensorElementDataType type);                           // 58
  OrtStatus*(ORT_API_CALL* SetDimensions)(OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t n);  // 59
  OrtStatus*(ORT_API_CALL* GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info,
                                                 ONNXTensorElementDataType* out);                           // 60
  OrtStatus*(ORT_API_CALL* GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);         // 61
  OrtStatus*(ORT_API_CALL* GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t n);  // 62
  OrtStatus*(ORT_API_CALL* GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo* info, const char** names,
                                                  size_t n);  // 63
  void* unused_64[1];
  OrtStatus*(ORT_API_CALL* GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);  // 65
  void* unused_66[19];
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* out);  // 85
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name,
                                                         int64_t* out);  // 86
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttribute_string)(const OrtKernelInfo* info, const char* name, char* out,
                                                          size_t* size);                                        // 87
  OrtStatus*(ORT_API_CALL* KernelContext_GetInputCount)(const OrtKernelContext* context, size_t* out);  // 88
  void* unused_89[1];
  OrtStatus*(ORT_API_CALL* KernelContext_GetInput)(const OrtKernelContext* context, size_t index,
                                                   const OrtValue** out);  // 90
  OrtStatus*(ORT_API_CALL* KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dims,
                                                    size_t n, OrtValue** out);  // 91
  void* unused_92[1];
  void(ORT_API_CALL* ReleaseStatus)(OrtStatus* status);  // 93
  void* unused_94[5];
  void(ORT_API_CALL* ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);  // 99
  void* unused_100[1];
  void(ORT_API_CALL* ReleaseCustomOpDomain)(OrtCustomOpDomain* domain);  // 101
  void* unused_102[60];
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttributeArray_float)(const OrtKernelInfo* info, const char* name, float* out,
                                                              size_t* size);  // 162
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttributeArray_int64)(const OrtKernelInfo* info, const char* name,
                                                              int64_t* out, size_t* size);  // 163
  void* unused_164[103];
  OrtStatus*(ORT_API_CALL* ShapeInferContext_GetInputCount)(const OrtShapeInferContext* context, size_t* out);  // 267
  OrtStatus*(ORT_API_CALL* ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext* context, size_t index,
                                                                OrtTensorTypeAndShapeInfo** out);  // 268
  void* unused_269[1];
  OrtStatus*(ORT_API_CALL* ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext* context, size_t index,
                                                                 const OrtTensorTypeAndShapeInfo* info);  // 270
  OrtStatus*(ORT_API_CALL* SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo* info, const char** names, size_t n);  // 271
  void* unused_272[2];
  OrtStatus*(ORT_API_CALL* KernelContext_ParallelFor)(const OrtKernelContext* context, void (*task)(void*, size_t),
                                                      size_t total, size_t batches, void* data);  // 274
};

struct OrtApiBase {
  const OrtApi*(ORT_API_CALL* GetApi)(uint32_t version);
  const char*(ORT_API_CALL* GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void*(ORT_API_CALL* CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char*(ORT_API_CALL* GetName)(const OrtCustomOp* op);
  const char*(ORT_API_CALL* GetExecutionProviderType)(const OrtCustomOp* op);
  ONNXTensorElementDataType(ORT_API_CALL* GetInputType)(const OrtCustomOp* op, size_t index);
  size_t(ORT_API_CALL* GetInputTypeCount)(const OrtCustomOp* op);
  ONNXTensorElementDataType(ORT_API_CALL* GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t(ORT_API_CALL* GetOutputTypeCount)(const OrtCustomOp* op);
  void(ORT_API_CALL* KernelCompute)(void* kernel, OrtKernelContext* context);
  void(ORT_API_CALL* KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic(ORT_API_CALL* GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtCustomOpInputOutputCharacteristic(ORT_API_CALL* GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtMemType(ORT_API_CALL* GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int(ORT_API_CALL* GetVariadicInputMinArity)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus*(ORT_API_CALL* CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                                           void** kernel);
  OrtStatus*(ORT_API_CALL* KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus*(ORT_API_CALL* InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int(ORT_API_CALL* GetStartVersion)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetEndVersion)(const OrtCustomOp* op);
  size_t(ORT_API_CALL* GetMayInplace)(int** input_index, int** output_index);
  void(ORT_API_CALL* ReleaseMayInplace)(int* input_index, int* output_index);
  size_t(ORT_API_CALL* GetAliasMap)(int** input_index, int** output_index);
  void(ORT_API_CALL* ReleaseAliasMap)(int* input_index, int* output_index);
};

}  // extern "C"
#endif

namespace sa_softmax {

// The version asked of GetApi and declared by the ops: the one that brought the last member of OrtCustomOp above.
constexpr uint32_t kOrtApiVersion = 18;

#define SA_SOFTMAX_AT(table, member, position) \
  static_assert(offsetof(table, member) == (position) * sizeof(void*), #member " stands at another position")
SA_SOFTMAX_AT(OrtApi, CreateStatus, 0);
SA_SOFTMAX_AT(OrtApi, CreateCustomOpDomain, 26);
SA_SOFTMAX_AT(OrtApi, CustomOpDomain_Add, 27);
SA_SOFTMAX_AT(OrtApi, AddCustomOpDomain, 28);
SA_SOFTMAX_AT(OrtApi, GetTensorMutableData, 51);
SA_SOFTMAX_AT(OrtApi, CreateTensorTypeAndShapeInfo, 57);
SA_SOFTMAX_AT(OrtApi, SetTensorElementType, 58);
SA_SOFTMAX_AT(OrtApi, SetDimensions, 59);
SA_SOFTMAX_AT(OrtApi, GetTensorElementType, 60);
SA_SOFTMAX_AT(OrtApi, GetDimensionsCount, 61);
SA_SOFTMAX_AT(OrtApi, GetDimensions, 62);
SA_SOFTMAX_AT(OrtApi, GetSymbolicDimensions, 63);
SA_SOFTMAX_AT(OrtApi, GetTensorTypeAndShape, 65);
SA_SOFTMAX_AT(OrtApi, KernelInfoGetAttribute_float, 85);
SA_SOFTMAX_AT(OrtApi, KernelInfoGetAttribute_int64, 86);
SA_SOFTMAX_AT(OrtApi, KernelInfoGetAttribute_string, 87);
SA_SOFTMAX_AT(OrtApi, KernelContext_GetInputCount, 88);
SA_SOFTMAX_AT(OrtApi, KernelContext_GetInput, 90);
SA_SOFTMAX_AT(OrtApi, KernelContext_GetOutput, 91);
SA_SOFTMAX_AT(OrtApi, ReleaseStatus, 93);
SA_SOFTMAX_AT(OrtApi, ReleaseTensorTypeAndShapeInfo, 99);
SA_SOFTMAX_AT(OrtApi, ReleaseCustomOpDomain, 101);
SA_SOFTMAX_AT(OrtApi, KernelInfoGetAttributeArray_float, 162);
SA_SOFTMAX_AT(OrtApi, KernelInfoGetAttributeArray_int64, 163);
SA_SOFTMAX_AT(OrtApi, ShapeInferContext_GetInputCount, 267);
SA_SOFTMAX_AT(OrtApi, ShapeInferContext_GetInputTypeShape, 268);
SA_SOFTMAX_AT(OrtApi, ShapeInferContext_SetOutputTypeShape, 270);
SA_SOFTMAX_AT(OrtApi, SetSymbolicDimensions, 271);
SA_SOFTMAX_AT(OrtApi, KernelContext_ParallelFor, 274);
SA_SOFTMAX_AT(OrtApiBase, GetApi, 0);
SA_SOFTMAX_AT(OrtApiBase, GetVersionString, 1);
SA_SOFTMAX_AT(OrtCustomOp, CreateKernel, 1);
SA_SOFTMAX_AT(OrtCustomOp, GetName, 2);
SA_SOFTMAX_AT(OrtCustomOp, GetExecutionProviderType, 3);
SA_SOFTMAX_AT(OrtCustomOp, GetInputType, 4);
SA_SOFTMAX_AT(OrtCustomOp, GetInputTypeCount, 5);
SA_SOFTMAX_AT(OrtCustomOp, GetOutputType, 6);
SA_SOFTMAX_AT(OrtCustomOp, GetOutputTypeCount, 7);
SA_SOFTMAX_AT(OrtCustomOp, KernelCompute, 8);
SA_SOFTMAX_AT(OrtCustomOp, KernelDestroy, 9);
SA_SOFTMAX_AT(OrtCustomOp, GetInputCharacteristic, 10);
SA_SOFTMAX_AT(OrtCustomOp, GetOutputCharacteristic, 11);
SA_SOFTMAX_AT(OrtCustomOp, GetInputMemoryType, 12);
SA_SOFTMAX_AT(OrtCustomOp, GetVariadicInputMinArity, 13);
SA_SOFTMAX_AT(OrtCustomOp, GetVariadicOutputHomogeneity, 16);
SA_SOFTMAX_AT(OrtCustomOp, CreateKernelV2, 17);
SA_SOFTMAX_AT(OrtCustomOp, KernelComputeV2, 18);
SA_SOFTMAX_AT(OrtCustomOp, InferOutputShapeFn, 19);
SA_SOFTMAX_AT(OrtCustomOp, GetStartVersion, 20);
SA_SOFTMAX_AT(OrtCustomOp, GetEndVersion, 21);
SA_SOFTMAX_AT(OrtCustomOp, GetMayInplace, 22);
SA_SOFTMAX_AT(OrtCustomOp, ReleaseAliasMap, 25);
#undef SA_SOFTMAX_AT

static_assert(ORT_FAIL == 1 && ORT_INVALID_ARGUMENT == 2 && OrtMemTypeDefault == 0);
static_assert(INPUT_OUTPUT_REQUIRED == 0 && INPUT_OUTPUT_OPTIONAL == 1);
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == 1 && ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL == 9 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == 10 && ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE == 11 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 == 16);

}  // namespace sa_softmax
