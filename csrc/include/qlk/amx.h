// AMX tiles: 16 rows of 64 bytes. C [16 x 16 fp32] += A [16 x 32 bf16] · B, where B holds its 32
// rows in pairs: dword c of row p is (B[2p][c], B[2p + 1][c]).
//
// The instructions are written out rather than taken from immintrin.h, because gcc 12's macros do
// not tell the compiler that they touch memory.
#pragma once

#include "qlk/decode_tiles.h"
#include "qlk/isa.h"

#if defined(QLK_X86)

namespace qlk::amx {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 32;  // bf16 values of a row of A.
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileFloats = 256;
constexpr int64_t kRowBytes = 64;

}  // namespace qlk::amx

#if defined(QLK_EMULATE_AMX)
// Tests only (tests/emulation): the same Session, zero, load, store and multiply in plain C++.
#include "qlk/amx_twin.h"
#else

namespace qlk::amx {

// Tile registers are per-thread state that is off by default: on for the life of a Session.
class Session {
 public:
  Session() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = kRowBytes;
      config.rows[tile] = kTileRows;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Session() { __asm__ volatile("tilerelease"); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

template <int kTile>
QLK_INLINE void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
QLK_INLINE void load(const void* base, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(base), "r"(stride) : "memory");
}
template <int kTile>
QLK_INLINE void store(void* base, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(base), "r"(stride)
                   : "memory");
}
template <int kC, int kA, int kB>
QLK_INLINE void multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace qlk::amx

#endif

namespace qlk::amx {

// A row of tiles along the summed axis: tile s begins at base + s * step, its rows stride apart.
struct TileRun {
  const void* base;
  int64_t step, stride;

  const void* at(int64_t s) const { return static_cast<const char*>(base) + s * step; }
};

// Sums c[i * kB + j] of kA by kB tiles, at most four, in tile registers 0 ... 3; in memory each is
// kTileFloats contiguous floats.
template <int kCount>
QLK_INLINE void zero_sums() {
  zero<0>();
  if constexpr (kCount > 1) zero<1>();
  if constexpr (kCount > 2) zero<2>();
  if constexpr (kCount > 3) zero<3>();
}
template <int kCount>
QLK_INLINE void load_sums(float* const* c) {
  load<0>(c[0], kRowBytes);
  if constexpr (kCount > 1) load<1>(c[1], kRowBytes);
  if constexpr (kCount > 2) load<2>(c[2], kRowBytes);
  if constexpr (kCount > 3) load<3>(c[3], kRowBytes);
}
template <int kCount>
QLK_INLINE void store_sums(float* const* c) {
  store<0>(c[0], kRowBytes);
  if constexpr (kCount > 1) store<1>(c[1], kRowBytes);
  if constexpr (kCount > 2) store<2>(c[2], kRowBytes);
  if constexpr (kCount > 3) store<3>(c[3], kRowBytes);
}

QLK_INLINE void multiply_step_wide(const TileRun* a, const TileRun* b, int64_t s) {
  load<4>(a[0].at(s), a[0].stride);
  load<5>(b[0].at(s), b[0].stride);
  multiply<0, 4, 5>();
  load<6>(b[1].at(s), b[1].stride);
  multiply<1, 4, 6>();
  load<7>(b[2].at(s), b[2].stride);
  multiply<2, 4, 7>();
  load<5>(b[3].at(s), b[3].stride);
  multiply<3, 4, 5>();
}

// One step: c[i * kB + j] += a[i] · b[j] with the tiles at step s.
template <int kA, int kB>
QLK_INLINE void multiply_step(const TileRun* a, const TileRun* b, int64_t s) {
  static_assert(kA * kB <= 4 && kA != 3 && kB != 3);
  if constexpr (kB == 4) return multiply_step_wide(a, b, s);
  load<4>(a[0].at(s), a[0].stride);
  load<6>(b[0].at(s), b[0].stride);
  multiply<0, 4, 6>();
  if constexpr (kB == 2) {
    load<7>(b[1].at(s), b[1].stride);
    multiply<1, 4, 7>();
  }
  if constexpr (kA > 1) {
    load<5>(a[1].at(s), a[1].stride);
    multiply<kB, 5, 6>();
    if constexpr (kB == 2) multiply<3, 5, 7>();
  }
  if constexpr (kA == 4) {
    load<7>(a[2].at(s), a[2].stride);
    multiply<2, 7, 6>();
    load<4>(a[3].at(s), a[3].stride);
    multiply<3, 4, 6>();
  }
}

// A quarter of a step of four sums, for kernels that have other work between them: quarters 0 ... 3
// in this order make multiply_step<4, 1> or <2, 2>.
template <int kA, int kB, int kQuarter>
QLK_INLINE void multiply_quarter(const TileRun* a, const TileRun* b, int64_t s) {
  static_assert(kA * kB == 4 && kB <= 2);
  constexpr int kRow = kQuarter / kB, kColumn = kQuarter % kB;
  constexpr int kLeft = kRow % 2 == 0 ? 4 : 5, kRight = 6 + kColumn;
  if constexpr (kRow == 0) load<kRight>(b[kColumn].at(s), b[kColumn].stride);
  if constexpr (kColumn == 0) load<kLeft>(a[kRow].at(s), a[kRow].stride);
  multiply<kQuarter, kLeft, kRight>();
}

template <int kA, int kB>
QLK_INLINE void multiply_steps(const TileRun* a, const TileRun* b, int64_t steps, bool accumulate,
                               float* const* c) {
  if (accumulate)
    load_sums<kA * kB>(c);
  else
    zero_sums<kA * kB>();
  for (int64_t s = 0; s < steps; ++s) multiply_step<kA, kB>(a, b, s);
  store_sums<kA * kB>(c);
}

// rows[i] lane j and rows[j] lane i change places.
QLK_AVX512 QLK_INLINE void transpose(__m512i* rows) {
  __m512i pairs[16];
  QLK_UNROLL
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  QLK_UNROLL
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
  }
  // rows[4g + c], 128-bit part p: column 4p + c of rows 4g ... 4g + 3.
  QLK_UNROLL
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
    pairs[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    pairs[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    pairs[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    pairs[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  QLK_UNROLL
  for (int i = 0; i < 16; ++i) rows[i] = pairs[i];
}

// The first `count` (0 ... 16 or 32) lanes.
QLK_INLINE uint32_t first_lanes(int64_t count) {
  return count >= 32 ? 0xffffffffu : (uint32_t{1} << (count < 0 ? 0 : count)) - 1u;
}

// One B tile of source [tokens][depth], in tile order along depth (decode_tiles.h) or as it is:
// dword m of row p is the pair at 2p of source[m]. Beyond `tokens` and `depth` it is zero.
template <bool kInTileOrder>
QLK_AVX512 QLK_INLINE void pack_pairs(const uint16_t* source, int64_t stride, int64_t tokens,
                                      int64_t depth, void* tile) {
  const __mmask32 mask = _cvtu32_mask32(first_lanes(depth));
  __m512i rows[16];
  QLK_UNROLL
  for (int64_t m = 0; m < kTileRows; ++m) {
    rows[m] =
        m < tokens ? _mm512_maskz_loadu_epi16(mask, source + m * stride) : _mm512_setzero_si512();
    if constexpr (kInTileOrder) rows[m] = to_tile_order(rows[m]);
  }
  transpose(rows);
  QLK_UNROLL
  for (int64_t p = 0; p < kTileRows; ++p)
    _mm512_store_si512(static_cast<char*>(tile) + p * kRowBytes, rows[p]);
}

}  // namespace qlk::amx

#endif
