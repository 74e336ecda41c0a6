"""Which code an answer stands on: the digests of a module and of every module of ours that it imports.

A plugin's module counts as its package's: what it imports of its own package and of ours is followed too.
A comment or a docstring changes no answer, so they are left out of the digest.
"""

import ast
import hashlib
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

OURS = ("data", "models", "tasks", "flows")


def code_digests(
    modules: tuple[str, ...], libraries: tuple[str, ...] = (), *, without: frozenset[str] = frozenset()
) -> dict[str, str]:
    """`{module: digest}` of `modules` and all they import of ours, and `{library: version}`.

    without: modules that are left out, together with whatever is imported by way of them only.
    """
    seen: set[str] = set()
    queue = list(modules)
    while queue:
        module = queue.pop()
        if module not in seen and module not in without:
            seen.add(module)
            queue.extend(_imports(module))
    return {m: _digest(m) for m in sorted(seen)} | {name: version(name) for name in libraries}


@cache
def _source(module: str) -> Path | None:
    """The file of a module, or None. Looked up on disk: asking the import system would import its parents."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None:
        return None
    if not spec.submodule_search_locations:  # a plugin may be a single file
        return Path(spec.origin) if spec.origin and not rest else None
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    path = _source(module)
    return ast.parse(path.read_text() if path else "")


@cache
def _digest(module: str) -> str:
    tree = _tree(module)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            node.body = body[1:]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _imports(module: str) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (source := _imported_from(node, module)):
            # `from data.sim import env` names a module, `from data.store import Store` does not
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    followed = {*OURS, module.split(".")[0]}
    return frozenset(name for name in found if name.split(".")[0] in followed and _source(name) is not None)


def _imported_from(node: ast.ImportFrom, module: str) -> str:
    """The absolute name of what `from ... import` names in `module`."""
    if not node.level:
        return node.module or ""
    path = _source(module)
    above = module.split(".")
    above = above[: len(above) - node.level + bool(path and path.name == "__init__.py")]
    return ".".join([*above, *([node.module] if node.module else [])])
