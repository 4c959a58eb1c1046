// What `moeify export MODEL.pt2 --to tvm -o OUT` wrote, run by TVM's virtual machine. No Python.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cctype>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tensors.h"

namespace moeify {

class Program {
 public:
  // `folder` holds lib.so, params.safetensors and moeify.json. lib.so is machine code and runs with your rights.
  explicit Program(const std::string& folder) {
    auto header = ParseJson(ReadText(folder + "/moeify.json"), folder + "/moeify.json").cast<json::Object>();
    if (header["format"].cast<int64_t>() != 1) throw std::runtime_error(folder + " is of another format");
    if (std::string(header["device"].cast<ffi::String>()) != "cpu") {
      throw std::runtime_error(folder + " was compiled for a GPU; this example is for the CPU");
    }
    for (const auto& input : header["inputs"].cast<json::Array>()) {
      auto one = input.cast<json::Object>();
      names_.push_back(std::string(one["name"].cast<ffi::String>()));
      types_.push_back(ffi::StringToDLDataType(one["dtype"].cast<ffi::String>()));
      std::vector<std::string> sizes;
      for (const auto& size : one["shape"].cast<json::Array>()) {
        auto name = size.as<ffi::String>();
        sizes.push_back(name ? std::string(*name) : "");
      }
      sizes_.push_back(sizes);
    }
    if (header.count("ranges") != 0) {
      for (const auto& [name, range] : header["ranges"].cast<json::Object>()) {
        auto bounds = range.cast<json::Array>();
        auto most = bounds[1].as<int64_t>();
        ranges_[std::string(name.cast<ffi::String>())] = {bounds[0].cast<int64_t>(), most ? *most : INT64_MAX};
      }
    }
    if (header.count("cpu_flags") != 0) {
      for (const auto& flag : header["cpu_flags"].cast<json::Array>()) RequireFlag(flag.cast<ffi::String>());
    }
    auto read = ReadTensors(folder + "/params.safetensors");
    for (const auto& name : header["weights"].cast<json::Array>()) {
      weights_.push_back(read.at(std::string(name.cast<ffi::String>())));
    }
    ffi::Module library = ffi::Module::LoadFromFile(folder + "/lib.so");
    machine_ = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
    const int pooled = 2;  // memory is kept for the next run
    machine_.value()->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, pooled);
    main_ = machine_.value()->GetFunction("main").value();
  }

  const std::vector<std::string>& input_names() const { return names_; }

  // By name; results in order. Fixed sizes are checked by the library; bounds of the others are in moeify.json.
  std::vector<ffi::Tensor> Run(const std::map<std::string, ffi::Tensor>& inputs) {
    std::vector<ffi::AnyView> arguments;
    for (size_t i = 0; i < names_.size(); ++i) {
      auto found = inputs.find(names_[i]);
      if (found == inputs.end()) throw std::runtime_error("the input " + names_[i] + " is missing");
      DLDataType have = found->second.dtype();
      if (have.code != types_[i].code || have.bits != types_[i].bits || have.lanes != types_[i].lanes) {
        throw std::runtime_error("the input " + names_[i] + " has another type than the program takes");
      }
      CheckRanges(i, found->second);
      arguments.emplace_back(found->second);
    }
    for (const auto& weight : weights_) arguments.emplace_back(weight);
    ffi::Any result;
    main_.value().CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
    if (auto one = result.as<ffi::Tensor>()) return {*one};
    std::vector<ffi::Tensor> outputs;
    for (const auto& output : result.cast<ffi::Array<ffi::Any>>()) outputs.push_back(output.cast<ffi::Tensor>());
    return outputs;
  }

 private:
  // A processor that meets an instruction it does not have ends the process. Where the system does not tell, go on.
  static void RequireFlag(const std::string& flag) {
    static const std::string info = [] {
      std::ifstream file("/proc/cpuinfo");
      return std::string(std::istreambuf_iterator<char>(file), {}) + " ";
    }();
    for (size_t at = info.find(flag); at != std::string::npos; at = info.find(flag, at + 1)) {
      bool begins = at == 0 || std::isspace(static_cast<unsigned char>(info[at - 1]));
      if (begins && std::isspace(static_cast<unsigned char>(info[at + flag.size()]))) return;
    }
    if (info.size() > 1) throw std::runtime_error("the program was compiled for a processor with " + flag);
  }

  void CheckRanges(size_t input, const ffi::Tensor& tensor) const {
    auto shape = tensor.shape();
    for (size_t d = 0; d < sizes_[input].size() && d < shape.size(); ++d) {
      auto range = ranges_.find(sizes_[input][d]);
      if (range == ranges_.end()) continue;
      auto [least, most] = range->second;
      if (shape[d] < least || shape[d] > most) {
        throw std::runtime_error(range->first + " is " + std::to_string(shape[d]) + " in " + names_[input] +
                                 ": the program was compiled for " + std::to_string(least) + " to " +
                                 std::to_string(most));
      }
    }
  }

  std::vector<std::string> names_;
  std::vector<std::vector<std::string>> sizes_;  // names of dynamic dimensions, "" for fixed ones
  std::map<std::string, std::pair<int64_t, int64_t>> ranges_;
  std::vector<DLDataType> types_;
  std::vector<ffi::Tensor> weights_;
  ffi::Optional<ffi::Module> machine_;
  ffi::Optional<ffi::Function> main_;
};

}  // namespace moeify
