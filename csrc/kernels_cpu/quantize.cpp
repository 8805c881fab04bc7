// quantize: absmax, one division and the codes, a few kilobytes of weight at a time so that the
// second read comes from the first-level cache.
#include "qlk/quantize.h"

#include <cmath>
#include <cstring>

#include "qlk/isa.h"
#include "quantize_path.h"

namespace qlk {
namespace {

constexpr float kSmallestNormal = 0x1p-126f;
constexpr int64_t kGroupElements = 4096;
constexpr int64_t kMaxGroupBlocks = kGroupElements / 32;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;

template <class Scalar>
void absmax_portable(const void* weight, int64_t n_blocks, int64_t block_size,
                     uint32_t* magnitude) {
  using Storage = typename Scalar::Storage;
  const auto* w = static_cast<const Storage*>(weight);
  for (int64_t b = 0; b < n_blocks; ++b) {
    int32_t largest = 0;
    for (int64_t i = 0; i < block_size; ++i) {
      int32_t bits;
      if constexpr (sizeof(Storage) == 4) {
        bits = static_cast<int32_t>(float_bits(w[b * block_size + i]) & 0x7fffffffu);
      } else {
        bits = w[b * block_size + i] & 0x7fff;
      }
      largest = std::max(largest, bits);
    }
    magnitude[b] = static_cast<uint32_t>(largest);
  }
}

inline uint32_t encode_one(float n, const EncodeTree& tree) {
  uint32_t index = n > tree.level1[0];
  index |= static_cast<uint32_t>(n > tree.level2[index]) << 1;
  index |= static_cast<uint32_t>(n > tree.level3[index]) << 2;
  index |= static_cast<uint32_t>(n > tree.level4[index]) << 3;
  return tree.codes[index];
}

template <class Scalar>
void encode_portable(const void* weight, int64_t n_blocks, int64_t block_size, const float* inverse,
                     const EncodeTree& tree, uint8_t* codes) {
  const auto* w = static_cast<const typename Scalar::Storage*>(weight);
  for (int64_t b = 0; b < n_blocks; ++b) {
    const float r = inverse[b];
    for (int64_t i = 0; i < block_size; i += 2, w += 2) {
      const uint32_t high = encode_one(Scalar::load(w[0]) * r, tree);
      const uint32_t low = encode_one(Scalar::load(w[1]) * r, tree);
      *codes++ = static_cast<uint8_t>(high << 4 | low);
    }
  }
}

template <class Scalar>
constexpr QuantizePath kPortablePath = {absmax_portable<Scalar>, encode_portable<Scalar>};

// The value that absmax stores: NaN for a block that is not finite.
float magnitude_value(DType dtype, uint32_t bits) {
  float value = 0;
  switch (dtype) {
    case DType::kFloat32:
      value = float_from_bits(bits);
      break;
    case DType::kFloat16:
      value = half_to_float(static_cast<uint16_t>(bits));
      break;
    case DType::kBFloat16:
      value = bf16_to_float(static_cast<uint16_t>(bits));
      break;
  }
  return std::isfinite(value) ? value : std::numeric_limits<float>::quiet_NaN();
}

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The largest float that is not above x.
float round_down(double x) {
  const float nearest = static_cast<float>(x);
  return static_cast<double>(nearest) > x
             ? std::nextafter(nearest, -std::numeric_limits<float>::infinity())
             : nearest;
}

// Codes of one block against a decoded scale: up iff |scale| * midpoint < copysign(1, scale) * w,
// where a product of a midpoint and an fp32 scale is exact in fp64. An fp32 w is above it iff it is
// above the largest fp32 number that is not, so the path's fp32 comparisons are exact as well.
void encode_decoded(const QuantizeParams& p, const QuantizePath& path, const void* weight,
                    float scale, uint8_t* codes) {
  float limits[15];
  for (int i = 0; i < p.n_levels - 1; ++i)
    limits[i] = round_down(p.midpoints[i] * std::fabs(static_cast<double>(scale)));
  const EncodeTree tree(limits, p.rank_codes, p.n_levels);
  const float sign = std::copysign(1.0f, scale);
  path.encode(weight, 1, p.block_size, &sign, tree, codes);
}

// n_blocks full blocks, the first of which is block first_block of the weight.
void quantize_group(const QuantizeParams& p, const QuantizePath& path, const EncodeTree* tree,
                    const void* weight, int64_t first_block, int64_t n_blocks, uint8_t* codes) {
  uint32_t magnitude[kMaxGroupBlocks];
  float inverse[kMaxGroupBlocks];
  path.absmax(weight, n_blocks, p.block_size, magnitude);
  for (int64_t b = 0; b < n_blocks; ++b) {
    const float absmax = magnitude_value(p.dtype, magnitude[b]);
    p.absmax[first_block + b] = absmax;
    inverse[b] = 1.0f / std::max(absmax, kSmallestNormal);
  }
  if (tree) path.encode(weight, n_blocks, p.block_size, inverse, *tree, codes);

  const int64_t block_bytes = p.block_size / 2;
  for (int64_t b = 0; b < n_blocks; ++b) {
    const float absmax = p.absmax[first_block + b];
    bool zero = std::isnan(absmax);
    if (p.scales) {
      const float scale = p.scales[first_block + b];
      zero = zero || scale == 0 || !std::isfinite(scale);
      if (!zero) {
        const int64_t offset = b * p.block_size * element_bytes(p.dtype);
        encode_decoded(p, path, static_cast<const char*>(weight) + offset, scale,
                       codes + b * block_bytes);
      }
    } else {
      zero = zero || absmax == 0;
    }
    if (zero) std::memset(codes + b * block_bytes, p.zero_code << 4 | p.zero_code, block_bytes);
  }
}

// The short last block, through zero-padded copies: zeros leave absmax as it is, and an odd length
// is padded with their code.
void quantize_tail(const QuantizeParams& p, const QuantizePath& path, const EncodeTree* tree,
                   int64_t block) {
  alignas(64) char weight[kGroupElements * 4] = {};
  alignas(64) uint8_t codes[kGroupElements / 2];
  const int64_t begin = block * p.block_size, count = p.numel - begin;
  const int64_t size = element_bytes(p.dtype);
  std::memcpy(weight, static_cast<const char*>(p.weight) + begin * size, count * size);
  quantize_group(p, path, tree, weight, block, 1, codes);
  std::memcpy(p.codes + begin / 2, codes, (count + 1) / 2);
}

QuantizePath choose_path(DType dtype, Isa isa) {
#if defined(QLK_X86)
  if (isa >= Isa::kAvx512) return quantize_path_avx512(dtype);
  if (isa >= Isa::kAvx2) return quantize_path_avx2(dtype);
#else
  (void)isa;
#endif
  return quantize_path_portable(dtype);
}

}  // namespace

QuantizePath quantize_path_portable(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return kPortablePath<Float16>;
    case DType::kBFloat16:
      return kPortablePath<BFloat16>;
    default:
      return kPortablePath<Float32>;
  }
}

