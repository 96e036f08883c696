"""What a pass is: a frozen dataclass with a name, its options as fields, and ``run``."""

from __future__ import annotations

from typing import ClassVar, Protocol

from ir.program import Program


class Pass(Protocol):
    """A decision. ``run`` returns a new program and never mutates its input.

    The IR is valid before and after a pass (:func:`ir.verifier.verify_program` runs after each), not
    necessarily during it.
    """

    name: ClassVar[str]

    def run(self, program: Program) -> Program:
        """The program with this pass's decisions filled in."""
        ...
