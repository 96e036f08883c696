"""A training step under torch's profiler, cut into the phases that the model of a step has.

TorchRec names its own parts (``[splits_dist]``, ``[lookup]``, ``[output_dist]``), autograd names every backward
function, and gloo every collective; phases are read off these names and their order. Spans of one phase that
nothing of another interrupts on the stream are joined.

================  ===========================================================================================
input_dist        from the first ``[splits_dist]`` to the first ``[lookup]``: the rank waits for its ids
lookup_forward    ``[lookup]`` of every group of tables
bottom_forward    between the last ``[output_dist]`` and the wait for its vectors
output_dist       collectives in the forward pass after the first lookup
top_forward       from that wait to the backward pass, the loss included
top_backward      autograd before the first embedding collective of the backward pass, bottom_backward after it
gradient_dist     embedding collectives of the backward pass
all_reduce        of dense gradients
lookup_backward   FBGEMM's backward functions, which update fused tables
dense_update      steps of optimizers
================  ===========================================================================================

A module without tables has ``forward`` and ``backward`` instead of bottom and top.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MICRO = 1e6  # profiler times are in microseconds
_DENSE = ("broadcast", "barrier")  # collectives of DDP's bookkeeping, which no phase of the model stands for
_EXCHANGE = ("All2All", "ReduceScatter", "Reduce_Scatter", "AllGather", "SeqEmbedding")
Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """One phase, or a part of it, on one rank."""

    rank: int
    phase: str
    stream: str  # "compute" or "network"
    start: float  # seconds; of all ranks of a run, the first starts at 0
    seconds: float


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what native code writes to standard error: torch's profiler says there that it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def profiled(rank: int, step: Callable[[], object]) -> list[list[Any]]:
    """Run a step under the profiler; ``[rank, phase, stream, start, seconds]`` with the profiler's clock."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU])
    with _silent():
        profiler.start()
    step()
    with _silent():
        profiler.stop()
    with tempfile.TemporaryDirectory(prefix="planner-spans-") as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return [[rank, *part] for part in phases_of(events)]


def aligned(parts: Iterable[Sequence[Any]]) -> tuple[Span, ...]:
    """Spans of all ranks, moved so that the first starts at 0; ranks share the machine's clock."""
    made = [Span(int(r), str(p), str(s), float(t), float(d)) for r, p, s, t, d in parts]
    first = min((span.start for span in made), default=0.0)
    made = [Span(s.rank, s.phase, s.stream, s.start - first, s.seconds) for s in made]
    return tuple(sorted(made, key=lambda s: (s.rank, s.stream, s.start)))


def phases_of(events: Iterable[Event]) -> list[tuple[str, str, float, float]]:
    """``(phase, stream, start, seconds)`` of a profiler trace, in order of their starts."""
    whole = sorted(
        (e for e in events if isinstance(e, dict) and e.get("ph") == "X" and "ts" in e),
        key=lambda e: (float(e["ts"]), -float(e.get("dur", 0.0))),
    )
    marks = _Landmarks.of(whole)
    found = [*_dense_forward(whole, marks)]
    for event in whole:
        phase, stream = _phase(event, marks)
        if phase:
            found.append((phase, stream, float(event["ts"]), _end(event)))
    if marks.splits is not None and marks.lookup is not None:
        found.append(("input_dist", "network", marks.splits, marks.lookup))
    return [
        (phase, stream, start / MICRO, (end - start) / MICRO) for phase, stream, start, end in _joined(found)
    ]


