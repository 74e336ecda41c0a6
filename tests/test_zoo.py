"""Policies by name: every name at every size is built, and published ones are read back strictly."""

import sys
from dataclasses import replace

import pytest
import torch
from tiny_policy import HORIZON, SCHEMA, batch, generator, stats

from data.errors import BadInput
from models import zoo
from models.policy import Policy, PolicySpec
from models.published import loading
from models.registry import BACKBONES
from models.zoo import PRESETS, ZOO, named

TASKS = ("pick up the cube",)
# what only the dataset knows
GIVEN = {("dp_clip", preset): {"backbone_options": {"tasks": TASKS}} for preset in PRESETS} | {
    ("statevla", "published"): {"backbone_options": {"tasks": TASKS}}
}


def build(name: str, preset: str, schema=SCHEMA) -> Policy:
    config = named(name, preset, **GIVEN.get((name, preset), {}))
    return Policy.build(PolicySpec(config=config, schema=schema, horizon=HORIZON), stats())


@pytest.mark.parametrize("name", ZOO)
def test_every_name_is_built_at_every_size(name):
    """The published one without memory; each larger than the one before."""
    counts = [sum(p.numel() for p in build(name, preset).parameters()) for preset in ("tiny", "small")]
    with torch.device("meta"):
        published = build(name, "published", replace(SCHEMA, image_size=(224, 224)))
    counts.append(sum(p.numel() for p in published.parameters()))
    assert counts == sorted(counts) and counts[0] < 400_000 and counts[-1] > 5e6
    assert PolicySpec.from_json(published.spec.to_json()).config.backbone == ZOO[name].backbone


@pytest.mark.parametrize("name", [name for name in ZOO if ("tasks" not in str(GIVEN.get((name, "tiny"))))])
def test_every_name_learns_and_answers_at_its_tiny_size(name):
    policy, data = build(name, "tiny"), batch()
    policy.loss(data, generator("loss"))[0].mean().backward()
    assert any(p.grad is not None for p in policy.parameters())
    assert policy.eval().predict_action(data.observation, generator("n")).isfinite().all()


def test_pi0_and_gr00t_have_the_widths_of_their_weights():
    assert (named("pi0").pad_state, named("pi05").pad_action) == (32, 32)
    assert (named("gr00t_n1").pad_state, named("gr00t_n1_5").pad_action) == (64, 32)
    assert named("pi05").head_options["pi05"] and not named("pi0").head_options.get("pi05")


def test_what_is_given_comes_on_top_of_the_preset():
    config = named("pi05", "small", pad_action=8, backbone_options={"longest": 100}, head_options={"steps": 3})
    assert config.pad_action == 8 and config.normalization == "min_max"
    assert config.backbone_options == {"preset": "small", "state_in_prompt": True, "longest": 100}
    assert config.head_options == {"preset": "small", "pi05": True, "draws": 4, "steps": 3}
    assert named("pi05", "small").backbone_options["longest"] == 200  # the table is as it was


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("pi0.5",), "unknown policy 'pi0.5'; did you mean 'pi05'"),
        (("act", "smal"), "policy act: unknown preset 'smal'; did you mean 'small'"),
    ],
)
def test_unknown_names_are_refused(asked, said):
    with pytest.raises(BadInput, match=said):
        named(*asked)
    with pytest.raises(BadInput, match="policy act: no option 'pad_actions'; did you mean 'pad_action'"):
        named("act", pad_actions=3)


def test_the_table_needs_no_torch(monkeypatch):
    import subprocess

    code = "import sys; from models.zoo import named; named('pi0'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_command_lists_names_and_pairs(capsys):
    from flows.cli import main

    assert main(["policies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in zoo.ZOO:
        assert any(line.split()[:1] == [name] and ZOO[name].parts in line for line in lines), name
    fitting = next(line for line in lines if line.split()[:2] == ["diffusion_rgb", "gives"])
    assert "flow" in fitting and "pi0_flow" not in fitting
    for name in BACKBONES:
        assert any(line.split()[:2] == [name, "gives"] for line in lines), name


# -- published -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A published kind whose weights are ours already."""
    policy = Policy.build(PolicySpec(config=named("flow_dit", "tiny"), schema=SCHEMA, horizon=HORIZON), stats(), seed=3)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in policy.state_dict().items()}

    def read(path):
        return policy.spec, {"state": policy.state, "action": policy.action}, weights

    monkeypatch.setitem(sys.modules, "toy_published", type(sys)("toy_published"))
    sys.modules["toy_published"].read = read
    monkeypatch.setitem(loading.KINDS.table, "toy", "toy_published:read")
    path = tmp_path / "store" / "checkpoints" / "pi0" / "somebody--something"
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"type": "toy"}')
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    return path, weights


def test_a_fetched_policy_is_found_by_its_name_and_filled(folder):
    path, weights = folder
    for source in (path, str(path), "somebody/something"):
        policy = loading.load_published(source)
        assert not policy.training
        assert all(torch.equal(t, weights[name].to(t.dtype)) for name, t in policy.state_dict().items())
    with pytest.raises(BadInput, match="no such folder, and not fetched; `flywheel fetch somebody/else` gets"):
        loading.load_published("somebody/else")


def test_weights_that_do_not_fit_are_counted_and_named(folder):
    path, weights = folder
    first, second, third, *_ = sorted(weights)
    del weights[first], weights[second]
    weights["head.mystery"] = weights[third]
    weights[third] = torch.zeros(3, 3, 3, 3, 3)
    with pytest.raises(BadInput) as fault:
        loading.load_published(path)
    said = str(fault.value)
    assert "of 87 weights 2 missing, 1 unknown, 1 of another shape: " in said and first in said
    assert len(said) < 200 and "\n" not in said


def test_another_kind_is_refused(folder):
    (folder[0] / "config.json").write_text('{"type": "smolvla"}')
    with pytest.raises(BadInput, match=r"is of a 'smolvla'; known: act, diffusion, gr00t_n1"):
        loading.load_published(folder[0])
    (folder[0] / "config.json").write_text("[]")
    with pytest.raises(BadInput, match=r"is of a '\?'"):
        loading.load_published(folder[0])


def test_every_kind_s_reader_is_there():
    for kind in loading.KINDS:
        assert callable(loading.KINDS.resolve(kind))
