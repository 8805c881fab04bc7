// double_quantize: an exact sum of all scales, then per second-level block the largest distance
// from their mean and the nearest codes.
//
// The sum is exact and so the same in any order: each fp32 is a multiple of 2^-149, cut into 32-bit
// digits that are added as 64-bit integers. One rounding to fp64 gives what math.fsum gives.
#include "qlk/cuda/launch.h"
#include "qlk/cuda/scales.cuh"
#include "qlk/double_quantize.h"

namespace qlk {
namespace {

constexpr int kThreads = 256;
// fp32 magnitudes are below 2^277 units of 2^-149: nine digits. Then the counts of NaN, +Inf, -Inf.
constexpr int kDigits = 9, kNan = 9, kUp = 10, kDown = 11, kBins = cuda::kSumBins;
constexpr uint32_t kInfinityBits = 0x7f800000u, kNanBits = 0x7fc00000u;
constexpr float kSmallestNormal = 0x1p-126f;
using Bin = unsigned long long;  // What atomicAdd takes; a two's complement int64.

__device__ __forceinline__ void add_to_bin(Bin* bins, int bin, int64_t value) {
  if (value) atomicAdd(bins + bin, static_cast<Bin>(value));
}

// partials[block][kBins]: the bins of this block's scales.
__global__ __launch_bounds__(kThreads) void sum_kernel(const float* absmax, int64_t count,
                                                       int64_t* partials) {
  SHARED_ARRAY(Bin, bins, [kBins]);
  if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
  __syncthreads();
  // Scales are alike: a thread's digit seldom changes, and so it seldom adds to shared memory.
  int digit = 0;
  int64_t low = 0, high = 0;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
    const uint32_t bits = __float_as_uint(absmax[i]);
    const uint32_t exponent = bits >> 23 & 0xff, fraction = bits & 0x7fffff;
    const bool negative = bits >> 31;
    if (exponent == 0xff) {
      add_to_bin(bins, fraction ? kNan : negative ? kDown : kUp, 1);
      continue;
    }
    // A denormal has the smallest normal's unit and no implicit bit.
    const int position = exponent ? static_cast<int>(exponent) - 1 : 0;
    const uint64_t mantissa = exponent ? fraction | 0x800000u : fraction;
    const uint64_t wide = mantissa << (position & 31);
    if (position >> 5 != digit) {
      add_to_bin(bins, digit, low);
      add_to_bin(bins, digit + 1, high);
      low = high = 0;
      digit = position >> 5;
    }
    const auto l = static_cast<int64_t>(wide & 0xffffffffu), h = static_cast<int64_t>(wide >> 32);
    low += negative ? -l : l;
    high += negative ? -h : h;
  }
  add_to_bin(bins, digit, low);
  // The upper half of the highest digit is empty: nothing is added beyond the digits.
  add_to_bin(bins, digit + 1, high);
  __syncthreads();
  if (threadIdx.x < kBins)
    partials[blockIdx.x * kBins + threadIdx.x] = static_cast<int64_t>(bins[threadIdx.x]);
}

// The sum that the digits stand for, in fp64, rounded to nearest even once.
__device__ double round_sum(const int64_t* bins) {
  // The carry out of the last digit is -1 if the sum is negative.
  int64_t carry = 0;
  for (int i = 0; i < kDigits; ++i) carry = (bins[i] + carry) >> 32;
  const int64_t sign = carry < 0 ? -1 : 1;

  // 32-bit digits of the magnitude; the carry, at most 2^31, is the highest. Of these the highest
  // three that matter, and whether anything is left below them.
  carry = 0;
  uint64_t top = 0, second = 0, third = 0, below1 = 0, below2 = 0, rest = 0;
  bool sticky = false;
  int place = 0;
  for (int i = 0; i < kDigits + 2; ++i) {
    const int64_t value = (i < kDigits ? sign * bins[i] : 0) + carry;
    const auto digit = static_cast<uint64_t>(value & 0xffffffff);
    carry = value >> 32;
    if (digit) top = digit, second = below1, third = below2, sticky = rest != 0, place = i;
    rest |= below2;
    below2 = below1;
    below1 = digit;
  }
  if (top == 0) return 0.0;
  // 64 bits from the highest one on, the last of them "or something below": fp64 takes 53.
  const int shift = __clzll(static_cast<long long>(top)) - 32;
  uint64_t significand = (top << 32 | second) << shift;
  if (shift) significand |= third >> (32 - shift);
  sticky = sticky || (third << shift & 0xffffffffu) != 0;
  significand |= sticky ? 1 : 0;
  // Units of 2^(32 (place - 1) - shift - 149); never a denormal of fp64.
  const int exponent = 32 * (place - 1) - shift - 149;
  const double power = __longlong_as_double(static_cast<long long>(exponent + 1023) << 52);
  return __dmul_rn(__ull2double_rn(significand), power) * static_cast<double>(sign);
}

__device__ float mean_of(const int64_t* bins, int64_t count) {
  if (bins[kNan] > 0 || (bins[kUp] > 0 && bins[kDown] > 0)) return __uint_as_float(kNanBits);
  if (bins[kUp] > 0) return __uint_as_float(kInfinityBits);
  if (bins[kDown] > 0) return -__uint_as_float(kInfinityBits);
  return __double2float_rn(__ddiv_rn(round_sum(bins), static_cast<double>(count)));
}

__device__ __forceinline__ uint32_t largest_of_block(uint32_t value, uint32_t* warp_largest) {
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = max(value, __shfl_xor_sync(kAllLanes, value, step));
  if (threadIdx.x % kWarp == 0) warp_largest[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int w = 0; w < kThreads / kWarp; ++w) value = max(value, warp_largest[w]);
  __syncthreads();
  return value;
}

// Every block works out the mean, then takes second-level blocks in turn.
__global__ __launch_bounds__(kThreads) void encode_kernel(
    const __grid_constant__ DoubleQuantizeParams p, const int64_t* partials, int parts,
    int64_t n_second) {
  SHARED_ARRAY(int64_t, bins, [kBins]);
  SHARED_ARRAY(float, midpoints, [kScaleCodes]);
  SHARED_ARRAY(float, codebook, [kScaleCodes]);
  SHARED_ARRAY(float, shared_offset, [1]);
  SHARED_ARRAY(int, shared_zero_code, [1]);
  SHARED_ARRAY(uint32_t, warp_largest, [kThreads / kWarp]);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kBins) {
    int64_t sum = 0;
    for (int part = 0; part < parts; ++part) sum += partials[part * kBins + thread];
    bins[thread] = sum;
  }
  codebook[thread] = p.scale_codebook[thread];
  midpoints[thread] =
      thread + 1 < kScaleCodes
          ? __fmul_rn(__fadd_rn(p.scale_codebook[thread], p.scale_codebook[thread + 1]), 0.5f)
          : __uint_as_float(kInfinityBits);
  __syncthreads();
  if (thread == 0) {
    *shared_offset = mean_of(bins, p.n_blocks);
    if (blockIdx.x == 0) *p.scale_offset = *shared_offset;
    int nearest = 0;
    for (int i = 1; i < kScaleCodes; ++i)
      if (fabsf(codebook[i]) < fabsf(codebook[nearest])) nearest = i;
    *shared_zero_code = nearest;
  }
  __syncthreads();
  const float offset = *shared_offset;
  const auto zero_code = static_cast<uint8_t>(*shared_zero_code);

