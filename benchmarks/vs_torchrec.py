"""Ours against TorchRec's planner, both scored by TorchRec's own estimators.

    python benchmarks/vs_torchrec.py [--quick | --full] [--json] [--tables FILE.json [--ranks 8,16]]
                                     [--resume FILE [--ours-only] [--minutes M]] [--default-limit S]
    python benchmarks/vs_torchrec.py --check-rival

The rival is TorchRec as it comes ("default"), and tuned by an expert ("tuned": the best over its proposers
and ``min_partition`` 16, 32, 64 and unset, all seven sharding types). The default planner runs untouched and
its CPU seconds are measured; where it needs more than ``--default-limit`` of them (and more than 25 times
ours), it is stopped, they are a lower bound ("cpu_at_least"), and its plan comes from ``_torchrec_twin.py``, as
the tuned plans do: the same search, each shard priced once. ``--check-rival`` compares the twin with
the untouched planner. Same kernels, same storage reservation; our column splits are those of
``min_partition`` 16. Objective A is its ``Perf.total``, B adds ``input_dist_comms``; each is solved by
itself, with effort "quick", which every claim is about; "normal" searches longer and is shown beside
it. Every plan, the rival's too, is priced again from scratch, shard by shard. Milliseconds.

With ``--resume`` each result is stored as it is measured and not measured again; ``--ours-only`` plans and
scores our side again on the stored cases; ``--minutes 0`` prints what is stored.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _torchrec_cases as cases
from benchmarks._report import Report, geomean
from benchmarks._tables import Table

Record = dict[str, Any]
DECISIVE = 25.0  # times our CPU seconds after which the default planner's share is known to be under 1/20
TARGETS = {"A_default": 0.70, "A_tuned": 0.90, "B_tuned": 0.80}


def plan_ours(case: Any, objective: Any, effort: Any = "quick") -> Record | None:
    """Price, solve and build the sharding options; CPU seconds cover all of that, not the scoring.

    None when no plan fits.
    """
    from cost_models.adapters.torchrec import TorchRecObjective
    from ir.errors import InfeasibleError

    started = time.process_time()
    # All tables in HBM; else some in host memory; else with that as a limit, which takes a longer search.
    for spill, search in ((False, _solved), (True, _solved), (True, _solved_within_host_memory)):
        try:
            model = TorchRecObjective(
                case.module,
                case.sharders,
                case.topology,
                case.batch_size,
                case.constraints,
                objective=objective,
                spill=spill,
            )
            choice, placement, bound = search(model, effort)
        except InfeasibleError:
            continue
        options = model.sharding_options(choice, placement)
        used = time.process_time() - started
        score = model.score(options)
        if spill and not score.legal:
            continue
        value = score.total if objective == "total" else score.with_input
        return {
            "value": value,
            "bound": bound,
            "cpu": used,
            "path": score.critical_path,
            "legal": score.legal,
        }
    return None


def _solved(model: Any, effort: Any) -> tuple[Any, Any, float]:
    """Choice, placement and bound within HBM."""
    from passes.assignment import solve

    solution = solve(model.problem(), effort=effort)
    return solution.choice, solution.placement, solution.lower_bound


def _solved_within_host_memory(model: Any, _: Any) -> tuple[Any, Any, float]:
    """The same within HBM and host memory."""
    from passes.assignment.column_generation import Frame, Menu, relax
    from passes.assignment.joint import solve_joint

    problem = model.problem()
    frame = Frame(
        problem.names,
        problem.hosts,
        problem.host_size,
        problem.capacity,
        problem.phases,
        problem.limits,
        stretched=(False,) * len(problem.limits),
    )
    alike: dict[int, list[int]] = {}
    for table, options in enumerate(problem.options):
        alike.setdefault(id(options), []).append(table)  # tables of one shape share one tuple of options
    menus = [Menu(tuple(tables), list(problem.options[tables[0]])) for tables in alike.values()]
    joint = solve_joint(frame, menus, relax(frame, menus))
    chosen = zip(problem.options, joint.problem.options, joint.solution.choice, strict=True)
    choice = [options.index(kept[j]) for options, kept, j in chosen]
    return choice, joint.solution.placement, joint.solution.lower_bound


def run_ours(case: Any, normal: bool) -> Record:
    """Our plans for both objectives."""
    ours: Record = {"A": plan_ours(case, "total"), "B": plan_ours(case, "total+input")}
    if normal:
        ours["A_normal"] = plan_ours(case, "total", "normal")
        ours["B_normal"] = plan_ours(case, "total+input", "normal")
    return ours


def run_rival(case: Any, limit: float) -> Record:
    """TorchRec's default plan, and its best ones as an expert tunes it, scored for both objectives."""
    from benchmarks._torchrec_rival import default_plan, plan_text
    from benchmarks._torchrec_twin import Twin
    from cost_models.adapters.torchrec import TorchRecObjective

    measured = default_plan(case, limit)
    twin = Twin(case)
    fast = twin.default()
    equal = plan_text(measured.total) == plan_text(fast.total) if measured.whole else None
    rival = measured if measured.whole else fast
    scorer = TorchRecObjective(case.module, case.sharders, case.topology, case.batch_size, case.constraints)
    default = scorer.score(rival.total) if rival.total else None
    plans = twin.tuned()
    # The expert may also keep the default plan.
    known = [default] if default else []
    scored_a = [*(scorer.score(p.total) for p in plans if p.total), *known]
    scored_b = [*(scorer.score(p.with_input) for p in plans if p.with_input), *known]
    best_a = min(scored_a, key=lambda s: s.total, default=None)
    best_b = min(scored_b, key=lambda s: s.with_input, default=None)
    return {
        "default": default and {"A": default.total, "B": default.with_input, "path": default.critical_path},
        "tuned": best_a
        and best_b
        and {
            "A": best_a.total,
            "B": best_b.with_input,
            "path_A": best_a.critical_path,
            "path_B": best_b.critical_path,
        },
        "cpu": measured.cpu_seconds,
        "cpu_at_least": not measured.whole,
        "cpu_twin": fast.cpu_seconds + sum(p.cpu_seconds for p in plans),
        "twin_equal": equal,
        "note": rival.note,
    }


