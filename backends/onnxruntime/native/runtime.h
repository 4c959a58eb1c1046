// ONNX Runtime as the rest of the library sees it: its tensors, its errors, its threads and its memory.
#pragma once

#include <string>

#include "mixture.h"
#include "ort_api.h"

namespace moeify {

constexpr const char* kDomain = "moeify.kernels";
constexpr const char* kName = "DispatchFFN";

constexpr size_t kMostDimensions = 4;

// A tensor as the runtime gives it; `data` is null where an optional input is left out.
struct Tensor {
  const char* name = nullptr;
  const void* data = nullptr;
  int type = ort::kUndefined;
  size_t rank = 0;
  size_t sizes[kMostDimensions] = {};

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

inline std::string text(const size_t* sizes, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "]";
}

// An error of the runtime, or one of ours; the first wins, and later steps do nothing.
class Outcome {
 public:
  explicit Outcome(const OrtApi* api) : api_(api) {}

  bool ok() const { return status_ == nullptr; }

  bool take(OrtStatus* status) {
    if (status_ == nullptr) status_ = status;
    else if (status != nullptr) ort::ReleaseStatus::call(api_, status);
    return ok();
  }

  bool fail(const std::string& what) {
    const std::string message = std::string(kDomain) + "." + kName + ": " + what;
    return ok() && take(ort::CreateStatus::call(api_, ort::kInvalidArgument, message.c_str()));
  }

  OrtStatus* status() const { return status_; }

 private:
  const OrtApi* api_;
  OrtStatus* status_ = nullptr;
};

// One call's threads and memory.
class Call final : public Host {
 public:
  Call(const OrtApi* api, OrtKernelContext* context, OrtAllocator* allocator, Outcome& outcome)
      : api_(api), context_(context), allocator_(allocator), outcome_(outcome) {}

  // A refusal is the call's error: on one thread it would go on, and nobody would know why it is slow.
  bool parallel(size_t count, void (*task)(void*, size_t), void* data) override {
    // Batches 0: threads take the next task as they become free.
    return outcome_.take(ort::KernelContextParallelFor::call(api_, context_, task, count, 0, data));
  }

  void* allocate(size_t bytes) override {
    void* memory = nullptr;
    OrtStatus* status = ort::AllocatorAlloc::call(api_, allocator_, bytes, &memory);
    if (status != nullptr) ort::ReleaseStatus::call(api_, status);
    return memory;
  }

  void release(void* memory) override {
    OrtStatus* status = ort::AllocatorFree::call(api_, allocator_, memory);
    if (status != nullptr) ort::ReleaseStatus::call(api_, status);
  }

 private:
  const OrtApi* api_;
  OrtKernelContext* context_;
  OrtAllocator* allocator_;
  Outcome& outcome_;
};

// Fills `tensor`, whose name is set.
inline void read_tensor(const OrtApi* api, const OrtValue* value, Tensor& tensor, Outcome& outcome) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (!outcome.take(ort::GetTensorTypeAndShape::call(api, value, &info))) return;
  int64_t sizes[kMostDimensions] = {};
  outcome.take(ort::GetTensorElementType::call(api, info, &tensor.type));
  outcome.take(ort::GetDimensionsCount::call(api, info, &tensor.rank));
  if (tensor.rank > kMostDimensions) {
    outcome.fail(std::string(tensor.name) + ": has " + std::to_string(tensor.rank) + " dimensions");
  } else {
    outcome.take(ort::GetDimensions::call(api, info, sizes, tensor.rank));
  }
  ort::ReleaseTensorTypeAndShapeInfo::call(api, info);
  for (size_t i = 0; i < kMostDimensions; ++i) tensor.sizes[i] = size_t(sizes[i]);
  void* data = nullptr;
  // It is only read: the API has no function for that.
  outcome.take(ort::GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &data));
  // A tensor of no elements may have no memory; null here means that the input was left out.
  static const char nothing = 0;
  tensor.data = data == nullptr ? &nothing : data;
}

}  // namespace moeify
