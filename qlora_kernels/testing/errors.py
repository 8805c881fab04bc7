"""How results are compared: bit for bit for codecs, against fp64 for matmuls."""

from __future__ import annotations

import torch

_BITS_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# A result that is exact up to its one final rounding has about half a unit roundoff of error.
ERROR_FLOOR = 0.6


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal shape, dtype and bits; NaNs equal each other whatever their payload.

    Raises:
        AssertionError: names the first difference by its index, both values and both bit patterns.
    """
    where = f"{what}: " if what else ""
    assert actual.dtype == expected.dtype, f"{where}dtype {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{where}shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    actual, expected = actual.detach().contiguous(), expected.detach().contiguous()
    bits = _BITS_DTYPE[actual.element_size()]
    differs = actual.view(bits) != expected.view(bits)
    if actual.dtype.is_floating_point:
        differs &= ~(actual.isnan() & expected.isnan())
    count = int(differs.sum())
    if count == 0:
        return
    flat = int(differs.reshape(-1).nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape))
    got, want = actual.reshape(-1)[flat], expected.reshape(-1)[flat]
    mask = (1 << 8 * actual.element_size()) - 1
    raise AssertionError(
        f"{where}{count} of {actual.numel()} elements differ, first at {index}: "
        f"got {got.item()!r} ({int(got.view(bits)) & mask:#x}), "
        f"expected {want.item()!r} ({int(want.view(bits)) & mask:#x})"
    )


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """‖y - exact‖ / ‖exact‖ in fp64; 0 where both norms are 0."""
    difference = float((y.double() - exact.double()).norm())
    norm = float(exact.double().norm())
    return 0.0 if difference == 0.0 else difference / norm if norm else float("inf")


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest in `dtype`."""
    return torch.finfo(dtype).eps / 2


def assert_as_accurate(
    y: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor, factor: float = 2.0
) -> None:
    """The error of `y` is at most `factor` times that of `baseline`, or 0.6 unit roundoff.

    Args:
        y: the result under test.
        exact: the same in fp64.
        baseline: what torch computes in y's dtype.

    Raises:
        AssertionError: with both errors.
    """
    assert y.dtype == baseline.dtype, f"dtype {y.dtype}, but the baseline has {baseline.dtype}"
    assert y.shape == exact.shape, f"shape {tuple(y.shape)}, not {tuple(exact.shape)}"
    error, allowed = relative_error(y, exact), factor * relative_error(baseline, exact)
    floor = ERROR_FLOOR * unit_roundoff(y.dtype)
    assert error <= max(allowed, floor), (
        f"relative error {error:.3e} above {factor:g} x the baseline's ({allowed:.3e}) "
        f"and above the floor {floor:.3e}"
    )
