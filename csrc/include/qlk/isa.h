// Instruction-set paths: one attribute per Isa level for the functions of that path, and the
// detection.
//
// No file is compiled with -march: a function belongs to a path by its attribute alone, e.g.
//     QLK_AVX512 static void decode_strip(...) { ... }
// Lambdas do not inherit the attribute (gcc), so the inner loops of a path are plain functions. A
// helper marked with a lower level inlines into a function of a higher one. Everything between
// QLK_X86 guards is absent on other machines.
#pragma once

#include "qlk/types.h"

#if defined(__x86_64__)
#define QLK_X86 1
// gcc 12 takes the deliberately undefined operands inside its own intrinsics for mistakes (GCC PR
// 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

// gcc and clang spell the same features alike; the sets grow with the Isa levels of types.h.
#define QLK_TARGET_AVX2 "avx2,fma,f16c,bmi,bmi2,popcnt"
#define QLK_TARGET_AVX512 QLK_TARGET_AVX2 ",avx512f,avx512bw,avx512vl,avx512dq,avx512cd"
#define QLK_TARGET_AVX512_BF16 QLK_TARGET_AVX512 ",avx512bf16,avx512vbmi,avx512vbmi2"
#define QLK_TARGET_AMX QLK_TARGET_AVX512_BF16 ",amx-tile,amx-bf16"

#define QLK_AVX2 __attribute__((target(QLK_TARGET_AVX2)))
#define QLK_AVX512 __attribute__((target(QLK_TARGET_AVX512)))
#define QLK_AVX512_BF16 __attribute__((target(QLK_TARGET_AVX512_BF16)))
#define QLK_AMX __attribute__((target(QLK_TARGET_AMX)))
#endif

#define QLK_INLINE inline __attribute__((always_inline))

// Before a loop of a few constant iterations whose arrays must live in registers.
#if defined(__clang__)
#define QLK_UNROLL _Pragma("unroll")
#else
#define QLK_UNROLL _Pragma("GCC unroll 16")
#endif

namespace qlk {

// The best level that this CPU and its operating system offer. The first call asks the kernel for
// AMX tile state where the CPU has it (Linux grants it per process, on request); without that
// permission the answer is the next lower level.
Isa cpu_isa();

// Whether the machine multiplies more bf16 than fp32 pairs per second at that level; measured once
// (about 0.2 ms), where the level has bf16 products at all.
bool bf16_products_pay(Isa isa);

// "portable", "avx2", "avx512", "avx512_bf16" or "amx".
const char* isa_name(Isa isa);

}  // namespace qlk
