"""Formats as identities: ids, bits, bytes, bounds, kernels and the command that lists them."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cost_models.formats import bits_per_element, qsnr_lower_bound, qsnr_normal, storage_bytes
from ir.errors import InputError
from ir.format_kernels import KERNELS, kernels
from ir.format_plan import FormatRequest
from ir.formats import ELEMENTS, FORMATS, OCP_FORMATS, Format, parse_format
from ir.reading import parse_record
from planner.formats_cli import formats


@st.composite
def format_ids(draw: st.DrawFn) -> str:
    base = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    options = [f"axis={draw(st.integers(-4, 3))}"]
    if base.base in OCP_FORMATS:
        options.append(draw(st.sampled_from(["floor", "even", "rceil", "ceil"])))
    if base.scale == "e8m0":
        options.append("away")
        options.append(f"block={2 * draw(st.integers(1, 64))}")
    if base.scale == "fp32":
        options.append(f"bound={draw(st.floats(1e-3, 1e6))!r}")
    if base.scale.endswith("bias"):
        options.append(f"align={draw(st.sampled_from([1, 4, 16]))}")
    chosen = draw(st.lists(st.sampled_from(options), unique=True))
    return ":".join([base.base, *chosen])


@given(format_ids())
def test_an_id_names_one_identity_and_the_identity_gives_a_canonical_id(text: str) -> None:
    format = parse_format(text)
    assert parse_format(format.id) == format
    assert parse_format(format.id).id == format.id
    reordered = ":".join([text.split(":")[0], *reversed(text.split(":")[1:])])
    assert parse_format(reordered) == format


def test_formats_that_differ_in_any_field_have_different_ids() -> None:
    texts = ["mxfp4_e2m1", "mxfp4_e2m1:rceil", "mxfp4_e2m1:even", "mxfp4_e2m1:away", "mxfp4_e2m1:axis=0"]
    texts += ["mxfp4_e2m1:block=16", "fp8_row", "fp8_row:bound=1200", "int4", "int4:align=16", "nvfp4"]
    assert (
        len({parse_format(text).id for text in texts})
        == len({parse_format(text) for text in texts})
        == len(texts)
    )
    assert parse_format("mxfp4_e2m1:floor").id == "mxfp4_e2m1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mx8", "did you mean 'mx"),
        ("MX9", "did you mean 'mx9'"),
        ("mxfp8", "one of mxfp8_e4m3, mxfp8_e5m2"),
        ("", "not known"),
        ("mxfp8_e4m3:rcei", "did you mean 'rceil'"),
        ("mx9:rceil", "has no option 'rceil'"),
        ("int4:away", "has no option 'away'"),
        ("nvfp4:even", "has no option 'even'"),
        ("mxint8:bound=3", "has no option"),
        ("mxint8:block=0", "1 to 65536"),
        ("mxint8:block=1000000000000", "1 to 65536"),
        ("mx9:block=7", "not a multiple"),
        ("mxint8:block=x", "needs an integer"),
        ("fp8_row:bound=-1", "positive and finite"),
        ("fp8_row:bound=nan", "positive and finite"),
        ("fp8_row:bound=many", "needs a number"),
        ("int4:align=0", "1 to 65536 bytes"),
        ("mxint8:even:rceil", "twice"),
        ("mxint8:axis=", "needs an integer"),
    ],
)
def test_bad_ids_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_format(text)


def test_a_request_says_what_is_wrong_once() -> None:
    with pytest.raises(InputError, match=r"did you mean 'mx9'\?\); `planner formats` lists them$"):
        parse_record(FormatRequest, {"formats": {"table": ["mx7"]}}, "constraints")
    with pytest.raises(InputError, match=r"table: too few items; list at least 1$"):
        parse_record(FormatRequest, {"formats": {"table": []}}, "constraints")


def test_a_format_is_named_by_text() -> None:
    with pytest.raises(InputError, match="not int"):
        parse_format(4)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is not known"):
        Format("mx9", "s9", "block", "e8m0", 16)


# Bits per element from the papers' tables: BDR table 1, OCP MX v1.0 table 1, MSFP's names, NVFP4
PUBLISHED_BITS = {"mx9": 9, "mx6": 6, "mx4": 4, "msfp12": 4.5, "msfp16": 8.5, "nvfp4": 4.5, "mxint8": 8.25}
PUBLISHED_BITS |= {
    "mxfp8_e4m3": 8.25,
    "mxfp8_e5m2": 8.25,
    "mxfp6_e3m2": 6.25,
    "mxfp6_e2m3": 6.25,
    "mxfp4_e2m1": 4.25,
}


@pytest.mark.parametrize("name", PUBLISHED_BITS)
def test_bits_per_element_as_published(name: str) -> None:
    assert bits_per_element(name) == PUBLISHED_BITS[name]
    assert bits_per_element(name, 4096) == PUBLISHED_BITS[name]


@pytest.mark.parametrize("d", [8, 72, 128])
def test_four_bit_tables_shrink_as_the_paper_says(d: int) -> None:
    """Post-training 4-bit tables, arXiv 1911.02079: a row takes (d/2 + 4) / (4 d) of its float32 size."""
    share = storage_bytes("int4", (1000, d)) / storage_bytes("fp32", (1000, d))
    assert share == pytest.approx({8: 0.25, 72: 0.1389, 128: 0.1328}[d], abs=5e-5)


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("int4:align=16", (10, 16), 10 * 16),  # 8 + 4 bytes, padded: FBGEMM's tables on a GPU
        ("int4", (10, 16), 10 * 12),
        ("int2", (10, 18), 10 * (5 + 4)),
        ("int8", (3, 64), 3 * 68),
        ("int8_fused", (3, 64), 3 * 72),
        ("mx9", (2, 17), 2 * 2 * 18),  # two blocks a row, the second short but stored whole
        ("mxfp6_e2m3", (5, 33), 5 * 2 * 25),
        ("nvfp4", (4, 16), 4 * 9 + 4),  # and one scale for the tensor
        ("fp8_tensor", (4, 16), 64 + 4),
        ("fp8_row", (4, 16), 4 * 20),
        ("bf16", (4, 16), 128),
        ("mx6", (0, 16), 0),
    ],
)
def test_storage_counted_by_hand(name: str, shape: tuple[int, ...], size: int) -> None:
    assert storage_bytes(name, shape) == size


def test_storage_follows_the_axis() -> None:
    assert storage_bytes("mxfp8_e4m3", (33, 64), axis=0) == 64 * 2 * 33
    assert storage_bytes("mxfp8_e4m3:axis=0", (33, 64)) == 64 * 2 * 33
    for shape, axis in (((4,), 1), ((), -1), ((-1, 4), -1)):
        with pytest.raises(InputError):
            storage_bytes("mx9", shape, axis)


def test_bdr_theorem_values() -> None:
    """Block Data Representations, Theorem 1, at N >= k1: 34.74, 16.68 and 4.64 dB."""
    for name, value in (("mx9", 34.74), ("mx6", 16.68), ("mx4", 4.64)):
        assert qsnr_lower_bound(name, 10_000) == pytest.approx(value, abs=0.005)
        assert qsnr_lower_bound(name, 4) > qsnr_lower_bound(name, 16) == qsnr_lower_bound(name, 17)


def test_bounds_are_given_only_where_proved() -> None:
    for name in ("int8", "int4", "nvfp4", "fp8_row:bound=1200", "fp16"):
        assert qsnr_lower_bound(name, 64) is None
    assert qsnr_lower_bound("fp32", 64) == math.inf
    with pytest.raises(InputError):
        qsnr_lower_bound("mx9", 0)


def test_every_tabulated_qsnr_is_above_the_bound() -> None:
    for name in FORMATS:
        bound = qsnr_lower_bound(name, 128)
        assert bound is None or qsnr_normal(name) >= bound


def test_kernels_follow_the_stored_bytes_not_how_they_were_chosen() -> None:
    assert kernels("mxfp8_e4m3:rceil") == kernels("mxfp8_e4m3") != ()
    assert kernels("mxfp8_e4m3:block=16") == ()
    assert kernels("mx9") == ()
    assert "mx9" not in KERNELS
    assert {k.architecture for k in kernels("fp8_row", "gemm")} >= {"sm90", "sm100"}
    assert kernels("int4", "gemm") == ()
    assert all(kernel.source for found in KERNELS.values() for kernel in found)


def test_the_largest_value_of_every_float_element_follows_from_its_bits() -> None:
    # All ones is the largest code, but that E4M3 gives it to NaN and E5M2 gives its top binade to
    # infinity and NaN (OCP 8-bit floating point, OFP8)
    for name in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1"):
        element = ELEMENTS[name]
        top = 2 ** (element.bits - 1 - element.mantissa) - 1 - (name == "e5m2")
        fraction = 2**element.mantissa - 1 - (name == "e4m3")
        value = 2.0 ** (top - 1 + element.emin) * (1 + fraction / 2**element.mantissa)
        assert value == element.max
        assert math.floor(math.log2(value)) == element.emax


def test_the_command_lists_every_format_and_measures_what_is_not_tabulated() -> None:
    table = CliRunner().invoke(formats, [])
    assert table.exit_code == 0
    assert all(name in table.output for name in FORMATS)
    assert "everywhere" in table.output

    result = CliRunner().invoke(formats, ["mx9:block=32", "int4:align=16", "--row-length", "16", "--json"])
    assert result.exit_code == 0
    # one whole block of 32 for the 16 elements: 32 code bytes, the scale, 16 sub-exponent bits
    wide, rows = json.loads(result.output)["formats"]
    assert (wide["id"], wide["bits_per_element"]) == ("mx9:block=32", 8 * 35 / 16)
    assert 44 < wide["qsnr_normal_db"] < 46.5  # a wider block shares its exponent among more
    assert rows["bits_per_element"] == 8 * 16 / 16


def test_the_command_says_what_is_wrong() -> None:
    plain = CliRunner().invoke(formats, ["mx10"])
    assert plain.exit_code == 2
    assert "is not known" in plain.output
    as_json = CliRunner().invoke(formats, ["mx10", "--json"])
    assert json.loads(as_json.output)["exit_code"] == 2


def test_formats_are_listed_without_importing_torch() -> None:
    code = (
        "import sys, planner.formats_cli as f; f.formats(['--json'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