def row(spec: cases.Spec, record: Record) -> Record:
    """One line of the table."""
    rival, ours = record["rival"], record["ours"]
    cells: Record = {"tables": spec.name, "ranks": spec.ranks, "constants": spec.constants}
    for objective in ("A", "B"):
        mine, longer = ours[objective], ours.get(f"{objective}_normal")
        cells[f"{objective}_default"] = rival["default"] and rival["default"][objective]
        cells[f"{objective}_tuned"] = rival["tuned"] and rival["tuned"][objective]
        cells[f"{objective}_ours"] = mine and mine["value"]
        cells[f"{objective}_normal"] = longer and longer["value"]
        cells[f"{objective}_bound"] = mine and max(o["bound"] for o in (mine, longer) if o)
    cells["path_default"] = rival["default"] and rival["default"]["path"]
    cells["path_tuned_A"] = rival["tuned"] and rival["tuned"]["path_A"]
    cells["path_ours_A"] = ours["A"] and ours["A"]["path"]
    cells["path_tuned_B"] = rival["tuned"] and rival["tuned"]["path_B"]
    cells["path_ours_B"] = ours["B"] and ours["B"]["path"]
    cells["cpu_default"] = round(rival["cpu"], 2)
    cells["cpu_at_least"] = rival["cpu_at_least"]
    cells["cpu_twin"] = round(rival["cpu_twin"], 2)
    cells["cpu_ours_A"] = ours["A"] and round(ours["A"]["cpu"], 3)
    cells["cpu_ours_B"] = ours["B"] and round(ours["B"]["cpu"], 3)
    cells["legal"] = all(o["legal"] for o in ours.values() if o)
    cells["note"] = rival["note"] if ours["A"] else f"{rival['note']}; ours: no plan fits".strip("; ")
    return cells


