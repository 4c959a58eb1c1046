// The whole operator, with no word of ONNX Runtime: y[t] = sum_k weights[t, k] * expert[experts[t, k]](x[t]).
#pragma once

#include <string>

#include "kernels.h"
#include "layout.h"
#include "routing.h"

namespace moeify {

// What the operator needs of the program around it.
class Host {
 public:
  // Runs task(data, i) for each i below count, on several threads, and returns when all are done; false where that
  // cannot be done, and then it is not known which tasks have run.
  virtual bool parallel(size_t count, void (*task)(void* data, size_t i), void* data) = 0;
  // Memory that lives until `release`; null where there is none.
  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* memory) = 0;

 protected:
  ~Host() = default;
};

struct Mixture {
  Choices choices;
  size_t experts;
  Storage storage;
  size_t block;  // inputs that share a scale
  Activation activation;
  Matrix up, gate, down;  // gate.panels is null where there is none
  float* y;               // [tokens][down.width]
};

// Computes y. "" or what is wrong: an index out of range, before anything is written; no memory; no threads.
std::string run(const Mixture& mixture, const Kernels& kernels, Host& host);

}  // namespace moeify
