"""The composition: scaling, masks, widths, acting, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_policy import ACTION, BACKBONE, HEADS, HORIZON, PX, SCHEMA, batch, build, config, generator, spec, stats
from torch import nn

from data.errors import BadInput
from data.schema import Schema
from models import registry
from models.acting import ActingPolicy
from models.config import PolicyConfig
from models.policy import Policy, PolicySpec
from models.types import Context, Observation


def observation(n: int = 3) -> Observation:
    return batch(size=n).observation


def test_spec_survives_json():
    whole = spec(config("flow", pad_action=32, jitter=0.1))
    assert PolicySpec.from_json(whole.to_json()) == whole


def test_weights_are_a_function_of_the_seed():
    a, b, c = (build(seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build(seed=9)
    assert torch.equal(torch.rand(1), expected)


def test_pictures_are_scaled_once_and_either_layout_will_do():
    policy, seen = build(), observation()
    seen.images["head"][0] = 255
    seen.images["head"][1] = 0
    scaled = policy.prepare(seen).images["head"]
    assert scaled.shape == (3, 3, PX, PX) and scaled.dtype == torch.float32
    assert (scaled[0] == 1).all() and (scaled[1] == 0).all()
    chw = replace(seen, images={name: i.permute(0, 3, 1, 2) for name, i in seen.images.items()})
    assert torch.equal(policy.prepare(chw).images["head"], scaled)
    with pytest.raises(BadInput, match="uint8"):
        policy.prepare(replace(seen, images={name: i / 255 for name, i in seen.images.items()}))


def test_augmentation_is_of_training_alone_and_follows_the_generator():
    policy, data = build(), batch()
    first, again, other = (policy.train().loss(data, generator(g))[0] for g in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    plain = (policy.eval().loss(data, generator(g))[0] for g in ("a", "b"))
    assert torch.equal(*plain)  # act's loss draws nothing else


@pytest.mark.parametrize("head", HEADS)
def test_padded_widths_never_enter_the_loss(head, monkeypatch):
    """Contract 7: 32-dim variants. What the head predicts for padding cannot matter."""
    policy = build(config(head, pad_action=32, pad_state=32)).eval()
    data = batch()
    loss, _ = policy.loss(data, generator("l"))
    last = policy.head.action if head == "act" else policy.head.velocity_of
    with torch.no_grad():
        last.bias[ACTION:] += 1e6
    assert torch.equal(policy.loss(data, generator("l"))[0], loss)
    assert policy.predict_action(data.observation, generator("n")).shape == (8, HORIZON, ACTION)


def test_loss_of_a_perfect_prediction_is_zero(monkeypatch):
    policy, data = build().eval(), batch()
    monkeypatch.setattr(policy.head, "_decode", lambda context, style: policy.action.apply(data.action))
    assert policy.loss(data, generator(0))[0].abs().max() < 1e-6


def test_the_answer_is_in_the_environment_s_units_and_clips_commands(monkeypatch):
    policy = build().eval()
    normalised = torch.full((3, HORIZON, ACTION), 2.0)
    monkeypatch.setattr(policy.head, "sample", lambda context, noise: normalised)
    chunk = policy.predict_action(observation(), generator(0))
    expected = stats()["action"].mean + 2 * stats()["action"].std
    assert torch.allclose(chunk[0, 0, 2], torch.tensor(expected[2], dtype=torch.float32))  # rad: no limit
    assert expected[1] > 1 and (chunk[..., 1] == 1).all()  # "1": a command in [-1, 1]
    assert (chunk[..., 0] <= 1).all()


@pytest.mark.parametrize("head", HEADS)
def test_acting_is_a_function_of_observation_seed_and_step(head):
    """Not of the company a question is asked in, nor of what was asked before: bit for bit."""
    acting = ActingPolicy(build(config(head)), "digest")
    seen = batch(size=5).observation
    columns = {f"observation.images.{name}": i.numpy() for name, i in seen.images.items()}
    columns["observation.state"] = seen.state.numpy()
    together = acting.act(columns, ["t"] * 5, [1, 2, 3, 4, 5], [0, 0, 5, 5, 9])
    assert together.dtype == np.float32 and together.shape == (5, HORIZON, ACTION)
    alone = acting.act({name: c[3:4] for name, c in columns.items()}, ["t"], [4], [5])
    assert (alone[0] == together[3]).all()
    if head == "flow":
        other_step = acting.act({name: c[3:4] for name, c in columns.items()}, ["t"], [4], [6])
        assert not np.array_equal(other_step, alone)
    assert not acting.policy.training and torch.get_num_threads() != 0


def test_inference_and_get_action_are_predict_action():
    policy, seen = build(config("flow")).eval(), observation()
    noise = torch.randn(3, *policy.noise_shape, generator=generator("noise"))
    chunk = policy.predict_action(seen, noise=noise)
    assert torch.equal(policy.inference(seen, noise=noise), chunk)
    assert torch.equal(policy.get_action(seen, noise=noise), chunk)
    assert torch.equal(policy.propose(seen, noise[:, None])[:, 0], chunk)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "akt"}, "unknown head 'akt'; did you mean 'act'"),
        ({"backbone": "resnt"}, "unknown backbone 'resnt'; did you mean 'resnet'"),
        ({"head_options": {"dimm": 3}}, "head act has no option 'dimm'; did you mean 'dim'"),
        ({"backbone_options": {"keypoints": "many"}}, "backbone resnet: option keypoints"),
        ({"backbone_options": {"preset": "smal"}}, "backbone resnet: option preset"),
        ({"backbone_options": {"freeze": True}}, "freeze without pretrained"),
        ({"normalization": "mean"}, "unknown normalisation mode 'mean'"),
        ({"pad_action": 2}, "pad_action is 2, but the schema has 3"),
    ],
)
def test_refused_when_built(options, message):
    with pytest.raises(BadInput, match=message) as fault:
        build(PolicyConfig(**options))
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


def test_statistics_of_another_width_are_refused():
    with pytest.raises(BadInput, match="state: the statistics have 3 components, the schema 5"):
        Policy.build(spec(), {"state": stats()["action"], "action": stats()["action"]})


class PooledOnly(nn.Module):
    """A backbone that gives one vector."""

    gives = frozenset({"pooled"})
    Config = registry.BACKBONES.resolve("resnet").Config

    def __init__(self, config, *, cameras, image_size, state_width, give):
        super().__init__()
        self.width, self.linear = 8, nn.Linear(state_width, 8)

    def load_pretrained(self):
        pass

    def forward(self, observation):
        return Context(pooled=self.linear(observation.state))


def test_a_pair_that_does_not_fit_is_refused_naming_those_that_do(monkeypatch):
    monkeypatch.setitem(registry.BACKBONES.table, "pooled_only", "test_policy:PooledOnly")
    with pytest.raises(
        BadInput, match=r"'act' needs tokens.*'pooled_only'.*heads that fit it: diffusion, flow, gaussian, statevla$"
    ):
        build(PolicyConfig(backbone="pooled_only", head="act", head_options=HEADS["act"]))
    policy = build(PolicyConfig(backbone="pooled_only", head="flow", head_options=HEADS["flow"]))
    assert policy.predict_action(observation(), generator(0)).shape == (3, HORIZON, ACTION)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: replace(o, images={"head": o.images["head"]}), "camera 'wrist' is missing"),
        (lambda o: replace(o, images={n: i[:, :8] for n, i in o.images.items()}), "pictures are"),
        (lambda o: replace(o, state=o.state[:, :4]), "state has 4 components"),
    ],
)
def test_observations_that_do_not_fit_are_refused(change, message):
    with pytest.raises(BadInput, match=message):
        build().predict_action(change(observation()), generator(0))


def test_resnet18_reads_a_picture(tmp_path):
    """The GPU preset: from scratch with GroupNorm, and on weights in torchvision's names, frozen."""
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    scratch = build(PolicyConfig(backbone_options={"preset": "resnet18", "grid": 1}, head_options=HEADS["act"]))
    names = {type(m).__name__ for m in scratch.modules()}
    assert "GroupNorm" in names and "BatchNorm2d" not in names
    torch.manual_seed(0)
    weights = {n: w for n, w in resnet18(weights=None).state_dict().items() if "num_batches" not in n}
    save_file(weights, tmp_path / "resnet18.safetensors")
    options = {"preset": "resnet18", "pretrained": str(tmp_path / "resnet18.safetensors"), "freeze": True}
    policy = build(PolicyConfig(backbone_options=options, head_options=HEADS["act"]))
    trunk = policy.backbone.trunks[0].state_dict()
    assert torch.equal(trunk["1.layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])
    assert not any(p.requires_grad for p in policy.backbone.trunks.parameters())
    assert policy.predict_action(observation(1), generator(0)).isfinite().all()
    save_file({"conv1.weight": weights["conv1.weight"]}, tmp_path / "resnet18.safetensors")
    with pytest.raises(BadInput, match=r"bn1.weight is missing"):
        build(PolicyConfig(backbone_options=options, head_options=HEADS["act"]))


def test_schema_of_another_dataset_is_refused():
    other = Schema(**{**vars(SCHEMA), "fps": 10})
    with pytest.raises(BadInput, match="fps is 10"):
        spec().schema.refuse_unless_fits(other, mine="the policy", others="dataset D")


def test_small_preset_sees_where_a_thing_is():
    """The keypoints of an untrained trunk already move with the picture: nothing averages places away."""
    policy = build(PolicyConfig(backbone_options=BACKBONE, head="flow", head_options=HEADS["flow"])).eval()
    seen = observation(1)
    seen.images["head"][:] = 0
    moved = {name: i.clone() for name, i in seen.images.items()}
    seen.images["head"][:, 2:6, 2:6] = 255
    moved["head"][:, 10:14, 10:14] = 255
    a, b = (policy.context(o).pooled for o in (seen, replace(seen, images=moved)))
    assert (a - b).abs().max() > 1e-3
