// LoRA's products with many tokens on AMX tiles: the down-projection and the gradients of an
// adapter. x is read once, in its own layout where that is a tile's.
#include <algorithm>

#include "qlk/amx.h"
#include "qlk/low_rank.h"
#include "qlk/scratch.h"

namespace qlk {

#if defined(QLK_X86)

namespace {

using namespace amx;

// Token tiles of a unit of work: four sums hide the latency of a multiplication.
constexpr int64_t kUnitTiles = 4;
// Columns of x that a unit of a gradient packs, and the tokens that are summed on their own before
// they join it: the rounding error of fp32 grows with the length of a chain. 32 KiB of packed x.
constexpr int64_t kColumnTiles = 4, kColumns = kColumnTiles * kTileRows;
constexpr int64_t kChainTokens = 256, kChainSteps = kChainTokens / kTileDepth;

int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

QLK_AMX QLK_INLINE __mmask16 lanes(int64_t count) {
  return _cvtu32_mask16(first_lanes(std::min<int64_t>(count, 16)));
}

// 16 numbers of any dtype, and the reverse; lanes beyond `count` are zero, or not written.
QLK_AMX QLK_INLINE __m512 load_lanes(const void* data, DType dtype, int64_t offset, int64_t count) {
  const __mmask16 mask = lanes(count);
  if (dtype == DType::kFloat32)
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + offset);
  const __m256i words = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + offset);
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(words);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

QLK_AMX QLK_INLINE __m256i to_bf16(__m512 value) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
}

QLK_AMX QLK_INLINE void store_lanes(__m512 value, void* data, DType dtype, int64_t offset,
                                    int64_t count) {
  const __mmask16 mask = lanes(count);
  if (dtype == DType::kFloat32)
    return _mm512_mask_storeu_ps(static_cast<float*>(data) + offset, mask, value);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + offset, mask,
                           dtype == DType::kFloat16
                               ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)
                               : to_bf16(value));
}

// The B tile of an adapter's columns [col, col + 32) and ranks [first, first + 16), rounded to
// bf16.
QLK_AMX void pack_adapter(const AdapterView& adapter, int64_t first, int64_t col, char* tile) {
  const int64_t ranks = std::min(kTileRows, adapter.rank - first);
  const int64_t cols = std::min(kTileDepth, adapter.cols - col);
  if (adapter.col_stride == 1) {
    alignas(64) uint16_t rows[kTileRows * kTileDepth];
    for (int64_t r = 0; r < ranks; ++r) {
      const int64_t offset = (first + r) * adapter.rank_stride + col;
      for (int64_t j = 0; j < kTileDepth; j += 16)
        _mm256_store_si256(reinterpret_cast<__m256i*>(rows + r * kTileDepth + j),
                           to_bf16(load_lanes(adapter.data, adapter.dtype, offset + j, cols - j)));
    }
    return pack_pairs<false>(rows, kTileDepth, ranks, cols, tile);
  }
  for (int64_t p = 0; p < kTileRows; ++p) {
    __m512i words[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t j = 2 * p + i, count = j < cols ? ranks : 0;
      const int64_t offset = count > 0 ? (col + j) * adapter.col_stride + first : 0;
      words[i] =
          _mm512_cvtepu16_epi32(to_bf16(load_lanes(adapter.data, adapter.dtype, offset, count)));
    }
    _mm512_store_si512(tile + p * kRowBytes,
                       _mm512_or_si512(words[0], _mm512_slli_epi32(words[1], 16)));
  }
}

// A product of x [tokens, depth] and an adapter that is packed in B tiles [rank tiles][k_tiles].
struct Projection {
  const uint16_t* x;
  int64_t tokens, depth, k_tiles, rank;
  float scaling;
  const char* packed;
  float* left;  // [tokens, padded rank]
};

// Where the rows of a tile of tokens begin. The last tile of several holds rows of the one before
// as well, which are not stored again: a tile has 16.
int64_t tile_begin(const Projection& p, int64_t tile) {
  return std::max<int64_t>(0, std::min(tile * kTileRows, p.tokens - kTileRows));
}

