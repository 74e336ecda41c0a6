"""Published weights, brought into the store: from the hub as they are, openpi's converted.

```
store/checkpoints/pi0/<name>/            as published
store/checkpoints/pi0/<name>-lerobot/    openpi's, as the folder LeRobot would have saved (models.openpi_folder)
store/checkpoints/paligemma/             the tokenizer
store/checkpoints/clip/                  what tasks become vectors with (models.layers.language)
```
"""

import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from data.download import FETCHED, Fetched, adopt, exclusive, fetch, read_fetched
from data.errors import BadInput
from data.paths import root, store_dir
from data.registry import did_you_mean
from data.remotes import Bucket, Hub, Remote, RemoteFile, Unreachable
from tasks.progress import console, progress

TOKENIZER, CLIP = ("tokenizer.json", "tokenizer_config.json"), ("model.safetensors", "config.json", "tokenizer.json")
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".msgpack", ".joblib"}
TEXTS = {".json", ".md", ".txt"}
OCDBT = "params/manifest.ocdbt"  # what an openpi checkpoint has
LEROBOT = "-lerobot"  # ends the name of a converted one
PALIGEMMA = "google/paligemma-3b-pt-224"
OPENPI = "gs://openpi-assets/checkpoints"
MB = 1_000_000  # bytes


@dataclass(frozen=True, kw_only=True)
class Known:
    """Weights with a short name."""

    remote: Remote
    about: str
    original: str = ""  # the address of openpi's own, converted when fetched


KNOWN = {
    "pi0_base": Known(
        remote=Hub("lerobot/pi0_base"), about="pi0 before fine-tuning, 14 GB", original=f"{OPENPI}/pi0_base"
    ),
    "pi05_base": Known(
        remote=Hub("lerobot/pi05_base"), about="pi0.5 before fine-tuning, 14 GB", original=f"{OPENPI}/pi05_base"
    ),
    "pi0_libero": Known(
        remote=Hub("lerobot/pi0_libero_finetuned_v044"),
        about="pi0 fine-tuned on LIBERO by LeRobot",
        original=f"{OPENPI}/pi0_libero",
    ),
    "pi05_libero": Known(
        remote=Hub("lerobot/pi05_libero_finetuned_v044"),
        about="pi0.5 fine-tuned on LIBERO by LeRobot",
        original=f"{OPENPI}/pi05_libero",
    ),
    "paligemma": Known(remote=Hub(PALIGEMMA), about="the tokenizer of all, 35 MB; gated: needs `hf auth login`"),
    "clip": Known(  # its main branch has pickles alone
        remote=Hub("openai/clip-vit-base-patch32", "refs/pr/15"), about="what tasks become vectors with, 0.6 GB"
    ),
}
PARTS = {"paligemma": TOKENIZER, "clip": CLIP}  # those that lie beside the pi0s, and what is taken of them


def get(what: str) -> Path:
    """The folder to use of `what`: a name of `KNOWN`, "owner/name" on the hub, or "gs://bucket/folder".

    Fetched, and converted if it is openpi's, unless it is there. Raises `BadInput` with one line.
    """
    remote, folder = resolve(what)
    choose = partial(_parts, remote, PARTS[what]) if what in PARTS else _weights
    bar = partial(_megabytes, folder.name)
    try:
        fetched = fetch(remote, folder, choose=choose, progress=bar, waiting=_waiting(folder), room=_room)
    except Unreachable as error:
        raise BadInput(_without_network(str(error), remote, folder)) from None
    return _converted(fetched) if OCDBT in fetched.files else fetched.folder


