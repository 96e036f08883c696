"""``planner sensitivity``: what each tensor of a trained model loses in each format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ir.errors import InputError, PlannerError

if TYPE_CHECKING:
    from ir.format_plan import Sensitivity

DEFAULT_FORMATS = ("mx9", "mx6", "mx4", "int8", "int4")


@click.command()
@click.argument("model")
@click.option("--data", help="FILE.py:CALLABLE that returns (batches, loss); loss(model, batch) is a mean.")
@click.option(
    "--method",
    type=click.Choice(["weights", "gradients", "losses"]),
    help="How; default gradients where there are data, else weights.",
)
@click.option("--format", "formats", multiple=True, help="A format id; give several. Default mx9 to int4.")
@click.option("--low-precision", is_flag=True, help="Run the serving workflow and report it instead.")
@click.option(
    "--output", "-o", type=click.Path(), help="Write JSON that constraints.formats.sensitivity takes."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def sensitivity(
    model: str,
    data: str | None,
    method: str | None,
    formats: tuple[str, ...],
    low_precision: bool,
    output: str | None,
    as_json: bool,
) -> None:
    """Measure how MODEL suffers when one tensor takes one number format.

    MODEL is FILE.py:CALLABLE that returns a trained nn.Module on the CPU. Weights alone give relative squared
    errors; with --data also changes of the loss, by one backward pass a batch or measured one by one.
    """
    from planner.cli_support import fail

    try:
        _run(model, data, method, formats or DEFAULT_FORMATS, low_precision, output, as_json)
    except PlannerError as error:
        fail(error, as_json)


def _run(
    model: str,
    data: str | None,
    method: str | None,
    formats: tuple[str, ...],
    low_precision: bool,
    output: str | None,
    as_json: bool,
) -> None:
    from ir.plan import write_atomically
    from ir.reading import dump_record
    from planner.models import load_module

    path, colon, name = model.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputError(f"a trained model is named FILE.py:CALLABLE, not {model!r}")
    module, _ = load_module(path, name, device="cpu")
    batches, loss = _data(data) if data else ([], None)
    if low_precision:
        from planner.low_precision import low_precision as workflow

        if loss is None:
            raise InputError("--low-precision watches the loss; give --data")
        chosen, report = workflow(module, batches, loss)
        result = {"formats": chosen, "report": dump_record(report)}
        lines = report.lines()
    else:
        found = _measured(module, batches, loss, method, formats)
        result, lines = dump_record(found), _lines(found)
    if output:
        write_atomically(output, json.dumps(result, indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(result))
    else:
        for line in lines:
            click.echo(line)


def _data(text: str) -> tuple[list[Any], Any]:
    from codegen.runtime.launch import resolve

    made = resolve(text)()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[1])):
        raise InputError(f"{text} must return a pair: a list of batches, and loss(model, batch)")
    return list(made[0]), made[1]


def _measured(
    module: Any, batches: Any, loss: Any, method: str | None, formats: tuple[str, ...]
) -> Sensitivity:
    from planner.sensitivity import from_losses, from_weights
    from planner.sensitivity_fisher import from_gradients

    method = method or ("weights" if loss is None else "gradients")
    if method == "weights":
        return from_weights(module, formats)
    if loss is None:
        raise InputError(f"--method {method} runs the model; give --data")
    measure = from_gradients if method == "gradients" else from_losses
    return measure(module, batches, loss, formats)


def _lines(found: Sensitivity) -> list[str]:
    """One line a tensor, worst first by its largest change."""
    order = sorted(found.tensors, key=lambda name: -max(c.mean for c in found.tensors[name].values()))
    lines = [f"{found.metric}, by {found.method}; {found.source}"]
    for name in order:
        cells = (f"{f} {c.mean:.2e} +- {c.stderr:.0e}" for f, c in found.tensors[name].items())
        lines.append(f"{name}: {', '.join(cells)}")
    return lines
