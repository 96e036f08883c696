"""Sensitivities against whole tensors, against losses measured on a trained model, and against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegen.formats import apply_formats
from codegen.runtime.mx import fake_quantize
from cost_models.formats import qsnr_normal
from ir.errors import InputError
from ir.format_plan import FormatRequest, Sensitivity
from ir.reading import dump_record, parse_record
from planner.sensitivity import from_losses, from_weights, measure, predict, row_popularity
from planner.sensitivity_fisher import from_gradients
from planner.zoo import build

FORMATS = ("mx9", "mx6", "mx4", "int8", "int4", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4_e2m1")
ROWS = {"user": 300, "item": 500}


def make_model() -> nn.Module:
    return build(
        "dlrm",
        tables=[{"name": name, "rows": rows, "dim": 16} for name, rows in ROWS.items()],
        dense_features=4,
        bottom=(32, 16),
        top=(32, 1),
        embeddings="plain",
        device="cpu",
    ).module


def make_batches(count: int, size: int, seed: int) -> list[Any]:
    """Clicks of a teacher: a product of hidden user and item factors and a term of the dense features."""
    random = np.random.default_rng(seed)
    taste = np.random.default_rng(99)
    users, items = taste.normal(size=(300, 4)), taste.normal(size=(500, 4))
    found = []
    for _ in range(count):
        # popular rows come often: Zipf-like
        user, item = ((random.random(size) ** 2 * n).astype(np.int64) for n in (300, 500))
        dense = random.normal(size=(size, 4)).astype(np.float32)
        logit = (users[user] * items[item]).sum(1) + dense[:, 0] * dense[:, 1]
        label = (random.random(size) < 1 / (1 + np.exp(-logit))).astype(np.float32)
        starts = torch.arange(size)
        ids = {"user": (torch.from_numpy(user), starts), "item": (torch.from_numpy(item), starts)}
        found.append((torch.from_numpy(dense), ids, torch.from_numpy(label)))
    return found


def loss(model: nn.Module, batch: Any) -> Tensor:
    dense, ids, label = batch
    return F.binary_cross_entropy_with_logits(model(dense, ids), label)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    for batch in make_batches(120, 512, 1):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def batches() -> list[Any]:
    return make_batches(8, 1024, 2)


@pytest.fixture(scope="module")
def measured(trained: nn.Module, batches: list[Any]) -> Sensitivity:
    return from_losses(trained, batches, loss, FORMATS)


def test_all_rows_give_the_error_of_the_whole_weight(trained: nn.Module) -> None:
    found = from_weights(trained, FORMATS)
    for name, weight in (
        ("ebc.bags.user", trained.get_parameter("ebc.bags.user.weight")),
        ("bottom_0.weight", trained.get_parameter("bottom.0.weight")),
    ):
        values = weight.detach().double()
        for format in FORMATS:
            noise = fake_quantize(weight.detach(), format).double() - values
            change = found.tensors[name][format]
            assert change.mean == pytest.approx(float(noise.square().sum() / values.square().sum()), rel=1e-9)
            assert change.stderr == 0
    # activations are unknown without data: as normal
    assert found.tensors["top_0.input"]["mx6"].mean == pytest.approx(10 ** (-qsnr_normal("mx6") / 10))  # type: ignore[operator]


@pytest.mark.parametrize("format", ["mx4", "int4", "fp8_tensor", "nvfp4"])
def test_sampled_rows_cover_the_truth_as_often_as_they_say(format: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 1500))
    # rows of different spread and tails, so that rows do not all count alike
    model[0].weight.data = torch.randn(1500, 64) * torch.rand(1500, 1) * torch.randn(1500, 64).abs()
    truth = from_weights(model, [format], elements=10**9).tensors[_only(model)]
    inside, runs = 0, 40
    for seed in range(runs):
        change = from_weights(model, [format], elements=64 * 200, seed=seed).tensors[_only(model)][format]
        assert change.stderr > 0
        inside += abs(change.mean - truth[format].mean) <= 2 * change.stderr
    assert inside >= 0.85 * runs  # 95 % nominal; P(fewer than 34 of 40) = 0.3 %


def _only(model: nn.Module) -> str:
    names = [name for name in from_weights(model, ["mx9"]).tensors if name.endswith(".weight")]
    assert len(names) == 1
    return names[0]


def test_rows_count_as_often_as_they_are_read(trained: nn.Module, batches: list[Any]) -> None:
    popularity = row_popularity(trained, batches, lambda model, batch: model(batch[0], batch[1]))
    for name, rows in ROWS.items():
        ids = np.concatenate([batch[1][name][0].numpy() for batch in batches])
        assert popularity[f"ebc.bags.{name}"].tolist() == np.bincount(ids, minlength=rows).tolist()

    model = make_model()
    weight = model.get_parameter("ebc.bags.user.weight")
    with torch.no_grad():
        weight[:150] = weight[:150].sign()  # exact in every format
    hot, cold = torch.zeros(300), torch.zeros(300)
    hot[:150], cold[150:] = 1, 1
    errors = [
        from_weights(model, ["mx4"], popularity={"ebc.bags.user": counts})
        .tensors["ebc.bags.user"]["mx4"]
        .mean
        for counts in (hot, cold)
    ]
    assert errors[0] == 0
    # as many draws as rows, with replacement: still a sample
    drawn = from_weights(model, ["mx4"], popularity={"ebc.bags.user": cold}, elements=300 * 16 // 4)
    assert drawn.tensors["ebc.bags.user"]["mx4"].stderr > 0
    assert drawn.tensors["ebc.bags.item"]["mx4"].stderr > 0
    values = weight.detach()[150:].double()
    truth = (
        fake_quantize(weight.detach()[150:], "mx4").double() - values
    ).square().sum() / values.square().sum()
    assert errors[1] == pytest.approx(float(truth), rel=0.05)


def test_one_tensor_at_a_time_is_what_the_model_loses(
    trained: nn.Module, batches: list[Any], measured: Sensitivity
) -> None:
    for name, format in (("ebc.bags.item", "mx4"), ("top_0.input", "int4"), ("bottom_0.weight", "mx6")):
        narrow = apply_formats(trained, {name: format}, training=False)
        with torch.no_grad():
            change = [float(loss(narrow, b)) - float(loss(trained, b)) for b in batches]
        found = measured.tensors[name][format]
        assert found.mean == pytest.approx(np.mean(change), abs=2e-6)
        assert found.stderr == pytest.approx(np.std(change, ddof=1) / len(change) ** 0.5, abs=1e-6)


def test_losses_of_single_tensors_add_up(
    trained: nn.Module, batches: list[Any], measured: Sensitivity
) -> None:
    """The additive model against the measured loss of mixed plans with every tensor narrow."""
    random = np.random.default_rng(0)
    predicted, truth = [], []
    for _ in range(12):
        chosen = {name: str(random.choice(FORMATS[1:])) for name in measured.tensors}
        predicted.append(predict(measured, chosen).mean)
        truth.append(measure(trained, batches, loss, chosen).mean)
    assert np.corrcoef(predicted, truth)[0, 1] > 0.95
    assert np.sum(np.abs(np.subtract(predicted, truth))) < 0.25 * np.sum(np.abs(truth))


def test_one_backward_pass_tells_what_losses_tell(
    trained: nn.Module, batches: list[Any], measured: Sensitivity
) -> None:
    kept = [None if p.grad is None else p.grad.clone() for p in trained.parameters()]
    gradients = from_gradients(trained, batches, loss, FORMATS)
    pairs = np.array(
        [
            (measured.tensors[name][format].mean, gradients.tensors[name][format].mean)
            for name in measured.tensors
            for format in FORMATS
        ]
    )
    assert len(pairs) == len(FORMATS) * 10
    assert np.corrcoef(pairs.T)[0, 1] > 0.98
    assert pairs[:, 1].sum() == pytest.approx(pairs[:, 0].sum(), rel=0.15)
    curved = from_gradients(trained, batches, loss, ["mx4"], slope=False).tensors
    assert all(change["mx4"].mean >= 0 for change in curved.values())
    for before, parameter in zip(kept, trained.parameters(), strict=True):
        assert (before is None) == (parameter.grad is None)
        assert before is None or torch.equal(before, parameter.grad)


def test_the_second_order_is_exact_where_the_loss_is_quadratic_in_one_sample() -> None:
    """For the loss (y - t)^2 / 2 with residual r, the first order is r dy; Fisher gives (r dy)^2 / 2."""
    model = nn.Sequential(nn.Linear(16, 1, bias=False))
    x, target = torch.randn(8, 16), torch.randn(8, 1)

    def half_square(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean() / 2

    halves = [(x[:4], target[:4]), (x[4:], target[4:])]
    name = _only(model)
    found = from_gradients(model, halves, half_square, ["mx4"], tensors=[name]).tensors[name]["mx4"]
    weight = model[0].weight.detach()
    change = (x @ (fake_quantize(weight, "mx4") - weight).t()).double()
    residual = (x @ weight.t() - target).double()
    assert found.mean == pytest.approx(
        float((residual * change + (residual * change) ** 2 / 2).mean()), rel=1e-5
    )


def test_a_sensitivity_travels_inside_a_request(measured: Sensitivity) -> None:
    request = FormatRequest(average_bits=6.0, sensitivity=measured)
    assert parse_record(FormatRequest, dump_record(request), "request") == request


def test_bad_input_is_named(trained: nn.Module, batches: list[Any], measured: Sensitivity) -> None:
    with pytest.raises(InputError, match="two batches"):
        from_losses(trained, batches[:1], loss, ["mx9"])
    with pytest.raises(InputError, match=r"did you mean 'ebc\.bags\.item'"):
        from_losses(trained, batches, loss, ["mx9"], tensors=["ebc.bags.itme"])
    with pytest.raises(InputError, match="at least one id"):
        from_weights(trained, [])
    with pytest.raises(InputError, match="300 counts"):
        from_weights(trained, ["mx9"], popularity={"ebc.bags.user": [1, 2]})
    with pytest.raises(InputError, match="was not measured"):
        predict(measured, {"ebc.bags.item": "int2"})
    with pytest.raises(InputError, match="from_losses"):
        from_gradients(trained, batches, loss, ["mx9"], tensors=["traffic.forward"])
    broken = make_model()
    broken.get_parameter("ebc.bags.user.weight").data[3, 3] = float("nan")
    with pytest.raises(InputError, match=r"'ebc\.bags\.user' has weights that are not finite"):
        from_weights(broken, ["mx9"])
    with pytest.raises(InputError, match="not finite"):
        from_losses(broken, make_batches(2, 512, 0), loss, ["mx9"])
