// One kernel per wrapped instruction of sm_90, for tests against the PTX manual's definitions, as
// in instructions.cu.
#include "problem.h"
#include "qlk/cuda/ptx_wgmma.cuh"

namespace qlk::testing {
namespace {

constexpr dim3 kOne{1, 1, 1};
constexpr int kWarpgroup = 128;

// One box to shared memory: as it lies there, and in the order of its elements.
__global__ void copy_tensor_kernel(const __grid_constant__ TensorMap map, int inner, int outer,
                                   int bytes, Swizzle swizzle, uint32_t* result,
                                   uint32_t* in_order) {
  SWIZZLED_SHARED(uint32_t, tile);
  SHARED_ARRAY(uint64_t, barrier, [1]);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (ptx::elect_one()) {
    ptx::mbarrier_arrive_expect_bytes(barrier, static_cast<uint32_t>(bytes));
    if (inner % 2)
      ptx::copy_tensor_2d(tile, &map, inner, outer, barrier, ptx::evict_first_policy());
    else
      ptx::copy_tensor_2d(tile, &map, inner, outer, barrier);
  }
  ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += kWarp) {
    result[i] = tile[i];
    const uint32_t place = swizzled(ptx::shared_address(tile + i), swizzle);
    in_order[i] = tile[(place - ptx::shared_address(tile)) / 4];
  }
}

// `pieces` pieces of 16 words, twice as many words each, in phases of a barrier with two arrivals:
// lane 0 announces a piece before it copies, lane 1 after it has copied.
__global__ void copy_bulk_kernel(const uint32_t* source, int pieces, uint32_t* result) {
  constexpr int kWords = 16;
  SHARED_ARRAY(uint32_t, shared, [3 * kWords]);
  SHARED_ARRAY(uint64_t, barrier, [1]);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 2);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int piece = 0; piece < pieces; ++piece) {
    const uint32_t* from = source + piece * 3 * kWords;
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_bytes(barrier, kWords * 4);
      ptx::copy_bulk(shared, from, kWords * 4, barrier);
    } else if (threadIdx.x == 1) {
      ptx::copy_bulk(shared + kWords, from + kWords, 2 * kWords * 4, barrier,
                     ptx::evict_first_policy());
      ptx::mbarrier_arrive_expect_bytes(barrier, 2 * kWords * 4);
    }
    ptx::mbarrier_wait(barrier, static_cast<uint32_t>(piece % 2));
    for (int i = static_cast<int>(threadIdx.x); i < 3 * kWords; i += kWarp)
      result[piece * 3 * kWords + i] = shared[i];
    __syncthreads();
  }
}

// A warp hands `rounds` rows of 32 words to two others through a ring of two.
__global__ void mbarrier_kernel(const uint32_t* source, int rounds, uint32_t* result) {
  constexpr int kStages = 2;
  SHARED_ARRAY(uint32_t, ring, [kStages * kWarp]);
  SHARED_ARRAY(uint64_t, full, [kStages]);
  SHARED_ARRAY(uint64_t, empty, [kStages]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x == 0)
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s, kWarp);
      ptx::mbarrier_init(empty + s, 2);
    }
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    const int stage = round % kStages;
    const auto parity = static_cast<uint32_t>(round / kStages % 2);
    if (warp == 0) {
      // Of a fresh barrier the phase before the first counts as ended.
      ptx::mbarrier_wait(empty + stage, parity ^ 1);
      ring[stage * kWarp + lane] = source[round * kWarp + lane];
      ptx::mbarrier_arrive(full + stage);
    } else {
      ptx::mbarrier_wait(full + stage, parity);
      result[(round * 2 + warp - 1) * kWarp + lane] = ring[stage * kWarp + (lane + warp) % kWarp];
      __syncwarp();
      if (ptx::elect_one()) ptx::mbarrier_arrive(empty + stage);
    }
  }
}

// Pairs of warps reverse rows of 64 words, each pair with a barrier of its own.
__global__ void named_barrier_kernel(const uint32_t* source, int rounds, uint32_t* result) {
  SHARED_ARRAY(uint32_t, row, [kWarpgroup]);
  const int pair = static_cast<int>(threadIdx.x) / 64, place = static_cast<int>(threadIdx.x) % 64;
  for (int round = 0; round < rounds * (pair + 1); ++round) {
    row[pair * 64 + place] = source[place] + static_cast<uint32_t>(round);
    ptx::named_barrier_sync(1 + pair, 64);
    result[pair * 64 + place] = row[pair * 64 + 63 - place];
    ptx::named_barrier_sync(1 + pair, 64);
  }
}

