"""YAML as this project reads it: one document of plain data, nothing that grows while it is read.

Of YAML 1.1, what could make a small file large, slow or ambiguous is refused: anchors and aliases (a few lines of
them describe more nodes than memory holds), merge keys, tags, deep nesting, integers of more digits than any
quantity has, and keys given twice, of which the first would be lost without a word.
"""

from __future__ import annotations

from typing import Any

from ir.errors import InputError
from ir.reading import MAX_DIGITS, MAX_NESTING, clipped

MAX_YAML_CHARACTERS = 2 * 2**20  # libyaml with Python's constructors reads about 100 KB/s: 20 s


def loads_yaml(text: str, what: str) -> Any:
    """Parsed YAML; raises InputError with line and column of what is wrong."""
    import yaml

    if len(text) > MAX_YAML_CHARACTERS:
        raise InputError(
            f"{what} is larger than {MAX_YAML_CHARACTERS} characters; this is not a file for people"
        )
    fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=fast), what)
        return yaml.load(text, Loader=_loader(fast))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "bad syntax"
        raise InputError(f"{what} is not YAML: {clipped(str(problem))}{_at(mark)}") from None
    except (ValueError, OverflowError) as error:  # of dates and numbers that do not exist
        raise InputError(f"{what} holds a value that cannot be read: {clipped(str(error))}") from None
    except RecursionError:
        raise InputError(f"{what} is nested too deeply to be read") from None


def _at(mark: Any) -> str:
    return f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _check_events(events: Any, what: str) -> None:
    """Refuse aliases, tags and depth before anything is built."""
    import yaml

    depth = 0
    for event in events:
        where = _at(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise InputError(f"{what} has an anchor or alias{where}; write the value out")
        if getattr(event, "tag", None) is not None:
            raise InputError(f"{what} has the tag {clipped(event.tag)!r}{where}; plain values only")
        if isinstance(event, yaml.ScalarEvent):
            event.value.encode()  # halves of a character, written as escapes, are no text
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_NESTING:
                raise InputError(f"{what} is nested too deeply to be read{where}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _loader(base: Any) -> Any:
    """``base`` with integers of bounded length and keys that must differ."""
    import yaml

    class Loader(base):  # type: ignore[misc]
        """Safe loader of one document."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(
                        None, None, "merge keys are not read; write the keys out", key.start_mark
                    )
                same = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if same in seen:
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"the key {clipped(key.value)!r} is given twice; remove one",
                        key.start_mark,
                    )
                if same is not None:
                    seen.add(same)
            return super().construct_mapping(node, deep=deep)

        def whole(self, node: Any) -> Any:
            number = self.construct_yaml_int(node) if len(node.value) <= MAX_DIGITS else 2**63
            if abs(number) >= 2**63:
                raise yaml.constructor.ConstructorError(
                    None, None, "a whole number is too large; numbers end at 2**63", node.start_mark
                )
            return number

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.whole)
    return Loader