// `rows` [16, stride]: columns [col, depth) of a tile's tokens, zeros beyond.
QLK_AMX void copy_tokens(const Projection& p, int64_t tile, int64_t col, int64_t stride,
                         uint16_t* rows) {
  for (int64_t i = 0; i < kTileRows; ++i) {
    const int64_t token = tile_begin(p, tile) + i;
    for (int64_t k = 0; k < stride; k += kTileDepth) {
      const int64_t count = token < p.tokens ? std::max<int64_t>(0, p.depth - col - k) : 0;
      const __mmask32 mask = _cvtu32_mask32(first_lanes(count));
      const uint16_t* source = p.x + (count > 0 ? token * p.depth + col + k : 0);
      _mm512_storeu_si512(rows + i * stride + k, _mm512_maskz_loadu_epi16(mask, source));
    }
  }
}

QLK_AMX void store_projection(const Projection& p, int64_t tile, int64_t first, const float* sums) {
  const int64_t padded = padded_rank(p.rank), begin = tile_begin(p, tile);
  const __m512 scaling = _mm512_set1_ps(p.scaling);
  const __mmask16 ranks = lanes(p.rank - first);
  for (int64_t t = tile * kTileRows; t < std::min(p.tokens, (tile + 1) * kTileRows); ++t) {
    const __m512 value =
        _mm512_maskz_mul_ps(ranks, scaling, _mm512_load_ps(sums + (t - begin) * kTileRows));
    const __m512i words = _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(value)), 16);
    _mm512_mask_storeu_ps(p.left + t * padded + first, lanes(padded - first),
                          _mm512_castsi512_ps(words));
  }
}

// kCount tiles of tokens, 4, 2 or 1, with every rank. `spare`: the rows of a tile that x does not
// hold as a tile reads them.
template <int kCount>
QLK_AMX void project(const Projection& p, int64_t tile, uint16_t* spare) {
  const int64_t direct = p.tokens < kTileRows ? 0 : p.depth / kTileDepth;
  const int64_t rest = p.k_tiles - direct, spare_row = rest * kTileDepth;
  TileRun a[kCount], tail[kCount];
  for (int i = 0; i < kCount; ++i) {
    uint16_t* copy = spare + i * kTileRows * spare_row;
    if (rest > 0) copy_tokens(p, tile + i, direct * kTileDepth, spare_row, copy);
    a[i] = {p.x + tile_begin(p, tile + i) * p.depth, kRowBytes, p.depth * 2};
    tail[i] = {copy, kRowBytes, spare_row * 2};
  }
  alignas(64) float sums[kCount * kTileFloats];
  float* c[kCount];
  for (int i = 0; i < kCount; ++i) c[i] = sums + i * kTileFloats;
  const char* packed = p.packed;
  for (int64_t first = 0; first < p.rank; first += kTileRows, packed += p.k_tiles * kTileBytes) {
    const TileRun b[1] = {{packed, kTileBytes, kRowBytes}};
    const TileRun b_tail[1] = {{packed + direct * kTileBytes, kTileBytes, kRowBytes}};
    zero_sums<kCount>();
    for (int64_t s = 0; s < direct; ++s) multiply_step<kCount, 1>(a, b, s);
    for (int64_t s = 0; s < rest; ++s) multiply_step<kCount, 1>(tail, b_tail, s);
    store_sums<kCount>(c);
    for (int i = 0; i < kCount; ++i) store_projection(p, tile + i, first, c[i]);
  }
}

// The A tiles of leftᵀ [rank tiles][steps]: rows are ranks, columns 32 tokens; zero beyond both.
QLK_AMX void pack_left(const float* left, int64_t tokens, int64_t rank, char* packed) {
  const int64_t padded = padded_rank(rank), steps = tiles_of(tokens, kTileDepth);
  for (int64_t first = 0; first < rank; first += kTileRows) {
    for (int64_t s = 0; s < steps; ++s, packed += kTileBytes) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t token = s * kTileDepth + half * kTileRows;
        __m512i rows[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) {
          const bool present = token + i < tokens;
          const float* row = left + (present ? (token + i) * padded + first : 0);
          rows[i] =
              _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(present ? rank - first : 0), row));
        }
        transpose(rows);
        for (int64_t r = 0; r < kTileRows; ++r)
          _mm256_store_si256(
              reinterpret_cast<__m256i*>(packed + r * kRowBytes + half * kRowBytes / 2),
              to_bf16(_mm512_castsi512_ps(rows[r])));
      }
    }
  }
}

struct Gradient {
  const uint16_t* x;  // [tokens, cols]
  int64_t tokens;
  float scaling;
  const char* packed;  // A tiles of leftᵀ [rank tiles][steps]
  const AdapterView* out;
};

