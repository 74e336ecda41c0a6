"""apt for one folder: download and unpack packages without root and without changing the system.

Its lists, cache and idea of what is installed (nothing) are private; its sources are the machine's own.
"""

import re
import subprocess
from pathlib import Path

from data.errors import BadInput

NEEDS_BACKPORTS = ("bookworm",)  # releases whose own Mesa is older than 24
ALIASES = ("stable", "oldstable", "oldoldstable", "testing", "unstable", "sid")  # what a source may say for a codename


class PrivateApt:
    """See the head of this file; `folder` must not exist yet."""

    def __init__(self, folder: Path) -> None:
        for sub in ("lists/partial", "cache/archives/partial", "sources"):
            (folder / sub).mkdir(parents=True)
        (folder / "status").touch()
        self.folder = folder
        self.release = os_release()["VERSION_CODENAME"]
        for name, text in sources_of(Path("/etc/apt"), self.release).items():
            (folder / "sources" / name).write_text(text)
        self.options = [
            f"-oDir::State::Lists={folder}/lists",
            f"-oDir::State::status={folder}/status",
            f"-oDir::Cache={folder}/cache",
            f"-oDir::Etc::sourceparts={folder}/sources",
            "-oDir::Etc::sourcelist=/dev/null",
            "-oAPT::Sandbox::User=root",  # the usual download user could not write here
            "-oAPT::Install-Recommends=0",
        ]
        if self.release in NEEDS_BACKPORTS:
            self.options.append(f"-oAPT::Default-Release={self.release}-backports")

    def update(self) -> None:
        self._run("apt-get", "update")

    def closure(self, *packages: str) -> list[str]:
        """`packages` and all they stand on, as apt would install them on an empty machine."""
        return re.findall(r"^Inst (\S+)", self._run("apt-get", "--simulate", "install", *packages), flags=re.M)

    def unpack(self, packages: list[str], tree: Path) -> None:
        self._run("apt-get", "download", *packages)
        for archive in sorted(self.folder.glob("*.deb")):
            _command("dpkg", "-x", str(archive), str(tree))

    def _run(self, tool: str, *arguments: str) -> str:
        return _command(tool, *self.options, *arguments, cwd=self.folder)


def _command(*command: str, cwd: Path | None = None) -> str:
    """What `command` prints. Raises `BadInput` with the last line of its complaint."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BadInput(
            f"{command[0]} failed: {reason[:110]}; is the network up, does `apt-get update` work, is there room?"
        )
    return done.stdout


def sources_of(etc: Path, release: str) -> dict[str, str]:
    """The machine's sources for its own `release`, as file name -> text, with the backports suite if needed."""
    wanted = {release, *ALIASES}
    sources = {}
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if not path.is_file() or path.suffix not in (".list", ".sources"):
            continue
        edit = _edit_stanza if path.suffix == ".sources" else _edit_line
        pieces = re.split(r"\n\s*\n", path.read_text()) if path.suffix == ".sources" else path.read_text().splitlines()
        kept = [text for piece in pieces if (text := edit(piece, wanted, release in NEEDS_BACKPORTS))]
        if kept:
            sources[path.name] = ("\n\n" if path.suffix == ".sources" else "\n").join(kept) + "\n"
    if not sources:
        raise BadInput(f"{etc}: no apt source for release {release!r}; add one, or install Mesa >= 24 with lavapipe")
    return sources


def _edit_stanza(stanza: str, wanted: set[str], backports: bool) -> str | None:
    """One deb822 stanza, its suites extended; None if it is not for this release or switched off."""
    field = re.search(r"^Suites:(.*)$", stanza, flags=re.M)
    off = re.search(r"^Enabled:\s*no", stanza, flags=re.M | re.I)
    own = [suite for suite in field[1].split() if suite in wanted] if field else []
    if field is None or off or not own:
        return None
    suites = f"{field[1].strip()} {own[0]}-backports" if backports else field[1].strip()
    return stanza[: field.start()] + f"Suites: {suites}" + stanza[field.end() :]


def _edit_line(line: str, wanted: set[str], backports: bool) -> str | None:
    """One `deb [options] address suite components` line, with a twin for the backports."""
    parts = re.match(r"(deb\s+(?:\[.*?\]\s+)?\S+\s+)(\S+)(\s.*)$", line.strip())
    if not parts or parts[2] not in wanted:
        return None
    return line + (f"\n{parts[1]}{parts[2]}-backports{parts[3]}" if backports else "")


def os_release() -> dict[str, str]:
    pairs = re.findall(r'^(\w+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), flags=re.M)
    return {"VERSION_CODENAME": "sid", **dict(pairs)}


def is_installed(package: str) -> bool:
    done = subprocess.run(["dpkg-query", "-W", "-f=${db:Status-Status}", package], capture_output=True, text=True)
    return done.stdout.strip() == "installed"
