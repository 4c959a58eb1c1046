// Runs a compiled program: tensors of IN.safetensors by name in, OUT.safetensors with the results 0, 1, ... out.
//
//   build/run OUT IN.safetensors RESULT.safetensors
//
// TVM_NUM_THREADS sets the number of threads; TVM_BIND_THREADS=0 lets them move between processors.
#include <cstdio>
#include <exception>

#include "program.h"

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s OUT IN.safetensors RESULT.safetensors\n", argv[0]);
    return 2;
  }
  try {
    moeify::Program program(argv[1]);
    auto inputs = moeify::ReadTensors(argv[2]);
    std::vector<std::pair<std::string, tvm::ffi::Tensor>> results;
    for (auto& output : program.Run(inputs)) results.emplace_back(std::to_string(results.size()), output);
    moeify::WriteTensors(argv[3], results);
    std::printf("wrote %zu results to %s\n", results.size(), argv[3]);
  } catch (const std::exception& error) {  // tvm::ffi::Error is one
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
