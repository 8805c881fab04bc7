"""The counter-based dropout mask: Philox4x32-10 against published vectors, and its rate."""

from __future__ import annotations

import torch

from qlora_kernels.reference import dropout_reference, philox_words


def test_philox_matches_the_known_answers() -> None:
    # Random123's kat_vectors for philox4x32-10 with counter 0 and key 0.
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_words(0, 4).tolist() == expected


def test_rate_scale_and_replay() -> None:
    x = torch.ones(64, 4096)
    seed = torch.tensor([-12345])
    y = dropout_reference(x, 0.25, seed)
    assert torch.equal(y, dropout_reference(x, 0.25, seed))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y == 0).float().mean().item() - 0.25) < 0.004  # 4.7 sigma of 262,144 draws
    assert torch.equal(dropout_reference(x, 0.0, seed), x)
    assert not dropout_reference(x * torch.nan, 1.0, seed).any()
