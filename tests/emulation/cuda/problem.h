// One request to the runner: numbers and buffers by name, and the function that works on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace qlk::testing {

struct Buffer {
  size_t bytes = 0;
  bool is_output = false;
  void* data = nullptr;  // where kernels reach it, of exactly `bytes` bytes
};

struct Problem {
  std::map<std::string, int64_t> integers;
  std::map<std::string, double> reals;
  std::map<std::string, Buffer> buffers;

  int64_t integer(const std::string& name) const { return lookup(integers, name); }
  double real(const std::string& name) const { return lookup(reals, name); }

  // The buffer's pointer, or null if the request has none of that name.
  template <class T>
  T* pointer(const std::string& name) const {
    const auto found = buffers.find(name);
    return found == buffers.end() ? nullptr : static_cast<T*>(found->second.data);
  }

 private:
  template <class Value>
  static Value lookup(const std::map<std::string, Value>& values, const std::string& name) {
    const auto found = values.find(name);
    if (found == values.end()) {
      std::fprintf(stderr, "runner: the request has no %s\n", name.c_str());
      std::_Exit(2);
    }
    return found->second;
  }
};

// Runs a launcher on the problem; returns its cudaError_t.
using Function = int (*)(const Problem& problem);

// Registers a function at start-up: static const Registration r("dequantize", run_dequantize);
struct Registration {
  Registration(const char* name, Function function);
};

}  // namespace qlk::testing
