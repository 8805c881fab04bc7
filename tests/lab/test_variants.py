"""Which formats are compared, and what makes two of them different."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kernels import get_format, list_formats
from qlora_kernels.errors import ArgumentError, CheckpointError
from qlora_kernels.formats.definitions import import_definitions
from qlora_kernels.lab.variants import Variant, axes, choices, make_variants

DEFINITION = """
import qlora_kernels as qlk
qlk.register_format(qlk.Codebook("{name}", values=[-1, -0.5, 0, {value}, 1]))
"""


def test_every_combination_once() -> None:
    """nf4's own block size is 64: given twice, it is there once."""
    found, refused = make_variants(["nf4", "int4"], {"block_size": [32, 64, "own"]})
    assert [variant.label for variant in found] == ["nf4 b32", "nf4 b64", "int4 b32", "int4 b64"]
    assert refused == []
    assert found[0].format == get_format("nf4").override(block_size=32)
    assert found[1].format == get_format("nf4")


def test_all_formats_and_all_stores() -> None:
    found, refused = make_variants(None, {"scale_store": ["all"]})
    assert {variant.name for variant in found} == set(list_formats())
    stores = choices("scale_store")
    assert {"fp32", "double_quant"} <= set(stores)
    nf4 = {variant.format.scale_store for variant in found if variant.name == "nf4"}
    assert nf4 | {"refused"} >= set(stores) - {line.split("'")[3] for line in refused}


def test_what_a_format_does_not_take_is_told() -> None:
    """A combination that the Format refuses is left out, with its reason."""
    found, refused = make_variants(["nf4"], {"block_size": [64, 8]})
    assert [variant.label for variant in found] == ["nf4 b64"]
    assert len(refused) == 1
    assert "power of two" in refused[0]


def test_searched_scales_are_encoded_against_what_is_stored() -> None:
    """nf4's own encoding is bitsandbytes', which is for bitsandbytes' scales alone."""
    nf4 = get_format("nf4")
    assert nf4.encode_against == "original"
    assert Variant.of("nf4", {"encoder": "scale_search"}).format.encode_against == "decoded"
    assert Variant.of("nf4", {"scale_store": "e4m3"}).format.encode_against == "decoded"
    assert Variant.of("nf4", {"scale_store": "fp32"}).format.encode_against == "original"


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["nf5"], {}, "nf5"),
        (["nf4"], {"scale_store": ["fp31"]}, "--scale-stores must be own, all or one of fp32"),
        (["nf4"], {"encoder": ["best"]}, "--encoders must be own, all or one of nearest"),
        (["nf4"], {"block_size": [8]}, "at least one that is possible"),
    ],
)
def test_bad_choices(names: list[str], given: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_variants(names, given)


def test_variants_survive_json() -> None:
    variants, _ = make_variants(None, {axis: ["own", *choices(axis)[:2]] for axis in axes()[1:]})
    assert len(variants) > 3
    for variant in variants:
        again = Variant.from_json(variant.to_json())
        assert (again, again.digest) == (variant, variant.digest)


@pytest.mark.parametrize("value", [None, [], {"block_size": 32}, {"format": "nf4", "bits": 3}])
def test_other_json_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError):
        Variant.from_json(value)


def test_labels_tell_variants_apart() -> None:
    variants, _ = make_variants(None, {axis: ["own", *choices(axis)] for axis in axes()[1:]})
    assert len({variant.label for variant in variants}) == len(variants)


def test_a_definition_is_registered(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(DEFINITION.format(name="lab_mine", value=0.5))
    import_definitions([str(path)])
    assert "lab_mine" in list_formats()
    import_definitions([str(path)])  # again is harmless


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a Python file"),
        ("x = 1 +", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("raise KeyError('x')", "KeyError"),
        (DEFINITION.format(name="nf4", value=0.5), "already another format"),
        (DEFINITION.format(name="lab_bad", value="float('nan')"), "finite in float32"),
    ],
)
def test_a_definition_that_fails(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArgumentError, match=message):
        import_definitions([str(path)])