def resolve(what: str) -> tuple[Remote, Path]:
    """Where `what` is published, and where it lies here."""
    here = store_dir() / "checkpoints"
    if what in PARTS:
        return KNOWN[what].remote, here / what
    if what.startswith("gs://"):
        parts = [part for part in what.removeprefix("gs://").split("/") if part]
        if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]*\w", part) for part in parts):
            raise BadInput(f"{what}: no folder of a bucket; write gs://bucket/folder")
        return Bucket("gs://" + "/".join(parts)), here / "pi0" / f"gs--{parts[-1]}"
    if what in KNOWN:
        return KNOWN[what].remote, here / "pi0" / what
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", what):
        return Hub(what), here / "pi0" / what.replace("/", "--")
    raise BadInput(
        f"{what!r} is no OWNER/NAME of the hub, no gs:// address and no known name{did_you_mean(what, KNOWN)}"
    )


# -- what to take ----------------------------------------------------------------------------------------------------


def _weights(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """A pi0 in either layout, less what acting does not need. Raises `BadInput` for pickles alone, and for neither."""
    names = {file.name for file in files}
    if OCDBT in names:
        chosen = [f for f in files if f.name.startswith("params/") or _is_text(f, "assets")]
        return [file for file in chosen if PurePosixPath(file.name).suffix not in PICKLES]
    chosen = [f for f in files if "/" not in f.name and (_is_text(f) or f.name.endswith(".safetensors"))]
    if any(file.name.endswith(".safetensors") for file in chosen):
        return [file for file in chosen if file.name != FETCHED]
    pickles = sorted(name for name in names if PurePosixPath(name).suffix in PICKLES)
    if pickles:
        raise BadInput(
            f"{pickles[0][-60:]} is a pickle, which runs code when read; only safetensors or openpi's are taken"
        )
    raise BadInput(f"no weights there: neither *.safetensors nor openpi's {OCDBT}; check the address")


def _parts(remote: Remote, names: Sequence[str], files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Those of `names`, of which the first must be there."""
    chosen = [file for file in files if file.name in names]
    if names[0] not in {file.name for file in chosen}:
        raise BadInput(f"no {names[0]} there; fetch it from {remote.name}")
    return chosen


def _is_text(file: RemoteFile, folder: str = "") -> bool:
    path = PurePosixPath(file.name)
    return path.suffix in TEXTS and (not folder or path.parts[0] == folder)


def _room(files: Sequence[RemoteFile]) -> float:
    """openpi's are kept beside what they are converted to."""
    return 2.0 if any(file.name == OCDBT for file in files) else 1.0


# -- openpi's --------------------------------------------------------------------------------------------------------


def _converted(fetched: Fetched) -> Path:
    """LeRobot's layout of openpi's checkpoint, made now unless it is there."""
    out = fetched.folder.with_name(fetched.folder.name + LEROBOT)
    source = f"{fetched.source}, converted"
    with exclusive(out, _waiting(out)):
        if out.exists():
            return read_fetched(out, source=source).folder
        from models.openpi_folder import convert

        for killed in out.parent.glob(f".staging-{out.name}-*"):
            shutil.rmtree(killed)
        staging = out.parent / f".staging-{out.name}-{uuid.uuid4().hex[:8]}"
        staging.mkdir()
        try:
            console.print(f"  converting to LeRobot's layout: {_short(out)}", markup=False)
            convert(fetched.folder, staging, name=fetched.source.split("/")[-1], log=_say)
            adopt(staging, source=source, choose=lambda files: files)
            staging.rename(out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return out


# -- told to a person ------------------------------------------------------------------------------------------------


@contextmanager
def _megabytes(name: str, total: int) -> Iterator[Callable[[int], None]]:
    with progress(name, round(total / MB), "MB") as advance:
        done = 0

        def received(count: int) -> None:
            nonlocal done
            before, done = round(done / MB), done + count
            advance(round(done / MB) - before)

        yield received


def _waiting(folder: Path) -> Callable[[], None]:
    return lambda: _say(f"{_short(folder)}: another fetch is at work on it; waiting")


def _say(line: str) -> None:
    console.print(f"  {line}", markup=False)


def _without_network(fault: str, remote: Remote, folder: Path) -> str:
    return f"{fault}; elsewhere run `{remote.by_hand}`, bring the folder to {_short(folder)}, run this again"


def _short(folder: Path) -> str:
    return str(folder.relative_to(root()))
