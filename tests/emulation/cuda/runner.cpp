// Runs launchers for the Python tests, on emulated or real CUDA: requests on stdin, results on
// stdout, complaints of the emulation or a sanitizer on stderr.
//
// A request is lines "run NAME SEED", "integer NAME VALUE", "real NAME VALUE", "in|out|inout NAME
// BYTES", "end", then the bytes of all in and inout buffers in that order. The answer is "done
// STATUS" and a newline, then the bytes of all out and inout buffers.
#include <cstring>
#include <string>
#include <vector>

#include "problem.h"
#include "qlk/cuda/device.cuh"

namespace qlk::testing {
namespace {

std::map<std::string, Function>& functions() {
  static std::map<std::string, Function> registered;
  return registered;
}

[[noreturn]] void broken(const char* what) {
  std::fprintf(stderr, "runner: %s\n", what);
  std::_Exit(2);
}

void read_exactly(void* data, size_t bytes) {
  if (std::fread(data, 1, bytes, stdin) != bytes) broken("the request ends early");
}

// Exactly sized, so that a sanitizer sees every byte beyond.
void* allocate(size_t bytes) {
  void* data = nullptr;
#if defined(QLK_EMULATE_CUDA)
  // As aligned as torch's own, but never larger: alignments of malloc would hide short accesses.
  if (posix_memalign(&data, 256, bytes ? bytes : 1) != 0) broken("out of memory");
#else
  if (cudaMalloc(&data, bytes ? bytes : 1) != cudaSuccess) broken("cudaMalloc failed");
#endif
  return data;
}

void release(void* data) {
#if defined(QLK_EMULATE_CUDA)
  std::free(data);
#else
  if (cudaFree(data) != cudaSuccess) broken("cudaFree failed");
#endif
}

void to_device(void* device, const void* host, size_t bytes) {
#if defined(QLK_EMULATE_CUDA)
  std::memcpy(device, host, bytes);
#else
  if (cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice) != cudaSuccess)
    broken("copying to the device failed");
#endif
}

void to_host(void* host, const void* device, size_t bytes) {
#if defined(QLK_EMULATE_CUDA)
  std::memcpy(host, device, bytes);
#else
  if (cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost) != cudaSuccess)
    broken("copying from the device failed");
#endif
}

int synchronize(int status) {
#if defined(QLK_EMULATE_CUDA)
  emulation::synchronize();
  return status;
#else
  return status ? status : static_cast<int>(cudaDeviceSynchronize());
#endif
}

bool serve() {
  Problem problem;
  Function function = nullptr;
  std::vector<std::pair<std::string, bool>> order;  // buffers, and whether their bytes follow
  char line[256], kind[16], name[64], value[64];
  for (;;) {
    if (!std::fgets(line, sizeof line, stdin)) {
      if (function) broken("the request has no end");
      return false;
    }
    if (std::strcmp(line, "end\n") == 0) break;
    if (std::sscanf(line, "%15s %63s %63s", kind, name, value) != 3) broken(line);
    const std::string what = kind;
    if (what == "run") {
      if (!functions().count(name)) broken("no such function");
      function = functions().at(name);
#if defined(QLK_EMULATE_CUDA)
      emulation::set_seed(std::strtoull(value, nullptr, 10));
#endif
    } else if (what == "integer") {
      problem.integers[name] = std::strtoll(value, nullptr, 10);
    } else if (what == "real") {
      problem.reals[name] = std::strtod(value, nullptr);
    } else {
      Buffer buffer;
      buffer.bytes = std::strtoull(value, nullptr, 10);
      buffer.is_output = what != "in";
      buffer.data = allocate(buffer.bytes);
      problem.buffers[name] = buffer;
      order.emplace_back(name, what != "out");
    }
  }
  if (!function) broken("the request names no function");
  std::vector<char> bytes;
  for (const auto& [buffer_name, has_bytes] : order) {
    const Buffer& buffer = problem.buffers[buffer_name];
    bytes.assign(buffer.bytes, '\xff');
    if (has_bytes && buffer.bytes) read_exactly(bytes.data(), bytes.size());
    if (buffer.bytes) to_device(buffer.data, bytes.data(), bytes.size());
  }
  const int status = synchronize(function(problem));
  std::printf("done %d\n", status);
  for (const auto& [buffer_name, has_bytes] : order) {
    const Buffer& buffer = problem.buffers[buffer_name];
    if (!buffer.is_output || buffer.bytes == 0) continue;
    bytes.resize(buffer.bytes);
    to_host(bytes.data(), buffer.data, bytes.size());
    std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  }
  std::fflush(stdout);
  for (const auto& [buffer_name, buffer] : problem.buffers) release(buffer.data);
  return true;
}

}  // namespace

Registration::Registration(const char* name, Function function) { functions()[name] = function; }

}  // namespace qlk::testing

int main() {
  while (qlk::testing::serve()) {
  }
  return 0;
}
