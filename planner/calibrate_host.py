"""Constants for what ranks share and what their host adds to a step, from the record of a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cost_models.calibration import Calibration
from cost_models.collective.planning import communication, dense_reduction
from cost_models.collectives import Network, all_gather, all_reduce, network, reduce_scatter
from cost_models.embedding import phase_overheads
from ir.topology import Topology
from ir.workload import Workload

Record = Mapping[str, Any]

_DIGITS = 4


def card_sharing(record: Record) -> float:
    """How much faster a rank sends to another host alone than while all of its host do; 1 to those ranks."""
    links = record["links"].get("inter")
    if links is None or record["host_size"] == 1:
        return 1.0
    # the last two sizes: what an idle link lets through at once cancels out
    (small, large) = links["points"][-2:]
    alone = (large["bytes"] - small["bytes"]) / max(large["seconds"] - small["seconds"], 1e-9)
    return float(min(max(alone / links["flood"]["bandwidth"], 1.0), record["host_size"]))


def host_constants(record: Record, topology: Topology, found: Calibration) -> dict[str, Any]:
    """Factors of the library's reductions, and the framework's seconds; what was not measured is left out.

    ``found`` has everything else, since these constants are what its predictions leave unexplained.
    """
    constants: dict[str, Any] = {"ids_ahead": False}
    net = network(topology, found)
    for name, form in (
        ("all_reduce", all_reduce),
        ("reduce_scatter", reduce_scatter),
        ("all_gather", all_gather),
    ):
        factor = _factor(record, name, net, form)
        if factor is not None:
            constants[f"{name}_factor"] = factor
    gain = _one_way_gain(record)
    if gain is not None:
        constants["one_way_gain"] = gain
    trials = record.get("framework")
    if trials is not None:
        constants |= _framework(trials, topology, replace(found, **constants))
    return {
        name: value if isinstance(value, bool) else float(f"{value:.{_DIGITS}g}")
        for name, value in constants.items()
    }


def _factor(record: Record, name: str, net: Network, form: Any) -> float | None:
    """Measured seconds of the largest buffer, its floor taken off, over those of the ring."""
    for level in ("inter", "intra"):
        rows = _rows(record, level, name)
        if len(rows) > 1:
            seconds = rows[-1]["seconds"] - _floor(rows)
            # below 1: rings that are faster than an all-to-all of the same link, which set its bandwidth
            return float(max(seconds, 0.1 * rows[-1]["seconds"]) / form(rows[-1]["bytes"], net))
    return None


def _floor(rows: Sequence[Record]) -> float:
    # of the smallest and the next: the smallest is timed back to back, which slows a collective of many messages
    return float(min(row["seconds"] for row in rows[: max(len(rows) - 1, 1)][:2]))


def _rows(record: Record, level: str, name: str) -> list[Record]:
    return [row for row in record["collectives"] if row["level"] == level and row["op"] == name]


def _one_way_gain(record: Record) -> float | None:
    """Share of an all-to-all's seconds saved when only half of the hosts send; None where it was not measured."""
    for row in _rows(record, "inter", "one_way"):
        both = [other for other in _rows(record, "inter", "all_to_all") if other["bytes"] == row["bytes"]]
        if both:
            return float(min(max(1 - row["seconds"] / both[0]["seconds"], 0.0), 0.9))
    return None


def _framework(trials: Record, topology: Topology, found: Calibration) -> dict[str, float]:
    table = (trials["many"] - trials["few"]) / (trials["many_tables"] - trials["few_tables"])
    group = trials["two_types"] - trials["many"]
    # what the model knows of such a step: the floors of its collectives and the launches of its kernels
    known = sum(phase_overheads(topology, Workload(), found, "train").values())
    reduction = dense_reduction(communication(topology, found), found.bucket_bytes, False)
    known += sum(reduction.price(trials["dense_bytes"]).values())
    table, group = max(table, 0.0), max(group, 0.0)
    constants = {
        "table_seconds": table,
        "group_seconds": group,
        "step_seconds": max(trials["few"] - trials["few_tables"] * table - known, 0.0),
    }
    if "exchange_few" in trials:
        spread = trials["many_tables"] - trials["few_tables"]
        each = max((trials["exchange_many"] - trials["exchange_few"]) / spread, 0.0)
        # two exchanges of sizes more than the phases of a step know
        rest = (
            trials["exchange_few"]
            - trials["few_tables"] * each
            - known
            - 2 * network(topology, found).latency
        )
        constants |= {"exchange_seconds": max(rest, 0.0), "exchange_table_seconds": each}
    return constants
