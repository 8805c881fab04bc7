"""How the Triton matmuls choose a path, tiles and splits: pure functions, so tested for GPUs that
are not here."""

from __future__ import annotations

import itertools

import pytest
import torch

from qlora_kernels.backends import launch_config
from qlora_kernels.backends.device import A100, B200, H200, DeviceFacts, device_facts
from qlora_kernels.backends.launch_config import (
    FEW_TOKENS,
    FUSED_TOKENS,
    MatmulConfig,
    MatmulSizes,
    backward_config,
    choose_path,
    down_config,
    down_gradient_config,
    extends_backward,
    extends_forward,
    extends_group_backward,
    few_tokens_config,
    forward_config,
    tile_rank,
    up_gradients_config,
    why_not_fused,
)

GPUS = (A100, H200, B200)
BF16 = torch.bfloat16
# Llama's 7B, 70B attention and MLP, [N, K].
LAYERS = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672))


def sizes(tokens: int, rows: int = 4096, cols: int = 4096, **other: object) -> MatmulSizes:
    base = MatmulSizes(tokens, rows, cols, BF16, 64)
    return base._replace(**other)


def test_path_follows_the_number_of_tokens() -> None:
    for tokens in (1, 2, 16, FEW_TOKENS):
        assert choose_path(sizes(tokens)) == "few_tokens"
    for tokens in (FEW_TOKENS + 1, 100, FUSED_TOKENS):
        assert choose_path(sizes(tokens)) == "fused"
    for tokens in (FUSED_TOKENS + 1, 8192):
        assert choose_path(sizes(tokens)) == "dense"
    assert choose_path(sizes(100, dtype=torch.float32)) == "dense"
    assert choose_path(sizes(1, dtype=torch.float32)) == "one_token"
    # A word of codes a lane is half a block of 16.
    assert choose_path(sizes(1, block_size=16)) == "one_token"
    assert choose_path(sizes(2, block_size=16)) == "fused"


def test_batch_invariant_products_are_always_fused() -> None:
    for tokens, dtype in itertools.product((1, 2, 100, 8192), (BF16, torch.float32)):
        assert choose_path(sizes(tokens, dtype=dtype, batch_invariant=True)) == "fused"
    one = forward_config(sizes(1, batch_invariant=True), H200)
    assert forward_config(sizes(5000, batch_invariant=True), H200) == one


@pytest.mark.parametrize(
    ("cols", "block_size", "fits"),
    [(96, 32, True), (96, 64, False), (11008, 4096, True), (100, 32, False), (64, 4096, True)],
)
def test_fused_wants_whole_groups_of_a_scale(cols: int, block_size: int, fits: bool) -> None:
    problem = sizes(40, cols=cols, block_size=block_size)
    assert (why_not_fused(problem) is None) is fits
    assert (choose_path(problem) == "fused") is fits
    if not fits:
        assert "in_features must be a multiple of" in (why_not_fused(problem) or "")


def test_empty_products_are_dense() -> None:
    for empty in (sizes(0), sizes(3, rows=0), sizes(3, cols=0)):
        assert choose_path(empty) == "dense"


