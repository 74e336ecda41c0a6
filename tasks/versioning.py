"""DVC's name for a folder's content: the md5 that `dvc.lock` records, and that MLflow shows as a dataset's digest.

The only file that knows dvc. `dvc_data` promises no stable interface; a test holds it to what `dvc add` writes.
"""

from pathlib import Path

from data.errors import BadInput
from data.paths import state_dir


def dvc_digest(path: Path) -> str:
    """`<md5>.dir` of a folder, `<md5>` of a file. Files known by inode, size and time of change are not read again.

    BadInput if there is nothing at `path`, or DVC would refuse it.
    """
    from dvc_data.hashfile.build import IgnoreInCollectedDirError, build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.state import State
    from dvc_objects.fs.local import LocalFileSystem

    path = Path(path).absolute()
    known = state_dir() / "dvc" / "state"
    known.mkdir(parents=True, exist_ok=True)
    state = State(root_dir="/", tmp_dir=str(known))
    files = LocalFileSystem()
    try:
        _, _, tree = build(HashFileDB(files, str(known), state=state), str(path), files, "md5", dry_run=True)
    except FileNotFoundError as error:
        raise BadInput(f"{path}: nothing there to take a digest of; run the stage that makes it") from error
    except IgnoreInCollectedDirError as error:
        raise BadInput(f"{path}: DVC versions no folder with a .dvcignore inside; remove that file") from error
    finally:
        state.close()
    assert tree.hash_info and tree.hash_info.value
    return tree.hash_info.value
