// The native operator against a plain one in double, over random shapes, routings, storages and activations, on every
// instruction set of this processor and on several threads. Every array has exactly the size it needs, so that a
// sanitizer sees any read or write outside.
//
//   fuzz [cases] [seed]
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "mixture.h"
#include "runtime.h"

using namespace moeify;

namespace {

// float32 sums of up to 200 products, twice over.
constexpr double kTolerance = 2e-6;

class Threads final : public Host {
 public:
  explicit Threads(size_t count) : count_(count) {}

  bool parallel(size_t count, void (*task)(void*, size_t), void* data) override {
    std::atomic<size_t> next{0};
    const auto work = [&] {
      for (size_t i = next++; i < count; i = next++) task(data, i);
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < count_; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return true;
  }
  // Filled with NaN, so that nothing is used before it is written.
  void* allocate(size_t bytes) override {
    void* memory = std::malloc(bytes);
    std::memset(memory, 0xff, bytes);
    return memory;
  }
  void release(void* memory) override { std::free(memory); }

 private:
  size_t count_;
};

std::mt19937 random_bits;

size_t below(size_t limit) { return std::uniform_int_distribution<size_t>(0, limit - 1)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }
std::vector<float> normals(size_t count, float scale = 1) {
  std::vector<float> values(count);
  for (float& value : values) value = scale * normal();
  return values;
}

// A weight as it is stored, and its value: float16 and bfloat16 are made from their bits by their definition.
double stored(Storage storage, char* to) {
  if (storage == Storage::kInt8) {
    const int8_t value = int8_t(int(below(255)) - 127);
    std::memcpy(to, &value, 1);
    return value;
  }
  if (storage == Storage::kFloat32) {
    const float value = 0.1f * normal();
    std::memcpy(to, &value, 4);
    return value;
  }
  const bool half = storage == Storage::kFloat16;
  const int fraction_bits = half ? 10 : 7, bias = half ? 15 : 127;
  // Around 1/16, and now and then 0, a denormal or the like: exponent 0.
  const int exponent = below(50) == 0 ? 0 : bias - 4 - int(below(3));
  const int fraction = int(below(size_t(1) << fraction_bits)), sign = int(below(2));
  const uint16_t bits = uint16_t(sign << 15 | exponent << fraction_bits | fraction);
  std::memcpy(to, &bits, 2);
  const double whole = (exponent == 0 ? 0.0 : 1.0) + std::ldexp(fraction, -fraction_bits);
  return (sign ? -1 : 1) * std::ldexp(whole, std::max(exponent, 1) - bias);
}

struct Weights {
  std::vector<char> panels;
  std::vector<float> scales, bias;
  std::vector<double> plain;  // [experts][width][depth]
  Matrix matrix;

  Weights(size_t experts, size_t width, size_t depth, Storage storage, size_t block, bool with_bias) {
    const size_t count = panel_count(width), blocks = block == 0 ? 1 : (depth + block - 1) / block;
    const size_t bytes = bytes_of(storage);
    panels.resize(experts * count * depth * kColumns * bytes);
    plain.resize(experts * width * depth);
    if (storage == Storage::kInt8) {
      scales = normals(experts * count * blocks * kColumns, 0.001f);
      matrix.scales = scales.data();
    }
    for (size_t e = 0; e < experts; ++e) {
      for (size_t row = 0; row < width; ++row) {
        const size_t panel = e * count + row / kColumns, j = row % kColumns;
        for (size_t d = 0; d < depth; ++d) {
          double value = stored(storage, panels.data() + ((panel * depth + d) * kColumns + j) * bytes);
          if (!scales.empty()) value *= scales[(panel * blocks + (block == 0 ? 0 : d / block)) * kColumns + j];
          plain[(e * width + row) * depth + d] = value;
        }
      }
    }
    if (with_bias) bias = normals(experts * width, 0.1f);
    matrix.panels = panels.data();
    matrix.bias = with_bias ? bias.data() : nullptr;
    matrix.width = width;
    matrix.depth = depth;
    matrix.blocks = blocks;
    matrix.panel_bytes = depth * kColumns * bytes;
  }