@pytest.mark.parametrize("facts", GPUS, ids=lambda facts: facts.name)
@pytest.mark.parametrize(("rows", "cols"), LAYERS)
def test_fused_configurations_fill_the_gpu(rows: int, cols: int, facts: DeviceFacts) -> None:
    for tokens in (1, 16, 32, 33, 64, 128, 256, 512):
        problem = sizes(tokens, rows, cols)
        few = choose_path(problem) == "few_tokens"
        config = (few_tokens_config if few else forward_config)(problem, facts)
        programs = -(-rows // config.tile_n) * -(-tokens // config.tile_m) * config.splits
        assert programs >= facts.sm_count, f"{programs} programs for {facts.sm_count} SMs"
        # Parts of K are whole tiles, and long enough to be worth their partial sums.
        assert config.splits == 1 or cols // config.splits >= 512
        assert cols >= config.tile_k
        # fp32 accumulators take at most half of a program's registers.
        for tuned in (config, backward_config(problem, facts)):
            accumulators = tuned.tile_m * tuned.tile_n
            assert accumulators <= tuned.num_warps * 32 * 128


def test_configurations_print() -> None:
    assert repr(few_tokens_config(sizes(16), H200)) == (
        "MatmulConfig(tile_m=16, tile_n=64, tile_k=256, splits=6, num_warps=4, num_stages=3, "
        "decode='prmt')"
    )


def test_weights_are_decoded_by_permutation_where_it_counts_fewer_instructions() -> None:
    for facts, dtype, decode in (
        (A100, BF16, "gather"),
        (H200, BF16, "prmt"),
        (B200, BF16, "prmt"),
        (H200, torch.float16, "gather"),
    ):
        for config in (forward_config, backward_config):
            assert config(sizes(64, dtype=dtype), facts).decode == decode
        assert few_tokens_config(sizes(4, dtype=dtype), facts).decode == "prmt"


def test_a_tuned_row_holds_for_exactly_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = MatmulConfig(32, 128, 64, 2, 8, 5)
    table = {(H200.name, "forward", sizes(64)): tuned}
    monkeypatch.setattr(launch_config, "TUNED", table)
    assert forward_config(sizes(64), H200) == tuned
    for other in (sizes(65), sizes(64, rows=4224), sizes(64, block_size=128)):
        assert forward_config(other, H200) != tuned
    assert forward_config(sizes(64), B200) != tuned
    assert backward_config(sizes(64), H200) != tuned


def test_thin_products_cover_every_rank_and_size() -> None:
    assert [tile_rank(rank) for rank in (1, 16, 17, 64, 65, 300)] == [16, 16, 32, 64, 64, 64]
    for tokens, width, rank in itertools.product((1, 100, 16384), (1, 4096, 28672), (1, 16, 300)):
        for config in (
            down_config(tokens, width, rank, H200),
            up_gradients_config(tokens, width, rank, H200),
            down_gradient_config(tokens, width, rank, H200),
        ):
            assert 1 <= config.parts <= 16
            assert min(config.tile_rows, config.tile_cols, config.tile_rank) >= 16
    # xa of one token is spread over the GPU; that of many is not split.
    assert down_config(1, 4096, 16, H200).parts == 8
    assert down_config(65536, 4096, 16, H200).parts == 1
    invariant = [down_config(m, 4096, 16, H200, batch_invariant=True) for m in (1, 7, 9000)]
    assert len(set(invariant)) == 1


def test_the_longer_side_is_not_copied() -> None:
    # Forward copies x [M,K] or passes twice over y [M,N]; backward the other way round.
    assert extends_forward(4096, 4096, 4096, 16) and extends_backward(4096, 4096, 4096, 16)
    assert not extends_forward(4096, 4096, 14336, 16)
    assert not extends_backward(4096, 14336, 4096, 16)
    assert not extends_forward(4096, 4096, 4096, 300)


def test_a_group_is_one_gemm_where_copying_costs_less() -> None:
    # q, k, v: 3 K rows copied against five passes over grad_x; gate, up of a 7B MLP: 5.4 K against
    # three; nothing is copied for few tokens or a rank that takes several tiles.
    assert extends_group_backward(4096, 3 * 4096, 4096, 3, 16)
    assert extends_group_backward(4096, 2 * 11008, 4096, 2, 16)
    assert not extends_group_backward(4096, 2 * 14336, 4096, 2, 16)
    assert not extends_group_backward(512, 3 * 4096, 4096, 3, 16)
    assert not extends_group_backward(4096, 3 * 4096, 4096, 3, 65)


def test_other_devices_stand_for_an_h200() -> None:
    assert device_facts(torch.device("cpu")) == H200
    assert device_facts(torch.device("meta")) == H200
