"""`python benchmarks [NAME ...]`: each claim of speed beside its peer; measurements go to docs/results/NAME.json."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"


def measure(script: Path) -> dict | None:
    """The JSON object on the script's last line; everything else it says goes to the terminal as it comes.

    None when it ends with a line for people instead: there was nothing to measure on this machine.
    """
    process = subprocess.Popen([sys.executable, script, "--json"], stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        if last:
            print(last, end="", flush=True)
        last = line
    if process.wait():
        print(last, end="")
        raise SystemExit(process.returncode)
    if last.startswith("{"):
        return json.loads(last)
    print(last, end="")
    return None


def main(names: list[str]) -> None:
    scripts = [path for path in sorted(HERE.glob("*.py")) if path.name != "__main__.py"]
    if unknown := set(names) - {path.stem for path in scripts}:
        raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in scripts)}")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    for script in scripts:
        if names and script.stem not in names:
            continue
        print(f"== {script.stem}", flush=True)
        if not (found := measure(script)):
            continue
        result = {**found, "commit": commit.stdout.strip()}
        (RESULTS / f"{script.stem}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
