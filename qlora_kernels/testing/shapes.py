"""Named problem sizes for tests: the ragged ones that find faults."""

from __future__ import annotations

# Elements of a flattened weight: empty, one, odd, around a byte, a vector, a block, a task of a
# kernel (65536), and primes.
CODEC_NUMELS = (0, 1, 2, 3, 31, 33, 63, 64, 65, 127, 129, 255, 4095, 4097, 65537, 70001)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# [N, K] where blocks straddle rows, rows start in the middle of a byte, or K is below a block.
RAGGED_WEIGHTS = ((1, 1), (3, 5), (5, 33), (7, 63), (17, 100), (33, 129), (64, 96), (65, 257))

# Tokens that a matmul meets: none, decoding, around every tile size, training.
TOKENS = (0, 1, 2, 3, 5, 16, 17, 33, 64, 100, 512)
