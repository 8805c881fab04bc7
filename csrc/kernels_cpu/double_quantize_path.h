// What double_quantize.cpp asks of an instruction-set path: the codes of one second-level block.
#pragma once

#include "qlk/types.h"

namespace qlk {

// codes[i] = number of midpoints below (absmax[i] - offset) * inverse; a NaN product gives 255.
// midpoints holds 255 ascending values and an infinity.
using ScaleEncodeFn = void (*)(const float* absmax, int64_t count, float offset, float inverse,
                               const float* midpoints, uint8_t* codes);

void encode_scales_portable(const float* absmax, int64_t count, float offset, float inverse,
                            const float* midpoints, uint8_t* codes);
void encode_scales_avx2(const float* absmax, int64_t count, float offset, float inverse,
                        const float* midpoints, uint8_t* codes);
void encode_scales_avx512(const float* absmax, int64_t count, float offset, float inverse,
                          const float* midpoints, uint8_t* codes);

}  // namespace qlk
