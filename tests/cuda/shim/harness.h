// The arguments of a harness: tensors and numbers by name, from the file that tests/cuda/shim.py
// wrote. Every tensor's storage is one allocation of its exact size, so that AddressSanitizer sees
// what lies beyond; its changed bytes are written back to the file at the end.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <string>

#include "device.cuh"

namespace harness {

struct Tensor {
  std::string dtype;  // as torch calls it: float32, bfloat16, float16, int64, bool, ...
  std::vector<int64_t> sizes, strides;  // strides in elements
  unsigned char* storage = nullptr;
  int64_t bytes = 0, offset = 0;  // of the storage; of the first element in it
  long place = 0;                 // in the file

  int64_t size(size_t dim) const { return sizes.at(dim); }
  int64_t stride(size_t dim) const { return strides.at(dim); }
  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(storage + offset);
  }
};

// calls f(T{}) with the storage type of a torch dtype
template <class F>
void with_dtype(const std::string& dtype, F&& f) {
  if (dtype == "float32") return f(float{});
  if (dtype == "bfloat16") return f(dev::Bf16{});
  if (dtype == "float16") return f(dev::Fp16{});
  dev::host::fail("dtype %s is not one of float32, bfloat16, float16", dtype.c_str());
}

class Arguments {
 public:
  Arguments(int argc, char** argv) {
    if (argc != 2) dev::host::fail("usage: %s FILE", argv[0]);
    file_ = std::fopen(argv[1], "r+b");
    if (!file_) dev::host::fail("%s cannot be opened", argv[1]);
    read();
  }
  ~Arguments() {
    for (const auto& [name, t] : tensors_) {
      std::fseek(file_, t.place, SEEK_SET);
      if (t.bytes && std::fwrite(t.storage, size_t(t.bytes), 1, file_) != 1) {
        dev::host::fail("%s could not be written", name.c_str());
      }
      operator delete[](t.storage, std::align_val_t(256));
    }
    std::fclose(file_);
  }
  Arguments(const Arguments&) = delete;

  bool has(const std::string& name) const { return tensors_.count(name) || numbers_.count(name); }
  const Tensor& tensor(const std::string& name) const { return find(tensors_, name); }
  // nullptr for a tensor that was not given
  template <class T>
  T* data_or_null(const std::string& name) const {
    return tensors_.count(name) ? tensor(name).data<T>() : nullptr;
  }
  double number(const std::string& name) const { return find(numbers_, name); }
  // a word
  const std::string& text(const std::string& name) const { return find(texts_, name); }
  int64_t integer(const std::string& name) const { return int64_t(number(name)); }

 private:
  template <class V>
  static const V& find(const std::map<std::string, V>& map, const std::string& name) {
    const auto found = map.find(name);
    if (found == map.end()) dev::host::fail("the harness was given no %s", name.c_str());
    return found->second;
  }

  // a line per argument: "number NAME VALUE", "text NAME WORD" or "tensor NAME DTYPE BYTES OFFSET
  // DIMS SIZES STRIDES" with the storage right behind it; "end" closes the file
  void read() {
    char kind[16], name[64], dtype[32];
    while (std::fscanf(file_, "%15s", kind) == 1 && std::string(kind) != "end") {
      if (std::string(kind) == "number") {
        double value;
        if (std::fscanf(file_, "%63s %lf\n", name, &value) != 2) dev::host::fail("bad number");
        numbers_[name] = value;
        continue;
      }
      if (std::string(kind) == "text") {
        if (std::fscanf(file_, "%63s %31s\n", name, dtype) != 2) dev::host::fail("bad text");
        texts_[name] = dtype;
        continue;
      }
      Tensor t;
      long long bytes, offset;
      int dims;
      if (std::fscanf(file_, "%63s %31s %lld %lld %d", name, dtype, &bytes, &offset, &dims) != 5) {
        dev::host::fail("bad tensor");
      }
      t.dtype = dtype;
      t.bytes = bytes;
      t.offset = offset;
      for (auto* list : {&t.sizes, &t.strides}) {
        for (int i = 0; i < dims; ++i) {
          long long value;
          if (std::fscanf(file_, "%lld", &value) != 1) dev::host::fail("bad tensor %s", name);
          list->push_back(value);
        }
      }
      std::fgetc(file_);  // the end of the line
      t.place = std::ftell(file_);
      t.storage = static_cast<unsigned char*>(
          operator new[](size_t(bytes), std::align_val_t(256)));  // as torch aligns on the device
      if (bytes && std::fread(t.storage, size_t(bytes), 1, file_) != 1) {
        dev::host::fail("bad tensor %s", name);
      }
      tensors_[name] = t;
    }
  }

  std::FILE* file_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, double> numbers_;
  std::map<std::string, std::string> texts_;
};

}  // namespace harness
