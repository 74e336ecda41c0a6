"""Code of a user's own that registers backbones, heads, policies and phases when it is imported.

```
 pip install my_package                 its entry points in the group `vla_flywheel.plugins` name modules
 flywheel train --plugin my_module      a module that can be imported, or a file; may be repeated
 FLYWHEEL_PLUGINS=my_module:/x/y.py     the same for what starts without a command line; children inherit it
```
They are imported when a name is asked for that the tables do not have: what needs no plugin pays for none.
"""

import os
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from data.errors import BadInput

GROUP = "vla_flywheel.plugins"  # of entry points
VARIABLE = "FLYWHEEL_PLUGINS"  # modules and files, separated as PATH is


def add(plugin: str) -> None:
    """Have this process and its children know `plugin`. Raises `BadInput` for one that is not there."""
    if _is_file(plugin):
        plugin = str(Path(plugin).resolve())
    if plugin not in _named():
        os.environ[VARIABLE] = os.pathsep.join([*_named(), plugin])
    _module(plugin)


def load() -> None:
    """Import all plugins, once. Raises `BadInput` for one that cannot be imported."""
    for name, module, remedy in _known():
        _import(name, module, remedy)


def _known() -> list[tuple[str, str, str]]:
    """(who asks for it, module, what to do if it fails)."""
    named = [(f"plugin {p}", _module(p), f"mend it or leave it out of --plugin and {VARIABLE}") for p in _named()]
    installed = [
        (f"plugin {e.name} of {e.dist.name if e.dist else '?'}", e.module, "mend or uninstall that package")
        for e in entry_points(group=GROUP)
    ]
    return named + installed


@cache
def _import(name: str, module: str, remedy: str) -> None:
    try:
        import_module(module)
    except BadInput:
        raise
    except Exception as fault:  # whatever a user's code may raise
        raise BadInput(f"{name}: {type(fault).__name__}: {str(fault).splitlines()[0]:.90}; {remedy}") from fault


def _named() -> list[str]:
    return [plugin for plugin in os.environ.get(VARIABLE, "").split(os.pathsep) if plugin]


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py")


@cache
def _module(plugin: str) -> str:
    """The module to import; a file's folder goes to the end of the path, so that it hides nothing."""
    if not _is_file(plugin):
        try:
            found = find_spec(plugin)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise BadInput(f"plugin {plugin!r}: no such module can be imported; install it, or name a file.py")
        return plugin
    path = Path(plugin)
    if not path.is_file():
        raise BadInput(f"plugin {plugin}: no such file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    found = find_spec(path.stem)
    if found is None or found.origin is None or Path(found.origin).resolve() != path.resolve():
        where = found.origin if found else "nowhere"
        raise BadInput(f"plugin {plugin}: the name {path.stem!r} belongs to {where}; rename the file")
    return path.stem
