// The operator moeify.kernels.DispatchFFN of ONNX Runtime: reads and checks its inputs, and runs the mixture on the
// runtime's own threads and memory.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <string>

#include "runtime.h"

namespace moeify {
namespace {

enum Input : size_t {
  kX, kExperts, kWeights, kUp, kGate, kDown, kUpBias, kGateBias, kDownBias, kUpScale, kGateScale, kDownScale, kInputs,
};
constexpr const char* kInputNames[kInputs] = {
    "x",       "experts",   "weights",   "up",       "gate",       "down",
    "up_bias", "gate_bias", "down_bias", "up_scale", "gate_scale", "down_scale",
};
constexpr int kInputTypes[kInputs] = {
    ort::kFloat,     ort::kInt64, ort::kFloat, ort::kUndefined, ort::kUndefined, ort::kUndefined,
    ort::kFloat,     ort::kFloat, ort::kFloat, ort::kFloat,     ort::kFloat,     ort::kFloat,
};
constexpr bool required(size_t input) { return input <= kUp || input == kDown; }

class Kernel {
 public:
  Kernel(const OrtApi* api, const OrtKernelInfo* info, Outcome& outcome) : api_(api) {
    char name[32] = "";
    size_t size = sizeof name;
    outcome.take(ort::KernelInfoGetAttributeString::call(api, info, "activation", name, &size));
    d_expert_ = attribute(info, "d_expert", outcome);
    d_out_ = attribute(info, "d_out", outcome);
    OrtStatus* absent = ort::KernelInfoGetAttributeInt64::call(api, info, "block", &block_);
    if (absent != nullptr) ort::ReleaseStatus::call(api, absent);
    if (!outcome.ok()) return;
    size_t index = 0;
    const size_t count = sizeof kActivationNames / sizeof *kActivationNames;
    while (index < count && std::strcmp(kActivationNames[index], name) != 0) ++index;
    if (index == count) outcome.fail("activation: there is no " + std::string(name));
    activation_ = Activation(index);
    if (d_expert_ < 1 || d_out_ < 1) outcome.fail("d_expert, d_out: must be at least 1");
    if (block_ != 0 && block_ != 32 && block_ != 64 && block_ != 128 && block_ != 256) {
      outcome.fail("block: is " + std::to_string(block_) + "; 0, 32, 64, 128 or 256 inputs share a scale");
    }
    if (outcome.ok()) outcome.take(ort::KernelInfoGetAllocator::call(api, info, ort::kDefaultMemory, &allocator_));
  }

  ~Kernel() {
    if (allocator_ != nullptr) ort::ReleaseAllocator::call(api_, allocator_);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Outcome outcome(api_);
    Tensor inputs[kInputs];
    read(context, inputs, outcome);
    Mixture m;
    if (outcome.ok()) describe(inputs, m, outcome);
    if (!outcome.ok()) return outcome.status();
    const int64_t sizes[] = {int64_t(m.choices.tokens), d_out_};
    OrtValue* y = nullptr;
    void* data = nullptr;
    if (!outcome.take(ort::KernelContextGetOutput::call(api_, context, 0, sizes, 2, &y)) ||
        !outcome.take(ort::GetTensorMutableData::call(api_, y, &data))) {
      return outcome.status();
    }
    m.y = static_cast<float*>(data);
    Call call(api_, context, allocator_, outcome);
    const std::string problem = run(m, best_kernels(), call);
    if (!problem.empty()) outcome.fail(problem);
    return outcome.status();
  }

 private:
  int64_t attribute(const OrtKernelInfo* info, const char* name, Outcome& outcome) {
    int64_t value = 0;
    if (outcome.ok()) outcome.take(ort::KernelInfoGetAttributeInt64::call(api_, info, name, &value));
    return value;
  }

  void read(OrtKernelContext* context, Tensor* inputs, Outcome& outcome) const {
    size_t given = 0;
    outcome.take(ort::KernelContextGetInputCount::call(api_, context, &given));
    for (size_t i = 0; i < kInputs && outcome.ok(); ++i) {
      inputs[i].name = kInputNames[i];
      const OrtValue* value = nullptr;
      if (i < given) outcome.take(ort::KernelContextGetInput::call(api_, context, i, &value));
      if (value != nullptr) read_tensor(api_, value, inputs[i], outcome);
    }
  }

  void describe(const Tensor* inputs, Mixture& m, Outcome& outcome) const {
    const Tensor &x = inputs[kX], &experts = inputs[kExperts], &up = inputs[kUp];
    const bool gated = inputs[kGate].data != nullptr;
    m.experts = up.sizes[0];
    m.activation = activation_;
    m.block = size_t(block_);
    m.choices = {x.as<float>(), experts.as<int64_t>(), inputs[kWeights].as<float>(),
                 x.sizes[0],    up.sizes[2],           experts.sizes[1]};
    const size_t hidden = size_t(d_expert_), out = size_t(d_out_);
    if (!storage_of(up, m.storage, outcome)) return;
    expect(x, {m.choices.tokens, m.choices.width}, outcome);
    expect(experts, {m.choices.tokens, m.choices.k}, outcome);
    expect(inputs[kWeights], {m.choices.tokens, m.choices.k}, outcome);
    if (m.choices.k == 0) outcome.fail("experts: a token has no slot");
    if (m.experts == 0 || m.choices.width == 0) outcome.fail("up: is empty, " + text(up.sizes, up.rank));
    m.up = matrix(inputs, kUp, m, hidden, m.choices.width, outcome);
    m.down = matrix(inputs, kDown, m, out, hidden, outcome);
    if (gated) m.gate = matrix(inputs, kGate, m, hidden, m.choices.width, outcome);
    for (const Input input : {kGateBias, kGateScale}) {
      if (!gated && inputs[input].data != nullptr) {
        outcome.fail(std::string(kInputNames[input]) + ": given, and there is no gate");
      }
    }
  }