Status quantize(const QuantizeParams& p, Isa isa, const ThreadPool& pool) {
  // Pointers of empty tensors are null, and a null `scales` would mean another mode.
  if (p.numel == 0) return Status::kOk;
  const QuantizePath path = choose_path(p.dtype, isa);
  const float no_boundaries[15] = {};
  const EncodeTree tree(p.scales ? no_boundaries : p.boundaries, p.rank_codes, p.n_levels);
  const EncodeTree* used_tree = p.scales ? nullptr : &tree;

  const int64_t full_blocks = p.numel / p.block_size;
  const int64_t group_blocks = kGroupElements / p.block_size;
  const int64_t n_groups = (full_blocks + group_blocks - 1) / group_blocks;
  pool.run(0, n_groups, kGrainElements / kGroupElements, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * group_blocks;
      const int64_t n_blocks = std::min(group_blocks, full_blocks - first);
      const int64_t offset = first * p.block_size;
      const char* weight = static_cast<const char*>(p.weight) + offset * element_bytes(p.dtype);
      quantize_group(p, path, used_tree, weight, first, n_blocks, p.codes + offset / 2);
    }
  });
  if (full_blocks * p.block_size < p.numel) quantize_tail(p, path, used_tree, full_blocks);
  return Status::kOk;
}

}  // namespace qlk
