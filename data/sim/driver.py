"""A Vulkan driver that SAPIEN accepts, on a machine without a GPU, without root and without changing the system.

SAPIEN renders through Vulkan. Mesa's software driver (lavapipe) will do from version 24 on; Debian 12 ships 22, which
lacks `descriptorBindingPartiallyBound`, and most servers ship none. So the distribution's own newer package is
unpacked under `.flywheel/vulkan`, with whatever libraries the machine lacks, and used by this project's processes only:

```
 python -m data.sim.driver      works already? -> one line
                                else: private apt lists -> download -> dpkg -x -> .flywheel/vulkan -> works? -> one line
 load_sapien() in each process  .flywheel/vulkan there, no GPU asked for? -> preload its libraries, VK_ICD_FILENAMES
```
The addresses come from the machine's own apt sources.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from data.errors import BadInput
from data.paths import state_dir

PACKAGE = "mesa-vulkan-drivers"
SAPIEN_NEEDS = "libx11-6"  # its wheel links to libX11 and does not bring it
NEEDS_BACKPORTS = ("bookworm",)  # releases whose own Mesa is older than 24
ALIASES = ("stable", "oldstable", "oldoldstable", "testing", "unstable", "sid")  # what a source may say for a codename
NEVER_UNPACK = ("libc6", "libgcc-s1", "libstdc++6")  # a second copy of these in one process is asking for trouble
PROBE = "import sapien; sapien.render.RenderSystem(); print(sapien.render.get_device_summary())"


@dataclass(frozen=True, kw_only=True)
class RenderDevice:
    """What SAPIEN would render on."""

    ok: bool  # SAPIEN can render here
    name: str  # e.g. "llvmpipe (LLVM 15.0.6, 256 bits)"; "" when there is none
    detail: str  # the reason there is none, or where the driver comes from


def driver_dir() -> Path:
    """The unpacked private driver, when there is one."""
    return state_dir() / "vulkan"


def ensure_driver(device: str = "auto") -> None:
    """Make this process ready for `import sapien`, which must come after. Cheap; call it as often as you like.

    The private driver is used unless the caller has chosen one (VK_ICD_FILENAMES, VK_DRIVER_FILES), or a GPU is asked
    for, or "auto" finds one. Where `python -m data.sim.driver` found the system's own good enough, there is none.
    """
    icd = driver_dir() / "icd.json"
    if not icd.exists():
        return
    _preload(icd.parent)
    chosen = os.environ.get("VK_ICD_FILENAMES") or os.environ.get("VK_DRIVER_FILES")
    if not chosen and resolve_device(device) == "cpu":
        os.environ["VK_ICD_FILENAMES"] = str(icd)


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda": the kind of device that "auto", "cpu" or "cuda:N" means on this machine."""
    return "cuda" if device.startswith("cuda") or (device == "auto" and _has_nvidia_vulkan()) else "cpu"


def load_sapien(device: str = "auto") -> ModuleType:
    """`import sapien`, ready to render, without its warning that it brings its own Vulkan loader."""
    ensure_driver(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to find system libvulkan")
        try:
            import sapien
        except ImportError as error:  # it links to libX11, which a bare server does not have
            raise BadInput(f"cannot import sapien: {str(error)[:100]}; run `python -m data.sim.driver`") from error
    return sapien


def device_summary() -> RenderDevice:
    """What SAPIEN finds, asked in a fresh process: a Vulkan that is broken may abort the one that asks."""
    ensure_driver()
    probe = f"from data.sim.driver import load_sapien; load_sapien(); {PROBE}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", probe], capture_output=True, text=True, timeout=120)
    found = re.search(r"GPU: (.*)\n\s*Supported: 1", done.stdout)
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or [f"the probe ended with code {done.returncode}"])[-1]
        return RenderDevice(ok=False, name="", detail=reason)
    icd = os.environ.get("VK_ICD_FILENAMES") or "the system's driver"
    return RenderDevice(ok=True, name=found[1], detail=icd)


def install_driver(log: Callable[[str], None] = print) -> Path:
    """Unpack the distribution's lavapipe under `driver_dir()` and return that folder. Raises `BadInput` if it cannot.

    Atomic: built beside its final name and renamed, so that a kill leaves nothing half-made and two may race.
    """
    if missing := [tool for tool in ("apt-get", "apt-cache", "dpkg") if not shutil.which(tool)]:
        raise BadInput(
            f"no Vulkan driver SAPIEN accepts, and {missing[0]} is not here to fetch one: "
            "install Mesa >= 24 with lavapipe by this system's own means"
        )
    state_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vulkan-", dir=state_dir()) as folder:
        work = Path(folder)
        apt = _PrivateApt(work / "apt")
        log(f"fetching {PACKAGE} into {driver_dir()}")
        apt.update()
        needed = apt.closure(PACKAGE, SAPIEN_NEEDS)
        packages = [p for p in needed if p == PACKAGE or not (_installed(p) or p in NEVER_UNPACK)]
        tree = work / "vulkan"
        apt.unpack(packages, tree)
        _write_icd(tree)
        _publish(tree, driver_dir())
    return driver_dir()


