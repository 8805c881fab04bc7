"""Whether an adapter becomes further columns (forward) or rows (backward) of the weight, so that
one GEMM sums all, or is added to that GEMM's result by another.

The extended operand is a copy of x or grad_y with the low-rank product behind it; the other way
reads and writes the result once more for every product after the first. Both count elements moved:
pure functions of sizes, tested without a GPU. Neither has been timed on a GPU yet.
"""

from __future__ import annotations

# Columns of a GEMM operand begin at 16-byte boundaries: cuBLAS is slow otherwise.
RANK_STEP = 8


def padded_rank(rank: int) -> int:
    """Columns or rows that an adapter takes in an extended GEMM operand."""
    return -(-rank // RANK_STEP) * RANK_STEP


def copy_cost(width: int, one_pass: bool) -> int:
    """Elements a token costs that a copy of `width` columns moves: written, and read as well unless
    the pass that makes the low-rank product writes them."""
    return width if one_pass else 2 * width


def extends(copied: int, products: int, result_width: int) -> bool:
    """Whether the extended operand moves less.

    Args:
        copied: what making it costs a token, the sum of `copy_cost`.
        products: GEMMs that the result would take otherwise.
        result_width: columns of the result.
    """
    return copied < 2 * (products - 1) * result_width


def extends_forward(out_features: int, in_features: int, one_pass: bool) -> bool:
    """[x | xa] · [Ŵ | scaling·B]ᵀ against x Ŵᵀ + scaling·xa Bᵀ: in one pass where N > K / 2. For a
    group `out_features` is that of all members, which share the copy of x."""
    return extends(copy_cost(in_features, one_pass), 2, out_features)
