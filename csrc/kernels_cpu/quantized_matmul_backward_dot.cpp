// grad_x = grad_y Ŵ for few tokens, in fp32: a strip of columns is summed over all rows of the
// weight, a few rows decoded at a time and added to every token's sums.
#include <algorithm>

#include "qlk/convert.h"
#include "qlk/decode_span.h"
#include "qlk/dot.h"
#include "qlk/low_rank.h"
#include "qlk/quantized_matmul.h"
#include "qlk/scratch.h"

namespace qlk {
namespace {

// Tokens whose fp32 copy and sums are held at once; more are done in passes that decode again.
constexpr int64_t kPassTokens = 32;
// Columns per unit of work: the sums of a pass are 64 KiB.
constexpr int64_t kStrip = 512;
// Rows summed on their own before they join the total: the rounding error of fp32 grows with the
// length of a chain of additions.
constexpr int64_t kChainRows = 256;

// sums += partial for every token.
void join(const float* partial, int64_t tokens, int64_t cols, float* sums) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < cols; ++j) sums[t * kStrip + j] += partial[t * kStrip + j];
}

// `partial` is scratch of the size of `sums`.
void strip_sums(const QuantizedView& weight, const float* grad, int64_t tokens, int64_t col,
                int64_t cols, Isa isa, float* partial, float* sums) {
  alignas(64) float rows[kAxpyRows * kStrip];
  alignas(64) float factors[kPassTokens * kAxpyRows];
  std::fill_n(sums, tokens * kStrip, 0.0f);
  const int64_t N = weight.rows;
  for (int64_t n = 0; n < N; n += kAxpyRows) {
    const int64_t count = std::min(kAxpyRows, N - n);
    if (n % kChainRows == 0) std::fill_n(partial, tokens * kStrip, 0.0f);
    for (int64_t r = 0; r < count; ++r)
      decode_span_f32(weight, (n + r) * weight.cols + col, cols, isa, rows + r * kStrip);
    if (count == kAxpyRows) {
      add_rows(rows, kStrip, cols, grad + n, N, tokens, isa, partial, kStrip);
    } else {
      // The last rows: what is missing counts as zeros times zero.
      std::fill_n(rows + count * kStrip, (kAxpyRows - count) * kStrip, 0.0f);
      std::fill_n(factors, tokens * kAxpyRows, 0.0f);
      for (int64_t t = 0; t < tokens; ++t)
        std::copy_n(grad + t * N + n, count, factors + t * kAxpyRows);
      add_rows(rows, kStrip, cols, factors, kAxpyRows, tokens, isa, partial, kStrip);
    }
    if ((n + kAxpyRows) % kChainRows == 0 || n + kAxpyRows >= N) join(partial, tokens, cols, sums);
  }
}

Status run_pass(const QuantizedMatmulParams& p, const float* grad, int64_t token_begin,
                int64_t tokens, Isa isa, const ThreadPool& pool) {
  const int64_t K = p.weight.cols;
  Failure failure;
  pool.run(0, (K + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    auto* sums = static_cast<float*>(scratch.reserve((2 * tokens + padded_rank(p.low_rank.rank)) *
                                                     kStrip * static_cast<int64_t>(sizeof(float))));
    if (!sums) return failure.set();
    float* products = sums + tokens * kStrip;
    float* tile = products + tokens * kStrip;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t col = strip * kStrip, cols = std::min(kStrip, K - col);
      strip_sums(p.weight, grad, tokens, col, cols, isa, products, sums);
      const LowRankTerm& term = p.low_rank;
      if (term.present()) {
        load_adapter_tile({term.right, term.right_dtype, term.rank, K, term.right_rank_stride,
                           term.right_col_stride},
                          p.dtype, col, cols, cols, isa, tile);
        add_low_rank(term, token_begin, tokens, col, cols, K, tile, isa, products, sums, kStrip);
      }
      for (int64_t t = 0; t < tokens; ++t)
        store_f32(sums + t * kStrip, cols, p.dtype, isa,
                  element_at(p.y, p.dtype, (token_begin + t) * K + col));
    }
  });
  return failure.status();
}

}  // namespace

Status quantized_matmul_backward_dot(const QuantizedMatmulParams& params, Isa isa,
                                     const ThreadPool& pool) {
  static thread_local Scratch scratch;
  const int64_t N = params.weight.rows;
  for (int64_t begin = 0; begin < params.tokens; begin += kPassTokens) {
    const int64_t tokens = std::min(kPassTokens, params.tokens - begin);
    auto* copy =
        static_cast<float*>(scratch.reserve(tokens * N * static_cast<int64_t>(sizeof(float))));
    if (!copy) return Status::kOutOfMemory;
    load_f32(params.x, params.dtype, begin * N, tokens * N, isa, copy);
    const Status status = run_pass(params, copy, begin, tokens, isa, pool);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

}  // namespace qlk
