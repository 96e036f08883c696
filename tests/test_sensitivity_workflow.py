"""The low-precision workflow and the command, on a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from codegen.formats import apply_formats
from ir.errors import InputError
from ir.format_plan import Sensitivity
from ir.reading import parse_record
from planner.low_precision import format_report, low_precision
from planner.sensitivity_cli import sensitivity

SOURCE = Path(__file__)


class Net(nn.Module):
    """A table and three layers, of which the middle one has one output a hundred times as large as the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(200, 16, mode="sum")
        self.bottom = nn.Linear(16, 32)
        self.middle = nn.Linear(32, 32)
        self.odd = nn.Linear(32, 32)
        self.top = nn.Linear(32, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.silu(self.bottom(self.table(ids)))
        x = F.silu(self.odd(F.silu(self.middle(x))))
        return self.top(x).squeeze(-1)

    def example_inputs(self, batch: int) -> tuple[Tensor]:
        return (torch.zeros(batch, 3, dtype=torch.int64),)


def trained() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        # within a row of int8 weights one of 30 takes all resolution; the layer matters, as its bias is small
        model.odd.weight[:, 0] = 60.0
        model.middle.weight[0] = 0.0
        model.middle.bias[0] = 0.0
    return model


def data() -> tuple[list[tuple[Tensor, Tensor]], object]:
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 200, (256, 3), generator=random) for _ in range(4)]
    model = trained()
    with torch.no_grad():
        batches = [(i, model(i).sigmoid()) for i in ids]  # its own labels: any change is for the worse
    return batches, loss


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def test_layers_are_ranked_by_the_error_of_what_they_return() -> None:
    model, (batches, _) = trained(), data()
    names = ("middle", "odd")
    chosen = {"table": "int4"} | {f"{n}.{part}": "int8" for n in names for part in ("weight", "input")}
    report = format_report(model, batches, loss, chosen, clip=False)
    assert report.layers[0].path == "odd"
    assert [layer.qsnr for layer in report.layers] == sorted(layer.qsnr for layer in report.layers)
    # the table alone, by hand
    narrow = apply_formats(model, {"table": "int4"}, training=False)
    with torch.no_grad():
        wide = torch.cat([model.table(ids) for ids, _ in batches]).double()
        noise = torch.cat([narrow.table(ids) for ids, _ in batches]).double() - wide  # type: ignore[operator]
        both = apply_formats(model, chosen, training=False)
        drift = [float(loss(both, b) - loss(model, b)) for b in batches]
        mean = sum(float(loss(model, b)) for b in batches) / 4
    table = next(layer for layer in report.layers if layer.path == "table")
    assert table.qsnr == pytest.approx(
        10 * float(torch.log10(wide.square().sum() / noise.square().sum())), abs=1e-3
    )
    assert report.drift.mean == pytest.approx(sum(drift) / 4 / mean, abs=1e-6)
    assert report.wide_loss == pytest.approx(mean)


def test_the_workflow_leaves_ends_and_the_worst_layer_wide() -> None:
    model, (batches, _) = trained(), data()
    everything, loose = low_precision(model, batches, loss, tables="int8", max_drift=10.0)
    gemms = {f"{name}.{part}" for name in ("middle", "odd") for part in ("weight", "input")}
    assert set(everything) == {"table", *gemms}  # first and last wide by rule
    assert loose.drift.mean > 0
    chosen, report = low_precision(model, batches, loss, tables="int8", max_drift=loose.drift.mean / 2)
    assert set(chosen) == {"table", "middle.weight", "middle.input"}  # odd by its error
    assert 0 <= report.drift.mean <= loose.drift.mean / 2
    with pytest.raises(InputError, match="max_drift"):
        low_precision(model, batches, loss, max_drift=0.0)


def test_the_command_writes_what_a_request_reads(tmp_path: Path) -> None:
    runner, model, given = CliRunner(), f"{SOURCE}:trained", f"{SOURCE}:data"
    out = tmp_path / "s.json"
    for method, kind in (("weights", "qsnr"), ("gradients", "fisher"), ("losses", "loss change")):
        done = runner.invoke(
            sensitivity, [model, "--data", given, "--method", method, "--format", "mx4", "-o", str(out)]
        )
        assert done.exit_code == 0, done.output
        found = parse_record(Sensitivity, json.loads(out.read_text()), "file")
        assert found.method == kind
        assert {"table", "odd.weight", "odd.input"} <= set(found.tensors)
        assert "odd.weight: mx4" in done.output
    done = runner.invoke(sensitivity, [model, "--data", given, "--low-precision", "--json"])
    assert done.exit_code == 0, done.output
    assert "table" in json.loads(done.output)["formats"]
    for arguments in (
        ["dlrm"],
        [model, "--method", "losses"],
        [model, "--low-precision"],
        [model, "--format", "mx10"],
    ):
        done = runner.invoke(sensitivity, arguments)
        assert done.exit_code == 2, arguments
        assert "error:" in done.output
