"""DoRA over a weight that need not be there: y = m/‖Ŵ + ΔW‖ ⊙ (x Ŵᵀ + x ΔWᵀ) + bias.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024; the norm is a constant to the
gradient (their section 4.3). With ΔW = scaling·B A the squares of a row's norm are
‖Ŵ_n‖² + 2·scaling·⟨(Ŵ Aᵀ)_n, B_n⟩ + scaling²·⟨(B A Aᵀ)_n, B_n⟩: the first term belongs to the
frozen weight and is kept, the others cost R tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


@torch.no_grad()
def row_norms(
    row_squares: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """‖Ŵ + scaling·B A‖ of each row, fp32 [N].

    Args:
        row_squares: ‖Ŵ_n‖², fp32 [N].
        product: x [M, K] -> x Ŵᵀ [M, N].
        lora_a: [R, K].
        lora_b: [N, R].
        scaling: of the adapter.
    """
    a, b = lora_a.float(), lora_b.float()
    cross = (product(a).t() * b).sum(dim=1)
    own = ((b @ (a @ a.t())) * b).sum(dim=1)
    squares = row_squares + 2 * scaling * cross + scaling**2 * own
    # Rounding may leave a little less than nothing of a row that cancels out.
    return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


def scaled_rows(
    y: torch.Tensor, magnitude: torch.Tensor, norms: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """magnitude/norms ⊙ y + bias, in fp32 and rounded once to y's dtype; differentiable in y,
    magnitude and bias."""
    scaled = y * (magnitude.float() / norms)
    if bias is not None:
        scaled = scaled + bias
    return scaled.to(y.dtype)
