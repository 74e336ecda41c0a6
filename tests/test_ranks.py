"""A training in several processes, started by the stage itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import FIT, batches, build, config

from data.errors import BadInput
from models.fit import fit
from models.ranks import in_ranks


def train(job: tuple[Path, int], on_metrics) -> Path:
    folder, size = job
    policy = build(replace(config("act"), shift=0))
    return fit(policy, batches, replace(FIT, steps=3, batch_size=size), folder, on_metrics=on_metrics)


def test_two_ranks_learn_what_one_process_does(tmp_path):
    told: dict[int, dict] = {}
    one = in_ranks(train, (tmp_path / "one", 8), 1, lambda step, metrics: None)
    two = in_ranks(train, (tmp_path / "two", 8), 2, lambda step, metrics: told.update({step: metrics}))
    assert sorted(told) == [1, 2, 3] and all("loss" in metrics for metrics in told.values())
    apart = load_file(two / "weights.safetensors")
    for name, weight in load_file(one / "weights.safetensors").items():
        if not name.endswith("in_proj_bias"):  # nothing depends on the keys' part: its gradient is rounding alone
            assert torch.allclose(weight, apart[name], atol=1e-5), name


def test_what_a_rank_refuses_is_refused_in_its_own_words(tmp_path):
    with pytest.raises(BadInput, match=r"^a batch of 8 at step 0, fit.batch_size is 6$"):
        in_ranks(train, (tmp_path / "odd", 6), 2, lambda step, metrics: None)
