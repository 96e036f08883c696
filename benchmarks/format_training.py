"""DLRM on MovieLens-100K in number formats: trained in them, and served in them after training in fp32.

    python benchmarks/format_training.py [--quick] [--json] [--plot FILE.svg]

Plans at an average of 9, 8, 6 and 4 stored bits over tables and GEMM weights come from ``planner.compile`` with
sensitivities measured on training batches; activations take the format of the weights they meet. Each is
compared with every uniform format that needs as many bits or fewer, on the same seeds and batches.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a file: make the project importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import planner
from benchmarks._format_rivals import Group, greedy, integer_program, modelopt_scores
from benchmarks._report import Report
from benchmarks._svg import Point, line_chart
from codegen.formats import Site, apply_formats, narrow_modules, sites
from cost_models.formats import bits_per_element
from examples import _movielens as movielens
from ir.constraints import Constraints
from ir.format_plan import FormatRequest, Sensitivity
from planner.sensitivity import from_losses, mean_of, predict

BATCH, RATE, EPS = 512, 0.02, 1e-3  # those of examples/train_movielens.py
UNIFORM = ("mx9", "mx6", "mx4", "int8", "int4", "int2")
BITS = {9: "mx9", 8: None, 6: "mx6", 4: "mx4"}  # the uniform format that needs exactly as many, if any
GRADIENT = "mx9"  # BDR, arXiv 2302.08007, section 6: MX9 trains without a change of recipe
RESOLUTION = (
    1e-4  # of both metrics: what two runs of one training must agree to in examples/train_movielens.py
)
VALIDATION = 9000  # training ratings kept from training, for sensitivities: a tenth


@dataclass(frozen=True)
class Setting:
    """How much to run."""

    seeds: int
    epochs: int
    limit: int | None  # training samples of an epoch
    train_bits: Sequence[int]
    serve_bits: Sequence[int]
    true_labels: bool = False


@dataclass(frozen=True)
class Score:
    """A model on the held-out ratings."""

    auc: float
    log_loss: float


class Task:
    """The data, collated once, and what is done with it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.data = movielens.load()
        self.held_out = self.data.batch(np.arange(self.data.train, len(self.data)))
        shuffled = np.random.default_rng(0).permutation(self.data.train)
        self.trained_on = np.sort(shuffled[VALIDATION:])
        self.validation = [self.data.batch(part) for part in np.array_split(shuffled[:VALIDATION], 18)]
        self.known: dict[str, Site] = sites(self.build(0))
        model = self.build(0)
        self.shapes = {  # parameters (a bias counts with its weight), and the length of a row
            name: (sum(p.numel() for p in module.parameters()), module.get_parameter("weight").shape[1])
            for name, site in self.known.items()
            if site.kind in ("table", "weight")
            for module in (model.get_submodule(site.path),)
        }

    def build(self, seed: int) -> nn.Module:
        """The model as a seed draws it."""
        torch.manual_seed(seed)
        model: nn.Module = movielens.build(self.data.rows, self.data.dense.shape[1])
        return model

    def batches(self, seed: int) -> list[Any]:
        """The training batches of a seed, in order."""
        random = np.random.default_rng(seed)
        found = []
        for _ in range(self.setting.epochs):
            order = random.permutation(self.trained_on)[: self.setting.limit]
            found += [
                self.data.batch(order[at : at + BATCH]) for at in range(0, len(order) - BATCH + 1, BATCH)
            ]
        return found

    def train(self, seed: int, batches: Sequence[Any], chosen: dict[str, str] | None) -> nn.Module:
        """A trained model: fp32, or computing in the formats ``chosen`` with gradients in MX9."""
        model = self.build(seed)
        if chosen is not None:
            model = apply_formats(
                model, chosen, training=True, gradient=GRADIENT, inplace=True, known=self.known
            )
        optimizer = torch.optim.Adagrad(model.parameters(), lr=RATE, eps=EPS)
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return model

    def score(self, model: nn.Module) -> Score:
        """AUC and log-loss on the held-out ratings."""
        dense, ids, labels = self.held_out
        with torch.no_grad():
            logits = model(dense, ids)
            return Score(
                movielens.auc(logits.double().numpy(), labels.numpy()), float(loss(model, self.held_out))
            )

    def served(self, model: nn.Module, chosen: dict[str, str]) -> Score:
        """The score of a trained model with narrow copies of its tensors."""
        return self.score(apply_formats(model, chosen, training=False, known=self.known))

    def uniform(self, format: str) -> dict[str, str]:
        """One format for tables, weights and activations."""
        return {
            name: format
            for name, site in self.known.items()
            if site.kind in ("table", "weight", "activation")
        }

    def bits(self, chosen: dict[str, str]) -> float:
        """Stored bits per parameter over tables and layers, scales and padding included."""
        stored = sum(
            elements * bits_per_element(chosen[name], row) for name, (elements, row) in self.shapes.items()
        )
        return stored / sum(elements for elements, _ in self.shapes.values())

    def budget(self, bits: int) -> float:
        """Average bits of the plan called ``bits``: those of the uniform format of that name, padding and all."""
        named = BITS[bits]
        return self.bits(self.uniform(named)) if named else bits * self.bits(self.uniform("mx9")) / 9

    def groups(self) -> list[tuple[str, ...]]:
        """Tensors that take one format: a table; a weight and the activation that it meets."""
        tables = [(name,) for name, site in self.known.items() if site.kind == "table"]
        weights = [name for name, site in self.known.items() if site.kind == "weight"]
        return tables + [(name, f"{name.removesuffix('.weight')}.input") for name in weights]

    def rivals(self, model: nn.Module, sensitivity: Sensitivity, bits: float) -> dict[str, dict[str, str]]:
        """The choices of a greedy search and of ModelOpt's program at the same bytes."""
        groups = []
        for names in self.groups():
            elements, row = self.shapes[names[0]]
            widths = {f: elements * bits_per_element(f, row) for f in UNIFORM}
            losses = {f: predict(sensitivity, dict.fromkeys(names, f)).mean for f in UNIFORM}
            groups.append(Group(names, widths, losses))
        scores = modelopt_scores(
            model,
            self.validation,
            loss,
            {names[0]: self.known[names[0]].path for names in self.groups()},
            lambda first, f: self.narrow(model, first, f),
            UNIFORM,
        )
        diagonal = [replace(group, losses=scores[group.names[0]]) for group in groups]
        bound = bits * sum(elements for elements, _ in self.shapes.values()) * (1 + 1e-9)
        return {"greedy": greedy(groups, bound), "ModelOpt-style": integer_program(diagonal, bound)}

    def narrow(self, model: nn.Module, first: str, format: str) -> nn.Module:
        """The module of a group with its tensors in a format."""
        names = next(names for names in self.groups() if names[0] == first)
        made = narrow_modules(model, {self.known[name]: format for name in names}, training=True)
        return made[self.known[first].path]

    def plan(self, sensitivity: Sensitivity, bits: float) -> dict[str, str]:
        """The mix of least predicted loss within ``bits``, by the format pass."""
        request = FormatRequest(
            objective="loss",
            average_bits=bits,
            kernels="emulate",
            formats=dict.fromkeys(("table", "weight", "activation"), UNIFORM),
            rules={"traffic.*": ("fp32",), "*.state": ("fp32",)},
            groups=tuple(group for group in self.groups() if len(group) > 1),
            sensitivity=sensitivity,
        )
        compiled = planner.compile(
            self.build(0), "local-1", mode="train", constraints=replace(Constraints(), formats=request)
        )
        decided = compiled.decisions.formats
        assert decided is not None
        return {tensor.name: tensor.format for tensor in decided.tensors if tensor.name in self.known}


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean log-loss of a batch."""
    dense, ids, labels = batch
    return F.binary_cross_entropy_with_logits(model(dense, ids), labels)


def soft_labels(model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """The batches with the labels that the model itself expects.

    The loss then changes by the divergence from the model as it was, which is never negative. With true labels
    a format can be chosen because its rounding happens to help on a few thousand ratings, which does not last.
    """
    with torch.no_grad():
        return [(dense, ids, model(dense, ids).sigmoid()) for dense, ids, _ in batches]


class Results:
    """Scores by protocol ("trained", "served"), name and seed."""

    def __init__(self) -> None:
        self.scores: dict[tuple[str, str], dict[int, Score]] = {}
        self.bits: dict[tuple[str, str], list[float]] = {}

    def add(self, protocol: str, name: str, seed: int, bits: float, score: Score) -> None:
        """One more score."""
        self.scores.setdefault((protocol, name), {})[seed] = score
        self.bits.setdefault((protocol, name), []).append(bits)

    def mean(self, protocol: str, name: str, metric: str) -> tuple[float, float]:
        """Mean and standard error over seeds."""
        return _mean([getattr(score, metric) for score in self.scores[protocol, name].values()])

    def difference(self, protocol: str, name: str, other: str, metric: str) -> tuple[float, float]:
        """Mean of ``name`` minus ``other`` over the seeds that both have, with its standard error."""
        mine, theirs = self.scores[protocol, name], self.scores[protocol, other]
        common = [seed for seed in mine if seed in theirs]
        return _mean([getattr(mine[seed], metric) - getattr(theirs[seed], metric) for seed in common])

    def width(self, protocol: str, name: str) -> float:
        """Stored bits per element, mean over seeds."""
        return sum(self.bits[protocol, name]) / len(self.bits[protocol, name])

    def uniform_within(self, protocol: str, bits: float) -> list[str]:
        """Uniform formats that need ``bits`` or fewer."""
        names = [name for kind, name in self.scores if kind == protocol and name in UNIFORM]
        return [name for name in names if self.width(protocol, name) <= bits * (1 + 1e-9)]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], 0.0
    change = mean_of(values)
    return change.mean, change.stderr


def run_seed(task: Task, seed: int, results: Results, training: dict[int, dict[str, str]]) -> None:
    """Everything of one seed; plans to train under are made from the first seed's sensitivities."""
    batches = task.batches(seed)
    wide = task.train(seed, batches, None)
    for protocol in ("trained", "served"):
        results.add(protocol, "fp32", seed, 32.0, task.score(wide))
    labelled = task.validation if task.setting.true_labels else soft_labels(wide, task.validation)
    sensitivity = from_losses(wide, labelled, loss, UNIFORM)
    for format in UNIFORM:
        chosen = task.uniform(format)
        results.add("served", format, seed, task.bits(chosen), task.served(wide, chosen))
    for bits in task.setting.serve_bits:
        chosen = task.plan(sensitivity, task.budget(bits))
        training.setdefault(bits, chosen)
        made = {"plan": chosen, **task.rivals(wide, sensitivity, task.budget(bits))}
        for name, formats in made.items():
            results.add("served", f"{name} {bits}", seed, task.bits(formats), task.served(wide, formats))
    for format in ("mx9", "mx6", "mx4"):
        chosen = task.uniform(format)
        score = task.score(task.train(seed, batches, chosen))
        results.add("trained", format, seed, task.bits(chosen), score)
    for bits in task.setting.train_bits:
        score = task.score(task.train(seed, batches, training[bits]))
        results.add("trained", f"plan {bits}", seed, task.bits(training[bits]), score)


