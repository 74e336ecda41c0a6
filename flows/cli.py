"""`flywheel`: the command line. Nothing heavy is imported before it is known what is asked."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module

from data.errors import BadInput
from data.registry import did_you_mean

FLOWS = {
    "nightly": "collect, build, train, evaluate, register",
    "collect": "rollouts of a recipe, in committed batches",
    "dataset": "frame stores, chunk tables and the training set",
    "train": "a policy checkpoint",
    "evaluate": "success on unseen seeds",
    "compare": "several recipes on the same data and seeds: success, speed, memory",
}
COMMANDS = {
    "stage": "one stage of a recipe, written where dvc.yaml expects it",
    "offline-rl": "chunk-level offline RL on a LeRobot dataset of yours",
    "policies": "the policies by name, and which backbone fits which head",
    "fetch": "published weights of pi0 and its tokenizer, into the store",
    "doctor": "what this machine can do, and the command that mends what it cannot",
    "up": "start Prefect's server and worker and MLflow's pages, deploy the flows, schedule the nightly",
    "down": "end what `up` started",
    "status": "what is running, and where its pages are",
}
USAGE = """usage: flywheel COMMAND ...

flows (each: flywheel FLOW [RECIPE] [options]; RECIPE is demo unless said; compare takes several)
{flows}
commands
{commands}
`flywheel FLOW [RECIPE] --help` shows every option with its default and unit. `--plugin MODULE` goes with all."""


@dataclass
class Arguments:
    """What a flow was asked."""

    recipes: list[str] = field(default_factory=list)
    several: bool = False  # whether it takes more than one recipe
    overrides: list[str] = field(default_factory=list)
    force: list[str] = field(default_factory=list)
    explain: bool = False
    json: bool = False
    record: str = ""
    resume: bool = True
    another_night: bool = False
    help: bool = False

    @property
    def recipe(self) -> str:
        """The one that is asked for, or the first of several."""
        return self.recipes[0] if self.recipes else "demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except BadInput as fault:
        print(f"flywheel: {fault}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our lines has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("flywheel: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    arguments = _without_plugins(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(flows=_table(FLOWS), commands=_table(COMMANDS)))
        return 0
    command, *rest = arguments
    if command not in FLOWS and command not in COMMANDS:
        raise BadInput(f"unknown command {command!r}{did_you_mean(command, [*FLOWS, *COMMANDS])}")
    import_module("flows.environment").prepare()
    if command in FLOWS:
        return _flow(command, parse(rest, several=command == "compare"))
    return import_module("flows.commands").run(command, rest)


def _without_plugins(arguments: list[str]) -> list[str]:
    """`arguments` less `--plugin MODULE`, wherever it stands; what is named is known here and to all children."""
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        name, sign, plugin = word.partition("=")
        if name != "--plugin":
            rest.append(word)
        elif sign or queue:
            import_module("models.plugins").add(plugin or queue.pop(0))
        else:
            raise BadInput("--plugin needs a module that can be imported, or a file.py")
    return rest


def _flow(command: str, asked: Arguments) -> int:
    if asked.help:
        import_module("flows.help").show(command, asked.recipe)
        return 0
    running = import_module("flows.running")
    if asked.explain:
        running.explain(command, asked)
        return 0
    summary = running.run(command, asked)
    if asked.record:
        running.record(summary, asked.record)
    if asked.json:
        print(json.dumps(summary, sort_keys=True))
    return 0


def parse(rest: Sequence[str], *, several: bool = False) -> Arguments:
    """`[RECIPE ...] [--fit.lr 1e-4 | --fit.lr=1e-4] [--force STAGE]`, and the flags of `flows.help.COMMON`."""
    asked = Arguments(several=several)
    queue = list(rest)
    while queue and not queue[0].startswith("-") and (several or not asked.recipes):
        asked.recipes.append(queue.pop(0))
    while queue:
        word = queue.pop(0)
        if word in ("-h", "--help"):
            asked.help = True
        elif word in ("--explain", "--json", "--another-night"):
            setattr(asked, word[2:].replace("-", "_"), True)
        elif word in ("--resume", "--no-resume"):
            asked.resume = word == "--resume"
        elif word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            if not sign:
                if not queue or (queue[0].startswith("--")):
                    raise BadInput(f"option --{name} needs a value; `--help` shows every option")
                value = queue.pop(0)
            if name == "force":
                asked.force.append(value)
            elif name == "record":
                asked.record = value
            else:
                asked.overrides.append(f"{name}={value}")
        else:
            raise BadInput(f"unexpected argument {word!r}; options are written --name value")
    return asked


def _table(rows: dict[str, str]) -> str:
    return "".join(f"  {name:<10} {about}\n" for name, about in rows.items()).rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
