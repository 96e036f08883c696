"""Run every benchmark and write docs/benchmarks.md: ``make bench`` (``--quick`` for the short subsets)."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"


def commands() -> list[str]:
    """Every benchmark module, in alphabetical order."""
    return sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_") and p.stem != "all")


def run(name: str, quick: bool) -> tuple[dict[str, object], str]:
    """One benchmark in its own process: its JSON object, or the tail of what it printed instead."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", *(["--quick"] if quick else [])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(result.stdout), ""
    return {}, (result.stdout + result.stderr)[-2000:]


def machine() -> str:
    """Processor and versions, without host names."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    import os

    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


def section(name: str, body: dict[str, object], failure: str, quick: bool) -> str:
    """One benchmark as Markdown: the command and a line a claim."""
    out = io.StringIO()
    print(f"## {name}\n\n`python benchmarks/{name}.py{' --quick' if quick else ''}`\n", file=out)
    if not body:
        print(f"Did not finish:\n\n```\n{failure}\n```\n", file=out)
        return out.getvalue()
    print("| claim | value | target | holds |\n|---|---|---|---|", file=out)
    claims = body.get("claims")
    for claim in claims if isinstance(claims, list) else []:
        value = claim["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else value
        holds = "yes" if claim["ok"] else "**no**"
        print(f"| {claim['id']} | {shown} | {claim['sense']} {claim['target']} | {holds} |", file=out)
    print(file=out)
    return out.getvalue()


def main() -> None:
    """Run all and write the page whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    parts = [
        "# Benchmarks\n",
        f"Written by `make bench` on {datetime.date.today().isoformat()}; {machine()}.\n"
        "Rivals ran in the same process run as the planner, on the same input.\n",
    ]
    for name in commands():
        print(f"{name} ...", file=sys.stderr, flush=True)
        parts.append(section(name, *run(name, quick), quick))
    temporary = PAGE.with_suffix(".md.tmp")
    temporary.write_text("\n".join(parts))
    temporary.replace(PAGE)
    print(f"written to {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