def report_on(results: Results, report: Report, task: Task) -> None:
    """Rows and claims."""
    for protocol, name in sorted(results.scores, key=lambda key: (key[0] != "trained", key[1])):
        auc, auc_error = results.mean(protocol, name, "auc")
        log_loss, loss_error = results.mean(protocol, name, "log_loss")
        change, change_error = results.difference(protocol, name, "fp32", "log_loss")
        report.row(
            protocol=protocol,
            formats=name,
            bits=round(results.width(protocol, name), 2),
            auc=round(auc, 5),
            auc_se=round(auc_error, 5),
            log_loss=round(log_loss, 5),
            log_loss_se=round(loss_error, 5),
            log_loss_vs_fp32=round(change, 5),
            paired_se=round(change_error, 5),
        )
    drift, error = results.difference("trained", "mx9", "fp32", "auc")
    report.claim("MX9 training: |AUC - fp32's|", abs(drift), max(1e-3, error), "<=")
    for protocol, widths in (("trained", task.setting.train_bits), ("served", task.setting.serve_bits)):
        for bits in widths:
            for metric, sign in (("auc", -1), ("log_loss", 1)):
                others = [best_uniform(results, protocol, task.budget(bits), metric, sign)]
                others += [f"greedy {bits}", f"ModelOpt-style {bits}"] if protocol == "served" else []
                for other in others:
                    worse, error = results.difference(protocol, f"plan {bits}", other, metric)
                    name = f"{protocol}: {metric} lost by plan {bits} against {other}"
                    report.claim(name, sign * worse, max(RESOLUTION, error), "<=")


