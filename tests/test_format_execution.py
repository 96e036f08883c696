"""Models that compute in number formats, against the same arithmetic written out, FBGEMM and TorchRec."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codegen.format_globs import linears, narrow_linears, row_wise_fp8
from codegen.formats import apply_formats, formats_applied, narrow_optimizer, sites
from codegen.runtime.format_clip import clip_rows
from codegen.runtime.format_modules import (
    FormatLinear,
    Fp8RowLinear,
    FrozenLinear,
    GemmFormats,
    narrow_linear,
)
from codegen.runtime.format_tables import (
    IntegerEmbeddingBag,
    PackedEmbedding,
    PackedEmbeddingBag,
    narrow_table,
)
from codegen.runtime.mx import fake_quantize
from cost_models.formats import storage_bytes
from ir.errors import InputError
from ir.formats import parse_format
from planner.zoo import build

ROW_FORMATS = ("mx9", "mx4", "mxfp4_e2m1", "mxint8", "nvfp4", "fp8_row", "fp8_tensor", "int4", "bf16", "fp16")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def along_last(x: Tensor, format: str) -> Tensor:
    return fake_quantize(x.contiguous(), format, -1)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def small_dlrm(**options: object) -> nn.Module:
    return build(
        "dlrm",
        tables=[{"name": "a", "rows": 40, "dim": 16}, {"name": "b", "rows": 300, "dim": 16}],
        dense_features=5,
        bottom=(32, 16),
        top=(24, 1),
        device="cpu",
        **options,
    ).module


def batch_of(model: nn.Module, size: int = 64) -> tuple[Tensor, object]:
    dense, ids = model.example_inputs(size)  # type: ignore[operator]
    return torch.randn_like(dense), ids


# --- linear layers


def test_training_quantises_each_operand_along_the_axis_that_its_gemm_reduces() -> None:
    """Each GEMM with its operands transposed first and quantised along their last axis."""
    x = torch.randn(3, 7, 40, requires_grad=True)
    linear = nn.Linear(40, 20)
    layer = FormatLinear.of(linear, GemmFormats("mx4", "mx6", "mx9"))
    g = torch.randn(3, 7, 20)
    layer(x).backward(g)

    flat, rows = x.detach().reshape(21, 40), g.reshape(21, 20)
    w = linear.weight.detach()
    expected = along_last(flat, "mx6") @ along_last(w, "mx4").t() + linear.bias.detach()
    assert relative(layer(x).detach().reshape(21, 20), expected) < 1e-6
    dx = along_last(rows, "mx9") @ along_last(w.t(), "mx4").t()
    dw = along_last(rows.t(), "mx9") @ along_last(flat.t(), "mx6").t()
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert linear.bias.grad is not None
    assert relative(x.grad.reshape(21, 40), dx) < 1e-6
    assert relative(linear.weight.grad, dw) < 1e-6  # the source's own parameter has the gradient
    assert relative(linear.bias.grad, rows.sum(0)) < 1e-6
    # quantising does not commute with transposing: the other axis gives other numbers
    assert relative(along_last(w, "mx4"), along_last(w.t(), "mx4").t()) > 1e-2


def test_without_a_gradient_format_the_backward_pass_is_straight_through() -> None:
    x = torch.randn(9, 16, requires_grad=True)
    linear = nn.Linear(16, 8, bias=False)
    FormatLinear.of(linear, GemmFormats("mx4", "mx6"))(x).square().sum().backward()
    mine = [x.grad, linear.weight.grad]
    x.grad = linear.weight.grad = None
    # the identity trick: x + (Q(x) - x).detach() has the value of Q(x) and the gradient of x
    w = linear.weight
    wide_x = x + (along_last(x.detach(), "mx6") - x.detach())
    wide_w = w + (along_last(w.detach(), "mx4") - w.detach())
    (wide_x @ wide_w.t()).square().sum().backward()
    for one, other in zip(mine, (x.grad, linear.weight.grad), strict=True):
        assert one is not None
        assert other is not None
        assert relative(one, other) < 1e-6


def test_fp32_everywhere_is_the_layer_itself() -> None:
    linear = nn.Linear(12, 5)
    x = torch.randn(4, 12)
    for training in (True, False):
        assert torch.equal(
            narrow_linear(linear, GemmFormats(gradient="fp32"), training=training)(x), linear(x)
        )


def test_row_wise_fp8_is_the_product_of_rounded_operands_and_stores_bytes() -> None:
    linear = nn.Linear(64, 48)
    x = torch.randn(10, 64)
    made = narrow_linear(linear, GemmFormats("fp8_row", "fp8_row"), training=False)
    assert isinstance(made, Fp8RowLinear)
    # scale = max / 448 for each row, values cast by torch's own float8 type
    scale_x, scale_w = x.abs().amax(1, keepdim=True) / 448, linear.weight.abs().amax(1, keepdim=True) / 448
    low_x = (x / scale_x).to(torch.float8_e4m3fn).float() * scale_x
    low_w = (linear.weight / scale_w).to(torch.float8_e4m3fn).float() * scale_w
    assert relative(made(x), (low_x @ low_w.t() + linear.bias).detach()) < 1e-5
    assert made.codes.element_size() == 1


def test_the_scale_bound_clips_outliers_and_saves_the_rest_of_the_row() -> None:
    layer = nn.Linear(32, 16, bias=False)
    x = torch.rand(1, 32) * 10
    x[0, 3] = 1e8
    wide, bounded = (
        narrow_linear(layer, GemmFormats("fp8_row", f"fp8_row{option}"), training=False)
        for option in ("", ":bound=1200")
    )
    layer.weight.data[:, 3] = 0  # what the outlier itself would add
    for made in (wide, bounded):
        made.codes[:, 3] = 0  # type: ignore[index, operator]
    exact = layer(x)
    assert relative(bounded(x), exact) < 0.05
    assert relative(wide(x), exact) > 0.9  # without a bound all else is rounded to zero


def test_widths_that_scaled_mm_does_not_take_are_emulated() -> None:
    linear = nn.Linear(20, 7)
    made = narrow_linear(linear, GemmFormats("fp8_row", "fp8_row"), training=False)
    assert isinstance(made, FrozenLinear)
    with pytest.raises(InputError, match="multiples of 16"):
        Fp8RowLinear(linear, parse_format("fp8_row"), parse_format("fp8_row"))


# --- tables


@pytest.mark.parametrize("format", ROW_FORMATS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_reads_the_rounded_table(format: str, mode: str) -> None:
    bag = nn.EmbeddingBag(50, 20, mode=mode, padding_idx=None if mode == "max" else 7)
    ids, offsets = torch.randint(0, 50, (60,)), torch.tensor([0, 5, 5, 30])
    weights = torch.rand(60) if mode == "sum" else None
    whole = copy.deepcopy(bag)
    # nvfp4 and fp8_tensor scale by the largest value read, so read every row
    ids[:50] = torch.arange(50)
    whole.weight.data = fake_quantize(bag.weight.detach(), format, -1)
    expected = whole(ids, offsets, weights)
    for training in (True, False):
        made = narrow_table(bag, format, training=training)
        assert relative(made(ids, offsets, weights), expected) < 1e-6
    narrow = narrow_table(bag, format, training=True)
    pull = torch.randn_like(expected)
    if mode != "max":  # another row may be the largest
        narrow(ids, offsets, weights).backward(pull)
        mine = bag.weight.grad
        bag.weight.grad = None
        bag(ids, offsets, weights).backward(pull)
        assert mine is not None
        assert torch.allclose(mine, bag.weight.grad)


@pytest.mark.parametrize("format", ROW_FORMATS)
def test_a_packed_table_takes_its_storage_bytes(format: str) -> None:
    table = nn.Embedding(30, 48)
    made = narrow_table(table, format, training=False)
    assert isinstance(made, PackedEmbedding)
    assert made.nbytes == storage_bytes(format, (30, 48))
    ids = torch.tensor([[3, 3, 0], [29, 1, 2]])
    assert torch.equal(made(ids), fake_quantize(table.weight.detach(), format, -1)[ids])


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int4", 4), ("int2", 2)])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_integer_bags_are_fbgemms(format: str, bits: int, mode: str) -> None:
    pytest.importorskip("fbgemm_gpu")
    bag = nn.EmbeddingBag(100, 24, mode=mode)
    made = narrow_table(bag, format, training=False)
    assert isinstance(made, IntegerEmbeddingBag)
    rows = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(bag.weight.detach(), bits)
    stored = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, bits)
    ids, offsets = torch.randint(0, 100, (70,)), torch.tensor([0, 0, 12, 40])
    assert torch.allclose(made(ids, offsets), F.embedding_bag(ids, stored, offsets, mode=mode), atol=1e-6)
    square = ids.reshape(10, 7)
    assert torch.allclose(made(square), F.embedding_bag(square, stored, mode=mode), atol=1e-6)


def test_integer_tables_equal_torchrecs_quantised_collection() -> None:
    torchrec = pytest.importorskip("torchrec")
    from torchrec.inference.modules import quantize_embeddings

    model = small_dlrm()
    _, ids = batch_of(model)
    theirs = quantize_embeddings(
        torch.nn.Sequential(copy.deepcopy(model.ebc)),  # type: ignore[arg-type]
        torch.int8,
        inplace=True,
        per_table_weight_dtype={"a": torch.quint4x2, "b": torch.int8},
    )(ids)
    assert isinstance(theirs, torchrec.KeyedTensor)
    ours = apply_formats(model, {"a": "int4", "b": "int8"}, training=False).ebc(ids)  # type: ignore[operator]
    for feature in model.features:  # type: ignore[union-attr]
        assert torch.allclose(ours[feature], theirs[feature], atol=1e-6)


def test_tables_that_change_as_they_are_read_are_refused() -> None:
    with pytest.raises(InputError, match="max_norm"):
        narrow_table(nn.EmbeddingBag(4, 4, max_norm=1.0), "mx9", training=True)
    with pytest.raises(InputError, match="along its columns"):
        narrow_table(nn.Embedding(4, 4), "mx9:axis=0", training=False)
    with pytest.raises(InputError, match="not a table"):
        narrow_table(nn.Linear(4, 4), "mx9", training=False)


# --- clipping


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    ),
    format=st.sampled_from(["int8", "int4", "int2", "int8_fused"]),
)
def test_clipping_never_raises_the_error_of_a_row(rows: list[list[float]], format: str) -> None:
    x = torch.tensor(rows)
    plain = (fake_quantize(x, format) - x).square().sum(-1)
    clipped = (fake_quantize(clip_rows(x, format), format) - x).square().sum(-1)
    assert bool((clipped <= plain * (1 + 1e-6)).all())


def test_clipping_gains_what_outliers_cost() -> None:
    """One outlier in 64 normal values: 4-bit steps follow the rest; a grid search is no better by much."""
    x = torch.randn(200, 64)
    x[:, 0] = 6.0
    error = (fake_quantize(clip_rows(x, "int4"), "int4") - x).square().sum(-1)
    plain = (fake_quantize(x, "int4") - x).square().sum(-1)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    span = high - low
    grid = torch.stack(
        [
            (fake_quantize(x.clamp(low + i / 100 * span, high - j / 100 * span), "int4") - x).square().sum(-1)
            for i in range(0, 17)
            for j in range(0, 17 - i)
        ]
    ).amin(0)
    assert error.mean() < plain.mean()
    assert error.mean() < grid.mean() * 1.05
    with pytest.raises(InputError, match="integer formats"):
        clip_rows(x, "mx9")


# --- whole models


def test_applying_formats_copies_the_model_and_keeps_its_parameter_names() -> None:
    model = small_dlrm()
    dense, ids = batch_of(model)
    before = model(dense, ids)
    chosen = {
        "a": "mx6",
        "b": "mx9",
        "bottom_0.weight": "mx6",
        "bottom_0.input": "mx6",
        "top_0.weight": "mx9",
    }
    made = apply_formats(model, chosen, training=True)
    assert made.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(model(dense, ids), before)
    after = made(dense, ids)
    assert not torch.equal(after, before)
    assert relative(after, before) < 0.1
    frozen = apply_formats(model, chosen, training=False)
    assert torch.allclose(frozen(dense, ids), after, atol=1e-6)
    with formats_applied(model, chosen, sites(model)):
        assert torch.equal(model(dense, ids), after)
    assert torch.equal(model(dense, ids), before)
    assert not isinstance(model.get_submodule("bottom.0"), FormatLinear)


def test_the_wire_rounds_pooled_rows_and_their_gradients() -> None:
    model = small_dlrm(embeddings="plain")
    dense, ids = batch_of(model)
    bag = model.get_submodule("ebc.bags.b")
    rows: list[Tensor] = []
    apply_formats(model, {"traffic.forward": "mx4", "traffic.backward": "mx6"}, training=True, inplace=True)
    bag.register_forward_hook(lambda _, __, output: rows.append(output))
    model(dense, ids).sum().backward()
    assert torch.equal(rows[0], fake_quantize(rows[0], "mx4"))  # already on the grid
    assert isinstance(bag.weight.grad, Tensor)
    assert bag.weight.grad.abs().sum() > 0


def test_optimizer_state_is_rounded_after_every_step() -> None:
    model = small_dlrm()
    dense, ids = batch_of(model)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    known = sites(model)
    narrow_optimizer(optimizer, model, {"b.state": "bf16", "a": "mx9"}, known)
    model(dense, ids).square().sum().backward()
    optimizer.step()
    state = {name: optimizer.state[parameter]["sum"] for name, parameter in model.named_parameters()}
    b, a = state["ebc.embedding_bags.b.weight"], state["ebc.embedding_bags.a.weight"]
    assert b.abs().sum() > 0
    assert torch.equal(b, b.bfloat16().float())
    assert not torch.equal(a, a.bfloat16().float())


def test_names_that_the_model_lacks_are_refused() -> None:
    model = small_dlrm()
    with pytest.raises(InputError, match="no tensor 'c'"):
        apply_formats(model, {"c": "mx9"}, training=True)
    with pytest.raises(InputError, match=r"no tensor 'bottom_0\.bias'"):
        apply_formats(model, {"bottom_0.bias": "mx9"}, training=True)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_two_uses_of_one_layer_must_agree() -> None:
    model = Shared()
    names = [name for name, site in sites(model).items() if site.kind == "weight"]
    assert len(names) == 2
    with pytest.raises(InputError, match="used twice"):
        apply_formats(model, dict(zip(names, ("mx9", "mx6"), strict=True)), training=True)
    made = apply_formats(model, dict.fromkeys(names, "mx6"), training=True)
    assert isinstance(made.layer, FormatLinear)


# --- by glob, as Llama 3 does


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(32, 32, bias=False)
        self.feed_forward = nn.ModuleDict({"w1": nn.Linear(32, 64), "w2": nn.Linear(64, 32)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward["w2"](F.silu(self.feed_forward["w1"](x)))


def test_feed_forward_layers_but_the_first_and_last_become_fp8() -> None:
    model = nn.ModuleDict({"layers": nn.Sequential(*(Block() for _ in range(12)))})
    made = row_wise_fp8(model)
    narrow = {path for path, module in made.named_modules() if isinstance(module, Fp8RowLinear)}
    assert narrow == {f"layers.{i}.feed_forward.w{j}" for i in range(1, 11) for j in (1, 2)}
    x = torch.randn(3, 5, 32)
    exact = model["layers"](x)
    error = relative(made["layers"](x), exact)  # type: ignore[index]
    assert 1e-4 < error < 0.05
    tail = linears(model, ["*attention"], wide_last=10)
    assert tail == ("layers.0.attention", "layers.1.attention")  # by number: 10 and 11 come after 9


def test_globs_that_leave_nothing_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(InputError, match="no linear layer"):
        row_wise_fp8(model)
    with pytest.raises(InputError, match="stay wide"):
        row_wise_fp8(model, ["*"])
    made = narrow_linears(model, GemmFormats("mx9", "mx9", "mx9"), ["*"], wide_first=1, training=True)
    assert isinstance(made.get_submodule("1"), FormatLinear)
    assert not isinstance(made.get_submodule("0"), FormatLinear)


def test_packed_bags_serve_rows_that_no_kernel_reads() -> None:
    assert isinstance(narrow_table(nn.EmbeddingBag(9, 8), "mx6", training=False), PackedEmbeddingBag)
