// Tensors in a safetensors file, read into aligned memory and written.
//
// The format: eight bytes with the length of a JSON header, the header ({name: {dtype, shape, data_offsets}}), then the
// bytes of the tensors. Sizes are checked against the file: it comes from somebody else.
#pragma once

#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/json.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace moeify {

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

// TVM's kernels read memory that begins at a multiple of 64 bytes.
struct Aligned {
  static constexpr size_t kBytes = 64;
  void AllocData(DLTensor* tensor) {
    size_t size = (ffi::GetDataSize(*tensor) + kBytes) / kBytes * kBytes;
    tensor->data = std::aligned_alloc(kBytes, size);
    if (tensor->data == nullptr) throw std::runtime_error("out of memory");
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

inline ffi::Tensor Empty(const std::vector<int64_t>& shape, DLDataType dtype) {
  return ffi::Tensor::FromNDAlloc(Aligned(), ffi::ShapeView(shape.data(), shape.size()), dtype, DLDevice{kDLCPU, 0});
}

inline const std::map<std::string, std::string>& TypeNames() {  // of safetensors -> of TVM
  static const std::map<std::string, std::string> names = {
      {"BOOL", "bool"}, {"U8", "uint8"},    {"U16", "uint16"},    {"U32", "uint32"},  {"U64", "uint64"},
      {"I8", "int8"},   {"I16", "int16"},   {"I32", "int32"},     {"I64", "int64"},   {"F16", "float16"},
      {"F32", "float32"}, {"F64", "float64"}, {"BF16", "bfloat16"}};
  return names;
}

inline json::Value ParseJson(const std::string& text, const std::string& where) {
  ffi::String problem;
  json::Value value = json::Parse(text, &problem);
  if (problem.size() != 0) throw std::runtime_error(where + ": " + std::string(problem));
  return value;
}

inline std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

inline std::map<std::string, ffi::Tensor> ReadTensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("cannot open " + path);
  const int64_t total = file.tellg();
  file.seekg(0);
  uint64_t length = 0;  // little-endian, as this machine is
  file.read(reinterpret_cast<char*>(&length), sizeof(length));
  if (!file || length > static_cast<uint64_t>(total) - sizeof(length)) {
    throw std::runtime_error(path + " is no safetensors file");
  }
  std::string text(length, ' ');
  file.read(text.data(), static_cast<std::streamsize>(length));
  const int64_t start = static_cast<int64_t>(sizeof(length) + length);

  std::map<std::string, ffi::Tensor> tensors;
  for (auto [key, value] : ParseJson(text, path).cast<json::Object>()) {
    std::string name = key.cast<ffi::String>();
    if (name == "__metadata__") continue;
    auto entry = value.cast<json::Object>();
    std::vector<int64_t> shape;
    int64_t count = 1;
    for (const auto& size : entry["shape"].cast<json::Array>()) {
      shape.push_back(size.cast<int64_t>());
      if (shape.back() < 0 || (shape.back() != 0 && count > total / shape.back())) {
        throw std::runtime_error(name + " is larger than " + path);
      }
      count *= shape.back();
    }
    auto type = TypeNames().find(entry["dtype"].cast<ffi::String>());
    if (type == TypeNames().end()) throw std::runtime_error(name + " has an unknown type in " + path);
    auto offsets = entry["data_offsets"].cast<json::Array>();
    const int64_t begin = offsets[0].cast<int64_t>(), end = offsets[1].cast<int64_t>();
    const DLDataType dtype = ffi::StringToDLDataType(type->second);
    const int64_t bytes = static_cast<int64_t>(ffi::GetDataSize(count, dtype));
    if (begin < 0 || end - begin != bytes || end > total - start) {
      throw std::runtime_error(name + " lies outside " + path);
    }
    ffi::Tensor tensor = Empty(shape, dtype);
    file.seekg(start + begin);
    file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(bytes));
    if (!file) throw std::runtime_error("cannot read " + name + " from " + path);
    tensors.emplace(name, tensor);
  }
  return tensors;
}

inline void WriteTensors(const std::string& path, const std::vector<std::pair<std::string, ffi::Tensor>>& tensors) {
  std::map<std::string, std::string> names;
  for (const auto& [theirs, ours] : TypeNames()) names[ours] = theirs;
  std::string header = "{";
  size_t start = 0;
  for (const auto& [name, tensor] : tensors) {
    std::string shape;
    for (int64_t size : tensor.shape()) shape += (shape.empty() ? "" : ",") + std::to_string(size);
    const size_t end = start + ffi::GetDataSize(tensor);
    header += (start == 0 && header.size() == 1 ? "\"" : ",\"") + name + "\":{\"dtype\":\"" +
              names.at(std::string(ffi::DLDataTypeToString(tensor.dtype()))) + "\",\"shape\":[" + shape +
              "],\"data_offsets\":[" + std::to_string(start) + "," + std::to_string(end) + "]}";
    start = end;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const uint64_t length = header.size();
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), sizeof(length));
  file.write(header.data(), static_cast<std::streamsize>(length));
  for (const auto& [name, tensor] : tensors) {
    const size_t bytes = ffi::GetDataSize(tensor);
    file.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(bytes));
  }
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

}  // namespace moeify
