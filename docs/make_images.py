"""Draw the pictures of the README: ``python docs/make_images.py``."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

import planner
from planner.render import WIDTH, summary

FOLDER = Path(__file__).resolve().parent / "images"


def main() -> None:
    """docs/images/plan.svg: what ``planner compile dlrm-dcnv2 --topology h100-16x8`` prints."""
    FOLDER.mkdir(exist_ok=True)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(summary(planner.compile("dlrm-dcnv2", "h100-16x8")))
    svg = console.export_svg(title="planner compile dlrm-dcnv2 --topology h100-16x8", unique_id="plan")
    (FOLDER / "plan.svg").write_text(svg)


if __name__ == "__main__":
    main()
