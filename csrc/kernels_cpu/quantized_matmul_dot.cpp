// y = x Ŵᵀ for few tokens: each weight is decoded once, in registers or in the first-level cache,
// and multiplied with every token. A token's sums do not depend on the other tokens.
#include <algorithm>
#include <cmath>

#include "qlk/convert.h"
#include "qlk/decode_span.h"
#include "qlk/dot.h"
#include "qlk/low_rank.h"
#include "qlk/quantized_matmul.h"
#include "qlk/scratch.h"

namespace qlk {
namespace {

// Tokens whose fp32 copy is held at once; more are done in passes that decode the weight again.
constexpr int64_t kPassTokens = 32;
// Output features per unit of work: results and the low-rank tile of a strip stay in cache.
constexpr int64_t kStrip = 64;
// Weights decoded at a time.
constexpr int64_t kChunk = 1024;

// out[t * kStrip + i] = x[t] · Ŵ[row_begin + i].
void strip_by_chunks(const QuantizedView& weight, const float* x, int64_t tokens, int64_t row_begin,
                     int64_t rows, Isa isa, float* out) {
  alignas(64) float decoded[kChunk];
  alignas(64) float sums[kPassTokens * kDotLanes];
  const int64_t K = weight.cols;
  for (int64_t i = 0; i < rows; ++i) {
    std::fill_n(sums, tokens * kDotLanes, 0.0f);
    for (int64_t k = 0; k < K; k += kChunk) {
      const int64_t count = std::min(kChunk, K - k);
      decode_span_f32(weight, (row_begin + i) * K + k, count, isa, decoded);
      dot_chunk(decoded, count, x + k, K, tokens, isa, sums);
    }
    for (int64_t t = 0; t < tokens; ++t) out[t * kStrip + i] = sum_lanes(sums + t * kDotLanes);
  }
}

// How a pass holds its tokens.
enum class Held { kRows, kInterleavedFloats, kInterleavedIntegers };

XLayout layout_of(Held held) {
  return held == Held::kInterleavedFloats ? XLayout::kFloat : XLayout::kInteger;
}

struct Pass {
  const QuantizedMatmulParams* params;
  Isa isa;
  Held held;
  int64_t token_begin, tokens;
  const float* x;  // [tokens, K], or as interleave_row lays it out
};

// Low-rank term, bias and rounding of a strip; `tile` is scratch for the term's right side.
void finish_strip(const Pass& pass, int64_t row_begin, int64_t rows, float* tile, float* products,
                  float* out) {
  const QuantizedMatmulParams& p = *pass.params;
  const LowRankTerm& term = p.low_rank;
  alignas(64) float bias[kStrip];
  if (p.bias) load_f32(p.bias, p.bias_dtype, row_begin, rows, pass.isa, bias);
  if (term.present()) {
    load_adapter_tile({term.right, term.right_dtype, term.rank, p.weight.rows,
                       term.right_rank_stride, term.right_col_stride},
                      p.dtype, row_begin, rows, rows, pass.isa, tile);
    add_low_rank(term, pass.token_begin, pass.tokens, row_begin, rows, p.weight.rows, tile,
                 pass.isa, products, out, kStrip);
  }
  for (int64_t t = 0; t < pass.tokens; ++t) {
    float* y = out + t * kStrip;
    if (p.bias)
      for (int64_t i = 0; i < rows; ++i) y[i] += bias[i];
    store_f32(y, rows, p.dtype, pass.isa,
              element_at(p.y, p.dtype, (pass.token_begin + t) * p.weight.rows + row_begin));
  }
}

Status run_pass(const Pass& pass, const ThreadPool& pool) {
  const QuantizedMatmulParams& p = *pass.params;
  const int64_t strips = (p.weight.rows + kStrip - 1) / kStrip;
  Failure failure;
  pool.run(0, strips, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int64_t tile_size = padded_rank(p.low_rank.rank) * kStrip;
    const int64_t scale_count = interleaved_scale_count(p.weight);
    auto* tile = static_cast<float*>(
        scratch.reserve((tile_size + scale_count) * static_cast<int64_t>(sizeof(float))));
    if (!tile) return failure.set();
    alignas(64) float out[kPassTokens * kStrip], products[kPassTokens * kStrip];
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t row = strip * kStrip, rows = std::min(kStrip, p.weight.rows - row);
      if (pass.held == Held::kRows)
        strip_by_chunks(p.weight, pass.x, pass.tokens, row, rows, pass.isa, out);
      else
        strip_interleaved(p.weight, layout_of(pass.held), pass.x, pass.tokens, row, rows,
                          tile + tile_size, kStrip, out);
      finish_strip(pass, row, rows, tile, products, out);
    }
  });
  return failure.status();
}

