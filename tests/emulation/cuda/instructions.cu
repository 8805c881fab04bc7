// One kernel per wrapped or emulated instruction, for tests against the PTX manual's definitions:
// a single warp, each lane with its own operands. And kernels that misuse the machine, which the
// emulation must refuse.
#include "problem.h"
#include "qlk/cuda/element.cuh"

namespace qlk::testing {
namespace {

__global__ void permute_bytes_kernel(const uint32_t* operands, uint32_t* result) {
  const uint32_t* mine = operands + 3 * threadIdx.x;
  result[threadIdx.x] = ptx::permute_bytes(mine[0], mine[1], mine[2]);
}

__global__ void convert_kernel(const float* pairs, uint32_t* bf16, uint32_t* f16,
                               const uint16_t* halves, float* widened) {
  const unsigned i = threadIdx.x + blockIdx.x * blockDim.x;
  bf16[i] = ptx::pack_bf16(pairs[2 * i], pairs[2 * i + 1]);
  f16[i] = ptx::pack_f16(pairs[2 * i], pairs[2 * i + 1]);
  widened[i] = ptx::f16_to_float(halves[i]);
}

template <bool kBFloat16>
__global__ void multiply_add_kernel(const uint32_t* left, const uint32_t* right, float* sum) {
  const unsigned lane = threadIdx.x;
  uint32_t l[4], r[2];
  float s[4];
  for (int i = 0; i < 4; ++i) l[i] = left[4 * lane + i], s[i] = sum[4 * lane + i];
  for (int i = 0; i < 2; ++i) r[i] = right[2 * lane + i];
  ptx::multiply_add<kBFloat16>(s, l, r);
  for (int i = 0; i < 4; ++i) sum[4 * lane + i] = s[i];
}

template <bool kTranspose>
__global__ void load_matrices_kernel(const uint16_t* rows, uint32_t* result) {
  SHARED_ARRAY(uint16_t, shared, [32 * 8]);
  for (int i = 0; i < 8; ++i) shared[8 * threadIdx.x + i] = rows[8 * threadIdx.x + i];
  __syncwarp();
  uint32_t r[4];
  ptx::load_matrices<kTranspose>(r, shared + 8 * threadIdx.x);
  for (int i = 0; i < 4; ++i) result[4 * threadIdx.x + i] = r[i];
}

// Each lane copies 16 bytes, of which `present` are read, 8 and 4, in three groups, and looks at
// the shared memory after waits for 2, 1 and 0 groups: what has surely arrived.
__global__ void copy_async_kernel(const uint32_t* source, int present, uint32_t* result) {
  SHARED_ARRAY(uint32_t, shared, [32 * 8]);
  uint32_t* mine = shared + 8 * threadIdx.x;
  const uint32_t* from = source + 8 * threadIdx.x;
  ptx::copy_async<16>(mine, from, present);
  ptx::commit_copies();
  ptx::copy_async<8>(mine + 4, from + 4);
  ptx::commit_copies();
  ptx::copy_async<4>(mine + 6, from + 6);
  ptx::commit_copies();
  uint32_t* out = result + 7 * threadIdx.x;
  ptx::wait_copies<2>();
  for (int i = 0; i < 4; ++i) out[i] = mine[i];
  ptx::wait_copies<1>();
  for (int i = 4; i < 6; ++i) out[i] = mine[i];
  ptx::wait_copies<0>();
  out[6] = mine[6];
}

__global__ void shuffle_kernel(const uint32_t* values, int argument, int width, uint32_t* result) {
  const unsigned lane = threadIdx.x;
  const uint32_t value = values[lane];
  result[lane] = __shfl_sync(kAllLanes, value, argument, width);
  result[32 + lane] = __shfl_xor_sync(kAllLanes, value, argument, width);
  result[64 + lane] = __shfl_down_sync(kAllLanes, value, static_cast<unsigned>(argument), width);
  result[96 + lane] = __ballot_sync(kAllLanes, value & 1);
  result[128 + lane] = static_cast<uint32_t>(__any_sync(kAllLanes, value & 2));
  result[160 + lane] = static_cast<uint32_t>(__all_sync(kAllLanes, value & 4));
}

enum Fault {
  kNone,
  kMissingBarrier,
  kBarrierInBranch,
  kTwoBarriers,
  kMissingWarpSync,
  kMissingWait,
  kNoWaitAtAll,
  kWrongMask,
  kMissingLane,
  kSharedOverflow,
  kDynamicOverflow,
  kUnalignedCopy,

};

__global__ void faulty_kernel(int fault, const uint32_t* source, uint32_t* result) {
  SHARED_ARRAY(uint32_t, shared, [64]);
  SHARED_ARRAY(uint32_t, copied, [64 * 4]);
  DYNAMIC_SHARED(uint32_t, dynamic);
  const unsigned thread = threadIdx.x, lane = thread % kWarp;
  shared[thread + (fault == kSharedOverflow ? 1 : 0)] = source[thread];
  dynamic[thread + (fault == kDynamicOverflow ? 1 : 0)] = source[thread];
  if (fault != kUnalignedCopy) {
    ptx::copy_async<16>(copied + 4 * thread, source + 4 * thread);
  } else {
    ptx::copy_async<16>(copied + 4 * thread, source + 4 * thread + 1);
  }
  ptx::commit_copies();
  if (fault == kBarrierInBranch) {
    if (thread < 40) __syncthreads();
  } else if (fault == kTwoBarriers) {
    if (thread < 32)
      __syncthreads();
    else
      __syncthreads();
  } else if (fault != kMissingBarrier) {
    __syncthreads();
  }
  uint32_t sum = shared[63 - thread] + dynamic[thread];
  if (fault == kMissingWait) {
    sum += copied[4 * thread];
    ptx::wait_copies<0>();
  } else if (fault != kNoWaitAtAll) {
    ptx::wait_copies<0>();
    sum += copied[4 * thread];
  }
  __syncthreads();
  shared[thread] = sum;
  if (fault != kMissingWarpSync) __syncwarp();
  sum += shared[thread ^ 1];
  if (fault == kWrongMask) {
    sum = __shfl_xor_sync(lane < 16 ? 0x0000ffffu : kAllLanes, sum, 1);
  } else if (fault == kMissingLane) {
    if (lane != 5) sum = __shfl_xor_sync(kAllLanes, sum, 1);
  } else {
    sum = __shfl_xor_sync(kAllLanes, sum, 1);
  }
  result[thread] = sum;
}

constexpr dim3 kOne{1, 1, 1}, kLanes{32, 1, 1};

int run_permute_bytes(const Problem& p) {
  return launch(permute_bytes_kernel, kOne, kLanes, 0, nullptr,
                static_cast<const uint32_t*>(p.pointer<uint32_t>("operands")),
                p.pointer<uint32_t>("result"));
}

int run_convert(const Problem& p) {
  const auto blocks = static_cast<unsigned>(p.integer("count") / 32);
  return launch(convert_kernel, dim3{blocks, 1, 1}, kLanes, 0, nullptr,
                static_cast<const float*>(p.pointer<float>("pairs")), p.pointer<uint32_t>("bf16"),
                p.pointer<uint32_t>("f16"),
                static_cast<const uint16_t*>(p.pointer<uint16_t>("halves")),
                p.pointer<float>("widened"));
}

int run_multiply_add(const Problem& p) {
  const auto kernel =
      p.integer("bfloat16") ? multiply_add_kernel<true> : multiply_add_kernel<false>;
  return launch(
      kernel, kOne, kLanes, 0, nullptr, static_cast<const uint32_t*>(p.pointer<uint32_t>("left")),
      static_cast<const uint32_t*>(p.pointer<uint32_t>("right")), p.pointer<float>("sum"));
}

int run_load_matrices(const Problem& p) {
  const auto kernel =
      p.integer("transpose") ? load_matrices_kernel<true> : load_matrices_kernel<false>;
  return launch(kernel, kOne, kLanes, 0, nullptr,
                static_cast<const uint16_t*>(p.pointer<uint16_t>("rows")),
                p.pointer<uint32_t>("result"));
}

int run_copy_async(const Problem& p) {
  return launch(copy_async_kernel, kOne, kLanes, 0, nullptr,
                static_cast<const uint32_t*>(p.pointer<uint32_t>("source")),
                static_cast<int>(p.integer("present")), p.pointer<uint32_t>("result"));
}

int run_shuffle(const Problem& p) {
  return launch(shuffle_kernel, kOne, kLanes, 0, nullptr,
                static_cast<const uint32_t*>(p.pointer<uint32_t>("values")),
                static_cast<int>(p.integer("argument")), static_cast<int>(p.integer("width")),
                p.pointer<uint32_t>("result"));
}

int run_faulty(const Problem& p) {
  return launch(faulty_kernel, kOne, dim3{64, 1, 1}, 64 * sizeof(uint32_t), nullptr,
                static_cast<int>(p.integer("fault")),
                static_cast<const uint32_t*>(p.pointer<uint32_t>("source")),
                p.pointer<uint32_t>("result"));
}

const Registration permute_bytes("permute_bytes", run_permute_bytes);
const Registration convert("convert", run_convert);
const Registration multiply_add("multiply_add", run_multiply_add);
const Registration load_matrices("load_matrices", run_load_matrices);
const Registration copy_async("copy_async", run_copy_async);
const Registration shuffle("shuffle", run_shuffle);
const Registration faulty("faulty", run_faulty);

}  // namespace
}  // namespace qlk::testing
