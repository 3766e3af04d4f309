"""An extension of the docs site: what docstrings say of each parameter is a list, as they have a line for each."""

import re
from typing import Any

from griffe import Extension, Object

PARAMETERS = re.compile(r"((?:\w+, )*\w+): (.*)")


class ParameterLists(Extension):
    """Changes docstrings when they have been read and before they are shown."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(docstring: str) -> str:
    """A docstring whose lines `name: words`, with those that go on below them, are the items of a list."""
    lines: list[str] = []
    in_list = False
    for line in docstring.splitlines():
        match = PARAMETERS.match(line)
        if match:
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            lines += [f"* {names}: {match[2]}"] if in_list else ["", f"* {names}: {match[2]}"]
            in_list = True
        elif in_list and line and not line.startswith("Raises "):
            lines.append(f"  {line.strip()}")
        else:
            lines += ["", line] if in_list else [line]
            in_list = False
    return "\n".join(lines)
