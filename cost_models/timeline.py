"""A step as a DAG of ops on streams: start times, makespan and critical path.

List scheduling in the given order: each op starts when the ops it waits for and the op before it on its
stream have ended (as CUDA streams with events do). The makespan is the longest path of the graph whose
edges are dependencies and stream order; ``networkx`` finds the path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx as nx

from ir.errors import IRError
from ir.plan import Event, Timeline


@dataclass(frozen=True, slots=True)
class TimedOp:
    """One op of a step.

    Attributes:
        name: unique in the step.
        stream: ops of one stream run one after the other in the order given.
        seconds: how long it runs.
        after: names of ops that must have ended before it starts.
        terms: what the seconds are made of.
    """

    name: str
    stream: str
    seconds: float
    after: tuple[str, ...] = ()
    terms: dict[str, float] = field(default_factory=dict)


def _graph(ops: Sequence[TimedOp]) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(op.name for op in ops)
    if len(graph) != len(ops):
        raise IRError("two ops of a timeline have the same name; give each its own")
    last: dict[str, str] = {}
    for op in ops:
        for name in op.after:
            if name not in graph:
                raise IRError(f"op {op.name!r} of a timeline waits for {name!r}, which does not exist")
            graph.add_edge(name, op.name)
        if op.stream in last:
            graph.add_edge(last[op.stream], op.name)
        last[op.stream] = op.name
    return graph


def schedule(ops: Sequence[TimedOp]) -> Timeline:
    """The schedule of ``ops``; events in the given order, those of one longest path marked critical.

    Raises:
        IRError: equal names, an unknown dependency, or ops that wait for each other.
    """
    graph = _graph(ops)
    try:
        order = list(nx.topological_sort(graph))
    except nx.NetworkXUnfeasible:
        raise IRError("the ops of a timeline wait for each other; remove the cycle") from None
    seconds = {op.name: op.seconds for op in ops}
    start: dict[str, float] = {}
    blocker: dict[str, str | None] = {}
    for name in order:
        before = max(graph.predecessors(name), key=lambda other: start[other] + seconds[other], default=None)
        blocker[name] = before
        start[name] = start[before] + seconds[before] if before is not None else 0.0
    critical: set[str] = set()
    last = max(order, key=lambda name: start[name] + seconds[name], default=None)
    step = start[last] + seconds[last] if last is not None else 0.0
    while last is not None:
        critical.add(last)
        last = blocker[last]
    events = tuple(
        Event(op.name, op.stream, start[op.name], op.seconds, op.name in critical, dict(op.terms))
        for op in ops
    )
    return Timeline(step, events)
