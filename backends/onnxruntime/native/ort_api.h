// The part of ONNX Runtime's C API that a custom operator needs, without its header, which no Python package carries.
//
// The API is a table of functions. Its documented rule is that versions only append to it, so that a function keeps its
// position for ever: include/onnxruntime/core/session/onnxruntime_c_api.h of https://github.com/microsoft/onnxruntime.
// The tests call all but ReleaseCustomOpDomain, so that a wrong position does not go unseen.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtAllocator;
struct OrtShapeInferContext;
struct OrtApi;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null for a version that the runtime does not have
  const char* (*GetVersionString)();
};

// The description of an operator, of which each runtime reads as much as `version` says is there.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  // From version 16 on.
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  // From version 17 on.
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  // From version 18 on.
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // extern "C"

namespace moeify::ort {

constexpr uint32_t kApiVersion = 18;
constexpr const char* kOldestRuntime = "1.18";

// Codes of a status, types of elements, kinds of inputs and of memory.
constexpr int kFail = 1, kInvalidArgument = 2;
constexpr int kUndefined = 0, kFloat = 1, kInt8 = 3, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16;
constexpr int kRequired = 0, kOptional = 1;
constexpr int kDefaultMemory = 0;

template <size_t position, class Function>
struct Entry;

// Calls the function at a position of the table.
template <size_t position, class Result, class... Arguments>
struct Entry<position, Result(Arguments...)> {
  static Result call(const OrtApi* api, Arguments... arguments) {
    void* const* table = reinterpret_cast<void* const*>(api);
    return reinterpret_cast<Result (*)(Arguments...)>(table[position])(arguments...);
  }
};

using CreateStatus = Entry<0, OrtStatus*(int code, const char* message)>;
using CreateCustomOpDomain = Entry<26, OrtStatus*(const char* name, OrtCustomOpDomain** out)>;
using CustomOpDomainAdd = Entry<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Entry<51, OrtStatus*(OrtValue*, void** out)>;
using GetTensorElementType = Entry<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int* out)>;
using GetDimensionsCount = Entry<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* out)>;
using GetDimensions = Entry<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t* out, size_t count)>;
using GetTensorTypeAndShape = Entry<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo** out)>;
using AllocatorAlloc = Entry<75, OrtStatus*(OrtAllocator*, size_t bytes, void** out)>;
using AllocatorFree = Entry<76, OrtStatus*(OrtAllocator*, void*)>;
using KernelInfoGetAttributeInt64 = Entry<86, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t* out)>;
using KernelInfoGetAttributeString =
    Entry<87, OrtStatus*(const OrtKernelInfo*, const char* name, char* out, size_t* size)>;
using KernelContextGetInputCount = Entry<88, OrtStatus*(const OrtKernelContext*, size_t* out)>;
using KernelContextGetInput = Entry<90, OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue** out)>;
using KernelContextGetOutput =
    Entry<91, OrtStatus*(OrtKernelContext*, size_t index, const int64_t* sizes, size_t count, OrtValue** out)>;
using ReleaseStatus = Entry<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void(OrtTensorTypeAndShapeInfo*)>;
using ReleaseCustomOpDomain = Entry<101, void(OrtCustomOpDomain*)>;
using ReleaseAllocator = Entry<132, void(OrtAllocator*)>;
using Task = void (*)(void* data, size_t i);
using KernelContextParallelFor =
    Entry<274, OrtStatus*(const OrtKernelContext*, Task, size_t count, size_t batches, void* data)>;
using KernelInfoGetAllocator = Entry<278, OrtStatus*(const OrtKernelInfo*, int memory, OrtAllocator** out)>;

}  // namespace moeify::ort
