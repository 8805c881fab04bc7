"""Wrong adapter products on AMX tiles: low_rank_amx.cpp."""

from __future__ import annotations

from tests.can_fail.mutation import Mutation

QLORA = "tests/backends/test_cpu_qlora_linear.py"
SOURCE = "low_rank_amx.cpp"


def _wrong(what: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(what, SOURCE, old, new, f"{QLORA}::{test}", "amx")


MUTATIONS = (
    _wrong(
        "projection_takes_the_first_ranks_for_all",
        "packed += p.k_tiles * kTileBytes",
        "packed += 0",
        "test_qlora_of_every_rank",
    ),
    _wrong(
        "projection_copies_the_next_token_behind_the_depth",
        "std::max<int64_t>(0, p.depth - col - k) : 0;",
        "kTileDepth : 0;",
        "test_a_row_that_is_not_finite_stays_alone",
    ),
    _wrong(
        "projection_mistakes_the_rows_of_its_last_tile",
        "(t - begin) * kTileRows",
        "(t % kTileRows) * kTileRows",
        "test_qlora_of_larger_weights",
    ),
    _wrong(
        "projection_packs_the_columns_of_a_pair_in_reverse",
        "_mm512_or_si512(words[0], _mm512_slli_epi32(words[1], 16))",
        "_mm512_or_si512(words[1], _mm512_slli_epi32(words[0], 16))",
        "test_qlora_of_every_rank",
    ),
    _wrong(
        "gradient_is_stored_in_the_order_of_the_tiles",
        "return dword / 4 * 8 + tile * 4 + dword % 4;",
        "return tile * 16 + dword;",
        "test_qlora_of_every_rank",
    ),
    _wrong(
        "gradient_keeps_the_last_chain_alone",
        "_mm512_add_ps(_mm512_load_ps(own + i), _mm512_load_ps(chain + i))",
        "_mm512_load_ps(chain + i)",
        "test_gradients_of_many_tokens_stay_as_accurate_as_torchs",
    ),
    _wrong(
        "gradient_leaves_stale_tokens_behind_the_last",
        "const bool present = token + i < tokens;",
        "const bool present = token + i <= tokens;",
        "test_qlora_of_ragged_weights",
    ),
)
