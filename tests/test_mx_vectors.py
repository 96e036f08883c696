"""The shared conformance vectors: an exact reference and five other libraries, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from codegen.runtime import mx_native
from codegen.runtime.mx import fake_quantize, pack, quantize
from codegen.runtime.mx_elements import decode_table, encode, round_to_grid
from ir.formats import ELEMENTS, OCP_FORMATS

VECTORS = Path(__file__).parent / "data" / "vectors"
INPUTS = np.load(VECTORS / "mx_inputs.npz")
X = torch.from_numpy(INPUTS["x"].copy())


def vectors(name: str) -> dict[str, np.ndarray]:
    file = "bdr_" + name if name in ("mx9", "mx6", "mx4") else name.replace("mx", "mx_", 1)
    return dict(np.load(VECTORS / f"{file}.npz"))


def same_bits(a: torch.Tensor | np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, the signs of zeros included; NaNs of any kind are equal."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


@pytest.fixture(params=["as installed", "torch path"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the compiled kernels, where there is a compiler, and without."""
    if request.param == "torch path":
        monkeypatch.setattr(mx_native, "usable", lambda x, format: False)


@pytest.mark.parametrize("name", [*OCP_FORMATS, "mx9", "mx6", "mx4"])
def test_values_equal_the_exact_reference_everywhere(name: str) -> None:
    data = vectors(name)
    expected = data["ref_floor_dq"] if name in OCP_FORMATS else data["ref_dq"]
    assert same_bits(fake_quantize(X, name), expected)


@pytest.mark.parametrize("mode", ["floor", "even", "rceil", "ceil"])
@pytest.mark.parametrize("name", OCP_FORMATS)
def test_scales_and_codes_equal_the_exact_reference_in_every_scale_mode(name: str, mode: str) -> None:
    data, q = vectors(name), quantize(X, f"{name}:{mode}")
    assert np.array_equal(q.scales, data[f"ref_{mode}_scale"])
    assert np.array_equal(q.codes, data[f"ref_{mode}_code"])


@pytest.mark.parametrize("name", ["mx9", "mx6", "mx4"])
def test_bdr_exponents_shifts_and_codes_equal_the_exact_reference(name: str) -> None:
    data, q = vectors(name), quantize(X, name)
    finite = np.isfinite(INPUTS["x"]).reshape(-1, 2, 16).all(-1)
    assert np.array_equal(q.scales.numpy().astype(int)[finite] - 127, data["ref_E"][finite])
    assert (q.scales.numpy()[~finite] == 255).all()
    assert np.array_equal(q.shifts.numpy()[finite], data["ref_shift"][finite])
    m = q.format.element.bits - 1
    codes = q.codes.numpy().astype(int)
    signed = np.where(codes >> m, -(codes & (2**m - 1)), codes)
    assert np.array_equal(signed, data["ref_code"])


def peers(name: str) -> list[str]:
    keys = {"mx9": ["quark_dq", "tensorcast_dq"], "mxint8": ["microxcaling_even_dq", "tensorcast_dq"]}
    if name in ("mx6", "mx4"):
        return keys["mx9"]
    return keys.get(name, ["microxcaling_even_dq", "torchao_floor_dq"])


@pytest.mark.parametrize("name", [*OCP_FORMATS, "mx9", "mx6", "mx4"])
def test_values_equal_two_other_libraries_wherever_those_agree(name: str) -> None:
    data = vectors(name)
    agree = np.unpackbits(data["all_agree"], axis=1).astype(bool)[:, :32]
    ours = fake_quantize(X, name).numpy()
    for peer in peers(name):
        theirs = data[peer]
        equal = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        assert equal[agree].all(), peer
    assert agree.mean() > 0.9  # the reference's own figure: 92 to 96 % by format


