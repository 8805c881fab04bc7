// LoRA's products. All of them are built from the two primitives of dot.h, so they run at every
// instruction-set level and add in one order.
#include "qlk/low_rank.h"

#include <algorithm>

#include "qlk/convert.h"
#include "qlk/dot.h"
#include "qlk/dropout.h"
#include "qlk/scratch.h"

namespace qlk {
namespace {

constexpr int64_t kFloat = sizeof(float);
// Columns worked on at a time.
constexpr int64_t kStrip = 512;

}  // namespace

void load_adapter_tile(const AdapterView& adapter, DType dtype, int64_t col_begin, int64_t cols,
                       int64_t tile_stride, Isa isa, float* tile) {
  const bool rounds = adapter.dtype != dtype;
  for (int64_t r = adapter.rank; r < padded_rank(adapter.rank); ++r)
    std::fill_n(tile + r * tile_stride, cols, 0.0f);
  if (adapter.col_stride == 1) {
    for (int64_t r = 0; r < adapter.rank; ++r) {
      float* row = tile + r * tile_stride;
      load_f32(adapter.data, adapter.dtype, r * adapter.rank_stride + col_begin, cols, isa, row);
      if (rounds) round_f32(row, cols, dtype, isa);
    }
    return;
  }
  // Rank is the contiguous axis here: read the ranks of some columns, or a run of those of one, and
  // spread them.
  constexpr int64_t kRun = 1024;
  float run[kRun];
  const bool whole_columns =
      adapter.rank > 0 && adapter.rank <= kRun && adapter.col_stride == adapter.rank;
  const int64_t columns = whole_columns ? kRun / adapter.rank : 1;
  const int64_t ranks = whole_columns ? adapter.rank : std::min(kRun, adapter.rank);
  for (int64_t j = 0; j < cols; j += columns) {
    const int64_t width = std::min(columns, cols - j);
    for (int64_t first = 0; first < adapter.rank; first += ranks) {
      const int64_t count = std::min(ranks, adapter.rank - first);
      load_f32(adapter.data, adapter.dtype,
               (col_begin + j) * adapter.col_stride + first * adapter.rank_stride, width * count,
               isa, run);
      if (rounds) round_f32(run, width * count, dtype, isa);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < width; ++i)
          tile[(first + r) * tile_stride + j + i] = run[i * count + r];
    }
  }
}

Status down_projection(const void* x, DType dtype, int64_t tokens, const AdapterView& adapter,
                       float scaling, Isa isa, const ThreadPool& pool, float* left) {
  static thread_local Scratch memory;
  const int64_t depth = adapter.cols, rank = adapter.rank, padded = padded_rank(rank);
  // Few tokens are shared out by ranks, many by tokens; the additions are the same.
  const bool by_rank = tokens < pool.num_threads;
  // Few tokens read the adapter's rows where they are: a copy of them would be used only once.
  const bool copies = !by_rank || adapter.col_stride != 1;
  float* rows = nullptr;
  if (copies) {
    rows = static_cast<float*>(memory.reserve(padded * depth * kFloat));
    if (!rows) return Status::kOutOfMemory;
    pool.run(0, (depth + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kStrip, last = std::min(depth, end * kStrip);
      for (int64_t j = first; j < last; j += kStrip)
        load_adapter_tile(adapter, dtype, j, std::min(kStrip, last - j), depth, isa, rows + j);
    });
  }
  const int64_t rank_step = by_rank ? kAxpyRows : std::max<int64_t>(padded, 1);
  const int64_t rank_units = (padded + rank_step - 1) / rank_step;
  Failure failure;
  pool.run(0, tokens * rank_units, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch own;
    const int64_t tile_rows = copies ? 0 : rank_step;
    auto* sums = static_cast<float*>(
        own.reserve((rank_step * kDotLanes + (1 + tile_rows) * kStrip) * kFloat));
    if (!sums) return failure.set();
    float* wide = sums + rank_step * kDotLanes;
    float* tile = wide + kStrip;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t token = unit / rank_units, first = unit % rank_units * rank_step;
      const int64_t count = std::min(rank_step, padded - first);
      std::fill_n(sums, count * kDotLanes, 0.0f);
      for (int64_t j = 0; j < depth; j += kStrip) {
        const int64_t cols = std::min(kStrip, depth - j);
        load_f32(x, dtype, token * depth + j, cols, isa, wide);
        if (copies) {
          dot_chunk(wide, cols, rows + first * depth + j, depth, count, isa, sums);
          continue;
        }
        AdapterView part = adapter;
        part.data = element_at(adapter.data, adapter.dtype, first * adapter.rank_stride);
        part.rank = std::min(count, rank - first);
        load_adapter_tile(part, dtype, j, cols, kStrip, isa, tile);
        dot_chunk(wide, cols, tile, kStrip, count, isa, sums);
      }
      float* out = left + token * padded + first;
      for (int64_t r = 0; r < count; ++r)
        out[r] = first + r < rank ? scaling * sum_lanes(sums + r * kDotLanes) : 0.0f;
      round_f32(out, count, dtype, isa);
    }
  });
  return failure.status();
}

