// stream_bytes: reads one buffer and writes another at full width, in step, split over the threads
// as the codecs split theirs. What is written is a running xor of what was read: no load is dead.
#include "qlk/stream_bytes.h"

#include <cstring>

#include "qlk/isa.h"

namespace qlk {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kTasks = 256;

void stream_portable(const uint8_t* source, int64_t source_bytes, uint8_t* target,
                     int64_t target_bytes) {
  uint64_t mixed = 0;
  for (int64_t i = 0; i < source_bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, source + i, 8);
    mixed ^= word;
  }
  std::memset(target, static_cast<int>(mixed & 0xff), target_bytes);
}

#if defined(QLK_X86)

QLK_AVX512 void stream_avx512(const uint8_t* source, int64_t source_bytes, uint8_t* target,
                              int64_t target_bytes) {
  __m512i mixed = _mm512_setzero_si512();
  const int64_t read_lines = source_bytes / kLine, write_lines = target_bytes / kLine;
  int64_t read = 0, due = 0;
  for (int64_t written = 0; written < write_lines; ++written) {
    for (due += read_lines; due >= write_lines; due -= write_lines, ++read)
      mixed = _mm512_xor_si512(mixed, _mm512_loadu_si512(source + read * kLine));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + written * kLine), mixed);
  }
  _mm_sfence();
}

#endif

}  // namespace

Status stream_bytes(const StreamBytesParams& p, Isa isa, const ThreadPool& pool) {
  // Parts start on cache lines, which the non-temporal stores need.
  const auto part = [](int64_t bytes, int64_t task) {
    return bytes / kLine * task / kTasks * kLine;
  };
  const bool aligned = reinterpret_cast<uintptr_t>(p.target) % kLine == 0;
  if (p.source_bytes % kLine != 0 || p.target_bytes % kLine != 0 || !aligned)
    return Status::kUnsupported;
  pool.run(0, kTasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = part(p.source_bytes, begin), to = part(p.target_bytes, begin);
    const int64_t reads = part(p.source_bytes, end) - from, writes = part(p.target_bytes, end) - to;
#if defined(QLK_X86)
    if (isa >= Isa::kAvx512) return stream_avx512(p.source + from, reads, p.target + to, writes);
#endif
    stream_portable(p.source + from, reads, p.target + to, writes);
  });
  return Status::kOk;
}

}  // namespace qlk