  std::vector<double> times(size_t expert, const std::vector<double>& x) const {
    std::vector<double> y(matrix.width);
    for (size_t row = 0; row < matrix.width; ++row) {
      y[row] = bias.empty() ? 0 : bias[expert * matrix.width + row];
      const double* weights = plain.data() + (expert * matrix.width + row) * matrix.depth;
      for (size_t d = 0; d < matrix.depth; ++d) y[row] += weights[d] * x[d];
    }
    return y;
  }
};

double activated(Activation a, double u) {
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  switch (a) {
    case Activation::kIdentity: return u;
    case Activation::kRelu: return std::max(u, 0.0);
    case Activation::kRelu2: return std::max(u, 0.0) * std::max(u, 0.0);
    case Activation::kGelu: return 0.5 * u * (1 + std::erf(u / std::sqrt(2.0)));
    case Activation::kGeluTanh: return u * sigmoid(2 * std::sqrt(2 / std::acos(-1.0)) * (u + 0.044715 * u * u * u));
    case Activation::kQuickGelu: return u * sigmoid(1.702 * u);
    case Activation::kSilu: return u * sigmoid(u);
    case Activation::kSigmoid: return sigmoid(u);
    case Activation::kTanh: return std::tanh(u);
    case Activation::kRelu6: return std::min(std::max(u, 0.0), 6.0);
  }
  return u;
}

[[noreturn]] void fail(const char* what, const std::string& where) {
  std::printf("FAILED: %s (%s)\n", what, where.c_str());
  std::exit(1);
}

std::vector<const Kernels*> tables() {
  const std::string best = best_kernels().name;
  std::vector<const Kernels*> found{baseline_kernels()};
  if (best == "avx2" || best == "avx512") found.push_back(avx2_kernels());
  if (best == "avx512") found.push_back(avx512_kernels());
  return found;
}

// Half of the cases have sizes in the tens, where every remainder comes up; the others one large size each, for several
// groups, windows and shares.
size_t size(size_t small, size_t large) { return 1 + (below(8) == 0 ? below(large) : below(small)); }

// One case on all tables; returns its largest error relative to the largest result.
double run_case(size_t number) {
  const size_t experts = size(9, 40), width = size(40, 200), hidden = size(40, 200), out = size(40, 200);
  const size_t k = size(3, 9);
  const size_t tokens = below(10) == 0 ? 0 : below(25) == 0 ? 500 + below(600) : size(20, 150);
  const Storage storage = Storage(below(kStorages));
  const size_t blocks[] = {0, 32, 64, 128, 256};
  const size_t block = storage == Storage::kInt8 ? blocks[below(5)] : 0;
  const Activation activation = Activation(below(sizeof kActivationNames / sizeof *kActivationNames));
  const bool gated = below(2) == 1;
  const std::string where = "case " + std::to_string(number) + ": " + std::to_string(tokens) + " tokens, " +
                            std::to_string(experts) + " experts " + std::to_string(width) + " to " +
                            std::to_string(hidden) + " to " + std::to_string(out) + ", k " + std::to_string(k) +
                            ", storage " + std::to_string(int(storage)) + ", " + kActivationNames[int(activation)];
  const Weights up(experts, hidden, width, storage, block, below(2) == 1);
  const Weights gate(experts, hidden, width, storage, block, below(2) == 1);
  const Weights down(experts, out, hidden, storage, block, below(2) == 1);
  const std::vector<float> x = normals(tokens * width);
  std::vector<float> weights = normals(tokens * k);
  std::vector<int64_t> chosen(tokens * k);
  const size_t favourite = below(experts);
  for (int64_t& expert : chosen) expert = int64_t(below(3) == 0 ? favourite : below(experts));  // loads far from even
  for (float& weight : weights) weight = below(4) == 0 ? 0.0f : weight;

  Mixture m;
  m.choices = {x.data(), chosen.data(), weights.data(), tokens, width, k};
  m.experts = experts;
  m.storage = storage;
  m.block = block;
  m.activation = activation;
  m.up = up.matrix;
  m.down = down.matrix;
  if (gated) m.gate = gate.matrix;

  std::vector<double> wanted(tokens * out);
  double largest = 0;
  for (size_t t = 0; t < tokens; ++t) {
    const std::vector<double> row(x.begin() + t * width, x.begin() + (t + 1) * width);
    for (size_t i = 0; i < k; ++i) {
      const size_t e = size_t(chosen[t * k + i]);
      std::vector<double> h = up.times(e, row);
      const std::vector<double> g = gated ? gate.times(e, row) : h;
      for (size_t f = 0; f < hidden; ++f) h[f] = activated(activation, g[f]) * (gated ? h[f] : 1);
      const std::vector<double> y = down.times(e, h);
      for (size_t o = 0; o < out; ++o) wanted[t * out + o] += double(weights[t * k + i]) * y[o];
    }
  }
  for (double value : wanted) largest = std::max(largest, std::abs(value));

  double worst = 0;
  for (const Kernels* kernels : tables()) {
    std::vector<float> first;
    for (const size_t threads : {1, 3}) {
      std::vector<float> y(tokens * out, std::numeric_limits<float>::quiet_NaN());
      m.y = y.data();
      Threads host(threads);
      const std::string problem = run(m, *kernels, host);
      if (!problem.empty()) fail(problem.c_str(), where);
      for (size_t i = 0; i < y.size(); ++i) {
        const double error = std::abs(y[i] - wanted[i]) / (largest + 1e-30);
        if (!(error <= kTolerance)) {
          fail((std::string(kernels->name) + " is off by " + std::to_string(error)).c_str(), where);
        }
        worst = std::max(worst, error);
      }
      if (first.empty()) first = y;
      if (!std::equal(y.begin(), y.end(), first.begin())) fail("the result depends on the number of threads", where);
    }
  }

  if (tokens > 0) {  // an index just outside, anywhere: refused, and nothing is read or written
    chosen[below(chosen.size())] = below(2) == 0 ? -1 : int64_t(experts);
    m.y = nullptr;
    Threads host(1);
    if (run(m, best_kernels(), host).find("experts: index ") != 0) fail("a bad index was taken", where);
  }
  return worst;
}

// NaN and infinity come out where torch has them, and nowhere else.
void special_values() {
  const size_t width = 20, hidden = 33, out = 18;
  for (const Kernels* kernels : tables()) {
    for (size_t a = 0; a < sizeof kActivationNames / sizeof *kActivationNames; ++a) {
      const Weights up(2, hidden, width, Storage::kFloat32, 0, true), down(2, out, hidden, Storage::kFloat32, 0, true);
      std::vector<float> x = normals(4 * width);
      x[1 * width + 3] = std::numeric_limits<float>::quiet_NaN();
      x[2 * width + 7] = std::numeric_limits<float>::infinity();
      const int64_t chosen[] = {0, 1, 0, 1};
      const float weights[] = {1, 1, 0, std::numeric_limits<float>::quiet_NaN()};
      std::vector<float> y(4 * out);
      Mixture m;
      m.choices = {x.data(), chosen, weights, 4, width, 1};
      m.experts = 2;
      m.storage = Storage::kFloat32;
      m.block = 0;
      m.activation = Activation(a);
      m.up = up.matrix;
      m.down = down.matrix;
      m.y = y.data();
      Threads host(1);
      run(m, *kernels, host);
      for (size_t o = 0; o < out; ++o) {
        const bool right = std::isfinite(y[o]) && std::isnan(y[out + o]) && std::isnan(y[3 * out + o]);
        if (!right) fail("NaN did not propagate, or spread", std::string(kernels->name) + " " + kActivationNames[a]);
        // 0 times a result that is not finite is NaN. Bounded activations make infinity finite; of the others, every
        // row of down mixes infinities.
        const bool bounded = a == size_t(Activation::kSigmoid) || a == size_t(Activation::kTanh) ||
                             a == size_t(Activation::kRelu6);
        if (bounded ? y[2 * out + o] != 0 : !std::isnan(y[2 * out + o])) {
          fail("a slot of weight 0 was skipped, and its row is not finite",
               std::string(kernels->name) + " " + kActivationNames[a]);
        }
      }
    }
  }
}

// What the runtime would have to do for its threads to take no work: a table of its functions that has only what the
// call reads.
OrtStatus* const kRefused = reinterpret_cast<OrtStatus*>(&random_bits);
OrtStatus* refuse(const OrtKernelContext*, ort::Task, size_t, size_t, void*) { return kRefused; }
OrtStatus* allocate(OrtAllocator*, size_t bytes, void** out) {
  *out = std::malloc(bytes);
  return nullptr;
}
OrtStatus* release(OrtAllocator*, void* memory) {
  std::free(memory);
  return nullptr;
}

// A refusal of the runtime's threads is the runtime's own error; nothing is computed on one thread in silence.
void refused_threads() {
  std::vector<void*> table(300);
  table[274] = reinterpret_cast<void*>(refuse);  // KernelContextParallelFor, AllocatorAlloc and AllocatorFree
  table[75] = reinterpret_cast<void*>(allocate);
  table[76] = reinterpret_cast<void*>(release);
  const OrtApi* api = reinterpret_cast<const OrtApi*>(table.data());

  const size_t tokens = 64, size = 200;  // enough for several shares
  const Weights up(2, size, size, Storage::kFloat32, 0, true), down(2, size, size, Storage::kFloat32, 0, true);
  const std::vector<float> x = normals(tokens * size), weights(tokens, 1.0f);
  const std::vector<int64_t> chosen(tokens, 1);
  std::vector<float> y(tokens * size);
  Mixture m;
  m.choices = {x.data(), chosen.data(), weights.data(), tokens, size, 1};
  m.experts = 2;
  m.storage = Storage::kFloat32;
  m.block = 0;
  m.activation = Activation::kRelu;
  m.up = up.matrix;
  m.down = down.matrix;
  m.y = y.data();
  Outcome outcome(api);
  Call call(api, nullptr, nullptr, outcome);
  if (run(m, best_kernels(), call).empty()) fail("refused threads were no problem", "one expert of two");
  if (outcome.status() != kRefused) fail("the runtime's error was lost", "one expert of two");
}

}  // namespace

int main(int argc, char** argv) {
  const size_t cases = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 200;
  random_bits.seed(argc > 2 ? unsigned(std::strtoul(argv[2], nullptr, 10)) : 0u);
  special_values();
  refused_threads();
  double worst = 0;
  for (size_t i = 0; i < cases; ++i) worst = std::max(worst, run_case(i));
  std::string names;
  for (const Kernels* kernels : tables()) names += std::string(names.empty() ? "" : ", ") + kernels->name;
  std::printf("%zu cases on %s: largest error %.1e\n", cases, names.c_str(), worst);
}
