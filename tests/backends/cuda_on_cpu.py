"""The CUDA entries on CPU tensors: plain torch in place of the kernels that they launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from qlora_kernels.backends.cuda import dense_path, low_rank
from qlora_kernels.backends.cuda import qlora_group as group_entry
from qlora_kernels.backends.cuda import qlora_linear as qlora_entry
from qlora_kernels.backends.cuda import quantized_matmul as matmul_entry
from qlora_kernels.formats.quantized_weight import WeightOperands
from qlora_kernels.reference import (
    dequantize_reference,
    dropout_reference,
    quantized_matmul_reference,
)


def install(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Returns how often each of them is launched."""
    calls: Counter[str] = Counter()

    def adapter_gradients(
        grad_y: torch.Tensor,
        xa: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        token_slices: int,
        extended: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls["adapter_gradients"] += 1
        assert token_slices >= 1
        u = (scaling * (grad_y.float() @ lora_b.to(grad_y.dtype).float())).to(grad_y.dtype)
        grad_b = (scaling * (grad_y.float().t() @ xa.float())).to(lora_b.dtype)
        if extended is not None:
            alone = extended.shape[1] == grad_y.shape[1]
            dense_path.write_extended(grad_y, None if alone else u, extended)
        return u, grad_b

    def token_product(
        data: torch.Tensor,
        left: torch.Tensor,
        scaling: float,
        token_slices: int,
        dtype: torch.dtype,
        rank_major: bool,
    ) -> torch.Tensor:
        calls["token_product"] += 1
        assert token_slices >= 1
        product = (scaling * (data.float().t() @ left.float())).to(dtype)
        return product.t().contiguous() if rank_major else product

    def column_product(
        x: torch.Tensor, adapter: torch.Tensor, token_slices: int, extended: torch.Tensor
    ) -> torch.Tensor:
        calls["column_product"] += 1
        assert token_slices >= 1
        xa = (x.float() @ adapter.to(x.dtype).float().t()).to(x.dtype)
        dense_path.write_extended(x, xa, extended)
        return xa

    def dequantize(
        operands: WeightOperands,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        calls["dequantize"] += 1
        return dequantize_reference(operands, shape, dtype, out)

    def dequantize_many(
        operands: Sequence[WeightOperands], dtype: torch.dtype, outs: Sequence[torch.Tensor]
    ) -> None:
        calls["dequantize_many"] += 1
        for weight, out in zip(operands, outs, strict=True):
            dequantize_reference(weight, weight.shape, dtype, out)

    def fused_matmul(
        x: torch.Tensor,
        operands: WeightOperands,
        bias: torch.Tensor | None,
        xa: torch.Tensor | None = None,
        lora_b: torch.Tensor | None = None,
        scaling: float = 0.0,
        projection: low_rank.Projection | None = None,
        path: str = "fused",
    ) -> torch.Tensor:
        calls[f"{path}_matmul"] += 1
        if projection is not None:
            calls["down_projection"] += 1
            operand, adapter, result = projection
            result.copy_(operand.float() @ adapter.to(x.dtype).float().t())
        y = quantized_matmul_reference(x.float(), operands, None if bias is None else bias.float())
        if xa is not None and lora_b is not None:
            assert xa.stride(1) == 1
            y = y + scaling * (xa.float() @ lora_b.to(x.dtype).float().t())
        return y.to(x.dtype)

    for module in (matmul_entry, dense_path):
        monkeypatch.setattr(module, "dequantize_cuda", dequantize)
    monkeypatch.setattr(dense_path, "dequantize_many_cuda", dequantize_many)
    for module in (qlora_entry, dense_path, group_entry):
        monkeypatch.setattr(module, "dropout_cuda", dropout_reference)
    for module in (qlora_entry, group_entry):
        monkeypatch.setattr(module, "fused_matmul", fused_matmul)
    monkeypatch.setattr(low_rank, "run_adapter_gradients", adapter_gradients)
    monkeypatch.setattr(low_rank, "run_token_product", token_product)
    monkeypatch.setattr(low_rank, "run_column_product", column_product)
    return calls
