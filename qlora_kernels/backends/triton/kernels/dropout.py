"""dropout: Philox4x32-10 on (seed, element index), as `reference/dropout.py` states it."""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_kernels.backends.triton.kernels.tiles import round_tile, widen_tile


@triton.jit
def _words(counter, seed):
    """The four 32-bit words of int64 counters."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def dropout_tile(tile, first, seed, threshold, keep_scale, ALIGNED: tl.constexpr):
    """Drop elements of an fp32 tile [ROWS, COLS]; kept ones times keep_scale.

    first: int64 [ROWS], the index of each row's first element in all of x. ALIGNED: all of them
    are multiples of 4, so that a counter serves four neighbours.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    if ALIGNED:
        counter = first[:, None] // 4 + tl.arange(0, COLS // 4)[None, :]
        w0, w1, w2, w3 = _words(counter, seed)
        # [ROWS, COLS / 4, 2, 2]: the last axis picks the pair, the one before it within the pair.
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, COLS)
    else:
        index = first[:, None] + tl.arange(0, COLS)[None, :]
        w0, w1, w2, w3 = _words(index // 4, seed)
        which = index % 4
        words = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    kept = words >= threshold.to(tl.uint32, bitcast=True)
    return tl.where(kept, tile * keep_scale, 0.0)


@triton.jit(do_not_specialize=["threshold"])
def _dropout_kernel(
    x_ptr, seed_ptr, out_ptr, numel, threshold, keep_scale, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """x flat, ROWS·COLS elements a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = row * COLS
    offs = first[:, None] + tl.arange(0, COLS)[None, :]
    mask = offs < numel
    x = widen_tile(tl.load(x_ptr + offs, mask=mask, other=0.0))
    dropped = dropout_tile(x, first, tl.load(seed_ptr), threshold, keep_scale, True)
    tl.store(out_ptr + offs, round_tile(dropped, out_ptr.dtype.element_ty), mask=mask)
