// Twins of qlk/cuda/ptx_sm90.cuh and qlk/cuda/ptx_wgmma.cuh that touch a kernel's memory, compiled
// with the sanitizers.
#pragma once

#include <cstring>

#include "qlk/cuda_emulation.h"
#include "qlk/cuda_engine_sm90.h"
#include "qlk/float16.h"

namespace qlk::emulation {

// "Swizzling Modes" of the manual: in every 128 bytes number r, 16-byte piece p of each row as wide
// as the mode lies at p XOR (r mod its pieces).
inline uint32_t swizzle_address(uint32_t address, int swizzle_bytes) {
  if (swizzle_bytes == 0) return address;
  const uint32_t pieces = static_cast<uint32_t>(swizzle_bytes) / 16;
  const uint32_t row128 = address / 128, piece = address / 16;
  return (piece ^ (row128 & (pieces - 1))) * 16 + address % 16;
}

// Word by word: TSAN overlooks a memset that is one store.
inline void poison(void* data, size_t bytes) {
  for (size_t i = 0; i < bytes / 4; ++i) static_cast<uint32_t*>(data)[i] = 0xffffffffu;
}

// Also what TSAN sees of an mbarrier: using one races with making it, without a barrier in between.
inline void check_mbarrier(const uint64_t* mbarrier) {
  (void)*const_cast<const volatile uint64_t*>(mbarrier);
}

inline void arrive(const uint64_t* mbarrier, uint32_t expected_bytes) {
  check_mbarrier(mbarrier);
  mbarrier_arrive(mbarrier, expected_bytes);
}

// 16 bytes of a box: elements that the matrix does not have are zeros.
inline void load_piece(const TensorMap& map, int64_t inner, int64_t outer, unsigned char* piece) {
  const int elements = 16 / map.element_bytes;
  for (int i = 0; i < elements; ++i) {
    const int64_t column = inner + i;
    const bool is_inside = outer >= 0 && outer < map.outer && column >= 0 && column < map.inner;
    for (int b = 0; b < map.element_bytes; ++b)
      piece[i * map.element_bytes + b] =
          is_inside ? map.data[outer * map.row_stride_bytes + column * map.element_bytes + b] : 0;
  }
}

inline void deliver(const BulkCopy& copy) {
  if (!copy.map.data) {
    for (uint32_t i = 0; i < copy.bytes / 4; ++i)
      static_cast<uint32_t*>(copy.destination)[i] = static_cast<const uint32_t*>(copy.source)[i];
    return;
  }
  const uint32_t start = window_address(copy.destination);
  const uint32_t row_bytes = static_cast<uint32_t>(copy.map.box_inner * copy.map.element_bytes);
  const int piece_elements = 16 / copy.map.element_bytes;
  for (uint32_t at = 0; at < copy.bytes; at += 16) {
    unsigned char piece[16];
    load_piece(copy.map, copy.inner + int64_t{at % row_bytes / 16} * piece_elements,
               int64_t{copy.outer} + at / row_bytes, piece);
    const uint32_t there = swizzle_address(start + at, copy.map.swizzle_bytes);
    auto* words = static_cast<uint32_t*>(const_cast<void*>(from_window(there, 16)));
    for (int i = 0; i < 4; ++i) std::memcpy(words + i, piece + 4 * i, 4);
  }
}

inline void wait_for_phase(const uint64_t* mbarrier, uint32_t parity) {
  check_mbarrier(mbarrier);
  if (!await_phase(mbarrier, parity)) return;
  BulkCopy copy;
  while (next_bulk_copy(mbarrier, &copy)) deliver(copy);
  end_phase(mbarrier);
}

inline void issue(const BulkCopy& copy, const uint64_t* mbarrier) {
  check_mbarrier(mbarrier);
  if (!in_shared(copy.destination, copy.bytes))
    fail("a copy of %u bytes to %p: not in shared memory", copy.bytes, copy.destination);
  poison(copy.destination, copy.bytes);
  queue_bulk_copy(copy, mbarrier);
}

inline void issue_bulk(void* shared, const void* global, uint32_t bytes, const uint64_t* mbarrier) {
  if (!in_shared(shared, bytes) || window_address(shared) % 16 ||
      reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    fail("cp.async.bulk of %u bytes from %p to %p: not 16 aligned bytes of shared memory", bytes,
         global, shared);
  issue({shared, global, bytes, {}, 0, 0}, mbarrier);
}

inline void issue_tensor(void* shared, const TensorMap* map, int32_t inner, int32_t outer,
                         const uint64_t* mbarrier) {
  if (!map->data || reinterpret_cast<uintptr_t>(map) % 64)
    fail("cp.async.bulk.tensor: the tensor map was not made, or is not aligned to 64 bytes");
  const auto bytes = static_cast<uint32_t>(map->box_inner * map->box_outer * map->element_bytes);
  const uint32_t boundary =
      map->swizzle_bytes > 16 ? 8 * static_cast<uint32_t>(map->swizzle_bytes) : 128;
  if (!in_shared(shared, bytes) || window_address(shared) % boundary)
    fail("cp.async.bulk.tensor to %p: not %u bytes of shared memory at a boundary of %u", shared,
         bytes, boundary);
  issue({shared, nullptr, bytes, *map, inner, outer}, mbarrier);
}

// Columns 8 `piece` ... 8 `piece` + 7 of a row of the tile that a matrix descriptor describes.
inline const uint16_t* described_piece(uint64_t descriptor, int row, int piece) {
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) * 16;
  };
  const int modes[4] = {0, 128, 64, 32}, swizzle_bytes = modes[descriptor >> 62];
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 49 & 7) fail("a matrix descriptor with a base offset");
  uint32_t address = start + static_cast<uint32_t>(row / 8) * stride;
  if (swizzle_bytes) {
    const auto width = static_cast<uint32_t>(swizzle_bytes);
    if (start % (8 * width) >= width) fail("a swizzled tile not at a boundary of its 8 rows");
    if (start % width + 32 > width) fail("16 columns that a tile's rows do not have");
    address += static_cast<uint32_t>(row % 8) * width + static_cast<uint32_t>(piece) * 16;
  } else {
    address += static_cast<uint32_t>(row % 8) * 16 + static_cast<uint32_t>(piece) * leading;
  }
  return static_cast<const uint16_t*>(from_window(swizzle_address(address, swizzle_bytes), 16));
}

