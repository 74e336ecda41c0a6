"""SAPIEN's default shader without its look-up table.

The table (a 512x512 BRDF integral) is computed once per process: 5 CPU-seconds on a software driver. Here the installed
shader is copied and that one look-up replaced by the usual analytic fit; pictures look the same and start at once.
"""

import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from data.errors import BadInput
from data.paths import state_dir

DECLARATION = "uniform sampler2D samplerBRDFLUT"
LOOKUP = "vec2 envBRDF = texture(samplerBRDFLUT, vec2(roughness, dotNV)).xy;"
# Karis 2014, "Physically Based Shading on Mobile": scale and bias of the specular colour.
FIT = """vec4 fit = roughness * vec4(-1, -0.0275, -0.572, 0.022) + vec4(1, 0.0425, 1.04, -0.04);
  vec2 envBRDF = vec2(-1.04, 1.04) * (min(fit.x * fit.x, exp2(-9.28 * dotNV)) * fit.x + fit.y) + fit.zw;"""


def shader_dir() -> Path:
    """The patched copy of the installed SAPIEN's default shader, made on first use."""
    final = state_dir() / "shaders" / f"sapien-{version('sapien')}" / "default"
    if not final.exists():
        package = Path(find_spec("sapien").origin).parent
        _publish(package / "vulkan_shader", final)
    return final


def _publish(source: Path, final: Path) -> None:
    """Copy, patch, rename: a reader never sees half a shader, and two processes may race."""
    final.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent.parent) as folder:
        tree = Path(folder) / "tree"
        for part in ("default", "common"):  # default includes ../common
            shutil.copytree(source / part, tree / part)
        if sum(_patch(path) for path in sorted((tree / "default").iterdir())) != 3:
            raise BadInput(f"{source}: this SAPIEN's shaders are not those of 3.0; install the version in requirements.lock")
        try:
            os.rename(tree, final.parent)
        except OSError:
            if not final.exists():  # not lost to a racing process: a real fault
                raise


def _patch(path: Path) -> int:
    """Replace the declaration or look-up in one file; the number of places changed."""
    text = path.read_text()
    lines = [line for line in text.splitlines() if DECLARATION not in line]
    patched = "\n".join(lines).replace(LOOKUP, FIT)
    path.write_text(patched + "\n")
    return (len(lines) != len(text.splitlines())) + (LOOKUP in text)
