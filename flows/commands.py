"""The commands beside the flows."""

import json
from collections.abc import Callable, Sequence
from importlib import import_module

from data.errors import BadInput
from data.registry import did_you_mean


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one of `flows.cli.COMMANDS`. Returns the exit code."""
    return COMMANDS[command](list(arguments))


def _stage(arguments: list[str]) -> int:
    front = import_module("flows.dvc_front")
    if len(arguments) != 2:
        raise BadInput(f"usage: flywheel stage STAGE RECIPE; stages: {', '.join(front.STAGES)}")
    front.run_stage(*arguments)
    return 0


def _offline_rl(arguments: list[str]) -> int:
    import tyro

    offline_rl = import_module("tasks.offline_rl")
    asked = tyro.cli(offline_rl.OfflineRL, args=arguments, prog="flywheel offline-rl")
    print(offline_rl.run(asked).path)
    return 0


def _policies(arguments: list[str]) -> int:
    _refuse_unknown(arguments, ())
    import_module("flows.policies").show()
    return 0


def _fetch(arguments: list[str]) -> int:
    return import_module("flows.fetch").run(arguments)


def _doctor(arguments: list[str]) -> int:
    _refuse_unknown(arguments, ("--json", "--deep"))
    return import_module("flows.doctor").run(as_json="--json" in arguments, deep="--deep" in arguments)


def _up(arguments: list[str]) -> int:
    _refuse_unknown(arguments, ())
    for line in import_module("flows.services").up():
        print(line)
    return 0


def _down(arguments: list[str]) -> int:
    _refuse_unknown(arguments, ())
    for line in import_module("flows.services").down():
        print(line)
    return 0


def _status(arguments: list[str]) -> int:
    _refuse_unknown(arguments, ("--json",))
    state = import_module("flows.services").status()
    if "--json" in arguments:
        print(json.dumps(state))
    else:
        for name, text in state.items():
            print(f"{name:<10} {text}")
    return 0


def _refuse_unknown(arguments: list[str], known: tuple[str, ...]) -> None:
    for word in arguments:
        if word not in known:
            raise BadInput(
                f"unknown option {word!r}{did_you_mean(word, known) if known else '; this command has none'}"
            )


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "stage": _stage,
    "offline-rl": _offline_rl,
    "policies": _policies,
    "fetch": _fetch,
    "doctor": _doctor,
    "up": _up,
    "down": _down,
    "status": _status,
}