// A pair of B tiles holds 32 columns: interleaving the words of two rows leaves the first tile the
// columns 8q + i and the second 8q + 4 + i, q and i below 4, as dword 4q + i.
constexpr int64_t column_of(int64_t tile, int64_t dword) {
  return dword / 4 * 8 + tile * 4 + dword % 4;
}

// B tiles [kColumnTiles][steps] of 64 columns and steps of 32 tokens.
QLK_AMX void pack_columns(const Gradient& g, int64_t token, int64_t steps, int64_t col,
                          char* packed) {
  const int64_t cols = g.out->cols;
  for (int64_t pair = 0; pair < kColumnTiles / 2; ++pair) {
    const int64_t first = col + pair * 2 * kTileRows;
    const __mmask32 mask = _cvtu32_mask32(first_lanes(std::max<int64_t>(0, cols - first)));
    char* even = packed + 2 * pair * steps * kTileBytes;
    char* odd = even + steps * kTileBytes;
    for (int64_t p = 0; p < steps * kTileRows; ++p, even += kRowBytes, odd += kRowBytes) {
      __m512i rows[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t t = token + 2 * p + i;
        const bool present = t < g.tokens && first < cols;
        rows[i] = _mm512_maskz_loadu_epi16(present ? mask : _cvtu32_mask32(0),
                                           g.x + (present ? t * cols + first : 0));
      }
      _mm512_store_si512(even, _mm512_unpacklo_epi16(rows[0], rows[1]));
      _mm512_store_si512(odd, _mm512_unpackhi_epi16(rows[0], rows[1]));
    }
  }
}

// sums: C tiles [16 ranks][16 columns], two of them side by side.
QLK_AMX void store_gradient(const Gradient& g, int64_t first, int64_t col, const float* sums) {
  const AdapterView& out = *g.out;
  auto* data = const_cast<void*>(out.data);
  const int64_t ranks = std::min(kTileRows, out.rank - first);
  const __m512 scaling = _mm512_set1_ps(g.scaling);
  if (out.col_stride == 1) {
    alignas(64) int32_t from[2][16];
    for (int tile = 0; tile < 2; ++tile)
      for (int dword = 0; dword < 16; ++dword) {
        const int64_t column = column_of(tile, dword);
        from[column / 16][column % 16] = tile * 16 + dword;
      }
    for (int64_t r = 0; r < ranks; ++r) {
      const __m512 even = _mm512_load_ps(sums + r * 16);
      const __m512 odd = _mm512_load_ps(sums + kTileFloats + r * 16);
      for (int64_t half = 0; half < 2; ++half) {
        const __m512 value = _mm512_permutex2var_ps(even, _mm512_load_si512(from[half]), odd);
        const int64_t at = col + half * 16;
        if (at < out.cols)
          store_lanes(_mm512_mul_ps(scaling, value), data, out.dtype,
                      (first + r) * out.rank_stride + at, out.cols - at);
      }
    }
    return;
  }
  for (int64_t tile = 0; tile < 2; ++tile) {
    __m512i rows[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r)
      rows[r] = _mm512_load_si512(sums + tile * kTileFloats + r * 16);
    transpose(rows);
    for (int64_t dword = 0; dword < kTileRows; ++dword) {
      const int64_t at = col + column_of(tile, dword);
      if (at < out.cols)
        store_lanes(_mm512_mul_ps(scaling, _mm512_castsi512_ps(rows[dword])), data, out.dtype,
                    at * out.col_stride + first, ranks);
    }
  }
}