def ratios(cells: Record) -> Record:
    """The ratios that the claims are made of; infinite where only the rival has a plan."""
    made: Record = {"legal": float(cells["legal"])}
    for key in ("A_default", "A_tuned", "B_default", "B_tuned"):
        theirs, mine, bound = cells[key], cells[f"{key[0]}_ours"], cells[f"{key[0]}_bound"]
        if theirs:
            made[key] = mine / theirs if mine else float("inf")
            made[f"{key}_bound"] = bound / theirs if mine else 1.0
    if cells["cpu_ours_A"]:
        made["cpu"] = cells["cpu_ours_A"] / cells["cpu_default"]
    return made


def claims(report: Report, records: list[Record], whole: bool) -> None:
    """Turn the records into claims; the bounds' geometric means say what room there was."""
    all_ratios = [ratios(cells) for cells in report.rows]

    def of(key: str) -> list[float]:
        return [r[key] for r in all_ratios if key in r]

    against = [v for key in ("A_default", "A_tuned", "B_default", "B_tuned") for v in of(key)]
    report.claim("never_worse_than_rival", max(against, default=None), 1.0 + 1e-9, "<=")
    for key, target in TARGETS.items():
        name, value = f"{key.replace('_', '_vs_')}_geomean", geomean(of(key))
        if whole:
            report.claim(name, value, target, "<=")
        elif value is not None:
            report.note(f"{name}: {value:.3f} on these cases (the target {target} is for all of them)")
    report.claim("memory_legal", min(of("legal"), default=None), 1.0, "==")
    equal = [r["rival"]["twin_equal"] for r in records if r["rival"]["twin_equal"] is not None]
    if equal:
        report.claim("twin_plans_equal_to_untouched_default", sum(equal) / len(equal), 1.0, "==")
    share = geomean(of("cpu"))
    if whole:
        report.claim("cpu_share_of_default_geomean", share, 1 / 20, "<=")
    elif share is not None:
        report.note(f"cpu_share_of_default_geomean: {share:.4f}")
    if of("cpu"):
        report.note(f"largest share of the default planner's CPU seconds: {max(of('cpu')):.4f} of 0.05 asked")
    stopped = sum(r["rival"]["cpu_at_least"] for r in records)
    if stopped:
        report.note(
            f"cpu: at least, in {stopped} cases: the default planner was stopped, its plan is the twin's"
        )
    for key in TARGETS:
        room = geomean(of(f"{key}_bound"))
        if room is not None:
            report.note(f"{key}: no plan of this option space can be below {room:.3f} (the proved bound)")


def measure(args: argparse.Namespace, store: cases.Store, specs: list[cases.Spec]) -> Iterator[str]:
    """Measure what is not stored; yields a line a case."""
    from benchmarks._torchrec_rival import build_case, build_module

    end = time.monotonic() + 60.0 * args.minutes
    module: tuple[Any, Any] = (None, None)
    for spec in specs:
        known = store.known.get(spec.key)
        if (known is not None) != args.ours_only or time.monotonic() >= end:
            continue
        if module[0] != spec.tables:
            module = (spec.tables, build_module(list(spec.tables)))
        case = build_case(module[1], list(spec.tables), spec.ranks, spec.constants)
        started = time.monotonic()
        ours = run_ours(case, spec.standard)
        if known is None:
            limit = max(args.default_limit, DECISIVE * (ours["A"]["cpu"] if ours["A"] else 0.0))
            known = {"rival": run_rival(case, limit)}
        store.put(spec.key, {"rival": known["rival"], "ours": ours})
        ratio = {k: round(v, 4) for k, v in ratios(row(spec, store.known[spec.key])).items()}
        yield f"{spec.name} {spec.ranks} {spec.constants}: {time.monotonic() - started:.1f} s {ratio}"


