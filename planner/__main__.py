"""``python -m planner`` and the ``planner`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: whatever goes wrong is one sentence and an exit code, from the first import on."""
    try:
        from planner.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