def _publish(tree: Path, final: Path) -> None:
    """Put `tree` in the place of `final`, whatever lies there."""
    if final.exists():
        final.rename(tree.parent / "old")  # goes with the temporary folder
    try:
        tree.rename(final)
    except OSError:
        if not (final / "icd.json").exists():  # not a racing process that was first, but a real fault
            raise


class _PrivateApt:
    """apt with its own lists, cache and idea of what is installed (nothing), reading the machine's own sources."""

    def __init__(self, folder: Path) -> None:
        for sub in ("lists/partial", "cache/archives/partial", "sources"):
            (folder / sub).mkdir(parents=True)
        (folder / "status").touch()
        self.folder = folder
        self.release = _os_release()["VERSION_CODENAME"]
        for name, text in _sources(Path("/etc/apt"), self.release).items():
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


def _sources(etc: Path, release: str) -> dict[str, str]:
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
    suites = re.search(r"^Suites:(.*)$", stanza, flags=re.M)
    off = re.search(r"^Enabled:\s*no", stanza, flags=re.M | re.I)
    own = [suite for suite in (suites[1].split() if suites else []) if suite in wanted]
    if off or not own:
        return None
    extended = f"{suites[1].strip()} {own[0]}-backports" if backports else suites[1].strip()
    return stanza[: suites.start()] + f"Suites: {extended}" + stanza[suites.end() :]


def _edit_line(line: str, wanted: set[str], backports: bool) -> str | None:
    """One `deb [options] address suite components` line, with a twin for the backports."""
    parts = re.match(r"(deb\s+(?:\[.*?\]\s+)?\S+\s+)(\S+)(\s.*)$", line.strip())
    if not parts or parts[2] not in wanted:
        return None
    return line + (f"\n{parts[1]}{parts[2]}-backports{parts[3]}" if backports else "")


def _os_release() -> dict[str, str]:
    pairs = re.findall(r'^(\w+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), flags=re.M)
    return {"VERSION_CODENAME": "sid", **dict(pairs)}


def _installed(package: str) -> bool:
    done = subprocess.run(["dpkg-query", "-W", "-f=${db:Status-Status}", package], capture_output=True, text=True)
    return done.stdout.strip() == "installed"


def _write_icd(tree: Path) -> None:
    """`icd.json` for the Vulkan loader (its path relative, so the folder may move) and the libraries to preload."""
    library = next(tree.rglob("libvulkan_lvp.so"), None)
    shipped = next(tree.rglob("lvp_icd*.json"), None)
    if library is None or shipped is None:
        raise BadInput(f"{PACKAGE} of this distribution holds no lavapipe; install Mesa >= 24 with lavapipe")
    icd = json.loads(shipped.read_text())
    icd["ICD"]["library_path"] = f"./{library.relative_to(tree)}"
    (tree / "icd.json").write_text(json.dumps(icd))
    (tree / "preload.json").write_text(json.dumps(_private_libraries(tree, library, _sapien_library())))


def _sapien_library() -> Path:
    folder = Path(find_spec("sapien").submodule_search_locations[0])
    return next(folder.glob("pysapien.*.so"))


def _private_libraries(tree: Path, *users: Path) -> list[str]:
    """Those libraries that `users` need and that lie in `tree`, relative to it."""
    folders = sorted({str(path.parent) for path in tree.rglob("*.so*")})
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders)}
    paths: list[Path] = []
    for user in users:
        listing = subprocess.run(["ldd", str(user)], env=environment, capture_output=True, text=True).stdout
        paths += [Path(found) for found in re.findall(r"=> (\S+) \(", listing)]
    private = [path.relative_to(tree) for path in paths if path.is_relative_to(tree)]
    return [str(path) for path in dict.fromkeys(reversed(private))]  # mostly what is needed before what needs it


def _preload(folder: Path) -> None:
    """Load the private libraries by path: the dynamic loader then finds them by name when the driver asks.

    This is what LD_LIBRARY_PATH would do, had it been set before the process began.
    """
    waiting = [folder / name for name in json.loads((folder / "preload.json").read_text())]
    while waiting:
        failed = []
        for path in waiting:
            try:
                ctypes.CDLL(str(path))
            except OSError as error:  # it needs one that comes later in the list
                failed.append((path, error))
        if len(failed) == len(waiting):
            raise BadInput(f"{folder}: {failed[0][1]}; delete that folder and run `python -m data.sim.driver`")
        waiting = [path for path, _ in failed]


def _has_nvidia_vulkan() -> bool:
    """Whether an NVIDIA GPU with the graphics half of its driver is here (containers often have only compute)."""
    if not Path("/dev/nvidiactl").exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        ctypes.CDLL("libGLX_nvidia.so.0")
    except OSError:
        return False
    return True


def main() -> None:
    found = device_summary()
    if not found.ok:
        install_driver()
        found = device_summary()
    if not found.ok:
        raise BadInput(f"SAPIEN still finds no device: {found.detail[:120]}; install Mesa >= 24 with lavapipe")
    print(f"Vulkan device: {found.name} [{found.detail}]")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
