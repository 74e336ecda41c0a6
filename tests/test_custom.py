"""A policy of a user's own: CONTRIBUTING.md's text is run as it stands there."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_plugins import forgotten_afterwards  # noqa: F401 (a fixture)
from tiny_policy import ACTION, FIT, HORIZON, batch, batches, build, generator, spec, stats
from torch import nn

from data.errors import BadInput
from models import plugins
from models.acting import ActingPolicy
from models.checkpoint import load_critic, load_policy
from models.config import PolicyConfig
from models.custom import BasePolicy, Custom
from models.fit import fit
from models.policy import Policy
from models.registry import POLICIES, register
from models.types import Judged

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def template(tmp_path, forgotten_afterwards):  # noqa: F811
    """CONTRIBUTING.md's policy in a file, found as a plugin."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "documented_policy.py").write_text(code)
    plugins.add(str(tmp_path / "documented_policy.py"))
    return PolicyConfig(kind="custom_policy", options={"width": 32}, shift=0)


def test_the_documented_policy_trains_saves_loads_and_acts(template, tmp_path):
    before = build(template)
    folder = fit(build(template), batches, replace(FIT, steps=3), tmp_path / "run")
    loaded = load_policy(folder, weights="last")
    assert isinstance(loaded, Custom) and loaded.spec == before.spec
    assert not torch.equal(loaded.state_dict()["model.hidden.weight"], before.state_dict()["model.hidden.weight"])
    data = batch(size=3)
    columns = {f"observation.images.{name}": i.numpy() for name, i in data.observation.images.items()}
    columns["observation.state"] = data.observation.state.numpy()
    chunk = ActingPolicy(loaded, "digest").act(columns, ["t"] * 3, [0, 1, 2], [0, 0, 0])
    assert chunk.shape == (3, HORIZON, ACTION) and np.isfinite(chunk).all()
    expected = loaded.in_units(loaded.model(_read(loaded, data), train=False)["action_pred"])
    np.testing.assert_allclose(chunk, expected.detach().numpy(), atol=1e-6)
    with pytest.raises(BadInput, match="holds a custom_policy, not a critic"):
        load_critic(folder)


def test_it_learns_eight_chunks(template):
    policy, data = build(template), batch()
    error = (policy.predict_action(data.observation) - data.action).abs()[~data.action_is_pad].mean()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for step in range(200):
        policy.loss(data, generator("step", step))[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = (policy.predict_action(data.observation) - data.action).abs()[~data.action_is_pad].mean()
    assert after < 0.1 * error


def test_options_of_the_documented_policy_are_checked(template):
    with pytest.raises(BadInput, match="policy custom_policy has no option 'widht'; did you mean 'width'"):
        build(replace(template, options={"widht": 3}))
    with pytest.raises(BadInput, match="policy custom_policy: option width"):
        build(replace(template, options={"width": "wide"}))


class Plain(BasePolicy):
    """What each method answers is the test's."""

    noise_shape = (2,)

    def __init__(self, config, spec):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(spec.horizon, spec.action_width))
        self.gives = "action_pred"

    def forward(self, batch, train=True):
        if train:
            return {"loss": ((self.bias - batch.action) ** 2).mean()}
        return {self.gives: self.bias + batch.noise[:, :1, None]}


@pytest.fixture
def plain(monkeypatch) -> Policy:
    monkeypatch.setitem(POLICIES.table, "plain", "test_custom:Plain")
    return build(PolicyConfig(kind="plain"))


def test_one_loss_for_all_has_its_own_gradient_and_is_refused_where_samples_are_weighed(plain):
    data = batch()
    loss, _ = plain.loss(data, generator())
    loss.mean().backward()
    got, plain.model.bias.grad = plain.model.bias.grad.clone(), None
    mask = plain.mask(data.action_is_pad)
    ((plain.model.bias - plain.normalised(data.action, mask)) ** 2).mean().backward()
    assert loss.shape == (8,) and torch.equal(got, plain.model.bias.grad)
    judged = Judged(**vars(data), advantage=torch.zeros(8))
    with pytest.raises(BadInput, match=r"policy 'plain': loss is \[\], but \[8\] was asked for"):
        plain.loss(judged, generator())


def test_acting_is_a_function_of_the_noise(plain):
    seen, noise = batch(size=3).observation, torch.randn(3, 4, 2, generator=generator("noise"))
    many = plain.propose(seen, noise)
    assert many.shape == (3, 4, HORIZON, ACTION)
    assert torch.equal(many[:, 2], plain.predict_action(seen, noise=noise[:, 2]))
    assert not torch.equal(many[:, 1], many[:, 2])


def test_what_it_answers_is_checked(plain):
    plain.model.gives = "actions"
    with pytest.raises(BadInput, match="policy 'plain': inference gives actions, and no action_pred"):
        plain.predict_action(batch().observation)
    plain.model.gives = "action_pred"
    plain.model.bias = nn.Parameter(torch.zeros(HORIZON + 1, ACTION))
    with pytest.raises(BadInput, match=r"action_pred is \[8, 5, 3\], but \[8, 4, 3\] was asked for"):
        plain.predict_action(batch().observation)


def test_what_is_no_policy_is_not_registered():
    with pytest.raises(BadInput, match=r"policy 'box' \(.*inside of something"):

        @register("box")
        class Box(BasePolicy):
            pass

    with pytest.raises(BadInput, match=r"policy 'box' .* has no Config"):
        register("box")(nn.Identity)
    assert "box" not in POLICIES.table and Policy.build(spec(), stats()).spec.kind == "pair"


def _read(policy, data):
    from models.custom import CustomBatch

    return CustomBatch(observation=policy.prepare(data.observation))