void add_low_rank(const LowRankTerm& term, int64_t token_begin, int64_t tokens, int64_t col_begin,
                  int64_t cols, int64_t result_cols, const float* tile, Isa isa, float* products,
                  float* out, int64_t out_stride) {
  const int64_t padded = padded_rank(term.rank);
  std::fill_n(products, tokens * cols, 0.0f);
  for (int64_t r = 0; r < padded; r += kAxpyRows)
    add_rows(tile + r * cols, cols, cols, term.left + token_begin * padded + r, padded, tokens, isa,
             products, cols);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* product = products + t * cols;
    float* row = out + t * out_stride;
    if (!term.mask.active()) {
      for (int64_t j = 0; j < cols; ++j) row[j] += term.scaling * product[j];
      continue;
    }
    constexpr int64_t kRun = 256;
    float factors[kRun];
    for (int64_t first = 0; first < cols; first += kRun) {
      const int64_t count = std::min(kRun, cols - first);
      dropout_factors(term.mask, (token_begin + t) * result_cols + col_begin + first, count, isa,
                      factors);
      // A dropped element adds nothing, even where its product is NaN.
      for (int64_t j = 0; j < count; ++j)
        row[first + j] +=
            factors[j] != 0.0f ? term.scaling * product[first + j] * factors[j] : 0.0f;
    }
  }
}

Status adapter_gradient(const float* left, const void* x, DType dtype, int64_t tokens,
                        float scaling, const AdapterView& gradient, Isa isa,
                        const ThreadPool& pool) {
  static thread_local Scratch memory;
  const int64_t padded = padded_rank(gradient.rank), cols = gradient.cols;
  const int64_t rounds = (tokens + kAxpyRows - 1) / kAxpyRows;
  // left transposed, tokens padded with zeros: [padded][rounds * kAxpyRows].
  const int64_t row = rounds * kAxpyRows;
  auto* factors = static_cast<float*>(memory.reserve(padded * row * kFloat));
  if (!factors) return Status::kOutOfMemory;
  std::fill_n(factors, padded * row, 0.0f);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < gradient.rank; ++r)
      factors[r * row + t] = scaling * left[t * padded + r];
  auto* out = const_cast<void*>(gradient.data);
  Failure failure;
  pool.run(0, (cols + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch own;
    auto* sums = static_cast<float*>(
        own.reserve(((gradient.rank + kAxpyRows) * kStrip + gradient.rank) * kFloat));
    if (!sums) return failure.set();
    float* rows = sums + gradient.rank * kStrip;
    float* column = rows + kAxpyRows * kStrip;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t col = strip * kStrip, count = std::min(kStrip, cols - col);
      std::fill_n(sums, gradient.rank * kStrip, 0.0f);
      for (int64_t t = 0; t < tokens; t += kAxpyRows) {
        const int64_t loaded = std::min(kAxpyRows, tokens - t);
        for (int64_t i = 0; i < loaded; ++i)
          load_f32(x, dtype, (t + i) * cols + col, count, isa, rows + i * kStrip);
        std::fill_n(rows + loaded * kStrip, (kAxpyRows - loaded) * kStrip, 0.0f);
        add_rows(rows, kStrip, count, factors + t, row, gradient.rank, isa, sums, kStrip);
      }
      if (gradient.col_stride == 1) {
        for (int64_t r = 0; r < gradient.rank; ++r)
          store_f32(sums + r * kStrip, count, gradient.dtype, isa,
                    element_at(out, gradient.dtype, r * gradient.rank_stride + col));
        continue;
      }
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t r = 0; r < gradient.rank; ++r) column[r] = sums[r * kStrip + j];
        store_f32(column, gradient.rank, gradient.dtype, isa,
                  element_at(out, gradient.dtype, (col + j) * gradient.col_stride));
      }
    }
  });
  return failure.status();
}

}  // namespace qlk
