"""Parts in a user's own package: found by an entry point or by name, in this process and in its children."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_policy import BACKBONE, FIT, HEADS, batch, batches, build, generator

from data.errors import BadInput
from models import plugins, registry
from models.checkpoint import load_policy
from models.config import PolicyConfig
from models.fit import fit
from tasks import code

BACKBONE_FILE = """
from dataclasses import dataclass

import torch
from torch import nn

from models.registry import register
from models.types import Context


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    width: int = 8  # d of the context


@register("pixels", kind="backbone")
class Pixels(nn.Module):
    Config = PixelsConfig
    gives = frozenset({"pooled"})

    def __init__(self, config, *, cameras, image_size, state_width, give):
        super().__init__()
        self.cameras, self.width = cameras, config.width
        self.linear = nn.Linear(state_width + 3 * len(cameras), config.width)

    def load_pretrained(self):
        pass

    def forward(self, observation):
        colours = [observation.images[name].mean(dim=(2, 3)) for name in self.cameras]
        return Context(pooled=self.linear(torch.cat([observation.state, *colours], dim=1)))
"""

HEAD_FILE = """
from dataclasses import dataclass

from torch import nn

from models.layers.masked import masked_mean
from models.registry import register


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    bias: bool = True  # whether the chunk has a constant part


@register("linear", kind="head")
class LinearHead(nn.Module):
    Config = LinearConfig
    needs, likes = frozenset({"pooled"}), frozenset()
    noise_shape = (0,)

    def __init__(self, config, sizes):
        super().__init__()
        self.linear = nn.Linear(sizes.context, sizes.horizon * sizes.action, bias=config.bias)
        self.shape = (sizes.horizon, sizes.action)

    def loss(self, context, action, mask, generator):
        return masked_mean((self.sample(context, None) - action) ** 2, mask), {}

    def sample(self, context, noise):
        return self.linear(context.pooled).unflatten(1, self.shape)
