"""The modelled step, and a measured one, as a trace for Perfetto or chrome://tracing.

One process a class of equal ranks, one thread a stream. Where a rank's own share of a phase ends before that
of the slowest rank, the rest is drawn as waiting, and an arrow leads from the rank that is waited for.
Format: Trace Event Format (Chromium); times in microseconds. What Perfetto's importer makes of it (its
``json_trace_parser``, ``process_tracker`` and ``slice_tracker``) is kept in mind by :func:`write_trace`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import InputError
from ir.plan import Timeline, write_atomically
from ir.reading import read_json

MICRO = 1e6
LEAST_WAIT = 1e-8  # seconds of waiting that are drawn: anything shorter is rounding
MODELLED_FIRST = 1  # process ids of modelled classes start here; 0 is the idle process to Perfetto
MEASURED_FIRST = 1000  # process ids of measured ranks start here
Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RankClass:
    """Ranks with the same load.

    ``seconds`` is what each of them itself spends in an event, by the event's name; an event that is missing
    takes as long as on the slowest rank.
    """

    ranks: tuple[int, ...]
    seconds: Mapping[str, float]

    @property
    def label(self) -> str:
        """``"ranks 0, 3, 5 and 4 more"``."""
        shown = ", ".join(map(str, self.ranks[:4]))
        more = f" and {len(self.ranks) - 4} more" if len(self.ranks) > 4 else ""
        return f"rank{'s' if len(self.ranks) > 1 else ''} {shown}{more}"


def modelled_events(timeline: Timeline, classes: Sequence[RankClass]) -> list[Event]:
    """Events of a modelled step, one process a class, in the order given."""
    streams = list(dict.fromkeys(event.stream for event in timeline.events))
    made: list[Event] = []
    for process, group in enumerate(classes, MODELLED_FIRST):
        made += _names(process, f"modelled: {group.label}", streams)
        for event in timeline.events:
            own = min(group.seconds.get(event.name, event.duration), event.duration)
            common = {"ph": "X", "pid": process, "tid": streams.index(event.stream)}
            made.append(
                {
                    **common,
                    "name": event.name,
                    "cat": "critical" if event.critical else "modelled",
                    "ts": event.start * MICRO,
                    "dur": own * MICRO,
                    "args": {"critical": event.critical, "seconds": own, **event.terms},
                }
            )
            if event.duration - own > LEAST_WAIT:
                made.append(
                    {
                        **common,
                        "name": "waits for the slowest rank",
                        "cat": "wait",
                        "ts": (event.start + own) * MICRO,
                        "dur": (event.duration - own) * MICRO,
                        "args": {"in": event.name},
                    }
                )
    return made + _flows(timeline, classes, streams)


def _names(process: int, name: str, streams: Sequence[str]) -> list[Event]:
    made: list[Event] = [
        {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}},
    ]
    for thread, stream in enumerate(streams):
        made.append(
            {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": stream}}
        )
    return made


def _flows(timeline: Timeline, classes: Sequence[RankClass], streams: Sequence[str]) -> list[Event]:
    """An arrow from the class that a collective waits for to each class that waits."""
    made: list[Event] = []
    for event in timeline.events:
        if event.stream != "network":
            continue
        own = [min(g.seconds.get(event.name, event.duration), event.duration) for g in classes]
        last = own.index(max(own))
        for index, seconds in enumerate(own):
            if index == last or event.duration - seconds <= LEAST_WAIT:
                continue
            # a number: Perfetto reads text as a hexadecimal number and drops arrows whose id is none
            common = {"name": event.name, "cat": "flow", "id": len(made) // 2 + 1}
            thread = streams.index(event.stream)
            middle = event.start + own[last] / 2
            arrives = event.start + seconds + (event.duration - seconds) / 2
            start, end = MODELLED_FIRST + last, MODELLED_FIRST + index
            made.append({**common, "ph": "s", "pid": start, "tid": thread, "ts": middle * MICRO})
            made.append({**common, "ph": "f", "bp": "e", "pid": end, "tid": thread, "ts": arrives * MICRO})
    return made


def measured_events(files: Iterable[str | Path]) -> list[Event]:
    """Events of torch profiler traces, one file a rank, moved so that the earliest starts at 0.

    Raises:
        InputError: a file that is not a profiler's trace.
    """
    ranks = []
    for file in files:
        data = read_json(file, "trace")
        if not isinstance(data, dict) or not isinstance(data.get("traceEvents"), list):
            raise InputError(f"trace {file} has no traceEvents; give a file of torch.profiler")
        found = [e for e in data["traceEvents"] if isinstance(e, dict) and e.get("ph") == "X"]
        if not all(
            type(e.get("ts")) in (int, float) and type(e.get("dur", 0)) in (int, float) for e in found
        ):
            raise InputError(f"trace {file} has an event without a time; give a file of torch.profiler")
        ranks.append(found)
    starts = [float(e["ts"]) for events in ranks for e in events]
    first = min(starts, default=0.0)
    made: list[Event] = []
    for rank, events in enumerate(ranks):
        process = MEASURED_FIRST + rank
        threads = {tid: i for i, tid in enumerate(dict.fromkeys(str(e.get("tid")) for e in events))}
        made += _names(process, f"measured: rank {rank}", [f"thread {i}" for i in range(len(threads))])
        for event in events:
            made.append(
                {
                    "ph": "X",
                    "name": str(event.get("name", "")),
                    "cat": str(event.get("cat", "measured")),
                    "pid": process,
                    "tid": threads[str(event.get("tid"))],
                    "ts": float(event["ts"]) - first,
                    "dur": float(event.get("dur", 0.0)),
                }
            )
    return made


def write_trace(path: str | Path, events: Sequence[Event], about: Mapping[str, str]) -> None:
    """Write a trace file whole or not at all; raises InputError when the folder cannot be written.

    Slices of a thread that overlap without one being within the other get a thread more, because Perfetto drops them;
    it also names threads by their number alone, so that numbers are of one thread in the whole file.
    """
    body = {"displayTimeUnit": "ms", "otherData": dict(about), "traceEvents": placed(events)}
    write_atomically(path, json.dumps(body, allow_nan=False, separators=(",", ":")) + "\n")


def placed(events: Sequence[Event]) -> list[Event]:
    """Events with whole nanoseconds, on threads of their own number in which slices nest; outer slices first."""
    named = {(e["pid"], e["tid"]): e for e in events if e["name"] == "thread_name"}
    made = [dict(e) for e in events if e["ph"] == "M" and e["name"] != "thread_name"]
    slices = [(e, _nanoseconds(e["ts"]), _nanoseconds(e["ts"] + e["dur"])) for e in events if e["ph"] == "X"]
    slices.sort(key=lambda one: (one[1], -one[2]))
    lanes: dict[tuple[int, int], list[list[int]]] = {key: [[]] for key in named}
    first = 1 + max((pid for pid, _ in named), default=0)
    numbers: dict[tuple[int, int, int], int] = {
        (*key, 0): number for number, key in enumerate(named, first)
    }  # process, thread, lane -> the file's thread
    timed = []
    for event, start, end in slices:
        key = (event["pid"], event["tid"])
        lane = _lane(lanes[key], start, end)
        number = numbers.setdefault((*key, lane), first + len(numbers))
        timed.append({**event, "tid": number, "ts": _microseconds(start), "dur": _microseconds(end - start)})
    for (pid, tid, lane), number in numbers.items():
        name = named[pid, tid]["args"]["name"] + (f", {lane + 1} at a time" if lane else "")
        made.append({**named[pid, tid], "tid": number, "args": {"name": name}})
    arrows = [
        {**e, "tid": numbers[e["pid"], e["tid"], 0], "ts": _microseconds(math.floor(e["ts"] * 1e3))}
        for e in events
        if e["ph"] in "sf"
    ]
    return made + timed + arrows


def _lane(lanes: list[list[int]], start: int, end: int) -> int:
    """The first lane whose open slices (their ends, outermost first) are all over, or hold the new one; it is entered."""
    for index, open_ends in enumerate(lanes):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if not open_ends or end <= open_ends[-1]:
            open_ends.append(end)
            return index
    lanes.append([end])
    return len(lanes) - 1


def _nanoseconds(micro: float) -> int:
    return round(micro * 1e3)


def _microseconds(nano: int) -> float:
    """A number that readers which cut off after multiplying by 1,000, as Perfetto does, take for ``nano``."""
    micro = nano / 1e3
    return micro if int(micro * 1e3) == nano else math.nextafter(micro, math.inf)
