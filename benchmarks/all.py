"""Run every benchmark and write docs/benchmarks.md: ``make bench``.

    python -m benchmarks.all [--quick] [--resume] [--only NAME ...] [--results DIR] [--page FILE] [--minutes M]

Benchmarks run one at a time, from cheap to dear, each in its own process; one that fails is reported and the rest go
on. What each printed with ``--json`` is left in DIR (``build/benchmarks``, quick runs in its ``quick``) as
it ends, so ``--resume`` goes on after an interruption and runs what failed again. ``--quick`` runs the short
subsets and ends after 10 minutes: what is not done by then is said to be missing. The exit code is 0 when
every benchmark ran and every claim holds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Minutes to hours on two cores, the dearest last; all others take about a minute or less and go first.
DEAR = (
    "cache_ordering",
    "codecs",
    "fidelity",
    "peak_memory",
    "llm",
    "growth",
    "tiered_runtime",
    "scale",
    "vs_hugectr",
    "towers_model",
    "dedup",
    "context_parallel_cluster",
    "cluster_fidelity",
    "zoo_learning",
    "format_training",
    "compressed_training",
    "towers",
    "vs_torchrec",
)
QUICK_MINUTES = 10.0
QUICK_SECONDS = 120.0  # of one benchmark; each is meant to end within a minute on a quiet machine
GRACE_SECONDS = 20.0  # to clean up after an interrupt (networks of the emulated cluster)

Result = dict[str, Any]


def commands(folder: Path = HERE, quick: bool = False) -> list[str]:
    """Every benchmark, from cheap to dear: a module that offers ``--quick``; others are parts of one."""
    order = (DEAR[-1], *DEAR[:-1]) if quick else DEAR  # two cases of vs_torchrec take half a minute
    names = [
        path.stem
        for path in sorted(folder.glob("*.py"))
        if not path.stem.startswith("_") and path.stem != "all" and '"--quick"' in path.read_text("utf-8")
    ]
    return sorted(names, key=lambda name: order.index(name) if name in order else -1)


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs benchmarks of a folder and keeps what they print."""

    folder: Path
    results: Path
    quick: bool

    def command(self, name: str) -> list[str]:
        """What is run, without the interpreter."""
        extra = ["--quick"] if self.quick else []
        if name == "vs_torchrec" and not self.quick:
            extra = ["--resume", str(self.results / "vs_torchrec.jsonl")]  # takes hours: keeps each case
        return [str(self.folder / f"{name}.py"), "--json", *extra]

    def stored(self, name: str) -> Result | None:
        """What an earlier run left, if it ended."""
        with contextlib.suppress(OSError, json.JSONDecodeError):
            result = json.loads((self.results / f"{name}.json").read_text(encoding="utf-8"))
            return result if isinstance(result, dict) and "claims" in result else None
        return None

    def run(self, name: str, seconds: float) -> Result:
        """One benchmark in its own process: its JSON object, or ``failure`` with what it printed."""
        started = time.monotonic()
        out, err, stopped = _output([sys.executable, *self.command(name)], seconds)
        took = time.monotonic() - started
        about = {"date": datetime.date.today().isoformat(), "seconds": round(took, 1)}
        with contextlib.suppress(json.JSONDecodeError):
            result: Result = {**json.loads(out), "run": about}
            self._keep(name, result)
            return result
        why = f"stopped after {took:.0f} s\n" if stopped else ""
        return {"failure": (why + out + err)[-2000:] or "it printed nothing", "run": about}

    def _keep(self, name: str, result: Result) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        temporary = self.results / f"{name}.json.tmp"
        temporary.write_text(json.dumps(result), encoding="utf-8")
        temporary.replace(self.results / f"{name}.json")


def _output(command: Sequence[str], seconds: float) -> tuple[str, str, bool]:
    """Output and errors of a command, and whether it was stopped, its children with it."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds if seconds < float("inf") else None)
        return out, err, False
    except subprocess.TimeoutExpired:
        return *_stop(process), True
    except KeyboardInterrupt:
        _stop(process)
        raise


def _stop(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Interrupt a process group as Ctrl-C does; kill what is left of it after a while."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    try:
        return process.communicate(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def machine() -> str:
    """Processor and versions, without host names."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


def section(name: str, result: Result, quick: bool) -> str:
    """One benchmark as Markdown: the command, a line a claim, its notes."""
    about = result.get("run", {})
    took = f" ({about['seconds']:.0f} s, {about['date']})" if about else ""
    lines = [f"## {name}\n", f"`python benchmarks/{name}.py{' --quick' if quick else ''}`{took}\n"]
    if "failure" in result:
        lines.append(f"Did not finish:\n\n```\n{result['failure'].strip()}\n```\n")
        return "\n".join(lines)
    lines.append("| claim | value | target | holds |\n|---|---|---|---|")
    for claim in result["claims"]:
        value = claim["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else value
        holds = "yes" if claim["ok"] else "**no**"
        lines.append(f"| {claim['id']} | {shown} | {claim['sense']} {claim['target']} | {holds} |")
    lines += ["", *(f"- {note}" for note in result.get("notes", [])), ""]
    return "\n".join(lines)


def run_all(
    runner: Runner, names: Sequence[str], *, resume: bool, minutes: float, say: Callable[[str], None]
) -> dict[str, Result]:
    """The result of each benchmark; one not begun when the time is up has a ``failure`` that says so."""
    end = time.monotonic() + 60.0 * minutes
    results: dict[str, Result] = {}
    for name in names:
        kept = runner.stored(name) if resume else None
        left = end - time.monotonic()
        if kept is not None:
            results[name] = kept
        elif left <= 0:
            results[name] = {"failure": f"not run: the {minutes:.0f} minutes were over"}
        else:
            results[name] = runner.run(name, min(left, QUICK_SECONDS) if runner.quick else left)
        say(f"{name}: {verdict(results[name])}{' (kept)' if kept is not None else ''}")
    return results


def verdict(result: Result) -> str:
    """A benchmark in a few words."""
    if "failure" in result:
        return str(result["failure"]).strip().splitlines()[-1][:120]
    claims = result["claims"]
    held = sum(bool(claim["ok"]) for claim in claims)
    return f"{held} of {len(claims)} claims hold, {result.get('run', {}).get('seconds', 0.0):.0f} s"


def main() -> int:
    """Run all and write the page whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short subsets, ten minutes in all")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=commands(), help="these benchmarks alone"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "benchmarks")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--minutes", type=float, help="start no benchmark after that long (quick: 10)")
    args = parser.parse_args()
    minutes = args.minutes or (QUICK_MINUTES if args.quick else float("inf"))
    runner = Runner(HERE, args.results / "quick" if args.quick else args.results, args.quick)
    names = [name for name in commands(quick=args.quick) if not args.only or name in args.only]
    try:
        results = run_all(
            runner,
            names,
            resume=args.resume,
            minutes=minutes,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on from the results in {runner.results}", file=sys.stderr)
        return 130
    parts = [
        "# Benchmarks\n",
        f"Written by `make bench` on {datetime.date.today().isoformat()}; {machine()}.\n"
        "Rivals ran in the same process run as the planner, on the same input.\n",
        *(section(name, result, args.quick) for name, result in results.items()),
    ]
    temporary = args.page.with_suffix(".md.tmp")
    temporary.write_text("\n".join(parts))
    temporary.replace(args.page)
    print(f"written to {args.page}", file=sys.stderr)
    whole = all("failure" not in result for result in results.values())
    return 0 if whole and all(c["ok"] for r in results.values() for c in r["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
