// quantize: a warp takes four runs of 256 elements, a lane eight of each; the lanes of a block find
// its absmax by shuffles, then each lane encodes its elements and stores them as one word.
#include "qlk/cuda/element.cuh"
#include "qlk/cuda/launch.h"
#include "qlk/quantize.h"

namespace qlk {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRun = kWarp * kVector;
constexpr int kRuns = 4;
constexpr int kTile = kRuns * kRun;
constexpr int kMaxLevels = 16;
constexpr uint32_t kInfinityBits = 0x7f800000u, kNanBits = 0x7fc00000u;
constexpr float kSmallestNormal = 0x1p-126f;

// Boundaries in the order of a binary heap: node i has children 2i and 2i + 1, and the path "n is
// above" of four steps from node 1 ends at node 16 + rank.
template <class Boundary>
__device__ __forceinline__ void load_heap(const Boundary* boundaries, int n_levels,
                                          Boundary infinity, Boundary* heap) {
  const int node = static_cast<int>(threadIdx.x);
  if (node >= 1 && node < kMaxLevels) {
    int level = 0;
    while (node >> (level + 1)) ++level;
    const int place = ((2 * (node - (1 << level)) + 1) << (3 - level)) - 1;
    heap[node] = place < n_levels - 1 ? boundaries[place] : infinity;
  }
}

// Codes by rank, four bits each.
__device__ __forceinline__ uint64_t load_codes(const uint8_t* rank_codes, int n_levels) {
  uint64_t codes = 0;
  for (int rank = 0; rank < n_levels; ++rank)
    codes |= static_cast<uint64_t>(rank_codes[rank]) << (4 * rank);
  return codes;
}

__device__ __forceinline__ uint32_t encode(float n, const float* heap, uint64_t codes) {
  // Four times the node: its place in the heap in bytes, and the place of a rank's code in bits.
  int place = 4;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const float boundary =
        *reinterpret_cast<const float*>(reinterpret_cast<const char*>(heap) + place);
    place = 2 * place + (n > boundary ? 4 : 0);
  }
  return static_cast<uint32_t>(codes >> (place - 4 * kMaxLevels)) & 15u;
}

// Against a decoded scale: products of two fp32 values, or of one and a midpoint, are exact in
// fp64.
__device__ __forceinline__ uint32_t encode_decoded(double signed_w, double magnitude,
                                                   const double* heap, uint64_t codes) {
  int node = 1;
#pragma unroll
  for (int step = 0; step < 4; ++step)
    node = 2 * node + (signed_w > __dmul_rn(heap[node], magnitude) ? 1 : 0);
  return static_cast<uint32_t>(codes >> (4 * (node - kMaxLevels))) & 15u;
}

template <DType kDType>
__device__ __forceinline__ void load_run(const QuantizeParams& p, int64_t first, bool vector,
                                         float (&values)[kVector]) {
  const auto* weight = static_cast<const StorageOf<kDType>*>(p.weight) + first;
  if (vector && first + kVector <= p.numel)
    load_vector<kDType>(weight, values);
  else
    load_some<kDType>(weight, p.numel - first, values);
}

// As bits, because a maximum of floats need not keep a NaN, and NaN's bits are above all others.
__device__ __forceinline__ uint32_t largest_magnitude(const float (&values)[kVector]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
  return largest;
}

__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2)
    value = max(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

template <DType kDType, bool kDecoded>
struct Encoder {
  const QuantizeParams& p;
  const float* heap;
  const double* exact_heap;
  uint64_t codes;
  int block_shift;

  // Encodes a lane's eight elements from `first` on, of a block with the given absmax bits.
  __device__ __forceinline__ void run(const float (&values)[kVector], int64_t first,
                                      uint32_t magnitude) const {
    if (first >= p.numel) return;
    const int64_t block = first >> block_shift;
    const bool finite = magnitude < kInfinityBits;
    if ((first & ((int64_t{1} << block_shift) - 1)) == 0)
      p.absmax[block] = __uint_as_float(finite ? magnitude : kNanBits);
    bool usable = finite;
    float inverse = 0, sign = 1;
    double scale_magnitude = 0;
    if constexpr (kDecoded) {
      const float scale = p.scales[block];
      const uint32_t scale_bits = __float_as_uint(scale) & 0x7fffffffu;
      usable = usable && scale_bits != 0 && scale_bits < kInfinityBits;
      sign = __float_as_uint(scale) >> 31 ? -1.0f : 1.0f;
      scale_magnitude = __uint_as_float(scale_bits);
    } else {
      usable = usable && magnitude != 0;
      inverse = __fdiv_rn(1.0f, fmaxf(__uint_as_float(magnitude), kSmallestNormal));
    }
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      uint32_t code;
      if constexpr (kDecoded)
        code = encode_decoded(double{sign * values[i]}, scale_magnitude, exact_heap, codes);
      else
        code = encode(__fmul_rn(values[i], inverse), heap, codes);
      // Element 2i is the high nibble of byte i.
      word |= code << (4 * (i ^ 1));
    }
    const uint32_t zeros = p.zero_code * 0x11111111u;
    if (!usable) word = zeros;
    if (first + kVector <= p.numel) {
      reinterpret_cast<uint32_t*>(p.codes)[first / kVector] = word;
      return;
    }
    const int count = static_cast<int>(p.numel - first);
    if (count % 2) {
      const uint32_t pad = 15u << (4 * (count ^ 1));
      word = (word & ~pad) | (zeros & pad);
    }
    for (int byte = 0; byte < (count + 1) / 2; ++byte)
      p.codes[first / 2 + byte] = static_cast<uint8_t>(word >> (8 * byte));
  }
};

