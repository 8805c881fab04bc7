// A thread's reusable buffer: grows to the largest request, so that no call pays the page faults of
// a fresh allocation. Each kernel states its bound.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "qlk/types.h"

namespace qlk {

class Scratch {
 public:
  // At least `bytes` aligned to a cache line, contents undefined; null only if memory is short.
  void* reserve(int64_t bytes) {
    if (bytes > capacity_ || !memory_) {
      capacity_ = 0;
      memory_.reset();
      const int64_t rounded = (bytes + kAlignment) / kAlignment * kAlignment;
      memory_.reset(std::aligned_alloc(kAlignment, static_cast<size_t>(rounded)));
      if (memory_) capacity_ = rounded;
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t kAlignment = 4096;

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t capacity_ = 0;
};

// How the body of a parallel loop reports that it had no scratch.
class Failure {
 public:
  void set() { failed_.store(true, std::memory_order_relaxed); }
  Status status() const {
    return failed_.load(std::memory_order_relaxed) ? Status::kOutOfMemory : Status::kOk;
  }

 private:
  std::atomic<bool> failed_{false};
};

}  // namespace qlk
