// Whether AVX512_BF16 products are worth rounding weights for. A vdpbf16ps multiplies twice as many
// pairs as an fp32 multiply-add, but not everywhere as often: Intel's Golden Cove issues one every
// two cycles against two multiply-adds a cycle (measured: 47 against 94 G pairs/s per core).
#include <algorithm>
#include <chrono>

#include "qlk/isa.h"

namespace qlk {

#if defined(QLK_X86)

namespace {

constexpr int kChains = 10;  // More than latency times issue rate on any of them.
constexpr int kSteps = 512, kRepeats = 12;

template <class Step>
double shortest_seconds(Step step) {
  double shortest = 1.0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    step();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    shortest = std::min(shortest, taken.count());
  }
  return shortest;
}

QLK_AVX512_BF16 __attribute__((noinline)) void multiply_add_bf16() {
  __m512 sums[kChains];
  __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f));
  QLK_UNROLL
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int step = 0; step < kSteps; ++step) {
    QLK_UNROLL
    for (auto& sum : sums) {
      sum = _mm512_dpbf16_ps(sum, factor, factor);
      __asm__ volatile("" : "+v"(sum));
    }
  }
}

QLK_AVX512 __attribute__((noinline)) void multiply_add_f32() {
  __m512 sums[kChains];
  __m512 factor = _mm512_set1_ps(1.0f);
  QLK_UNROLL
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int step = 0; step < kSteps; ++step) {
    QLK_UNROLL
    for (auto& sum : sums) {
      sum = _mm512_fmadd_ps(factor, factor, sum);
      __asm__ volatile("" : "+v"(sum));
    }
  }
}

// Equal rates favour fp32, which rounds no weight; the margin keeps the clock's noise out.
bool measure() {
  constexpr double kPairsPerProduct = 2.0, kMargin = 1.2;
  return kPairsPerProduct * shortest_seconds(multiply_add_f32) >
         kMargin * shortest_seconds(multiply_add_bf16);
}

}  // namespace

bool bf16_products_pay(Isa isa) {
  if (isa < Isa::kAvx512Bf16 || cpu_isa() < Isa::kAvx512Bf16) return false;
  if (isa >= Isa::kAmx) return true;
  static const bool pay = measure();
  return pay;
}

#else

bool bf16_products_pay(Isa) { return false; }

#endif

}  // namespace qlk