@dataclass(frozen=True, slots=True)
class _Landmarks:
    """Times in the profiler's microseconds; None where the step has no such thing."""

    splits: float | None  # the first exchange of ids begins
    lookup: float | None  # the first lookup begins
    issued: float | None  # the last exchange of vectors has been started
    waited: tuple[float, float] | None  # the first wait for vectors begins, the last ends
    backward: float
    exchange: float | None  # the first embedding collective of the backward pass begins

    @classmethod
    def of(cls, events: Sequence[Event]) -> _Landmarks:
        def starts(*marks: str) -> list[Event]:
            return [e for e in events if str(e.get("name", "")).startswith(marks)]

        backward = min((float(e["ts"]) for e in starts("autograd::engine")), default=float("inf"))
        forward = [e for e in events if float(e["ts"]) < backward]
        lookups, splits = starts("[lookup]"), starts("[splits_dist]")
        first = float(lookups[0]["ts"]) if lookups else None
        waits = [e for e in forward if "CollectionAwaitable wait()" in str(e.get("name", ""))]
        issued = [_end(e) for e in starts("[output_dist]_")]
        exchanges = [
            float(e["ts"])
            for e in starts("autograd::engine")
            if any(kind in str(e["name"]) for kind in _EXCHANGE)
        ]
        return cls(
            float(splits[0]["ts"]) if splits else None,
            first,
            max(issued, default=None),
            (float(waits[0]["ts"]), max(map(_end, waits))) if waits else None,
            backward,
            min(exchanges, default=None),
        )


def _phase(event: Event, marks: _Landmarks) -> tuple[str, str]:
    """The phase and stream of one event; empty where it stands for none by itself."""
    name, start = str(event.get("name", "")), float(event["ts"])
    if name.startswith("gloo:"):
        return _collective(name.removeprefix("gloo:"), start, marks), "network"
    if name.startswith("[lookup]"):
        return "lookup_forward", "compute"
    if name.startswith("Optimizer.step#"):
        return "dense_update", "compute"
    if not name.startswith("autograd::engine"):
        return "", ""
    if "SplitLookup" in name:
        return "lookup_backward", "compute"
    if any(kind in name for kind in _EXCHANGE):
        return "", ""  # its collective is a span of its own
    if marks.lookup is None:
        return "backward", "compute"
    below = marks.exchange is not None and start > marks.exchange
    return ("bottom_backward" if below else "top_backward"), "compute"


def _collective(kind: str, start: float, marks: _Landmarks) -> str:
    if kind in _DENSE:
        return ""
    if kind == "all_reduce" or marks.lookup is None:
        return kind
    if start < marks.lookup:
        return ""  # within input_dist
    return "output_dist" if start < marks.backward else "gradient_dist"


def _dense_forward(events: Sequence[Event], marks: _Landmarks) -> Iterator[tuple[str, str, float, float]]:
    """The forward pass outside tables, by what it waits for; kernels only, not the time between them."""
    for event in events:
        name, start = str(event.get("name", "")), float(event["ts"])
        if not name.startswith("aten::"):
            continue
        if marks.lookup is None:  # micro-batches take turns; what autograd runs is joined with its function
            yield "forward", "compute", start, _end(event)
        elif start >= marks.backward:
            return
        elif marks.waited is not None and start >= marks.waited[1]:
            yield "top_forward", "compute", start, _end(event)
        elif marks.issued is not None and marks.issued <= start < (marks.waited or (float("inf"),))[0]:
            yield "bottom_forward", "compute", start, _end(event)


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event.get("dur", 0.0))


def _joined(found: Iterable[tuple[str, str, float, float]]) -> list[tuple[str, str, float, float]]:
    """Consecutive spans of one phase on a stream as one; nested ones vanish in what holds them.

    Collectives of two phases may be under way at a time, so none holds one of another phase.
    """
    made: dict[str, list[tuple[str, str, float, float]]] = {}
    for phase, stream, start, end in sorted(found, key=lambda part: (part[2], -part[3])):
        network = stream == "network"
        lane = made.setdefault(phase if network else stream, [])
        last = lane[-1] if lane else ("", "", 0.0, -1.0)
        # between kernels of a phase the host works for it; between collectives the network rests
        reaches = start <= last[3] if network else True
        if lane and ((last[0] == phase and reaches) or end <= last[3]):
            lane[-1] = (last[0], stream, last[2], max(last[3], end))
        else:
            lane.append((phase, stream, start, end))
    return sorted((part for lane in made.values() for part in lane), key=lambda part: part[2])
