"""`--help` of a flow: every field of the recipe with its type, default and meaning."""

import ast
import inspect
import textwrap
import tokenize
from dataclasses import fields, is_dataclass
from functools import cache
from io import StringIO
from typing import Any, get_type_hints

from rich.console import Console
from rich.table import Table

from flows.recipes import RECIPES, load
from tasks.recipe import hint
from tasks.stages import STAGES

COMMON = {
    "--explain": "say which stages are stale and why, run nothing",
    "--force STAGE": f"do this stage anyway ({', '.join(STAGES)}); may be repeated",
    "--no-resume": "start a killed training over instead of going on from its last checkpoint",
    "--another-night": "nightly only: collect one night more than were completed, as the schedule does",
    "--plugin MODULE": "a module or file.py that registers models of yours (CONTRIBUTING.md); may be repeated",
    "--record FILE": "write the summary with the code's commit to a JSON file",
    "--json": "the summary as one JSON object on the last line",
}


def show(flow: str, recipe: str) -> None:
    """Print the options of `flow` with the defaults of `recipe`."""
    loaded = load(recipe)
    console = Console(highlight=False)
    console.print(f"usage: flywheel {flow} [RECIPE] [--option value ...]\n")
    console.print(f"recipes: {', '.join(RECIPES)}; shown here: {loaded.name}, {loaded.about}\n", markup=False)
    table = _grid()
    for option, about in COMMON.items():
        table.add_row(option, "", about)
    console.print(table)
    for f in fields(loaded):
        part = getattr(loaded, f.name)
        if is_dataclass(part):
            console.print(f"\n{f.name}: {(type(part).__doc__ or '').strip().splitlines()[0]}", markup=False)
            table = _grid()
            _rows(table, part, f.name + ".")
            console.print(table)


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    return table


def _rows(table: Table, part: Any, prefix: str) -> None:
    types = get_type_hints(type(part))
    for f in fields(part):
        value = getattr(part, f.name)
        if is_dataclass(value):
            _rows(table, value, f"{prefix}{f.name}.")
        else:
            about = comments(type(part)).get(f.name, "")
            table.add_row(f"  --{prefix}{f.name}", _shown(value), f"{about} ({hint(types[f.name])})")


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None or value == {} else str(value)


@cache
def comments(cls: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, or on the line above it, as its author wrote it there."""
    inherited = [comments(base) for base in reversed(cls.__bases__) if is_dataclass(base)]
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    found = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    described = {name: about for part in inherited for name, about in part.items()}
    for node in next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = node.lineno - 1 if lines[node.lineno - 2].lstrip().startswith("#") else 0
            described[node.target.id] = found.get(node.end_lineno or 0) or found.get(above, "")
    return described
