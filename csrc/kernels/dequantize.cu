// dequantize: a lane takes eight codes, one word, and stores eight elements, 16 bytes of a 2-byte
// dtype; a block loops over tiles of up to kMaxMatrices weights, nested scales decoded on the way.
#include "qlk/cuda/element.cuh"
#include "qlk/cuda/launch.h"
#include "qlk/cuda/scales.cuh"
#include "qlk/dequantize.h"

namespace qlk {
namespace {

constexpr int kThreads = 256;
// Words of a lane that are loaded before any is decoded: 16 bytes in flight.
constexpr int kUnroll = 4;
constexpr int kTile = kThreads * kUnroll * kVector;

struct Matrix {
  const uint8_t* codes = nullptr;
  const float* codebook = nullptr;
  DeviceScales scales;
  void* out = nullptr;
  int64_t numel = 0, cols = 0, row_stride = 0, first_tile = 0;
  int block_shift = 0;
  bool word_loads = false;     // codes are aligned to 4 bytes
  bool vector_stores = false;  // every group of eight elements lies at a 16-byte boundary
};

struct Batch {
  Matrix matrices[cuda::kMaxMatrices];
  int count = 0;
  int64_t n_tiles = 0;
};

// Eight codes from element `first` on; the nibbles past the end are undefined.
__device__ __forceinline__ uint32_t load_word(const Matrix& m, int64_t first) {
  if (m.word_loads && first + kVector <= m.numel)
    return ptx::load_once(reinterpret_cast<const uint32_t*>(m.codes) + first / kVector);
  uint32_t word = 0;
  const int64_t bytes = (m.numel + 1) / 2;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (first / 2 + i < bytes) word |= static_cast<uint32_t>(m.codes[first / 2 + i]) << (8 * i);
  return word;
}

// The row of an element; a 64-bit division takes several times as long as one of 32 bits.
__device__ __forceinline__ int64_t row_of(const Matrix& m, int64_t element) {
  if (m.numel <= 0xffffffffll)
    return static_cast<uint32_t>(element) / static_cast<uint32_t>(m.cols);
  return element / m.cols;
}

template <DType kDType>
__device__ __forceinline__ void store_elements(const Matrix& m, int64_t first,
                                               const float (&values)[kVector]) {
  auto* out = static_cast<StorageOf<kDType>*>(m.out);
  const bool flat = m.row_stride == m.cols;
  int64_t row = flat ? 0 : row_of(m, first);
  int64_t col = first - row * m.cols;
  if (m.vector_stores && first + kVector <= m.numel) {
    store_vector<kDType>(out + row * m.row_stride + col, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (first + i < m.numel) {
      out[row * m.row_stride + col] = Element<kDType>::store(values[i]);
      if (++col == m.cols && !flat) col = 0, ++row;
    }
  }
}

template <DType kDType>
__global__ __launch_bounds__(kThreads) void dequantize_kernel(const __grid_constant__ Batch batch) {
  SHARED_ARRAY(float, table, [16]);
  SHARED_ARRAY(float, scale_map, [kScaleCodes]);
  const int thread = static_cast<int>(threadIdx.x);
  int current = -1;
  float offset = 0;
  for (int64_t tile = blockIdx.x; tile < batch.n_tiles; tile += gridDim.x) {
    int which = 0;
    while (which + 1 < batch.count && tile >= batch.matrices[which + 1].first_tile) ++which;
    const Matrix& m = batch.matrices[which];
    if (which != current) {
      __syncthreads();  // Everyone is done with the last weight's tables.
      if (thread < 16) table[thread] = m.codebook[thread];
      if (m.scales.nested()) {
        scale_map[thread] = m.scales.view.scale_codebook[thread];
        offset = *m.scales.view.scale_offset;
      }
      __syncthreads();
      current = which;
    }

    const int64_t begin = (tile - m.first_tile) * kTile + thread * kVector;
    uint32_t words[kUnroll];
    float scales[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = begin + u * kThreads * kVector;
      words[u] = 0;
      scales[u] = 0;
      if (first < m.numel) {
        words[u] = load_word(m, first);
        scales[u] = m.scales.decode(first >> m.block_shift, scale_map, offset);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = begin + u * kThreads * kVector;
      if (first >= m.numel) break;
      float values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        // Element 2i is the high nibble of byte i.
        values[i] = __fmul_rn(table[words[u] >> (4 * (i ^ 1)) & 15], scales[u]);
      store_elements<kDType>(m, first, values);
    }
  }
}

template <DType kDType>
int launch_for(const Batch& batch, cudaStream_t stream) {
  const int64_t resident = int64_t{multiprocessor_count()} * 8;
  const auto grid = static_cast<unsigned>(min(batch.n_tiles, resident));
  return launch(dequantize_kernel<kDType>, dim3{grid, 1, 1}, dim3{kThreads, 1, 1}, 0, stream,
                batch);
}

}  // namespace

int cuda::launch_dequantize(const DequantizeParams* matrices, int count, void* stream) {
  if (count < 0 || count > kMaxMatrices) return cudaErrorInvalidValue;
  Batch batch;
  for (int i = 0; i < count; ++i) {
    const DequantizeParams& p = matrices[i];
    if (p.dtype != matrices[0].dtype) return cudaErrorInvalidValue;
    const int64_t numel = p.weight.rows * p.weight.cols;
    if (numel == 0) continue;
    Matrix& m = batch.matrices[batch.count++];
    m.codes = p.weight.codes;
    m.codebook = p.weight.codebook;
    m.scales = DeviceScales(p.weight.scales);
    m.out = p.out;
    m.numel = numel;
    m.cols = p.weight.cols;
    m.row_stride = p.row_stride;
    m.first_tile = batch.n_tiles;
    m.block_shift = power_shift(p.weight.block_size);
    m.word_loads = reinterpret_cast<uintptr_t>(m.codes) % 4 == 0;
    const bool rows_fit = m.cols % kVector == 0 && m.row_stride % kVector == 0;
    m.vector_stores = is_aligned(m.out) && (m.row_stride == m.cols || rows_fit);
    batch.n_tiles += ceil_div(numel, int64_t{kTile});
  }
  if (batch.n_tiles == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (matrices[0].dtype) {
    case DType::kFloat16:
      return launch_for<DType::kFloat16>(batch, on);
    case DType::kBFloat16:
      return launch_for<DType::kBFloat16>(batch, on);
    default:
      return launch_for<DType::kFloat32>(batch, on);
  }
}

}  // namespace qlk
