"""Train a DLRM on MovieLens-100K under a plan, on real processes, beside the unsharded model.

    python examples/train_movielens.py --nproc 4

Will a user rate a film 4 or 5? Trained on the first 90 % of each user's ratings in time, judged by the
AUC on the rest. The sharded and the unsharded run start from the same weights and see the same batches, so
their AUCs agree to 1e-4; a model of two biases (user, film) is printed as the baseline to beat.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a file: make the project and the data module importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from codegen.runtime.launch import Rank, launch
from examples import _movielens as movielens
from ir.errors import PlannerError
from ir.plan import Plan
from ir.workload import Workload

# Adagrad's eps. Its usual 1e-8 makes the first step of a weight the sign of its gradient, however small, so that
# rounding decides some steps and two runs drift apart; 1e-3 reaches the same AUC here and is smooth.
EPS = 1e-3

RANK = f"{Path(__file__).resolve()}:train_rank"


def train_rank(place: Rank, plan: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """One process: train its slice of every batch, then score its slice of the held-out ratings.

    With a world size of 1 the model is not sharded at all: plain torch, whole batches.
    """
    import torch

    from codegen.runtime.batches import Batch
    from codegen.runtime.compare_rank import train_step, unsharded_model
    from codegen.runtime.gather import gather_rows
    from codegen.torchrec import sharded_model

    torch.set_num_threads(1)  # the layers are too small to gain from more
    data = movielens.load()
    decided = Plan.from_dict(plan)
    torch.manual_seed(options["seed"])
    module = movielens.build(data.rows, data.dense.shape[1])
    lr = options["lr"]
    if place.world_size == 1:
        model = unsharded_model(decided, module, "adagrad", lr, ("adagrad", lr), EPS)
    else:
        model = sharded_model(decided, module, optimizer="adagrad", lr=lr, dense_optimizer="adagrad", eps=EPS)
    start = time.perf_counter()
    for step, samples in enumerate(batches(data, options)):
        mine = np.split(samples, place.world_size)[place.rank]
        dense, ids, labels = data.batch(mine)
        _, loss = train_step(model, Batch((dense, ids), labels))
        if place.rank == 0:
            place.report([step + 1, float(loss)])
    seconds = time.perf_counter() - start
    scores = []
    with torch.no_grad():
        held_out = np.arange(data.train, len(data))
        held_out = held_out[: len(held_out) // place.world_size * place.world_size]
        mine = np.split(held_out, place.world_size)[place.rank]
        dense, ids, labels = data.batch(mine)
        scores.append(gather_rows(model(dense, ids)))
        truth = gather_rows(labels)
    area = movielens.auc(torch.cat(scores).double().numpy(), truth.numpy())
    return {"auc": area, "held_out": len(truth), "seconds": seconds}


def batches(data: movielens.Data, options: dict[str, Any]) -> Iterator[movielens.Ints]:
    """The samples of each global batch, the same for every number of processes."""
    random = np.random.default_rng(options["seed"])
    size = options["batch"]
    for _ in range(options["epochs"]):
        order = random.permutation(data.train)[: options["limit"]]
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def make_plan(data: movielens.Data, nproc: int, batch: int) -> Plan:
    """Compile the model for this machine, with the workload measured from the training data."""
    import planner

    samples = np.arange(data.train)
    sample_batches = []
    for part in np.array_split(samples, max(1, data.train // batch))[:20]:
        counts = {}
        for name, (ids, offsets) in data.ids.items():
            counts[name] = (
                ids[offsets[part[0]] : offsets[part[-1] + 1]],
                np.diff(offsets[part[0] : part[-1] + 2]),
            )
        sample_batches.append(counts)
    measured = Workload.from_batches(sample_batches, data.rows)
    features = measured.features
    workload = Workload(batch, features, optimizer="adagrad", origin=measured.origin)
    model = movielens.build(data.rows, data.dense.shape[1], device="meta")
    return planner.compile(model, f"local-{nproc}", workload, name="movielens-dlrm")


@contextlib.contextmanager
def progress(what: str, steps: int) -> Iterator[Callable[[int, Any], None] | None]:
    """A bar on a terminal, nothing in a pipe."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console, transient=True) as bar:
        task = bar.add_task(what, total=steps, loss="starting")
        yield lambda rank, message: bar.update(task, completed=message[0], loss=f"loss {message[1]:.4f}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compile, train twice, and what came out."""
    data = movielens.load()
    plan = make_plan(data, options.nproc, options.batch)
    settings = {name: getattr(options, name) for name in ("epochs", "batch", "seed", "lr", "limit")}
    steps = sum(1 for _ in batches(data, settings))
    found = {}
    for what, nproc in (("sharded", options.nproc), ("unsharded", 1)):
        with progress(f"{what}, {nproc} process{'es' * (nproc > 1)}", steps) as on_message:
            arguments = {"plan": plan.to_dict(), "options": settings}
            found[what] = launch(RANK, nproc, arguments, timeout=600, on_message=on_message)[0]
    test = slice(data.train, data.train + found["sharded"]["held_out"])
    baseline = movielens.auc(movielens.bias_only(data)[test], data.labels[test])
    return {
        "ratings": len(data),
        "nproc": options.nproc,
        "steps": steps,
        "decisions": {table.name: table.option for table in plan.table_plans},
        "sharded": found["sharded"],
        "unsharded": found["unsharded"],
        "difference": abs(found["sharded"]["auc"] - found["unsharded"]["auc"]),
        "bias_only": baseline,
    }


def show(result: dict[str, Any], options: argparse.Namespace) -> None:
    """The result for people."""
    console = Console(highlight=False)
    kinds: dict[str, list[str]] = {}
    for table, option in result["decisions"].items():
        kinds.setdefault(option, []).append(table.removeprefix("t_"))
    console.print(
        f"MovieLens-100K: {result['ratings']:,} ratings; held out: {result['sharded']['held_out']:,}, "
        "the latest of each user"
    )
    console.print("plan: " + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items()))
    table = Table(box=None, pad_edge=False)
    for title, side in (("run", "left"), ("AUC", "right"), ("ms a step", "right")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for what, nproc in (("sharded", options.nproc), ("unsharded", 1)):
        one = result[what]
        name = f"{what}, {nproc} process{'es' * (nproc > 1)}, {result['steps']} steps"
        table.add_row(name, f"{one['auc']:.6f}", f"{one['seconds'] / result['steps'] * 1e3:.1f}")
    table.add_row("user and film bias only", f"{result['bias_only']:.6f}", "")
    console.print(table)
    verdict = "equal" if result["difference"] <= 1e-4 else "NOT equal"
    console.print(f"AUC of the two runs: {verdict} to 1e-4 (difference {result['difference']:.1e})")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nproc", type=int, default=2, help="gloo processes (2 or 4 are good choices)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=512, help="samples of a global batch")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="training samples of an epoch, for a short run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.nproc < 2 or options.batch < 1 or options.batch % options.nproc or options.epochs < 1:
        parser.error("--nproc must be at least 2 and divide --batch; --epochs at least 1")
    if options.limit is not None and options.limit < options.batch:
        parser.error("--limit must be at least one batch")
    try:
        result = run(options)
    except PlannerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(result))
    else:
        show(result, options)
    return 0 if result["difference"] <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
