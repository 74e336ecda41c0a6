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
import fcntl
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
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

from data.errors import BadInput
from data.paths import state_dir
from data.sim.apt import PrivateApt, is_installed

PACKAGE = "mesa-vulkan-drivers"
SAPIEN_NEEDS = "libx11-6"  # its wheel links to libX11 and does not bring it
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

    Built beside its final name and renamed, one process at a time: a kill leaves nothing that would be used, and what
    it leaves the next installation removes.
    """
    if missing := [tool for tool in ("apt-get", "dpkg") if not shutil.which(tool)]:
        raise BadInput(
            f"no Vulkan driver SAPIEN accepts, and {missing[0]} is not here to fetch one: "
            "install Mesa >= 24 with lavapipe by this system's own means"
        )
    state_dir().mkdir(parents=True, exist_ok=True)
    with open(state_dir() / "vulkan.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in state_dir().glob("vulkan-*"):
            shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(prefix="vulkan-", dir=state_dir()) as folder:
            log(f"fetching {PACKAGE} into {driver_dir()}")
            tree = _unpacked(Path(folder))
            if driver_dir().exists():
                driver_dir().rename(Path(folder) / "old")  # goes with the temporary folder
            tree.rename(driver_dir())
    return driver_dir()


def _unpacked(work: Path) -> Path:
    """The driver, ready to be used, in a new folder under `work`."""
    apt = PrivateApt(work / "apt")
    apt.update()
    needed = apt.closure(PACKAGE, SAPIEN_NEEDS)
    packages = [p for p in needed if p == PACKAGE or not (is_installed(p) or p in NEVER_UNPACK)]
    tree = work / "vulkan"
    apt.unpack(packages, tree)
    _write_icd(tree)
    return tree


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
    return next(Path(str(distribution("sapien").locate_file("sapien"))).glob("pysapien.*.so"))


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