def check_rival(report: Report) -> None:
    """The twin's plans and ratings against those of the untouched planner: exactly equal, or a failure."""
    from benchmarks._torchrec_rival import MIN_PARTITIONS, build_case, build_module, default_plan, tuned_plans
    from benchmarks._torchrec_rival import plan_text as text
    from benchmarks._torchrec_twin import Twin

    for spec in cases.check():
        case = build_case(build_module(list(spec.tables)), list(spec.tables), spec.ranks, spec.constants)
        twin = Twin(case)
        pairs = [("default", default_plan(case), twin.default())]
        for width in MIN_PARTITIONS:
            plans = twin.tuned((width,))
            # No plan: the same options as an earlier min_partition, hence its plan.
            pairs.append(
                (f"tuned {width}", *tuned_plans(case, (width,)), plans[0] if plans else pairs[-1][2])
            )
        for name, theirs, ours in pairs:
            equal = text(theirs.total) == text(ours.total) and text(theirs.with_input) == text(
                ours.with_input
            )
            rated = theirs.ratings in (None, ours.ratings)
            report.row(
                tables=spec.name,
                ranks=spec.ranks,
                constants=spec.constants,
                planner=name,
                A=ours.ratings and ours.ratings[0],
                B=ours.ratings and ours.ratings[1],
                plans_equal=equal,
                ratings_equal=rated,
                cpu_untouched=round(theirs.cpu_seconds, 2),
                cpu_twin=round(ours.cpu_seconds, 2),
            )
    same = [r["plans_equal"] and r["ratings_equal"] for r in report.rows]
    report.claim("plans_and_ratings_equal", sum(same) / len(same), 1.0, "==")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two cases, under a minute")
    size.add_argument("--full", action="store_true", help="all table sets, from cheap to dear (hours)")
    size.add_argument("--tables", type=Path, help="a table set in the format of planner/data/tables")
    size.add_argument(
        "--check-rival", action="store_true", help="compare the twin with the untouched planner"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", default="8,16,64", help="with --tables: ranks, comma separated")
    parser.add_argument("--resume", type=Path, help="keep results in this file, and go on from there")
    parser.add_argument(
        "--ours-only", action="store_true", help="with --resume: our side again, stored cases"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after that long")
    parser.add_argument(
        "--default-limit", type=float, default=300.0, help="CPU seconds for the default planner (300)"
    )
    args = parser.parse_args()
    if args.ours_only and not args.resume:
        parser.error("--ours-only needs --resume FILE, the results to compare with")
    return args


def main() -> int:
    """Run the benchmark; exit code 0 when every claim holds."""
    args = arguments()
    report = Report("vs_torchrec")
    logging.disable(logging.WARNING)
    try:
        import torch
        import torchrec  # noqa: F401
    except ImportError as error:
        report.note(f"the rival is absent: {error}")
        report.claim("rival_installed", 0.0, 1.0, "==")
        return report.finish(args.json)
    torch.set_num_threads(1)
    warm_up()
    if args.check_rival:
        check_rival(report)
        return report.finish(args.json)
    chosen = cases.quick() if args.quick else cases.full() if args.full else cases.standard()
    specs = cases.of_file(args.tables, [int(r) for r in args.ranks.split(",")]) if args.tables else chosen
    store = cases.Store(args.resume)
    for line in measure(args, store, specs):
        print(line, file=sys.stderr, flush=True)
    done = [spec for spec in specs if spec.key in store.known]
    for spec in done:
        report.row(**row(spec, store.known[spec.key]))
    if len(done) < len(specs):
        report.note(f"{len(specs) - len(done)} of {len(specs)} cases are not measured yet")
    whole = len(done) == len(specs) and not (args.quick or args.tables)
    claims(report, [store.known[spec.key] for spec in done], whole)
    return report.finish(args.json)


def warm_up() -> None:
    """Load what both planners import lazily, so that no case pays for it."""
    from benchmarks._torchrec_rival import build_case, build_module, default_plan

    tables = [Table(f"warm{i}", 1000 * (i + 1) ** 4, 64, 1.0 + i) for i in range(20)]
    case = build_case(build_module(tables), tables, 8, "default")
    default_plan(case, 1.0)
    plan_ours(case, "total", "normal")


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # TorchRec enumerates sharding types and kernels in the order of a set of strings, which breaks ties.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(main())