// Every rank's gradient of 64 columns. `packed`: a chain's B tiles; sums: C tiles [rank tiles]
// [kColumnTiles], and as many again as a rank tile has.
QLK_AMX void gradient_of_columns(const Gradient& g, int64_t col, char* packed, float* sums) {
  const int64_t steps = tiles_of(g.tokens, kTileDepth);
  const int64_t rank_tiles = tiles_of(g.out->rank, kTileRows);
  float* chain = sums + rank_tiles * kColumnTiles * kTileFloats;
  for (int64_t begin = 0; begin < steps; begin += kChainSteps) {
    const int64_t count = std::min(kChainSteps, steps - begin);
    pack_columns(g, begin * kTileDepth, count, col, packed);
    for (int64_t tile = 0; tile < rank_tiles; ++tile) {
      const TileRun a[1] = {
          {g.packed + (tile * steps + begin) * kTileBytes, kTileBytes, kRowBytes}};
      TileRun b[kColumnTiles];
      float* own = sums + tile * kColumnTiles * kTileFloats;
      float* target = begin == 0 ? own : chain;
      float* c[kColumnTiles];
      for (int64_t j = 0; j < kColumnTiles; ++j) {
        b[j] = {packed + j * count * kTileBytes, kTileBytes, kRowBytes};
        c[j] = target + j * kTileFloats;
      }
      multiply_steps<1, kColumnTiles>(a, b, count, false, c);
      if (begin == 0) continue;
      for (int64_t i = 0; i < kColumnTiles * kTileFloats; i += 16)
        _mm512_store_ps(own + i, _mm512_add_ps(_mm512_load_ps(own + i), _mm512_load_ps(chain + i)));
    }
  }
  for (int64_t tile = 0; tile < rank_tiles; ++tile)
    for (int64_t pair = 0; pair < kColumnTiles / 2; ++pair)
      store_gradient(g, tile * kTileRows, col + pair * 2 * kTileRows,
                     sums + (tile * kColumnTiles + 2 * pair) * kTileFloats);
}

}  // namespace

Status down_projection_amx(const void* x, int64_t tokens, const AdapterView& adapter, float scaling,
                           const ThreadPool& pool, float* left) {
  static thread_local Scratch memory;
  const int64_t k_tiles = tiles_of(adapter.cols, kTileDepth);
  const int64_t rank_tiles = tiles_of(adapter.rank, kTileRows);
  auto* packed = static_cast<char*>(memory.reserve(rank_tiles * k_tiles * kTileBytes));
  if (!packed) return Status::kOutOfMemory;
  pool.run(0, rank_tiles * k_tiles, 32, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      pack_adapter(adapter, tile / k_tiles * kTileRows, tile % k_tiles * kTileDepth,
                   packed + tile * kTileBytes);
  });
  const Projection p{static_cast<const uint16_t*>(x),
                     tokens,
                     adapter.cols,
                     k_tiles,
                     adapter.rank,
                     scaling,
                     packed,
                     left};
  const int64_t token_tiles = tiles_of(tokens, kTileRows);
  Failure failure;
  pool.run(0, tiles_of(token_tiles, kUnitTiles), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch own;
    const int64_t spare_tiles = tokens < kTileRows ? k_tiles : kUnitTiles;
    auto* spare = static_cast<uint16_t*>(own.reserve(spare_tiles * kTileBytes));
    if (!spare) return failure.set();
    const Session session;
    const int64_t last = std::min(token_tiles, end * kUnitTiles);
    int64_t tile = begin * kUnitTiles;
    for (; tile + 4 <= last; tile += 4) project<4>(p, tile, spare);
    for (; tile + 2 <= last; tile += 2) project<2>(p, tile, spare);
    if (tile < last) project<1>(p, tile, spare);
  });
  return failure.status();
}

Status adapter_gradient_amx(const float* left, const void* x, int64_t tokens, float scaling,
                            const AdapterView& gradient, const ThreadPool& pool) {
  static thread_local Scratch memory;
  const int64_t rank_tiles = tiles_of(gradient.rank, kTileRows);
  auto* packed =
      static_cast<char*>(memory.reserve(rank_tiles * tiles_of(tokens, kTileDepth) * kTileBytes));
  if (!packed) return Status::kOutOfMemory;
  pack_left(left, tokens, gradient.rank, packed);
  const Gradient g{static_cast<const uint16_t*>(x), tokens, scaling, packed, &gradient};
  Failure failure;
  pool.run(0, tiles_of(gradient.cols, kColumns), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch own;
    auto* columns =
        static_cast<char*>(own.reserve((kChainSteps + rank_tiles + 1) * kColumnTiles * kTileBytes));
    if (!columns) return failure.set();
    auto* sums = reinterpret_cast<float*>(columns + kChainSteps * kColumnTiles * kTileBytes);
    const Session session;
    for (int64_t unit = begin; unit < end; ++unit)
      gradient_of_columns(g, unit * kColumns, columns, sums);
  });
  return failure.status();
}

#else

Status down_projection_amx(const void*, int64_t, const AdapterView&, float, const ThreadPool&,
                           float*) {
  return Status::kUnsupported;
}

Status adapter_gradient_amx(const float*, const void*, int64_t, float, const AdapterView&,
                            const ThreadPool&) {
  return Status::kUnsupported;
}

#endif

}  // namespace qlk
