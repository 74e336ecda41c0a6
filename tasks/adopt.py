"""Adoption: LeRobot datasets that others recorded, checked and copied into the store before anything stands on them."""

import shutil
from pathlib import Path

from data.errors import BadInput
from data.refs import Ref
from data.store import Build
from tasks.recipe import Recipe
from tasks.stages import Work, ensure
from tasks.versioning import dvc_digest


def adopt_datasets(recipe: Recipe) -> list[Ref]:
    """One artefact per folder in `dataset.sources`; a folder whose content changed is another artefact."""
    refuse_malformed(recipe)
    return [_adopt(Path(source)) for source in recipe.dataset.sources]


def refuse_malformed(recipe: Recipe) -> None:
    """Raise `BadInput` for the first source that is no sound dataset."""
    for source in map(Path, recipe.dataset.sources):
        if not source.is_dir():
            raise BadInput(f"dataset.sources {source}: no such folder; name the root of a LeRobot dataset")
        from data.validate import check_dataset

        check_dataset(source)


def _adopt(source: Path) -> Ref:
    content = {"content": dvc_digest(source)}
    return ensure("adopt", content, label=source.name, execution={"source": str(source.absolute())})


def copy_checked(build: Build, work: Work) -> None:
    """The body of the `adopt` stage; the source has just been checked."""
    shutil.copytree(work.execution["source"], build.out, dirs_exist_ok=True)
    for path in build.out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
