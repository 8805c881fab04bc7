// Shared memory of the engine: registered statics, one dynamic array, and their 32-bit addresses.
#include <cstdlib>
#include <vector>

#include "engine_state.h"

#if defined(QLK_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace qlk::emulation {

namespace {

constexpr size_t kCanaryBytes = 64;
constexpr unsigned char kUninitialised = 0xff, kCanary = 0xa5;
// Dynamic shared memory begins behind what the system keeps, and ends at most 227 KB further.
constexpr size_t kMostDynamicBytes = 227 << 10;
constexpr uint32_t kDynamicWindow = 1024, kStaticWindow = 228 << 10, kWindowEnd = 256 << 10;

struct SharedArray {
  unsigned char* data;
  size_t bytes;
};

SharedArray shared_arrays[kMaxSharedArrays];
int n_shared_arrays = 0;

void fill_bytes(unsigned char* data, size_t bytes, unsigned char value) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(data)[i] = value;
}

}  // namespace

void prepare_shared() {
  for (int i = 0; i < n_shared_arrays; ++i)
    fill_bytes(shared_arrays[i].data, shared_arrays[i].bytes, kUninitialised);
  if (machine->dynamic_data)
    fill_bytes(machine->dynamic_data, machine->dynamic_bytes, kUninitialised);
}

void allocate_dynamic(size_t bytes) {
  Machine& m = *machine;
  if (bytes > kMostDynamicBytes) fail("no such launch: %zu bytes of dynamic shared memory", bytes);
  m.dynamic_bytes = bytes;
  m.dynamic_data = nullptr;
  m.dynamic_is_swizzled = false;
  m.next_static_window = kStaticWindow;
  for (uint32_t& window : m.static_windows) window = 0;
  if (bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, bytes + kCanaryBytes) != 0) fail("out of memory");
    m.dynamic_data = static_cast<unsigned char*>(memory);
    fill_bytes(m.dynamic_data + bytes, kCanaryBytes, kCanary);
#if defined(QLK_ASAN)
    __asan_poison_memory_region(m.dynamic_data + bytes, kCanaryBytes);
#endif
  }
}

void check_dynamic_end() {
#if !defined(QLK_ASAN)
  const Machine& m = *machine;
  for (size_t i = 0; m.dynamic_data && i < kCanaryBytes; ++i)
    if (m.dynamic_data[m.dynamic_bytes + i] != kCanary)
      fail("a write past the %zu bytes of dynamic shared memory", m.dynamic_bytes);
#endif
}

void free_dynamic() {
  Machine& m = *machine;
  if (!m.dynamic_data) return;
#if defined(QLK_ASAN)
  __asan_unpoison_memory_region(m.dynamic_data + m.dynamic_bytes, kCanaryBytes);
#endif
  std::free(m.dynamic_data);
  m.dynamic_data = nullptr;
}

// The statics of a block that waits while another launch runs.
std::vector<unsigned char> save_shared() {
  size_t bytes = 0;
  for (int i = 0; i < n_shared_arrays; ++i) bytes += shared_arrays[i].bytes;
  std::vector<unsigned char> saved(bytes);
  unsigned char* at = saved.data();
  for (int i = 0; i < n_shared_arrays; at += shared_arrays[i++].bytes)
    copy_bytes(at, shared_arrays[i].data, shared_arrays[i].bytes);
  return saved;
}
// Arrays that were registered meanwhile are not that block's.
void restore_shared(const std::vector<unsigned char>& saved) {
  const unsigned char* at = saved.data();
  for (int i = 0; at != saved.data() + saved.size(); at += shared_arrays[i++].bytes)
    copy_bytes(shared_arrays[i].data, at, shared_arrays[i].bytes);
}

void register_shared(void* data, size_t bytes) {
  auto* array = static_cast<unsigned char*>(data);
  if (n_shared_arrays == kMaxSharedArrays) fail("more than %d shared arrays", kMaxSharedArrays);
  shared_arrays[n_shared_arrays++] = {array, bytes};
  fill_bytes(array, bytes, kUninitialised);
}

void* dynamic_shared(bool is_swizzled) {
  if (!machine->dynamic_data) fail("the launch asked for no dynamic shared memory");
  machine->dynamic_is_swizzled = is_swizzled;
  return machine->dynamic_data;
}

namespace {

bool is_inside(const void* data, size_t bytes, const unsigned char* array, size_t size) {
  const auto* begin = static_cast<const unsigned char*>(data);
  return array && begin >= array && begin + bytes <= array + size;
}

uint32_t dynamic_window() { return kDynamicWindow + (machine->dynamic_is_swizzled ? 0 : 128); }

}  // namespace

bool in_shared(const void* data, size_t bytes) {
  bool found = is_inside(data, bytes, machine->dynamic_data, machine->dynamic_bytes);
  for (int i = 0; i < n_shared_arrays; ++i)
    found = found || is_inside(data, bytes, shared_arrays[i].data, shared_arrays[i].bytes);
  return found;
}

uint32_t window_address(const void* data) {
  Machine& m = *machine;
  if (is_inside(data, 1, m.dynamic_data, m.dynamic_bytes))
    return dynamic_window() +
           static_cast<uint32_t>(static_cast<const unsigned char*>(data) - m.dynamic_data);
  for (int i = 0; i < n_shared_arrays; ++i) {
    const SharedArray& array = shared_arrays[i];
    if (!is_inside(data, 1, array.data, array.bytes)) continue;
    if (m.static_windows[i] == 0) {
      m.static_windows[i] = m.next_static_window;
      m.next_static_window += static_cast<uint32_t>((array.bytes + 127) / 128 * 128);
      if (m.next_static_window > kWindowEnd) fail("more shared memory than the window has");
    }
    return m.static_windows[i] +
           static_cast<uint32_t>(static_cast<const unsigned char*>(data) - array.data);
  }
  fail("%p is not in shared memory", data);
}

const void* from_window(uint32_t address, size_t bytes) {
  Machine& m = *machine;
  const auto fits = [&](uint32_t window, size_t size) {
    return address >= window && address + bytes <= window + size;
  };
  if (m.dynamic_data && fits(dynamic_window(), m.dynamic_bytes))
    return m.dynamic_data + (address - dynamic_window());
  for (int i = 0; i < n_shared_arrays; ++i)
    if (m.static_windows[i] && fits(m.static_windows[i], shared_arrays[i].bytes))
      return shared_arrays[i].data + (address - m.static_windows[i]);
  fail("shared memory has no %zu bytes at address %u", bytes, address);
}

}  // namespace qlk::emulation
