// Runs of a storage dtype to fp32 and back, at any instruction-set level.
#pragma once

#include "qlk/types.h"

namespace qlk {

// out[i] = float32(source[offset + i]).
void load_f32(const void* source, DType dtype, int64_t offset, int64_t count, Isa isa, float* out);

// source[i] rounded to nearest even into dtype at destination[0 ... count).
void store_f32(const float* source, int64_t count, DType dtype, Isa isa, void* destination);

// values[i] rounded to dtype and widened again, in place.
void round_f32(float* values, int64_t count, DType dtype, Isa isa);

// Bytes of one element.
inline int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The address of element `index`.
inline const void* element_at(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * dtype_size(dtype);
}
inline void* element_at(void* base, DType dtype, int64_t index) {
  return static_cast<char*>(base) + index * dtype_size(dtype);
}

}  // namespace qlk
