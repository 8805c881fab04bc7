// dropout: eight elements a thread, two counters of Philox4x32-10; the specification is
// qlk/dropout.h and qlora_kernels/reference/dropout.py.
#include "qlk/cuda/element.cuh"
#include "qlk/cuda/launch.h"

namespace qlk {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
constexpr uint32_t kKeyStep0 = 0x9e3779b9u, kKeyStep1 = 0xbb67ae85u;
constexpr int kRounds = 10;

// The four words of one counter.
__device__ __forceinline__ void philox(uint64_t seed, uint64_t counter, uint32_t (&words)[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t high0 = __umulhi(kMultiplier0, c0), low0 = kMultiplier0 * c0;
    const uint32_t high1 = __umulhi(kMultiplier1, c2), low1 = kMultiplier1 * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kKeyStep0;
    k1 += kKeyStep1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

template <DType kDType>
__global__ __launch_bounds__(kThreads) void dropout_kernel(
    const __grid_constant__ cuda::DropoutParams p, bool vector) {
  const auto seed = static_cast<uint64_t>(*p.seed);
  const auto* x = static_cast<const StorageOf<kDType>*>(p.x);
  auto* out = static_cast<StorageOf<kDType>*>(p.out);
  const int64_t stride = int64_t{gridDim.x} * kThreads * kVector;
  for (int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector; first < p.numel;
       first += stride) {
    const bool whole = vector && first + kVector <= p.numel;
    float values[kVector];
    if (whole)
      load_vector<kDType>(x + first, values);
    else
      load_some<kDType>(x + first, p.numel - first, values);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      philox(seed, static_cast<uint64_t>(first) / 4 + half, words);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = values[4 * half + i];
        // Chosen, not multiplied: a dropped NaN is 0. The threshold of p = 1 is above every word.
        value = words[i] >= p.threshold ? __fmul_rn(value, p.keep_scale) : 0.0f;
      }
    }
    if (whole) {
      store_vector<kDType>(out + first, values);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (first + i < p.numel) out[first + i] = Element<kDType>::store(values[i]);
    }
  }
}

template <DType kDType>
cudaError_t launch_for(const cuda::DropoutParams& p, cudaStream_t stream) {
  const int64_t wanted = ceil_div(p.numel, int64_t{kThreads} * kVector);
  const int64_t resident = int64_t{multiprocessor_count()} * 8;
  const bool vector = is_aligned(p.x) && is_aligned(p.out);
  return launch(dropout_kernel<kDType>, dim3{static_cast<unsigned>(min(wanted, resident)), 1, 1},
                dim3{kThreads, 1, 1}, 0, stream, p, vector);
}

}  // namespace

int cuda::launch_dropout(const DropoutParams& p, void* stream) {
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