template <DType kDType, bool kDecoded>
__global__ __launch_bounds__(kThreads, kDecoded ? 2 : 3) void quantize_kernel(
    const __grid_constant__ QuantizeParams p, int block_shift, bool vector) {
  SHARED_ARRAY(float, heap, [kMaxLevels]);
  SHARED_ARRAY(double, exact_heap, [kMaxLevels]);
  if constexpr (kDecoded)
    load_heap(p.midpoints, p.n_levels, double{__uint_as_float(kInfinityBits)}, exact_heap);
  else
    load_heap(p.boundaries, p.n_levels, __uint_as_float(kInfinityBits), heap);
  __syncthreads();
  const Encoder<kDType, kDecoded> encoder{p, heap, exact_heap, load_codes(p.rank_codes, p.n_levels),
                                          block_shift};

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t block_size = int64_t{1} << block_shift;
  // A unit is a tile, or a block that is larger.
  const int tiles = block_size > kTile ? static_cast<int>(block_size / kTile) : 1;
  const int64_t unit_size = int64_t{kTile} * tiles;
  const int64_t n_units = ceil_div(p.numel, unit_size);
  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; unit < n_units;
       unit += stride) {
    const int64_t begin = unit * unit_size + lane * kVector;
    float values[kRuns][kVector];
    uint32_t magnitude[kRuns] = {};
    for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
      for (int r = 0; r < kRuns; ++r)
        load_run<kDType>(p, begin + tile * kTile + r * kRun, vector, values[r]);
#pragma unroll
      for (int r = 0; r < kRuns; ++r)
        magnitude[r] = max(magnitude[r], largest_magnitude(values[r]));
    }
    if (block_size >= 2 * kRun)
      magnitude[0] = magnitude[1] = max(magnitude[0], magnitude[1]),
      magnitude[2] = magnitude[3] = max(magnitude[2], magnitude[3]);
    if (block_size >= 4 * kRun)
      magnitude[0] = magnitude[1] = magnitude[2] = magnitude[3] = max(magnitude[0], magnitude[2]);
    const int lanes = block_size < kRun ? static_cast<int>(block_size) / kVector : kWarp;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) magnitude[r] = largest_of_lanes(magnitude[r], lanes);

    for (int tile = 0; tile < tiles; ++tile) {
      const int64_t first = begin + tile * kTile;
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        // A block of one tile is still in registers.
        if (tiles > 1) load_run<kDType>(p, first + r * kRun, vector, values[r]);
        encoder.run(values[r], first + r * kRun, magnitude[r]);
      }
    }
  }
}

template <DType kDType>
int launch_for(const QuantizeParams& p, cudaStream_t stream) {
  const int64_t units = ceil_div(p.numel, max(p.block_size, int64_t{kTile}));
  // Persistent: a block's tables are loaded once.
  const int64_t resident = int64_t{multiprocessor_count()} * 4;
  const auto grid = static_cast<unsigned>(min(ceil_div(units, int64_t{kWarps}), resident));
  const int shift = power_shift(p.block_size);
  const bool vector = is_aligned(p.weight);
  if (p.scales)
    return launch(quantize_kernel<kDType, true>, dim3{grid, 1, 1}, dim3{kThreads, 1, 1}, 0, stream,
                  p, shift, vector);
  return launch(quantize_kernel<kDType, false>, dim3{grid, 1, 1}, dim3{kThreads, 1, 1}, 0, stream,
                p, shift, vector);
}

}  // namespace

int cuda::launch_quantize(const QuantizeParams& p, void* stream) {
  if (p.numel == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::kFloat16:
      return launch_for<DType::kFloat16>(p, on);
    case DType::kBFloat16:
      return launch_for<DType::kBFloat16>(p, on);
    default:
      return launch_for<DType::kFloat32>(p, on);
  }
}

}  // namespace qlk
