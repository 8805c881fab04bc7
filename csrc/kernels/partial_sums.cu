// What follows low_rank_gradients_sm80.cu: partial sums added up in their order, scaled, rounded
// once.
#include "qlk/cuda/element.cuh"
#include "qlk/cuda/launch.h"

namespace qlk {
namespace {

using cuda::PartialSums;

constexpr int kThreads = 256;
constexpr int64_t kLargest = (int64_t{1} << 31) - 1;

struct Sums {
  PartialSums jobs[cuda::kMaxPartialSums];
};

// Grid: blocks over a job's elements, jobs.
__global__ __launch_bounds__(kThreads) void partial_sums_kernel(const __grid_constant__ Sums sums) {
  const PartialSums& job = sums.jobs[blockIdx.y];
  const auto width = static_cast<uint32_t>(job.tail ? job.tail_cols : job.cols);
  const auto count = static_cast<uint32_t>(job.rows) * width;
  const int64_t part_size = job.rows * job.cols;
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const uint32_t row = i / width, column = i % width;
    float value = 0.0f;
    if (column < job.cols) {
      const int64_t index = int64_t{row} * job.cols + column;
      float sum = job.partials[index];
#pragma unroll 4
      for (int64_t part = 1; part < job.parts; ++part)
        sum = __fadd_rn(sum, job.partials[part * part_size + index]);
      value = __fmul_rn(job.scaling, sum);
      store_any(job.out, job.dtype, index, value);
    }
    if (job.tail) store_any(job.tail, job.dtype, row * job.tail_stride + column, value);
  }
}

}  // namespace

int cuda::launch_partial_sums(const PartialSums* sums, int count, void* stream) {
  if (count < 0 || count > kMaxPartialSums) return cudaErrorInvalidValue;
  Sums call;
  int jobs = 0;
  int64_t most = 0;
  for (int i = 0; i < count; ++i) {
    const PartialSums& sum = sums[i];
    const int64_t width = sum.tail ? sum.tail_cols : sum.cols;
    if (sum.rows == 0 || sum.cols == 0) continue;
    if (sum.parts < 1 || width < sum.cols || sum.rows > kLargest / width)
      return cudaErrorInvalidValue;
    call.jobs[jobs++] = sum;
    most = max(most, sum.rows * width);
  }
  if (jobs == 0) return cudaSuccess;
  const int64_t resident = int64_t{multiprocessor_count()} * 8;
  const auto blocks = static_cast<unsigned>(min(ceil_div(most, int64_t{kThreads}), resident));
  return launch(partial_sums_kernel, dim3{blocks, static_cast<unsigned>(jobs), 1},
                dim3{kThreads, 1, 1}, 0, static_cast<cudaStream_t>(stream), call);
}

}  // namespace qlk