__global__ void elect_kernel(uint32_t* result) {
  for (int i = 0; i < 2; ++i) {
    const bool elected = ptx::elect_one();
    result[i * kWarp + threadIdx.x] = __ballot_sync(kAllLanes, elected);
  }
}

// Three warpgroups: one gives registers up, two take more and then need them.
__global__ __launch_bounds__(3 * kWarpgroup, 1) void register_budget_kernel(const float* source,
                                                                            float* result) {
  constexpr int kValues = 160;
  if (threadIdx.x < kWarpgroup) {
    ptx::register_budget_decrease<40>();
    result[threadIdx.x] = source[threadIdx.x];
  } else {
    ptx::register_budget_increase<232>();
    float values[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = source[(threadIdx.x + i) % (3 * kWarpgroup)];
    float sum = 0;
    for (int round = 0; round < 2; ++round)
#pragma unroll
      for (int i = 0; i < kValues; ++i) sum = __fadd_rn(sum, values[i]);
    result[threadIdx.x] = sum;
  }
}

// left: registers of 128 threads for each 16 columns; tile: bytes as they lie in shared memory.
struct WgmmaProblem {
  const uint32_t *left, *tile;
  float* sums;
  int steps, tile_bytes, step_bytes;
  Swizzle swizzle;
  uint32_t stride_bytes, leading_bytes;
  bool accumulate;
};

template <bool kBFloat16, int kN>
__global__ __launch_bounds__(kWarpgroup,
                             1) void wgmma_kernel(const __grid_constant__ WgmmaProblem p) {
  constexpr int kMostSteps = 4;
  SWIZZLED_SHARED(uint32_t, tile);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < p.tile_bytes / 4; i += kWarpgroup) tile[i] = p.tile[i];
  ptx::fence_async_proxy_shared();
  __syncthreads();
  float sums[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sums[i] = p.sums[thread * (kN / 2) + i];
  uint32_t left[kMostSteps][4];
#pragma unroll
  for (int step = 0; step < kMostSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      left[step][i] = step < p.steps ? p.left[(step * kWarpgroup + thread) * 4 + i] : 0;
  ptx::wgmma_fence(sums);
  // Without a branch, which would make ptxas add fences: steps too many multiply by zeros.
#pragma unroll
  for (int step = 0; step < kMostSteps; ++step) {
    const auto* at =
        reinterpret_cast<const unsigned char*>(tile) + (step < p.steps ? step : 0) * p.step_bytes;
    const uint64_t descriptor =
        ptx::shared_descriptor(at, p.swizzle, p.stride_bytes, p.leading_bytes);
    ptx::wgmma_rs<kBFloat16, kN>(sums, left[step], descriptor, p.accumulate || step > 0);
    ptx::wgmma_commit();
  }
  ptx::wgmma_wait<1>();
  ptx::wgmma_wait<0>(sums);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) p.sums[thread * (kN / 2) + i] = sums[i];
}

// values += 1 for whoever comes next; then the sum of what the one before wrote and of `others`.
__global__ void primary_kernel(const uint32_t* source, uint32_t* values) {
  ptx::launch_dependents();
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  values[i] = source[i] + 1;
}
__global__ void secondary_kernel(const uint32_t* values, const uint32_t* others, uint32_t* result) {
  ptx::launch_dependents();
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t other = others[i];
  ptx::wait_for_primary();
  result[i] = values[gridDim.x * blockDim.x - 1 - i] + other;
}

int run_copy_tensor(const Problem& p) {
  TensorMapSpec spec;
  spec.data = p.pointer<void>("data");
  spec.element_bytes = static_cast<int>(p.integer("element_bytes"));
  spec.inner = p.integer("inner");
  spec.outer = p.integer("outer");
  spec.row_stride_bytes = p.integer("row_stride_bytes");
  spec.box_inner = static_cast<int>(p.integer("box_inner"));
  spec.box_outer = static_cast<int>(p.integer("box_outer"));
  spec.swizzle = static_cast<Swizzle>(p.integer("swizzle"));
  TensorMap map;
  const cudaError_t status = make_tensor_map_2d(&map, spec);
  if (status != cudaSuccess) return status;
  const int bytes = spec.box_inner * spec.box_outer * spec.element_bytes;
  return launch(copy_tensor_kernel, kOne, dim3{32, 1, 1}, static_cast<size_t>(bytes), nullptr, map,
                static_cast<int>(p.integer("column")), static_cast<int>(p.integer("row")), bytes,
                spec.swizzle, p.pointer<uint32_t>("result"), p.pointer<uint32_t>("in_order"));
}

// Kernels that take (source, a number, result).
template <void (*kKernel)(const uint32_t*, int, uint32_t*), unsigned kThreads>
int run_counted(const Problem& p) {
  return launch(kKernel, kOne, dim3{kThreads, 1, 1}, 0, nullptr,
                static_cast<const uint32_t*>(p.pointer<uint32_t>("source")),
                static_cast<int>(p.integer("count")), p.pointer<uint32_t>("result"));
}

int run_elect(const Problem& p) {
  return launch(elect_kernel, kOne, dim3{32, 1, 1}, 0, nullptr, p.pointer<uint32_t>("result"));
}

int run_register_budget(const Problem& p) {
  return launch(register_budget_kernel, kOne, dim3{3 * kWarpgroup, 1, 1}, 0, nullptr,
                static_cast<const float*>(p.pointer<float>("source")), p.pointer<float>("result"));
}

template <bool kBFloat16>
int run_wgmma_of(const WgmmaProblem& w, int64_t n) {
  const auto run = [&](auto kernel) {
    return launch(kernel, kOne, dim3{kWarpgroup, 1, 1}, static_cast<size_t>(w.tile_bytes), nullptr,
                  w);
  };
  switch (n) {
    case 8:
      return run(wgmma_kernel<kBFloat16, 8>);
    case 16:
      return run(wgmma_kernel<kBFloat16, 16>);
    case 24:
      return run(wgmma_kernel<kBFloat16, 24>);
    case 32:
      return run(wgmma_kernel<kBFloat16, 32>);
    case 48:
      return run(wgmma_kernel<kBFloat16, 48>);
    case 64:
      return run(wgmma_kernel<kBFloat16, 64>);
    case 96:
      return run(wgmma_kernel<kBFloat16, 96>);
    case 128:
      return run(wgmma_kernel<kBFloat16, 128>);
    case 256:
      return run(wgmma_kernel<kBFloat16, 256>);
    default:
      return cudaErrorInvalidValue;
  }
}

int run_wgmma(const Problem& p) {
  const WgmmaProblem w{p.pointer<uint32_t>("left"),
                       p.pointer<uint32_t>("tile"),
                       p.pointer<float>("sums"),
                       static_cast<int>(p.integer("steps")),
                       static_cast<int>(p.buffers.at("tile").bytes),
                       static_cast<int>(p.integer("step_bytes")),
                       static_cast<Swizzle>(p.integer("swizzle")),
                       static_cast<uint32_t>(p.integer("stride_bytes")),
                       static_cast<uint32_t>(p.integer("leading_bytes")),
                       p.integer("accumulate") != 0};
  return p.integer("bfloat16") ? run_wgmma_of<true>(w, p.integer("n"))
                               : run_wgmma_of<false>(w, p.integer("n"));
}

// A chain: the second overlaps the first, the third the second.
int run_overlap(const Problem& p) {
  const dim3 grid{static_cast<unsigned>(p.integer("blocks")), 1, 1}, block{64, 1, 1};
  const uint32_t* source = p.pointer<uint32_t>("source");
  auto *values = p.pointer<uint32_t>("values"), *between = p.pointer<uint32_t>("between");
  int status = launch(primary_kernel, grid, block, 0, nullptr, source, values);
  if (status == cudaSuccess)
    status = launch_overlapping(secondary_kernel, grid, block, 0, nullptr,
                                static_cast<const uint32_t*>(values), source, between);
  if (status == cudaSuccess)
    status = launch_overlapping(secondary_kernel, grid, block, 0, nullptr,
                                static_cast<const uint32_t*>(between), source,
                                p.pointer<uint32_t>("result"));
  return status;
}

const Registration copy_tensor("copy_tensor", run_copy_tensor);
const Registration copy_bulk("copy_bulk", run_counted<copy_bulk_kernel, 32>);
const Registration mbarrier("mbarrier", run_counted<mbarrier_kernel, 96>);
const Registration named_barrier("named_barrier", run_counted<named_barrier_kernel, 128>);
const Registration elect("elect", run_elect);
const Registration register_budget("register_budget", run_register_budget);
const Registration wgmma("wgmma", run_wgmma);
const Registration overlap("overlap", run_overlap);

}  // namespace
}  // namespace qlk::testing
