// Runs of consecutive weights, and the panels of a weight that the GEMM path multiplies.
#include "qlk/decode_span.h"

#include "qlk/convert.h"
#include "qlk/quantized_matmul.h"

namespace qlk {
namespace {

// Spans are decoded in pieces whose scales fit a small buffer; block sizes start at 32.
constexpr int64_t kPiece = 2048;
constexpr int64_t kPieceScales = kPiece / 32 + 2;

// Blocks that [begin, begin + count) touches.
QLK_INLINE int64_t blocks_touched(int64_t begin, int64_t count, int64_t block_size) {
  return (begin + count - 1) / block_size - begin / block_size + 1;
}

void decode_piece_portable(const QuantizedView& weight, int64_t begin, int64_t count, float* out) {
  float scales[kPieceScales];
  decode_scales(weight.scales, begin / weight.block_size,
                blocks_touched(begin, count, weight.block_size), scales);
  for (BlockRun run(begin, count, weight.block_size, scales); run.valid(); run.advance())
    decode_block_portable(weight.codes, run.begin(), run.length(), weight.codebook, run.scale(),
                          out + (run.begin() - begin));
}

#if defined(QLK_X86)

QLK_AVX2 void decode_piece_avx2(const QuantizedView& weight, int64_t begin, int64_t count,
                                float* out) {
  float scales[kPieceScales];
  decode_scales(weight.scales, begin / weight.block_size,
                blocks_touched(begin, count, weight.block_size), scales);
  for (BlockRun run(begin, count, weight.block_size, scales); run.valid(); run.advance())
    decode_block_avx2(weight.codes, run.begin(), run.length(), weight.codebook, run.scale(),
                      out + (run.begin() - begin));
}

QLK_AVX512 void decode_piece_avx512(const QuantizedView& weight, int64_t begin, int64_t count,
                                    float* out) {
  float scales[kPieceScales];
  decode_scales_avx512(weight.scales, begin / weight.block_size,
                       blocks_touched(begin, count, weight.block_size), scales);
  for (BlockRun run(begin, count, weight.block_size, scales); run.valid(); run.advance())
    decode_block_avx512(weight.codes, run.begin(), run.length(), weight.codebook, run.scale(),
                        out + (run.begin() - begin));
}

QLK_AVX512_BF16 void decode_piece_bf16(const QuantizedView& weight, int64_t begin, int64_t count,
                                       uint16_t* out) {
  float scales[kPieceScales];
  decode_scales_avx512(weight.scales, begin / weight.block_size,
                       blocks_touched(begin, count, weight.block_size), scales);
  const __m512 codebook = _mm512_loadu_ps(weight.codebook);
  for (BlockRun run(begin, count, weight.block_size, scales); run.valid(); run.advance())
    decode_block_bf16(weight.codes, run.begin(), run.length(), codebook, run.scale(),
                      out + (run.begin() - begin));
}

#endif

}  // namespace

void decode_span_f32(const QuantizedView& weight, int64_t begin, int64_t count, Isa isa,
                     float* out) {
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t piece = std::min(kPiece, count - done);
#if defined(QLK_X86)
    if (isa >= Isa::kAvx512) {
      decode_piece_avx512(weight, begin + done, piece, out + done);
      continue;
    }
    if (isa == Isa::kAvx2) {
      decode_piece_avx2(weight, begin + done, piece, out + done);
      continue;
    }
#endif
    decode_piece_portable(weight, begin + done, piece, out + done);
  }
}

void decode_span_bf16(const QuantizedView& weight, int64_t begin, int64_t count, Isa isa,
                      uint16_t* out) {
  float wide[kPiece];
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t piece = std::min(kPiece, count - done);
#if defined(QLK_X86)
    if (isa >= Isa::kAvx512Bf16) {
      decode_piece_bf16(weight, begin + done, piece, out + done);
      continue;
    }
#endif
    decode_span_f32(weight, begin + done, piece, isa, wide);
    store_f32(wide, piece, DType::kBFloat16, isa, out + done);
  }
}

Status decode_panel(const DecodePanelParams& params, Isa isa, const ThreadPool& pool) {
  if (params.dtype == DType::kFloat16) return Status::kUnsupported;
  const int64_t cols = params.col_end - params.col_begin;
  pool.run(params.row_begin, params.row_end, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t flat = row * params.weight.cols + params.col_begin;
      const int64_t at = (row - params.row_begin) * params.out_stride;
      if (params.dtype == DType::kBFloat16)
        decode_span_bf16(params.weight, flat, cols, isa, static_cast<uint16_t*>(params.out) + at);
      else
        decode_span_f32(params.weight, flat, cols, isa, static_cast<float*>(params.out) + at);
    }
  });
  return Status::kOk;
}

}  // namespace qlk
