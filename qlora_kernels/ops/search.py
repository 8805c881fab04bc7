"""Scale encoders: for each block, the scale of least squared error among candidates.

"scale_search" tries multiples of the rule's scale and refits the best; "least_squares" begins at
the rule's and alternates codes and the scale that fits them, s = Σ w·t / Σ t². Candidates are
rounded to the store first where it rounds each scale by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qlora_kernels.formats.format import Format
from qlora_kernels.formats.operands import WeightOperands
from qlora_kernels.formats.scale_store import EIGHT_BIT_STORES
from qlora_kernels.ops.library import run_dequantize
from qlora_kernels.reference.encode_scales import decode_stored_scales, encode_scales_reference
from qlora_kernels.reference.scale_rules import per_block, spread

# Multiples of the rule's scale that are tried. Below 1 the largest weights saturate and the others
# gain; few values gain from more of it. The best multiples of Gaussian, Student-t and real weights
# lie between these, and the refit finds what is between two of them.
FACTORS = (*(round(0.73 + 0.03 * i, 2) for i in range(9)), 1.0, 1.03, 1.06, 1.09, 1.12)
FEW_VALUES, FACTORS_OF_FEW = 8, (0.4, 0.47, 0.54, 0.61, 0.67)
# Scales that are powers of two have no others nearby.
POWER_FACTORS = (0.5, 1.0, 2.0)
LEAST_SQUARES_ROUNDS = 4
_PART_ELEMENTS = 1 << 18

NearestCodes = Callable[[torch.Tensor, torch.Tensor, Format], torch.Tensor]


def search_scales(
    fmt: Format,
    residual: torch.Tensor,
    scales: torch.Tensor,
    importance: torch.Tensor | None,
    nearest_codes: NearestCodes,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The encoder's scales fp32 [n_blocks], and e4m3's second-level scale if that is the store.

    Args:
        fmt: says how to search.
        residual: flat weight, its shifts taken off.
        scales: the rule's, fp32 [n_blocks].
        importance: fp32, of residual's shape, or None.
        nearest_codes: (w, scales, fmt) to packed codes.
    """
    second = None
    if fmt.scale_store == "e4m3":
        # Settled by the rule's scales, so that candidates and the result share it.
        second = encode_scales_reference("e4m3", scales, fmt.scale_block_size).second
    # Blocks are searched by themselves, some at a time: a part and its candidates stay in cache.
    parts = []
    step = max(1, _PART_ELEMENTS // fmt.block_size)
    for begin in range(0, scales.numel(), step):
        part = slice(begin * fmt.block_size, (begin + step) * fmt.block_size)
        search = ScaleSearch(
            fmt,
            residual[part],
            scales[begin : begin + step],
            None if importance is None else importance[part],
            nearest_codes,
            second,
        )
        parts.append(search.run())
    return (torch.cat(parts) if parts else scales), second


class ScaleSearch:
    """The search over some blocks; see `search_scales`."""

    def __init__(
        self,
        fmt: Format,
        residual: torch.Tensor,
        scales: torch.Tensor,
        importance: torch.Tensor | None,
        nearest_codes: NearestCodes,
        second: torch.Tensor | None = None,
    ) -> None:
        self.fmt, self.residual, self.scales = fmt, residual, scales
        self.importance, self.nearest_codes = importance, nearest_codes
        self.wide = residual.to(torch.float32)
        self.second = second

    def run(self) -> torch.Tensor:
        """The best scales, fp32 [n_blocks]."""
        self.best = self._rounded(self.scales)
        self.least = self.error(self.best)
        if self.fmt.encoder == "least_squares":
            for _ in range(LEAST_SQUARES_ROUNDS):
                self._try(self._fitted(self.best))
            return self.best
        if self._scales_are_absmax():
            self._try_multiples_of_absmax()
        else:
            for factor in self._factors():
                self._try(self.scales * factor)
        self._try(self._fitted(self.best))
        return self.best

    def _scales_are_absmax(self) -> bool:
        """Whether candidates are just multiples of a block's largest magnitude, but for the
        sign."""
        layout = EIGHT_BIT_STORES.get(self.fmt.scale_store)
        exact = self.fmt.scale_store == "fp32" or (
            layout is not None and layout.second_level == "block"
        )
        return exact and self.fmt.scale_rule in ("absmax", "signed_absmax")

    def _try_multiples_of_absmax(self) -> None:
        """Then the quantize op's own normalisation serves, with boundaries times the factor: a
        fraction of the time that exact comparisons take."""
        encoder, device = self.fmt.codebook.encoder, self.wide.device
        signs = torch.where(self.scales < 0, -1.0, 1.0)
        upright = self.wide
        if self.fmt.scale_rule == "signed_absmax":
            upright = upright * spread(signs, self.fmt.block_size, upright.numel())
        boundaries = torch.tensor(encoder.boundaries, dtype=torch.float32, device=device)
        ranks = torch.tensor(encoder.rank_codes, dtype=torch.uint8, device=device)
        for factor in self._factors():
            candidate = self.scales * factor
            codes, _ = torch.ops.qlora_kernels.quantize(
                upright, boundaries * factor, ranks, encoder.zero_code, self.fmt.block_size
            )
            self._keep(candidate, self._error_of(self._decoded(codes, candidate)))

    def _factors(self) -> tuple[float, ...]:
        if self.fmt.scale_store == "e8m0":
            return POWER_FACTORS
        few = len(self.fmt.codebook.values) <= FEW_VALUES
        return FACTORS_OF_FEW + FACTORS if few else FACTORS

    def _try(self, scales: torch.Tensor) -> None:
        candidate = self._rounded(scales)
        self._keep(candidate, self.error(candidate))

    def _keep(self, candidate: torch.Tensor, error: torch.Tensor) -> None:
        """Keep these scales for the blocks in which they err less."""
        better = error < self.least
        self.best = torch.where(better, candidate, self.best)
        self.least = torch.where(better, error, self.least)

    def _fitted(self, scales: torch.Tensor) -> torch.Tensor:
        """The scales of least squared error for the codes that `scales` give."""
        table = self._dequantized(scales, torch.ones_like(scales))
        product, square = self.wide * table, table * table
        if self.importance is not None:
            product, square = product * self.importance, square * self.importance
        top, bottom = self._sums(product), self._sums(square)
        return torch.where(bottom > 0, top / bottom, scales)

    def error(self, scales: torch.Tensor) -> torch.Tensor:
        """Squared error of each block, fp32 [n_blocks], under these scales; NaN scales: NaN."""
        return self._error_of(self._dequantized(scales, scales))

    def _error_of(self, dense: torch.Tensor) -> torch.Tensor:
        squares = (self.wide - dense).square_()
        return self._sums(squares if self.importance is None else squares * self.importance)

    def _dequantized(self, encode_with: torch.Tensor, decode_with: torch.Tensor) -> torch.Tensor:
        codes = self.nearest_codes(self.residual, encode_with, self.fmt)
        return self._decoded(codes, decode_with)

    def _decoded(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        fmt, numel = self.fmt, self.residual.numel()
        table = fmt.codebook.table(self.residual.device)
        operands = WeightOperands(
            codes, scales, None, None, None, table, None, (1, numel), fmt.block_size, 256
        )
        return run_dequantize(operands, torch.float32).view(-1)

    def _sums(self, elements: torch.Tensor) -> torch.Tensor:
        return per_block(elements, self.fmt.block_size, lambda rows: rows.sum(dim=1))

    def _rounded(self, scales: torch.Tensor) -> torch.Tensor:
        """What the store makes of each scale, where it does not depend on the other scales."""
        store = self.fmt.scale_store
        layout = EIGHT_BIT_STORES.get(store)
        if layout is not None and layout.second_level == "block":
            return scales
        stored = encode_scales_reference(store, scales, self.fmt.scale_block_size, self.second)
        return decode_stored_scales(store, stored, self.fmt.scale_block_size)
