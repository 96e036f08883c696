"""The site: ``make docs`` builds it into ``docs/_build/html``, and every warning is an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "shardwright"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
highlight_language = "text"  # unmarked blocks are output of commands
myst_heading_anchors = 3
html_theme = "furo"
html_title = "shardwright"
html_copy_source = False
html_show_copyright = False


def publish_schemas(app: Any, exception: Exception | None) -> None:
    """``schemas/NAME.json`` in the site: what ``planner schema NAME`` prints."""
    from planner.schema import RECORDS, json_schema

    if exception is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir) / "schemas"
    folder.mkdir(exist_ok=True)
    for name in RECORDS:
        (folder / f"{name}.json").write_text(json.dumps(json_schema(name), indent=2) + "\n")


def setup(app: Any) -> None:
    """Publish the schemas when the pages are written."""
    app.connect("build-finished", publish_schemas)
