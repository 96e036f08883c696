"""The site: ``make docs`` builds it into ``docs/_build/html``, and every warning is an error."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "shardwright"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
highlight_language = "text"  # unmarked blocks are output of commands
myst_heading_anchors = 3
html_theme = "furo"
html_title = "shardwright"
html_theme_options = {"light_css_variables": {"code-font-size": "72%"}}  # docstrings are up to 110 wide
html_copy_source = False
html_show_copyright = False


def publish_schemas(app: Any, exception: Exception | None) -> None:
    """``schemas/NAME.json`` in the site: what ``planner schema NAME`` prints."""
    from planner.schema import json_schema, names

    if exception is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir) / "schemas"
    folder.mkdir(exist_ok=True)
    for name in names():
        (folder / f"{name}.json").write_text(json.dumps(json_schema(name), indent=2) + "\n")


class CostModel(Directive):
    """The formulae of ``cost_models/NAME.py``: its docstring, so that page and code cannot differ."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One literal block; an error where the file or its docstring is missing."""
        path = ROOT / "cost_models" / f"{self.arguments[0]}.py"
        text = ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
        if text is None:
            raise self.error(f"{path.name} has no docstring to show")
        self.state.document.settings.record_dependencies.add(str(path))
        text = re.sub(r":\w+:`", "`", text).replace("``", "`")
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Any) -> None:
    """Register the directive; publish the schemas when the pages are written."""
    app.add_directive("cost-model", CostModel)
    app.connect("build-finished", publish_schemas)
