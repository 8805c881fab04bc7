// stream_bytes: the memory traffic of a codec without its arithmetic; the benches' yardstick.
#pragma once

#include "qlk/types.h"

namespace qlk {

struct StreamBytesParams {
  const uint8_t* source = nullptr;  // every byte is read once
  uint8_t* target = nullptr;        // every byte is written once
  int64_t source_bytes = 0, target_bytes = 0;
};

Status stream_bytes(const StreamBytesParams& params, Isa isa, const ThreadPool& pool);

}  // namespace qlk
