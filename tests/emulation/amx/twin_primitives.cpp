// The primitives of qlk/amx.h one at a time, for test_amx_twin.py; on the twin, or on the machine's
// own tile unit where QLK_EMULATE_AMX is not defined.
#include <cstdint>

#include "qlk/amx.h"

using namespace qlk::amx;

namespace {

template <int kTile>
void fill_tile(const void* source) {
  load<kTile>(source, kRowBytes);
}

}  // namespace

extern "C" {

// All of these move tiles of 16 rows, `stride` bytes apart.
void twin_copy(const void* source, int64_t source_stride, void* target, int64_t target_stride) {
  const Session session;
  load<3>(source, source_stride);
  store<3>(target, target_stride);
}

// Tile 2 zeroed, tiles 1 and 3 left as they were loaded.
void twin_zero(const void* source, void* targets) {
  const Session session;
  fill_tile<1>(source);
  fill_tile<2>(source);
  fill_tile<3>(source);
  zero<2>();
  store<1>(targets, kRowBytes);
  store<2>(static_cast<char*>(targets) + kTileBytes, kRowBytes);
  store<3>(static_cast<char*>(targets) + 2 * kTileBytes, kRowBytes);
}

// The tiles of a new session.
void twin_fresh(const void* source, void* targets) {
  {
    const Session session;
    fill_tile<0>(source);
    fill_tile<7>(source);
  }
  const Session session;
  store<0>(targets, kRowBytes);
  store<7>(static_cast<char*>(targets) + kTileBytes, kRowBytes);
}

// c += a · b, then a and b stored back over themselves: neither may change.
void twin_multiply_once(float* c, void* a, void* b) {
  const Session session;
  load<0>(c, kRowBytes);
  load<4>(a, kRowBytes);
  load<6>(b, kRowBytes);
  multiply<0, 4, 6>();
  store<0>(c, kRowBytes);
  store<4>(a, kRowBytes);
  store<6>(b, kRowBytes);
}

// A fault on a real tile unit.
void twin_use_without_session(float* c) { store<0>(c, kRowBytes); }
}
