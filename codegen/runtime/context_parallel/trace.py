"""When each step of a ring computed, sent and waited: records that export as Chrome trace events.

A transfer is in flight from the moment it is posted to the end of its wait, and it is hidden as far as
that time is spent in attention; what a wait takes is exposed. On CUDA the marks are events on the current
stream, so that they time kernels and stream waits rather than launches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Event:
    """One span of one rank; seconds since the trace began."""

    name: str  # "attention", "post", "wait", "transfer", "all_to_all", "merge"
    start: float
    end: float
    args: dict[str, Any] = field(default_factory=dict)  # step, bytes, peer


class Trace:
    """Collects events of one rank.

    Args:
        device: whose clock to use; "cuda" times with CUDA events, anything else with the host's clock.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._marks: list[tuple[str, Any, Any, dict[str, Any]]] = []
        self._origin = self.mark()

    def mark(self) -> Any:
        """A point in time."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, name: str, start: Any, end: Any, **args: Any) -> None:
        """Record a span between two marks."""
        self._marks.append((name, start, end, args))

    @contextmanager
    def span(self, name: str, **args: Any) -> Iterator[None]:
        """Record what the block takes."""
        start = self.mark()
        yield
        self.add(name, start, self.mark(), **args)

    def _seconds(self, mark: Any) -> float:
        if not self._cuda:
            return float(mark - self._origin)
        return float(self._origin.elapsed_time(mark)) / 1e3  # milliseconds

    @property
    def events(self) -> list[Event]:
        """All spans in the order of their start; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        found = [Event(name, self._seconds(a), self._seconds(b), args) for name, a, b, args in self._marks]
        return sorted(found, key=lambda event: event.start)

    def total(self, name: str) -> float:
        """Seconds of all spans called ``name``."""
        return sum(event.end - event.start for event in self.events if event.name == name)

    def sent(self, name: str = "transfer") -> int:
        """Bytes this rank sent in spans called ``name``."""
        return sum(int(event.args.get("bytes", 0)) for event in self.events if event.name == name)

    def chrome(self, rank: int) -> list[dict[str, Any]]:
        """Trace events for chrome://tracing and Perfetto: one process a rank, one row for each kind of work.

        Format: Trace Event Format, complete ("X") events, microseconds.
        """
        rows = {"attention": 0, "merge": 0, "transfer": 2, "all_to_all": 1}
        names = {0: "compute", 1: "waits", 2: "transfers"}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        ]
        for tid, name in names.items():
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": name}})
        for event in self.events:
            tid = rows.get(event.name, 1)
            span = {"ts": event.start * 1e6, "dur": (event.end - event.start) * 1e6}
            events.append(
                {"ph": "X", "name": event.name, "pid": rank, "tid": tid, **span, "args": event.args}
            )
        return events


def span(trace: Trace | None, name: str, **args: Any) -> Context[None]:
    """``trace.span``, or nothing without a trace."""
    return nullcontext() if trace is None else trace.span(name, **args)
