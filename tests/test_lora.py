"""Adapters train and nothing else does; a checkpoint holds both; compilation changes no name."""

from dataclasses import replace

import pytest
import torch
from test_pairs import config, data, shaken
from tiny_policy import FIT, HORIZON, SCHEMA, batches, generator, stats
from torch import nn

from data.errors import BadInput
from models.checkpoint import load_policy
from models.config import LoraOptions, PolicyConfig
from models.fit import fit
from models.freeze import frozen_digest
from models.layers.flow_dit import FlowDit
from models.lora import add_adapters
from models.policy import Policy, PolicySpec, with_lora

RANK = LoraOptions(rank=2)
# one pair for each backbone and each head that has layers of attention or MLPs by a usual name
PAIRS = [pytest.param("eagle", "flow_matching"), pytest.param("eagle_1_5", "flow_matching_1_5")]
PAIRS += [pytest.param("paligemma_expert", "pi0_flow")]


def build(policy: PolicyConfig) -> Policy:
    return Policy.build(PolicySpec(config=policy, schema=SCHEMA, horizon=HORIZON), stats())


def adapters(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(("backbone", "head"), PAIRS)
def test_only_adapters_train(backbone, head, tmp_path):
    """In both parts, with what a head says trains as a whole; the rest has the same bytes after three steps."""
    policy = build(config(backbone, head, lora=RANK))
    new = adapters(policy)
    assert {name.partition(".")[0] for name in new} == {"backbone", "head"}
    whole = tuple(f"head.{part}." for part in FlowDit.lora_trains_fully) if head.startswith("flow_matching") else ()
    for name, p in policy.named_parameters():
        assert p.requires_grad == (name in new or name.startswith(whole)), name
    before, began = frozen_digest(policy), {name: p.detach().clone() for name, p in new.items()}
    folder = fit(policy, batches, replace(FIT, steps=3, lr=1e-2), tmp_path)
    assert frozen_digest(policy) == before
    assert [name for name, p in new.items() if "lora_B" in name and torch.equal(p, began[name])] == []
    loaded, seen = load_policy(folder, weights="last"), data().observation
    noise = torch.randn(8, *policy.noise_shape, generator=generator("noise"))
    chunk = loaded.predict_action(seen, noise=noise)
    assert torch.equal(chunk, policy.eval().predict_action(seen, noise=noise))
    for p in adapters(loaded).values():
        p.data.zero_()
    assert not torch.equal(chunk, loaded.predict_action(seen, noise=noise))


def test_new_adapters_change_nothing_and_are_a_function_of_the_seed():
    base = config("eagle", "flow_matching")
    policy, noise = shaken(build(base)).eval(), torch.randn(8, HORIZON, 3, generator=generator("noise"))
    chunk = policy.predict_action(data().observation, noise=noise)
    with_lora(policy, RANK, seed=4)
    assert torch.equal(policy.predict_action(data().observation, noise=noise), chunk)
    assert policy.spec.config == replace(base, lora=RANK)
    with pytest.raises(BadInput, match="has adapters already"):
        with_lora(policy, RANK)
    again, other = with_lora(build(base), RANK, seed=4), with_lora(build(base), RANK, seed=5)
    drawn = [[p for name, p in adapters(one).items() if "lora_A" in name] for one in (policy, again, other)]
    assert all(map(torch.equal, drawn[0], drawn[1])) and not any(map(torch.equal, drawn[0], drawn[2]))


class Toy(nn.Module):
    lora_targets = (r"layers\.\d+", "gate")
    lora_trains_fully = ("norm",)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.gate, self.investigate, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 1)
        self.q_proj = nn.Linear(4, 4)


def adapted(**options) -> set[str]:
    toy = Toy()
    add_adapters({"backbone": toy}, LoraOptions(rank=2, **options), seed=0)
    trained = {name for name, p in toy.named_parameters() if p.requires_grad}
    return {name.partition(".lora_")[0] for name in trained}


def test_a_class_names_its_layers_and_a_user_may_name_others(monkeypatch):
    assert adapted() == {"layers.0", "layers.1", "gate", "norm.weight", "norm.bias"}
    assert adapted(targets="layers.1|q_proj") == {"layers.1", "q_proj", "norm.weight", "norm.bias"}
    monkeypatch.delattr(Toy, "lora_targets")
    monkeypatch.delattr(Toy, "lora_trains_fully")
    assert adapted() == {"q_proj"}  # a usual name; not that inside of torch's attention, which would pass it by


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("no_such_layer", r"no layer is called 'no_such_layer'; there are e.g. backbone.layers.0, backbone.layers.1"),
        ("out_proj", "no layer is called 'out_proj'"),
        ("(", "is no regular expression"),
    ],
)
def test_a_pattern_that_means_no_layer_is_refused(targets, said):
    with pytest.raises(BadInput, match=said) as fault:
        adapted(targets=targets)
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


def test_what_has_no_attention_says_so():
    with pytest.raises(BadInput, match="no layer is called the usual names of attention and MLPs; there are"):
        build(config("resnet", "flow", lora=RANK))
    assert adapters(build(config("resnet", "flow", lora=replace(RANK, targets="velocity_of|trunks.*"))))


def test_an_old_specification_has_no_adapters():
    old = {"backbone": "resnet", "head": "act"}
    assert PolicyConfig.from_json(old) == PolicyConfig()


# -- compilation -----------------------------------------------------------------------------------------------------


def test_compiled_is_the_same_under_the_same_names(monkeypatch, backbone="eagle", head="flow_matching"):
    """With dynamo and without a code generator, which would take minutes here."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: whole(*args, **{**kwargs, "backend": "eager"}))
    torch.compiler.reset()
    plain, compiled = build(config(backbone, head)), build(config(backbone, head, compile=True))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    compiled.load_state_dict(plain.state_dict())
    seen = data()
    losses = [policy.train().loss(seen, generator("loss"))[0] for policy in (plain, compiled)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.mean().backward()
    for mine, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    noise = torch.randn(8, *plain.noise_shape, generator=generator("noise"))
    answers = [policy.eval().predict_action(seen.observation, noise=noise) for policy in (plain, compiled)]
    torch.testing.assert_close(*answers)
    assert compiled.backbone._compiled_call_impl is not None