"""


@pytest.fixture
def forgotten_afterwards(monkeypatch):
    """No plugin outlives the test: neither in the tables, nor in the environment, nor among the modules."""
    before = set(sys.modules)
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for table, _ in registry.OPEN.values():
        monkeypatch.setattr(table, "table", dict(table.table))
    caches = plugins._module, plugins._import, code._source, code._tree, code._digest, code._imports
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()
    for name in set(sys.modules) - before:
        if not name.startswith(("models", "data", "tasks", "torch", "flows")):
            del sys.modules[name]


@pytest.fixture
def mine(tmp_path, forgotten_afterwards) -> Path:
    """A backbone and a head, each in one file, and no other file touched."""
    (tmp_path / "my_backbone.py").write_text(BACKBONE_FILE)
    (tmp_path / "my_head.py").write_text(HEAD_FILE)
    plugins.add(str(tmp_path / "my_backbone.py"))
    plugins.add(str(tmp_path / "my_head.py"))
    return tmp_path


def test_a_backbone_and_a_head_are_one_new_file_each(mine):
    """Each by name with what is there already, and the two together; three steps, saved, loaded."""
    pairs = {
        "both": PolicyConfig(backbone="pixels", head="linear", head_options={"bias": False}),
        "backbone": PolicyConfig(backbone="pixels", head="flow", head_options=HEADS["flow"]),
        "head": PolicyConfig(backbone="resnet", backbone_options=BACKBONE, head="linear"),
    }
    for name, config in pairs.items():
        folder = fit(build(config), batches, FIT, mine / name)
        policy, seen = load_policy(folder), batch().observation
        assert policy.predict_action(seen, generator(0)).isfinite().all()
        assert policy.spec.config == config
    with pytest.raises(BadInput, match="head linear has no option 'bais'; did you mean 'bias'"):
        build(PolicyConfig(backbone="pixels", head="linear", head_options={"bais": False}))
    with pytest.raises(BadInput, match=r"'act' needs tokens, which backbone 'pixels' does not give; .*, linear"):
        build(PolicyConfig(backbone="pixels", head="act"))


def test_a_wrong_name_still_gets_a_did_you_mean(mine):
    with pytest.raises(BadInput, match="unknown backbone 'pixel'; did you mean 'pixels'"):
        build(PolicyConfig(backbone="pixel"))
    with pytest.raises(BadInput, match="unknown policy 'pear'; did you mean 'pair'"):
        build(PolicyConfig(kind="pear"))


def test_a_name_that_is_taken_is_refused_naming_both(tmp_path, forgotten_afterwards):
    (tmp_path / "other_head.py").write_text(HEAD_FILE.replace('"linear"', '"gaussian"'))
    plugins.add(str(tmp_path / "other_head.py"))
    with pytest.raises(BadInput) as fault:
        registry.HEADS.resolve("no such head")
    said = str(fault.value)
    assert "head 'gaussian' is models.heads.gaussian:GaussianHead, and other_head:LinearHead asks for the name" in said
    assert len(said) < 200 and "\n" not in said


def test_the_same_class_may_be_registered_again(mine):
    registry.HEADS.resolve("linear")
    registry.register("linear", kind="head")(sys.modules["my_head"].LinearHead)


def test_what_cannot_be_imported_is_one_line(tmp_path, forgotten_afterwards):
    with pytest.raises(BadInput, match="plugin 'no_such_module': no such module can be imported"):
        plugins.add("no_such_module")
    with pytest.raises(BadInput, match=r"absent.py: no such file"):
        plugins.add(str(tmp_path / "absent.py"))
    (tmp_path / "torch.py").write_text("")
    with pytest.raises(BadInput, match=r"the name 'torch' belongs to .*; rename the file"):
        plugins.add(str(tmp_path / "torch.py"))
    (tmp_path / "broken_plugin.py").write_text("import no_such_module_either\n")
    os.environ[plugins.VARIABLE] = str(tmp_path / "broken_plugin.py")
    with pytest.raises(BadInput, match=r"ModuleNotFoundError: No module named .*; mend it or leave it out"):
        list(registry.HEADS)
    assert registry.HEADS.resolve("flow")  # what needs no plugin pays for none


def test_its_code_is_in_the_key_with_what_it_imports_of_its_own(tmp_path, forgotten_afterwards):
    package = tmp_path / "their_models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "size.py").write_text("WIDTH = 8\n")
    (package / "pixels.py").write_text("from .size import WIDTH\n" + BACKBONE_FILE.replace(" = 8", " = WIDTH"))
    sys.path.append(str(tmp_path))
    plugins.add("their_models.pixels")

    def digests() -> dict[str, str]:
        for cached in (code._source, code._tree, code._digest, code._imports):
            cached.cache_clear()
        return code.code_digests(registry.modules({"backbone": "pixels", "head": "flow"}))

    before = digests()
    assert {"their_models.pixels", "their_models.size", "models.heads.flow", "models.pair"} <= set(before)
    (package / "size.py").write_text("WIDTH = 9\n")
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {"their_models.size"}


def run(program: str, tmp_path: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_entry_point_is_found(tmp_path):
    (tmp_path / "their_head.py").write_text(HEAD_FILE)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vla_flywheel.plugins]\nheads = their_head\n")
    program = "from models.registry import HEADS; print(HEADS.module('linear'), 'gaussian' in list(HEADS))"
    assert run(program, tmp_path).split() == ["their_head", "True"]


def test_the_command_line_s_plugin_travels_to_spawned_processes(tmp_path, monkeypatch):
    (tmp_path / "my_head.py").write_text(HEAD_FILE)
    (tmp_path / "child.py").write_text(
        "def ask():\n    from models.registry import HEADS\n    print(HEADS.module('linear'))\n"
    )
    program = f"""
        import multiprocessing
        from flows.cli import _without_plugins
        import child

        if __name__ == "__main__":
            rest = _without_plugins(["train", "demo", "--plugin", "{tmp_path}/my_head.py", "--policy.head=linear"])
            assert rest == ["train", "demo", "--policy.head=linear"], rest
            worker = multiprocessing.get_context("spawn").Process(target=child.ask)
            worker.start()
            worker.join()
    """
    assert run(program, tmp_path).split() == ["my_head"]


def test_the_command_line_refuses_a_plugin_that_is_not_there(capsys, forgotten_afterwards):
    from flows.cli import main

    for words, said in (
        (["--plugin", "nowhere", "status"], "no such module"),
        (["nightly", "--plugin"], "needs a module"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_naming_a_plugin_imports_nothing_heavy(tmp_path):
    (tmp_path / "my_head.py").write_text(HEAD_FILE)
    program = f"""
        import sys
        from models import plugins
        plugins.add("{tmp_path}/my_head.py")
        print("torch" in sys.modules)
    """
    assert run(program, tmp_path).split() == ["False"]
