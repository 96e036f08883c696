"""``python -m benchmarks.cluster``."""

from __future__ import annotations

from benchmarks.cluster.cli import cli

if __name__ == "__main__":
    cli(prog_name="python -m benchmarks.cluster")