def best_uniform(results: Results, protocol: str, bits: float, metric: str, sign: int) -> str:
    """The uniform format within ``bits`` that scored best on the held-out ratings, in hindsight."""
    known = results.uniform_within(protocol, bits)
    return min(known, key=lambda format: sign * results.mean(protocol, format, metric)[0])


def plot(results: Results, path: str) -> None:
    """Log-loss against stored bits, one chart a protocol."""
    charts = []
    for protocol, title in (
        ("trained", "trained in the formats"),
        ("served", "served after training in fp32"),
    ):
        names = [name for kind, name in results.scores if kind == protocol and name != "fp32"]
        series: dict[str, list[Point]] = {}
        for name in names:
            of = "uniform" if name in UNIFORM else name.rpartition(" ")[0]
            mean = results.mean(protocol, name, "log_loss")[0]
            error = results.difference(protocol, name, "fp32", "log_loss")[1]
            if name != "int2":  # far off the scale
                series.setdefault(of, []).append((results.width(protocol, name), mean, error))
        charts.append((title, series, ("fp32", *results.mean(protocol, "fp32", "log_loss"))))
    Path(path).write_text(line_chart(charts, "stored bits per weight", "log-loss, held-out ratings"))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, one short epoch: within a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--true-labels", action="store_true", help="sensitivities from true labels, to see what that does"
    )
    parser.add_argument("--plot", metavar="FILE.svg", help="also draw log-loss against bits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(options.seeds, 3, None, tuple(BITS), tuple(BITS))
    if options.quick:
        setting = Setting(2, 1, 15_000, (6,), (6, 4))
    setting = replace(setting, true_labels=options.true_labels)
    task, results, training = Task(setting), Results(), {}
    start = time.perf_counter()
    for seed in range(setting.seeds):
        run_seed(task, seed, results, training)
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    report = Report("format_training")
    report_on(results, report, task)
    report.note(
        f"{len(task.data):,} ratings, {len(task.held_out[2]):,} held out; {setting.seeds} seeds; vs fp32: paired by seed; "
        "bits: stored, over tables and GEMM weights; a claim's target is a standard error over seeds, paired, or "
        f"{RESOLUTION:g}"
    )
    for bits, chosen in training.items():
        stored = (f"{name} {chosen[name]}" for name in task.shapes)
        report.note(f"plan {bits}: {', '.join(stored)}")
    if options.plot:
        plot(results, options.plot)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
