"""What a score was measured under, as one value with a hash."""

import json
from dataclasses import fields, replace

import pytest

from data.errors import BadInput
from data.protocol import EvalProtocol
from data.sim.config import SimConfig
from data.sim.randomization import Randomization

CONFIG = SimConfig(scene="pick_cube", image_size=(64, 96))
PROTOCOL = EvalProtocol.of(CONFIG, [7, 8, 9], replan=5)


def test_json_there_and_back() -> None:
    again = EvalProtocol.from_json(json.loads(json.dumps(PROTOCOL.to_json())))
    assert again == PROTOCOL
    assert again.hash == PROTOCOL.hash
    assert len(PROTOCOL.hash) == 64


CHANGES = {
    "scene": "reach",
    "seeds": (7, 9, 8),
    "max_steps": 81,
    "waiting_steps": 10,
    "replan": None,
    "temporal_ensemble": 0.01,
    "control_mode": "qpos",
    "control_hz": 10,
    "substeps": 6,
    "robot_body": "mesh",
    "cameras": ("wrist", "head"),
    "image_size": (96, 64),
    "orientation": "rotated by 180 degrees",
    "gripper": "-1 opens",
    "randomization": {},
    "renderer": "none",
    "simulator": "sapien 3.0.4",
    "device": "tpu",
}


def test_every_field_is_in_the_hash() -> None:
    assert CHANGES.keys() == {field.name for field in fields(EvalProtocol)}
    hashes = {replace(PROTOCOL, **{name: value}).hash for name, value in CHANGES.items()}
    assert len(hashes | {PROTOCOL.hash}) == len(CHANGES) + 1


def test_it_describes_the_simulator() -> None:
    assert PROTOCOL.max_steps > 0  # the scene's own
    assert EvalProtocol.of(replace(CONFIG, max_steps=3), [7]).max_steps == 3
    assert PROTOCOL.cameras == ("head", "wrist")
    assert PROTOCOL.simulator.startswith("sapien 3.0")
    blind = EvalProtocol.of(replace(CONFIG, renderer="none"), [7])
    assert (blind.renderer, blind.device, blind.cameras) == ("none", "none", ())
    lit = EvalProtocol.of(replace(CONFIG, randomization=Randomization(random_light=True)), [7, 8, 9], replan=5)
    assert lit.hash != PROTOCOL.hash


@pytest.mark.parametrize("irrelevant", [{"expert": True}, {"scene_reset_interval": 1}])
def test_what_cannot_change_a_score_is_not_in_it(irrelevant: dict) -> None:
    assert EvalProtocol.of(replace(CONFIG, **irrelevant), [7, 8, 9], replan=5) == PROTOCOL


def test_gpus_are_alike_but_not_like_a_cpu() -> None:
    first, second, cpu = (EvalProtocol.of(replace(CONFIG, device=d), [7]) for d in ("cuda:0", "cuda:1", "cpu"))
    assert first == second
    assert first.hash != cpu.hash


def test_collected_seeds_are_refused() -> None:
    PROTOCOL.refuse_collected({("pick_cube", 6), ("pick_cube", 10), ("reach", 8)})
    with pytest.raises(BadInput, match=r"2 evaluation seeds of pick_cube were collected .* 8; .* from 10 on"):
        PROTOCOL.refuse_collected({("pick_cube", 9), ("pick_cube", 8), ("reach", 40)})


@pytest.mark.parametrize("damage", [{"seeds": None}, {"extra": 1}])
def test_half_a_protocol_is_refused(damage: dict) -> None:
    value = {name: part for name, part in (PROTOCOL.to_json() | damage).items() if part is not None or name == "replan"}
    value.setdefault("temporal_ensemble", None)
    with pytest.raises(BadInput, match=next(iter(damage))):
        EvalProtocol.from_json(value)


def test_impossible_execution_is_refused() -> None:
    with pytest.raises(BadInput, match="leave replan out"):
        EvalProtocol.of(CONFIG, [7], replan=3, temporal_ensemble=0.01)
