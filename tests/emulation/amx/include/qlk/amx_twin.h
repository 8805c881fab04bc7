// The AMX tile unit in plain C++, so that the AMX kernels run where there is none. It stands in for
// the primitives of qlk/amx.h when that is compiled with QLK_EMULATE_AMX; every one follows the
// instruction's "Operation" section in the Intel SDM, volume 2. Using a tile outside a Session, a
// fault on a real machine, aborts.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace qlk::amx {

struct TwinTile {
  alignas(64) uint8_t rows[kTileRows][kRowBytes];
};

struct TwinUnit {
  bool configured = false;
  TwinTile tiles[8];
};

inline TwinUnit& twin_unit() {
  static thread_local TwinUnit unit;
  return unit;
}

inline TwinTile& twin_tile(int index) {
  TwinUnit& unit = twin_unit();
  if (!unit.configured) {
    std::fprintf(stderr, "tile %d was used outside a Session\n", index);
    std::abort();
  }
  return unit.tiles[index];
}

// LDTILECFG and TILERELEASE both leave all tiles zero.
class Session {
 public:
  Session() { reset(true); }
  ~Session() { reset(false); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  static void reset(bool configured) {
    twin_unit().configured = configured;
    std::memset(twin_unit().tiles, 0, sizeof twin_unit().tiles);
  }
};

// DAZ and FTZ are on whatever MXCSR says: a denormal is a zero of its sign.
QLK_INLINE float twin_flush(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}

// TDPBF16PS: the products of the even and of the odd halves of all 16 pairs are summed apart, each
// in fp32 by fused multiply-adds from zero, then added, and the sum is added to C. The attribute is
// for speed: std::fma is an instruction there.
QLK_AVX512 inline void twin_multiply(TwinTile& c, const TwinTile& a, const TwinTile& b) {
  constexpr int kColumns = 16;
  for (int m = 0; m < kTileRows; ++m) {
    float even[kColumns] = {}, odd[kColumns] = {}, result[kColumns];
    for (int k = 0; k < kColumns; ++k) {
      uint32_t left, right[kColumns];
      std::memcpy(&left, a.rows[m] + 4 * k, sizeof left);
      std::memcpy(right, b.rows[k], sizeof right);
      const float low = twin_flush(float_from_bits(left << 16));
      const float high = twin_flush(float_from_bits(left & 0xffff0000u));
      for (int n = 0; n < kColumns; ++n) {
        even[n] = twin_flush(std::fma(low, twin_flush(float_from_bits(right[n] << 16)), even[n]));
        odd[n] =
            twin_flush(std::fma(high, twin_flush(float_from_bits(right[n] & 0xffff0000u)), odd[n]));
      }
    }
    std::memcpy(result, c.rows[m], sizeof result);
    for (int n = 0; n < kColumns; ++n)
      result[n] = twin_flush(twin_flush(result[n]) + twin_flush(even[n] + odd[n]));
    std::memcpy(c.rows[m], result, sizeof result);
  }
}

template <int kTile>
void zero() {
  std::memset(twin_tile(kTile).rows, 0, kTileBytes);
}
template <int kTile>
void load(const void* base, int64_t stride) {
  for (int64_t row = 0; row < kTileRows; ++row)
    std::memcpy(twin_tile(kTile).rows[row], static_cast<const char*>(base) + row * stride,
                kRowBytes);
}
template <int kTile>
void store(void* base, int64_t stride) {
  for (int64_t row = 0; row < kTileRows; ++row)
    std::memcpy(static_cast<char*>(base) + row * stride, twin_tile(kTile).rows[row], kRowBytes);
}
template <int kC, int kA, int kB>
void multiply() {
  twin_multiply(twin_tile(kC), twin_tile(kA), twin_tile(kB));
}

}  // namespace qlk::amx
