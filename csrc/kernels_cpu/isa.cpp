// Detects the instruction sets of the machine: CPUID says what the CPU has, XCR0 what the operating
// system saves.
#include "qlk/isa.h"

#include <initializer_list>

#if defined(QLK_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qlk {
namespace {

#if defined(QLK_ASSUME_ISA)

// Tests only (tests/emulation): a level whose instructions CPUID does not show.
Isa detect() { return static_cast<Isa>(QLK_ASSUME_ISA); }

#elif defined(QLK_X86)

// State components of XCR0 (Intel SDM vol. 1, 13.1): SSE + AVX, the three of AVX-512, the two of
// AMX.
constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe0, kAmxState = 0x60000;

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

constexpr bool has_bits(uint64_t value, uint64_t wanted) { return (value & wanted) == wanted; }

constexpr uint32_t bits(std::initializer_list<int> positions) {
  uint32_t mask = 0;
  for (int position : positions) mask |= uint32_t{1} << position;
  return mask;
}

bool request_amx_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, Linux 5.16
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  const Registers leaf1 = cpuid(1, 0);
  // FMA 12, POPCNT 23, OSXSAVE 27, AVX 28, F16C 29.
  if (!has_bits(leaf1.ecx, bits({12, 23, 27, 28, 29}))) return Isa::kPortable;
  const uint64_t xcr0 = read_xcr0();
  const Registers leaf7 = cpuid(7, 0);
  // BMI1 3, AVX2 5, BMI2 8.
  if (!has_bits(xcr0, kAvxState) || !has_bits(leaf7.ebx, bits({3, 5, 8}))) return Isa::kPortable;
  // AVX512 F 16, DQ 17, CD 28, BW 30, VL 31.
  if (!has_bits(xcr0, kAvxState | kAvx512State) || !has_bits(leaf7.ebx, bits({16, 17, 28, 30, 31})))
    return Isa::kAvx2;
  const Registers leaf7_1 = cpuid(7, 1);
  // AVX512 VBMI 1, VBMI2 6, VNNI 11; AVX512_BF16 5.
  if (!has_bits(leaf7.ecx, bits({1, 6, 11})) || !has_bits(leaf7_1.eax, bits({5})))
    return Isa::kAvx512;
  // AMX-BF16 22, AMX-TILE 24.
  if (!has_bits(xcr0, kAmxState) || !has_bits(leaf7.edx, bits({22, 24})) || !request_amx_tiles())
    return Isa::kAvx512Bf16;
  return Isa::kAmx;
}

#else

Isa detect() { return Isa::kPortable; }

#endif

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

}  // namespace qlk
