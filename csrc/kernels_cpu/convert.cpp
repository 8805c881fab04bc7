// Conversions between the storage dtypes and fp32.
#include "qlk/convert.h"

#include <algorithm>

#include "qlk/float16.h"
#include "qlk/isa.h"
#include "qlk/simd_avx2.h"
#include "qlk/simd_avx512.h"

namespace qlk {
namespace {

template <class Scalar>
void load_tail(const typename Scalar::Storage* source, int64_t begin, int64_t count, float* out) {
  for (int64_t i = begin; i < count; ++i) out[i] = Scalar::load(source[i]);
}

template <class Scalar>
void store_tail(const float* source, int64_t begin, int64_t count,
                typename Scalar::Storage* destination) {
  for (int64_t i = begin; i < count; ++i) destination[i] = Scalar::store(source[i]);
}

#if defined(QLK_X86)

template <class Scalar>
QLK_AVX2 int64_t load_avx2(const typename Scalar::Storage* source, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, avx2::load8<Scalar>(source + i));
  return i;
}

template <class Scalar>
QLK_AVX512 int64_t load_avx512(const typename Scalar::Storage* source, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(out + i, avx512::load16<Scalar>(source + i));
  return i;
}

template <class Scalar>
QLK_AVX2 int64_t store_avx2(const float* source, int64_t count, uint16_t* destination) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(destination + i),
                     avx2::to_half_words<Scalar>(_mm256_loadu_ps(source + i)));
  return i;
}

template <class Scalar>
QLK_AVX512 int64_t store_avx512(const float* source, int64_t count, uint16_t* destination) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination + i),
                        avx512::to_half_words<Scalar>(_mm512_loadu_ps(source + i)));
  return i;
}

#endif

template <class Scalar>
void load_as(const void* source, int64_t offset, int64_t count, Isa isa, float* out) {
  const auto* typed = static_cast<const typename Scalar::Storage*>(source) + offset;
  int64_t done = 0;
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512)
    done = load_avx512<Scalar>(typed, count, out);
  else if (isa == Isa::kAvx2)
    done = load_avx2<Scalar>(typed, count, out);
#endif
  load_tail<Scalar>(typed, done, count, out);
}

template <class Scalar>
void store_as(const float* source, int64_t count, Isa isa, void* destination) {
  auto* typed = static_cast<typename Scalar::Storage*>(destination);
  int64_t done = 0;
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512)
    done = store_avx512<Scalar>(source, count, typed);
  else if (isa == Isa::kAvx2)
    done = store_avx2<Scalar>(source, count, typed);
#endif
  store_tail<Scalar>(source, done, count, typed);
}

}  // namespace

void load_f32(const void* source, DType dtype, int64_t offset, int64_t count, Isa isa, float* out) {
  switch (dtype) {
    case DType::kFloat32:
      std::copy_n(static_cast<const float*>(source) + offset, count, out);
      return;
    case DType::kFloat16:
      return load_as<Float16>(source, offset, count, isa, out);
    case DType::kBFloat16:
      return load_as<BFloat16>(source, offset, count, isa, out);
  }
}

void store_f32(const float* source, int64_t count, DType dtype, Isa isa, void* destination) {
  switch (dtype) {
    case DType::kFloat32:
      std::copy_n(source, count, static_cast<float*>(destination));
      return;
    case DType::kFloat16:
      return store_as<Float16>(source, count, isa, destination);
    case DType::kBFloat16:
      return store_as<BFloat16>(source, count, isa, destination);
  }
}

void round_f32(float* values, int64_t count, DType dtype, Isa isa) {
  if (dtype == DType::kFloat32) return;
  constexpr int64_t kPiece = 256;
  uint16_t narrow[kPiece];
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t piece = std::min(kPiece, count - done);
    store_f32(values + done, piece, dtype, isa, narrow);
    load_f32(narrow, dtype, 0, piece, isa, values + done);
  }
}

}  // namespace qlk
