"""`flywheel fetch`: the one command that goes to the network by itself."""

import logging
import os
from collections.abc import Sequence
from importlib import import_module

from data.errors import BadInput

USAGE = "usage: flywheel fetch NAME | OWNER/REPOSITORY | gs://BUCKET/FOLDER; `flywheel fetch --list` shows the names"


def run(arguments: Sequence[str]) -> int:
    """Fetch what is asked for and print the folder it lies in. Returns the exit code."""
    if list(arguments) in (["--list"], ["--help"], ["-h"]):
        _list()
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise BadInput(USAGE)
    os.environ["HF_HUB_OFFLINE"] = "0"  # read when huggingface_hub is imported
    for client in ("huggingface_hub", "httpx"):
        logging.getLogger(client).setLevel(logging.ERROR)  # what they warn of is tried again here
    print(import_module("tasks.weights").get(arguments[0]))
    return 0


def _list() -> None:
    print(USAGE + "\n")
    for name, known in import_module("tasks.weights").KNOWN.items():
        print(f"  {name:<12} {known.about}\n  {'':<12} {known.remote.name}")
        if known.original:
            print(f"  {'':<12} openpi's own: {known.original}")