  for (int64_t block = blockIdx.x; block < n_second; block += gridDim.x) {
    const int64_t first = block * p.scale_block_size;
    const int64_t end = min(first + p.scale_block_size, p.n_blocks);
    uint32_t magnitude = 0;
    for (int64_t i = first + thread; i < end; i += kThreads)
      // As bits: NaN's are above all others.
      magnitude = max(magnitude, __float_as_uint(__fsub_rn(p.absmax[i], offset)) & 0x7fffffffu);
    magnitude = largest_of_block(magnitude, warp_largest);
    const float scale = __uint_as_float(magnitude);
    if (thread == 0) p.scale_absmax[block] = scale;
    const bool usable = magnitude != 0 && magnitude <= kInfinityBits;
    const float inverse = __fdiv_rn(1.0f, fmaxf(scale, kSmallestNormal));
    for (int64_t i = first + thread; i < end; i += kThreads) {
      const float n = __fmul_rn(__fsub_rn(p.absmax[i], offset), inverse);
      int rank = 0;
#pragma unroll
      for (int step = kScaleCodes / 2; step > 0; step /= 2)
        // An infinite scale normalises to NaN, which the reference's search places last.
        rank += n <= midpoints[rank + step - 1] ? 0 : step;
      p.scale_codes[i] = usable ? static_cast<uint8_t>(rank) : zero_code;
    }
  }
}

}  // namespace

int cuda::launch_double_quantize(const DoubleQuantizeParams& p, int64_t* partials, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t resident = int64_t{multiprocessor_count()} * 4;
  const int64_t wanted = ceil_div(p.n_blocks, int64_t{kThreads} * 8);
  const auto parts = static_cast<unsigned>(min(min(wanted, resident), kMaxSumParts));
  const cudaError_t status = launch(sum_kernel, dim3{parts, 1, 1}, dim3{kThreads, 1, 1}, 0, on,
                                    p.absmax, p.n_blocks, partials);
  if (status != cudaSuccess) return status;
  const int64_t n_second = ceil_div(p.n_blocks, p.scale_block_size);
  const auto blocks = static_cast<unsigned>(min(n_second, resident));
  return launch(encode_kernel, dim3{blocks, 1, 1}, dim3{kThreads, 1, 1}, 0, on, p,
                static_cast<const int64_t*>(partials), static_cast<int>(parts), n_second);
}

}  // namespace qlk