Held preferred_way(const QuantizedMatmulParams& params, Isa isa) {
  if (!strip_interleaved_runs(isa)) return Held::kRows;
  // A table with NaN where no code points has no integers for them. The level below multiplies in
  // fp32: what has to have the error of torch's products by elements too asks for that one.
  const float* codebook = params.weight.codebook;
  const bool finite =
      std::all_of(codebook, codebook + 16, [](float c) { return std::isfinite(c); });
  return finite && params.dtype == DType::kBFloat16 && isa >= Isa::kAvx512Bf16
             ? Held::kInterleavedIntegers
             : Held::kInterleavedFloats;
}

// Floats that a token takes.
int64_t token_floats(Held held, int64_t cols) {
  return held == Held::kRows ? cols : phase_count(cols) * interleaved_row(cols, layout_of(held));
}

// Tokens from pass->token_begin on, at most `most`, to x, and how they are held: the first token
// decides, and one that has to be held otherwise begins the next pass. What a token's sums are may
// depend on nothing but the token.
void hold_tokens(Held preferred, int64_t most, float* x, Pass* pass) {
  const QuantizedMatmulParams& p = *pass->params;
  const int64_t K = p.weight.cols;
  pass->held = preferred;
  const auto hold = [&](int64_t t) {
    const void* source = element_at(p.x, p.dtype, (pass->token_begin + t) * K);
    float* target = x + t * token_floats(pass->held, K);
    if (pass->held != Held::kRows)
      return interleave_row(source, p.dtype, K, layout_of(pass->held), target);
    load_f32(source, p.dtype, 0, K, pass->isa, target);
    return true;
  };
  pass->tokens = 0;
  while (pass->tokens < most && hold(pass->tokens)) ++pass->tokens;
  if (pass->tokens > 0) return;
  // NaN or Inf in a token whose kind is held as integers.
  pass->held = Held::kInterleavedFloats;
  hold(0);
  pass->tokens = 1;
}

}  // namespace

Status quantized_matmul_dot(const QuantizedMatmulParams& params, Isa isa, const ThreadPool& pool) {
  static thread_local Scratch scratch;
  const int64_t K = params.weight.cols;
  const Held preferred = preferred_way(params, isa);
  const bool in_place = preferred == Held::kRows && params.dtype == DType::kFloat32;
  const int64_t pass_tokens = preferred == Held::kRows ? kPassTokens : kPassTokens / phase_count(K);
  Pass pass{&params, isa, preferred, 0, 0, nullptr};
  for (; pass.token_begin < params.tokens; pass.token_begin += pass.tokens) {
    const int64_t most = std::min(pass_tokens, params.tokens - pass.token_begin);
    if (in_place) {
      pass.x = static_cast<const float*>(params.x) + pass.token_begin * K;
      pass.tokens = most;
    } else {
      // A token takes the most floats as fp32 numbers.
      const Held largest = preferred == Held::kRows ? preferred : Held::kInterleavedFloats;
      auto* x = static_cast<float*>(
          scratch.reserve(most * token_floats(largest, K) * static_cast<int64_t>(sizeof(float))));
      if (!x) return Status::kOutOfMemory;
      hold_tokens(preferred, most, x, &pass);
      pass.x = x;
    }
    const Status status = run_pass(pass, pool);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

}  // namespace qlk
