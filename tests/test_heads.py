"""Heads and backbone layers, each against a number known beforehand."""

import pytest
import torch
from tiny_policy import HEADS, HORIZON, batch, build, generator, with_head_options

from models.heads.act import gaussian_kl
from models.layers.augment import colour_jitter, random_shift
from models.layers.embedding import grid_positions
from models.layers.masked import masked_mean
from models.layers.spatial_softmax import SpatialSoftmax, expected_coordinates
from models.types import Context


def context(b: int = 6, n: int = 5, width: int = 16) -> Context:
    draw = generator("context")
    return Context(pooled=torch.randn(b, width, generator=draw), tokens=torch.randn(b, n, width, generator=draw))


@pytest.mark.parametrize(("row", "column", "x", "y"), [(0, 0, -1, -1), (2, 1, -0.5, 1), (1, 4, 1, 0), (1, 2, 0, 0)])
def test_keypoint_of_a_one_hot_map_is_its_coordinate(row, column, x, y):
    logits = torch.full((1, 1, 3, 5), -1e4)
    logits[0, 0, row, column] = 1e4
    assert torch.allclose(expected_coordinates(logits), torch.tensor([[[x, y]]], dtype=torch.float32), atol=1e-6)


def test_keypoints_have_two_coordinates_each():
    assert SpatialSoftmax(8, 64)(torch.zeros(8, 8, 4, 4)).flatten(1).shape == (8, 128)


def test_shift_moves_by_whole_pixels_and_repeats_the_border():
    picture = torch.arange(12 * 12, dtype=torch.uint8).view(1, 12, 12, 1).expand(64, -1, -1, 3)
    seen = set()
    for shifted in random_shift(picture, 2, generator(0)):
        dy, dx = divmod(int(shifted[5, 5, 0]) - (5 * 12 + 5) + 2 * 12 + 2, 12)
        rows, columns = ((torch.arange(12) + d - 2).clamp(0, 11) for d in (dy, dx))
        assert torch.equal(shifted, picture[0][rows][:, columns])
        seen.add((dy - 2, dx - 2))
    assert {d for pair in seen for d in pair} == {-2, -1, 0, 1, 2}


def test_jitter_stays_in_range_and_differs_between_pictures():
    pictures = torch.rand(1, 3, 8, 8, generator=generator(1)).expand(4, -1, -1, -1)
    jittered = colour_jitter(pictures, 0.5, generator(2))
    assert jittered.min() >= 0 and jittered.max() <= 1
    assert not torch.allclose(jittered[0], jittered[1])


def test_grid_positions_tell_rows_from_columns():
    places = grid_positions(3, 3, 8).view(3, 3, 8)
    assert torch.equal(places[0, 1, :4], places[0, 2, :4])  # one row
    assert torch.equal(places[1, 0, 4:], places[2, 0, 4:])  # one column
    assert len(places.view(9, 8).unique(dim=0)) == 9


def test_masked_mean_divides_by_the_valid_entries():
    values = torch.tensor([[[1.0, 3.0], [5.0, 100.0]], [[1.0, 1.0], [1.0, 1.0]]])
    mask = torch.tensor([[[True, True], [True, False]], [[False, False], [False, False]]])
    assert masked_mean(values, mask).tolist() == [3.0, 0.0]


def test_kl_of_the_prior_is_zero():
    assert torch.equal(gaussian_kl(torch.zeros(3, 5), torch.zeros(3, 5)), torch.zeros(3))
    assert gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2)).item() == pytest.approx(1.0)


VARIANTS = {
    "act": with_head_options("act"),
    "act+vae": with_head_options("act", use_vae=True, latent=4, vae_layers=1),
    "flow noise_at_1": with_head_options("flow", convention="noise_at_1"),
    "flow data_at_1": with_head_options("flow", convention="data_at_1"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_entries_never_enter_a_loss(variant):
    """Contracts 2 and 7, at the policy: padded steps may hold anything."""
    policy = build(VARIANTS[variant]).eval()
    data = batch()
    other = data.action.clone()
    other[data.action_is_pad] = 1e6
    losses = [
        policy.loss(type(data)(**{**vars(data), "action": a}), generator("loss"))[0] for a in (data.action, other)
    ]
    assert torch.equal(*losses)
    assert losses[0].shape == (len(data),)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_s_loss_looks_at_that_sample_alone(variant):
    policy, data = build(VARIANTS[variant]).eval(), batch()
    _open_gates(policy)
    data.observation.state.requires_grad_()
    policy.loss(data, generator("loss"))[0][2].backward()
    touched = data.observation.state.grad.abs().sum(dim=1) > 0
    assert touched.tolist() == [i == 2 for i in range(len(data))]


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient(head):
    policy = build(VARIANTS["act+vae" if head == "act" else "flow noise_at_1"])
    _open_gates(policy)
    policy.loss(batch(), generator("loss"))[0].mean().backward()
    assert [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []


def _open_gates(policy):
    """A new flow head's blocks are the identity, whatever the observation."""
    for name, p in policy.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(p, generator=generator(name))


def test_padded_context_tokens_change_nothing():
    """Vision-language backbones pad their prompts."""
    head = build(with_head_options("act", encoder_layers=1)).head.eval()
    plain = context()
    padded = Context(
        tokens=torch.cat([plain.tokens, torch.full((6, 2, 16), 9.0)], dim=1),
        token_is_pad=torch.tensor([[False] * 5 + [True] * 2]).expand(6, -1),
    )
    noise = torch.zeros(6, 0)
    assert torch.allclose(head.sample(plain, noise), head.sample(padded, noise), atol=1e-6)


def test_flow_loss_is_zero_for_the_exact_velocity(monkeypatch):
    head = build(VARIANTS["flow noise_at_1"]).head
    action = torch.randn(6, HORIZON, 3, generator=generator("a"))
    repeated = action.repeat(head.config.draws, 1, 1)
    monkeypatch.setattr(head, "velocity", lambda x, t, condition: (x - repeated) / t[:, None, None])
    loss, _ = head.loss(context(), action, torch.ones_like(action, dtype=torch.bool), generator("l"))
    assert loss.max() < 1e-5


def test_sample_is_a_function_of_the_noise():
    head = build(VARIANTS["flow noise_at_1"]).head
    noise = torch.randn(6, *head.noise_shape, generator=generator("n"))
    assert torch.equal(head.sample(context(), noise), head.sample(context(), noise))
    assert not torch.equal(head.sample(context(), noise), head.sample(context(), -noise))
