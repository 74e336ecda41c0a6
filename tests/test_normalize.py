"""Normalisation: the inverse undoes it, statistics merge exactly, and nothing divides by nothing."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import BadInput
from data.normalize import MODES, Normalizer, Stats, fit, merge


def rows(seed: int, n: int = 200) -> np.ndarray:
    """Three components of very different scale and offset, and one that never moves."""
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.normal(0, 1, n), rng.normal(100, 5, n), rng.uniform(-0.04, 0.04, n), np.full(n, 0.3)])


def assert_equal(a: Stats, b: Stats) -> None:
    assert a.count == b.count
    for name in ("mean", "m2", "min", "max"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12, err_msg=name)


def test_fit_is_numpys_mean_and_deviation():
    stats = fit(rows(0))
    np.testing.assert_allclose(stats.mean, rows(0).mean(axis=0))
    np.testing.assert_allclose(stats.std, rows(0).std(axis=0), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 199), unique=True, max_size=8), seed=st.integers(0, 100))
def test_merged_parts_are_the_whole(cuts, seed):
    whole = rows(seed)
    assert_equal(merge([fit(part) for part in np.split(whole, sorted(cuts))]), fit(whole))


def test_merge_keeps_its_digits_far_from_zero():
    """Sums of squares would lose all of them: the mean is 10⁸ deviations away."""
    far = np.random.default_rng(0).normal(1e8, 1, (1000, 1))
    merged = merge([fit(far[:300]), fit(far[300:])])
    np.testing.assert_allclose(merged.std, far.std(axis=0), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_invert_undoes_apply(mode, seed):
    normalizer, x = Normalizer(stats=fit(rows(0)), mode=mode), rows(seed)
    np.testing.assert_allclose(normalizer.invert(normalizer.apply(x)), x, rtol=1e-9, atol=1e-9)


def test_what_the_modes_mean():
    x = rows(0)
    scaled = Normalizer(stats=fit(x), mode="mean_std").apply(x)[:, :3]
    np.testing.assert_allclose((scaled.mean(axis=0), scaled.std(axis=0)), ([0] * 3, [1] * 3), atol=1e-9)
    scaled = Normalizer(stats=fit(x), mode="min_max").apply(x)[:, :3]
    np.testing.assert_allclose((scaled.min(axis=0), scaled.max(axis=0)), ([-1] * 3, [1] * 3), atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_component_that_never_moved_does_not_amplify_noise(mode):
    normalizer = Normalizer(stats=fit(rows(0)), mode=mode, floor=1e-3)
    x = rows(0)[:1]
    assert normalizer.apply(x)[0, 3] == pytest.approx(0, abs=1e-9)
    assert normalizer.apply(x + 1e-5)[0, 3] == pytest.approx(1e-2, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_padding_stays_zero_both_ways(mode):
    normalizer = Normalizer(stats=fit(rows(0)), mode=mode)
    padded = np.pad(rows(1), ((0, 0), (0, 28)))
    assert (normalizer.apply(padded)[:, 4:] == 0).all()
    assert (normalizer.invert(padded)[:, 4:] == 0).all()
    np.testing.assert_array_equal(normalizer.apply(padded)[:, :4], normalizer.apply(rows(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_and_numpy_agree_and_keep_their_dtype(dtype):
    normalizer, x = Normalizer(stats=fit(rows(0))), torch.from_numpy(rows(1)).to(dtype).reshape(2, 100, 4)
    out = normalizer.apply(x)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    np.testing.assert_allclose(out.numpy(), normalizer.apply(x.numpy()), rtol=1e-6)
    assert normalizer.apply(rows(1).astype(np.float32)).dtype == np.float32
    torch.testing.assert_close(normalizer.invert(out), x, rtol=1e-5, atol=1e-5)


def test_nothing_is_changed_in_place():
    x = rows(0)
    before = x.copy()
    normalizer = Normalizer(stats=fit(x))
    normalizer.invert(normalizer.apply(x))
    np.testing.assert_array_equal(x, before)


def test_json_keeps_every_bit():
    normalizer = Normalizer(stats=fit(rows(0)), mode="min_max", floor=0.01)
    back = Normalizer.from_json(json.loads(json.dumps(normalizer.to_json())))
    assert back.to_json() == normalizer.to_json()
    np.testing.assert_array_equal(back.apply(rows(1)), normalizer.apply(rows(1)))


def test_refusals():
    with pytest.raises(BadInput, match="component 2 holds NaN"):
        fit(np.array([[0, 0, np.nan], [0, 0, 1]]))
    with pytest.raises(BadInput, match="component 0 holds NaN or infinity"):
        fit(np.array([[np.inf, 0]]))
    with pytest.raises(BadInput, match="no rows"):
        fit(np.empty((0, 3)))
    with pytest.raises(BadInput, match="did you mean 'min_max'"):
        Normalizer(stats=fit(rows(0)), mode="minmax")
    with pytest.raises(BadInput, match="3 components"):
        Normalizer(stats=fit(rows(0))).apply(rows(0)[:, :3])
