"""Contract 5: the two flow conventions, for the integrator and for every head that has one."""

import pytest
import torch
from tiny_policy import build, generator, with_head_options

from models.flow import CONVENTIONS, euler
from models.types import Context

POINT = torch.tensor([[[0.3, -1.2], [0.0, 2.5]]], dtype=torch.float64)


def exact_field(convention, point):
    """The velocity that carries every x_t of a data set of one point straight to it."""
    if convention.noise_at:
        return lambda x, t: (x - point) / t[:, None, None]
    return lambda x, t: (point - x) / (1 - t[:, None, None])


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("steps", range(1, 11))
def test_euler_with_the_exact_field_returns_the_point(name, steps):
    convention = CONVENTIONS[name]
    noise = torch.randn(7, 2, 2, generator=generator(steps), dtype=torch.float64)
    end = euler(convention, exact_field(convention, POINT), noise, steps)
    assert (end - POINT).abs().max() < 1e-6


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_head_with_the_exact_field_returns_the_point(name, steps, monkeypatch):
    head = build(with_head_options("flow", convention=name, steps=steps)).head
    point = torch.randn(1, *head.noise_shape, generator=generator("point"))
    field = exact_field(head.convention, point)
    monkeypatch.setattr(head, "condition", lambda context: torch.zeros(5, 1))
    monkeypatch.setattr(head, "velocity", lambda x, t, condition: field(x, t))
    noise = torch.randn(5, *head.noise_shape, generator=generator("noise"))
    assert (head.sample(Context(), noise) - point).abs().max() < 1e-5  # float32


@pytest.mark.parametrize("name", CONVENTIONS)
def test_velocity_is_the_slope_of_the_line(name):
    convention = CONVENTIONS[name]
    noise, action = torch.randn(2, 6, 4, 3, generator=generator(name), dtype=torch.float64)
    t = torch.linspace(0.1, 0.8, 6, dtype=torch.float64)
    slope = (convention.interpolate(noise, action, t + 0.1) - convention.interpolate(noise, action, t)) / 0.1
    assert torch.allclose(slope, convention.velocity(noise, action))


@pytest.mark.parametrize(("name", "at_zero"), [("noise_at_1", "action"), ("data_at_1", "noise")])
def test_what_lies_at_time_zero(name, at_zero):
    ends = {"noise": torch.full((1, 2, 2), 7.0), "action": torch.full((1, 2, 2), -3.0)}
    x = CONVENTIONS[name].interpolate(ends["noise"], ends["action"], torch.zeros(1))
    assert torch.equal(x, ends[at_zero])


@pytest.mark.parametrize(("name", "mean"), [("noise_at_1", 0.6004), ("data_at_1", 0.3994)])
def test_mean_sampled_time(name, mean):
    t = CONVENTIONS[name].sample_time((1_000_000,), generator(name), "beta")
    assert abs(t.mean().item() - mean) < 1e-3  # standard error 2.6e-4
    assert t.min() >= 0 and t.max() <= 1


def test_uniform_times():
    t = CONVENTIONS["noise_at_1"].sample_time((1_000_000,), generator(0), "uniform")
    assert abs(t.mean().item() - 0.5) < 1.5e-3