  bool storage_of(const Tensor& up, Storage& storage, Outcome& outcome) const {
    switch (up.type) {
      case ort::kFloat: storage = Storage::kFloat32; return true;
      case ort::kFloat16: storage = Storage::kFloat16; return true;
      case ort::kBfloat16: storage = Storage::kBfloat16; return true;
      case ort::kInt8: storage = Storage::kInt8; return true;
    }
    return outcome.fail("up: weights are float32, float16, bfloat16 or int8, and these have element type " +
                        std::to_string(up.type));
  }

  // The input `which`, its bias and its scales, which follow in the same order.
  Matrix matrix(const Tensor* inputs, Input which, const Mixture& m, size_t width, size_t depth,
                Outcome& outcome) const {
    const Tensor& panels = inputs[which];
    const Tensor& bias = inputs[which + (kUpBias - kUp)];
    const Tensor& scales = inputs[which + (kUpScale - kUp)];
    Matrix matrix;
    matrix.panels = panels.as<char>();
    matrix.width = width;
    matrix.depth = depth;
    matrix.blocks = block_ == 0 ? 1 : (depth + size_t(block_) - 1) / size_t(block_);
    matrix.panel_bytes = depth * kColumns * bytes_of(m.storage);
    if (panels.type != inputs[kUp].type) outcome.fail(std::string(panels.name) + ": is not of the type of up");
    expect(panels, {m.experts, matrix.count(), depth, kColumns}, outcome);
    if (bias.data != nullptr) {
      expect(bias, {m.experts, width}, outcome);
      matrix.bias = bias.as<float>();
    }
    const bool wanted = m.storage == Storage::kInt8;
    if (wanted != (scales.data != nullptr)) {
      outcome.fail(std::string(scales.name) + (wanted ? ": int8 weights need it" : ": these weights have no scales"));
    } else if (wanted) {
      expect(scales, {m.experts, matrix.count(), matrix.blocks, kColumns}, outcome);
      matrix.scales = scales.as<float>();
    }
    return matrix;
  }

  void expect(const Tensor& tensor, std::initializer_list<size_t> sizes, Outcome& outcome) const {
    if (tensor.rank == sizes.size() && std::equal(sizes.begin(), sizes.end(), tensor.sizes)) return;
    outcome.fail(std::string(tensor.name) + ": is " + text(tensor.sizes, tensor.rank) + ", and must be " +
                 text(sizes.begin(), sizes.size()));
  }

  const OrtApi* api_;
  OrtAllocator* allocator_ = nullptr;
  Activation activation_ = Activation::kIdentity;
  int64_t d_expert_ = 0, d_out_ = 0, block_ = 0;
};

OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** out) {
  Outcome outcome(api);
  Kernel* const kernel = new Kernel(api, info, outcome);
  if (outcome.ok()) *out = kernel;
  else delete kernel;
  return outcome.status();
}

OrtCustomOp make_op() {
  OrtCustomOp op = {};
  op.version = ort::kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return kInputTypes[i]; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return required(i) ? ort::kRequired : ort::kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ort::kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return static_cast<const Kernel*>(kernel)->compute(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace
}  // namespace moeify

#if defined(_WIN32)
#define MOEIFY_EXPORT __declspec(dllexport)
#else
#define MOEIFY_EXPORT __attribute__((visibility("default")))
#endif

extern "C" MOEIFY_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace moeify;
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    const std::string message = std::string("the kernels of moeify need ONNX Runtime ") + ort::kOldestRuntime +
                                " or newer, and this is " + base->GetVersionString();
    return ort::CreateStatus::call(base->GetApi(1), ort::kFail, message.c_str());
  }
  // The runtime keeps pointers to both for as long as it has sessions. Sessions may be opened by several threads.
  static const OrtCustomOp op = make_op();
  static OrtCustomOpDomain* domain = nullptr;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  Outcome outcome(api);
  if (domain == nullptr) {
    OrtCustomOpDomain* made = nullptr;
    if (outcome.take(ort::CreateCustomOpDomain::call(api, kDomain, &made)) &&
        outcome.take(ort::CustomOpDomainAdd::call(api, made, &op))) {
      domain = made;
    } else if (made != nullptr) {
      ort::ReleaseCustomOpDomain::call(api, made);
    }
  }
  if (outcome.ok()) outcome.take(ort::AddCustomOpDomain::call(api, options, domain));
  return outcome.status();
}

// The instruction set that the kernels use on this processor.
extern "C" MOEIFY_EXPORT const char* moeify_isa() { return moeify::best_kernels().name; }

// Of what the library was made: kernel_compile.py's digest of the sources.
#ifndef MOEIFY_SOURCES
#define MOEIFY_SOURCES ""
#endif
extern "C" MOEIFY_EXPORT const char* moeify_sources() { return MOEIFY_SOURCES; }
