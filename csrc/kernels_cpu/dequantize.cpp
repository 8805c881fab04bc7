// dequantize: table[code] * scale, rounded once to the output dtype. Runs of whole blocks take the
// path's vector loop; the pieces of blocks at the ends of a run are decoded one element at a time.
#include "qlk/dequantize.h"

#include <algorithm>
#include <cstring>

#include "dequantize_path.h"
#include "qlk/isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qlk {
namespace {

// Scales decoded at a time, on the stack.
constexpr int64_t kScaleBatch = 256;
// Elements per task: enough to hide the cost of handing it out.
constexpr int64_t kTaskElements = 65536;
// Outputs above the second-level cache are written past it: read-for-ownership would be a third of
// the traffic. Not so fresh ones, whose lines the kernel has just put there by clearing the page.
constexpr int64_t kLargeBytes = 4 << 20;

template <class Scalar>
void decode_blocks_portable(const uint8_t* codes, const float* scales, int64_t n_blocks,
                            int64_t block_size, const float* codebook, bool /*streaming*/,
                            void* out) {
  using Storage = typename Scalar::Storage;
  auto* target = static_cast<Storage*>(out);
  for (int64_t b = 0; b < n_blocks; ++b) {
    Storage table[16];
    for (int c = 0; c < 16; ++c) table[c] = Scalar::store(codebook[c] * scales[b]);
    for (int64_t i = 0; i < block_size; i += 2, ++codes, target += 2) {
      target[0] = table[*codes >> 4];
      target[1] = table[*codes & 15];
    }
  }
}

// Elements [begin, end) of one block.
template <class Scalar>
void decode_piece(const QuantizedView& weight, int64_t begin, int64_t end, float scale, void* out) {
  auto* target = static_cast<typename Scalar::Storage*>(out);
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t pair = weight.codes[i / 2];
    const int code = i % 2 == 0 ? pair >> 4 : pair & 15;
    *target++ = Scalar::store(weight.codebook[code] * scale);
  }
}

using DecodePieceFn = void (*)(const QuantizedView&, int64_t, int64_t, float, void*);

struct Decoder {
  DequantizePath path;
  DecodePieceFn decode_piece;
  int64_t element_bytes;

  // Elements [begin, end) of the flattened weight to `out`, contiguous.
  void decode(const QuantizedView& weight, int64_t begin, int64_t end, bool streaming,
              char* out) const {
    const int64_t size = weight.block_size;
    float scales[kScaleBatch];
    while (begin < end) {
      const int64_t block = begin / size;
      const int64_t n_full = begin % size == 0 ? std::min(kScaleBatch, (end - begin) / size) : 0;
      path.decode_scales(weight.scales, block, std::max<int64_t>(n_full, 1), scales);
      const int64_t stop = n_full ? begin + n_full * size : std::min(end, (block + 1) * size);
      if (n_full) {
        const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
        path.decode_blocks(weight.codes + begin / 2, scales, n_full, size, weight.codebook,
                           streaming && aligned, out);
      } else {
        decode_piece(weight, begin, stop, scales[0], out);
      }
      out += (stop - begin) * element_bytes;
      begin = stop;
    }
  }
};

template <class Scalar>
Decoder make_decoder(Isa isa) {
  Decoder decoder = {{decode_scales_portable, decode_blocks_portable<Scalar>},
                     decode_piece<Scalar>,
                     sizeof(typename Scalar::Storage)};
#if defined(QLK_X86)
  if (isa >= Isa::kAvx2) decoder.path = dequantize_path_avx2(Scalar::kDType);
  if (isa >= Isa::kAvx512) decoder.path = dequantize_path_avx512(Scalar::kDType);
  if (isa >= Isa::kAvx512Bf16) decoder.path = dequantize_path_avx512_bf16(Scalar::kDType);
#else
  (void)isa;
#endif
  return decoder;
}

Decoder choose_decoder(DType dtype, Isa isa) {
  switch (dtype) {
    case DType::kFloat16:
      return make_decoder<Float16>(isa);
    case DType::kBFloat16:
      return make_decoder<BFloat16>(isa);
    default:
      return make_decoder<Float32>(isa);
  }
}

// Asks for huge pages under a large fresh output: one page fault for 2 MB instead of 512 of them,
// which otherwise take several times as long as the decoding. Where they are not to be had, the
// request does nothing.
void request_huge_pages(char* out, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)out, (void)bytes;
#endif
}

}  // namespace

void decode_scales_portable(const ScalesView& view, int64_t first, int64_t count, float* scales) {
  if (!view.nested()) {
    std::memcpy(scales, view.absmax + first, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) scales[i] = decode_nested_scale(view, first + i);
}

Status dequantize(const DequantizeParams& p, Isa isa, const ThreadPool& pool) {
  const QuantizedView& weight = p.weight;
  const Decoder decoder = choose_decoder(p.dtype, isa);
  const int64_t numel = weight.rows * weight.cols;
  const bool large = numel * decoder.element_bytes >= kLargeBytes;
  const bool streaming = large && !p.fresh;
  char* out = static_cast<char*>(p.out);
  if (large && p.fresh) request_huge_pages(out, numel * decoder.element_bytes);

  if (p.row_stride == weight.cols) {
    // Tasks of whole blocks, so that no block is decoded by two.
    const int64_t n_tasks = (numel + kTaskElements - 1) / kTaskElements;
    pool.run(0, n_tasks, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kTaskElements, last = std::min(end * kTaskElements, numel);
      decoder.decode(weight, first, last, streaming, out + first * decoder.element_bytes);
    });
    return Status::kOk;
  }
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(weight.cols, 1));
  pool.run(0, weight.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      char* row = out + r * p.row_stride * decoder.element_bytes;
      decoder.decode(weight, r * weight.cols, (r + 1) * weight.cols, streaming, row);
    }
  });
  return Status::kOk;
}

}  // namespace qlk
