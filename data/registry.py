"""A registry is a table you can read: name -> "module:Attribute", imported when it is asked for."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from data.errors import BadInput


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'`, or the known names when nothing is close."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


class Registry:
    """Lazily imported parts of one kind ("scene", "backbone", ...)."""

    def __init__(self, kind: str, table: dict[str, str]) -> None:
        self.kind = kind
        self.table = dict(table)

    def __contains__(self, name: str) -> bool:
        return name in self.table

    def __iter__(self):
        return iter(self.table)

    def register(self, name: str, target: str) -> None:
        """Add `name` -> "module:Attribute". A name that is another's is refused, naming both."""
        if self.table.setdefault(name, target) != target:
            raise BadInput(
                f"{self.kind} {name!r} is {self.table[name]}, and {target} asks for the name; choose another"
            )

    def module(self, name: str) -> str:
        """The module that `name` lives in. Raises `BadInput` with a did-you-mean."""
        if name not in self.table:
            raise BadInput(f"unknown {self.kind} {name!r}{did_you_mean(name, self.table)}")
        return self.table[name].split(":")[0]

    def resolve(self, name: str) -> Any:
        """The registered attribute itself, imported now. Raises `BadInput` with a did-you-mean."""
        return getattr(import_module(self.module(name)), self.table[name].split(":")[1])