@pytest.mark.parametrize("name", OCP_FORMATS)
def test_ties_away_from_zero_equal_microxcaling_nearest_on_ordinary_data(name: str) -> None:
    data = vectors(name)
    names = list(INPUTS["category_names"])
    plain = {names.index(n) for n in ("gauss", "emb_uniform", "student_t3", "saturation_band", "onehot")}
    ties = {i for i, n in enumerate(names) if n.startswith("grid_ties")}
    rows = np.isin(INPUTS["category"], list(plain | ties))
    # microxcaling takes floor(log2) in float32, wrong within a few ulp below a power of two: those rows
    # are the ones where its ties-to-even result differs from the exact one as well
    sound = (data["microxcaling_even_dq"] == data["ref_floor_dq"]).all(-1)
    rows &= sound
    assert rows.sum() > 200
    ours = fake_quantize(X[rows], f"{name}:away").numpy()
    assert np.array_equal(ours, data["microxcaling_nearest_dq"][rows])
    assert not np.array_equal(ours, fake_quantize(X[rows], name).numpy()), "ties must occur in the data"


@pytest.mark.parametrize("mode", ["floor", "even", "rceil", "ceil"])
@pytest.mark.parametrize("name", [n for n in OCP_FORMATS if n != "mxint8"])
def test_scales_equal_torchao_but_for_its_documented_deviations(name: str, mode: str) -> None:
    """torchao gives infinities a finite scale; all else is equal in each of its modes."""
    finite = np.isfinite(INPUTS["x"]).all(-1)
    q = quantize(X, f"{name}:{mode}")
    assert np.array_equal(q.scales.numpy()[finite], vectors(name)[f"torchao_{mode}_scale"][finite])


NAMES = {"e4m3": "fp8_e4m3", "e5m2": "fp8_e5m2", "e3m2": "fp6_e3m2", "e2m3": "fp6_e2m3", "e2m1": "fp4_e2m1"}
TABLES = np.load(VECTORS / "elem_tables.npz")


@pytest.mark.parametrize("element", NAMES)
def test_every_code_decodes_as_in_ml_dtypes_and_encodes_back(element: str) -> None:
    table = decode_table(ELEMENTS[element])
    assert same_bits(table, TABLES[f"decode_{NAMES[element]}"])
    finite = torch.isfinite(table)
    codes = torch.arange(len(table), dtype=torch.uint8)
    assert torch.equal(encode(table[finite], ELEMENTS[element]), codes[finite])


@pytest.mark.parametrize("element", NAMES)
def test_element_casts_equal_ml_dtypes_up_to_saturation(element: str) -> None:
    values = TABLES["cast_in"]
    spec = ELEMENTS[element]
    # ml_dtypes turns FP8 overflow into NaN or infinity, where the OCP block formats saturate
    inside = np.isfinite(values) & (np.abs(values) <= spec.max)
    x = torch.from_numpy(values[inside])
    grid = round_to_grid(x.abs(), spec).copysign(x)
    assert np.array_equal(encode(grid, spec), TABLES[f"cast_mldtypes_{NAMES[element]}"][inside])


FBGEMM = np.load(VECTORS / "fbgemm_rowwise.npz")
ROWS = torch.from_numpy(FBGEMM["x"].copy())


@pytest.mark.parametrize(
    ("name", "key"), [("int8_fused", "fused8"), ("int8", "nbit8"), ("int4", "nbit4"), ("int2", "nbit2")]
)
def test_integer_rows_are_the_bytes_fbgemm_stores(name: str, key: str) -> None:
    assert np.array_equal(pack(quantize(ROWS, name)).data, FBGEMM[f"{key}_bytes"])
    if key != "nbit8":  # FBGEMM has no CPU kernel to read its 8-bit rows with half-precision scales
        assert same_bits(fake_quantize(ROWS, name), FBGEMM[f"{key}_dq"])


@pytest.mark.parametrize("mode", ["even", "ceil"])
def test_fbgemm_mx4_is_mxfp4_with_ties_away_from_zero(mode: str) -> None:
    """FBGEMM's rows hold, per 32 elements, 16 bytes of codes and the scale byte."""
    expected = FBGEMM[f"mx4_{mode}_bytes"].reshape(len(ROWS), 2, 17)
    packed = pack(quantize(ROWS, f"mxfp4_e2m1:{mode}:away"))
    assert np.array_equal(packed.scales, expected[..., 16])
    assert np.array_equal(packed.data, expected[..., :16])