template <bool kBFloat16, int kN>
void multiply_wgmma(const Wgmma& wgmma, float* values) {
  const auto value = [](uint16_t bits) {
    return double{kBFloat16 ? bf16_to_float(bits) : half_to_float(bits)};
  };
  const int t = lane_index() % 4;
  double left[2][16];
  for (int lane = 0; lane < 4; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int p = 0; p < 2; ++p)
        left[i % 2][8 * (i / 2) + 2 * lane + p] =
            value(static_cast<uint16_t>(wgmma.left[lane][i] >> (16 * p)));
  for (int tile = 0; tile < kN / 8; ++tile) {
    for (int p = 0; p < 2; ++p) {
      double right[16];
      for (int piece = 0; piece < 2; ++piece) {
        const uint16_t* bits = described_piece(wgmma.descriptor, 8 * tile + 2 * t + p, piece);
        for (int k = 0; k < 8; ++k) right[8 * piece + k] = value(bits[k]);
      }
      for (int half = 0; half < 2; ++half) {
        float& sum = values[4 * tile + 2 * half + p];
        double exact = wgmma.accumulate ? sum : 0.0;
        for (int k = 0; k < 16; ++k) exact += left[half][k] * right[k];
        sum = static_cast<float>(exact);
      }
    }
  }
}

template <bool kBFloat16, int kN>
void issue_wgmma(float* sums, const uint32_t* left, uint64_t descriptor, bool accumulate) {
  static const char* const operation = kBFloat16 ? "wgmma.bf16" : "wgmma.f16";
  Wgmma wgmma;
  {
    const Exchange exchange(operation, kFullMask, left, 16);
    for (int i = 0; i < 4; ++i) exchange.read(lane_index() / 4 * 4 + i, wgmma.left[i]);
  }
  wgmma.descriptor = descriptor;
  wgmma.n = kN;
  wgmma.accumulate = accumulate;
  wgmma.multiply = &multiply_wgmma<kBFloat16, kN>;
  queue_wgmma(wgmma, sums, left, operation);
}

}  // namespace qlk::emulation
