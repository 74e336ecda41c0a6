"""The seed design's trainer: a LeRobot dataset in, a policy out, with its flags and its defaults."""

from dataclasses import asdict

import pytest
from malformed import tiny_dataset

from data.errors import BadInput
from data.store import Store
from models.checkpoint import load_policy
from tasks.offline_rl import ChunkLevelOfflineRL, OfflineRL


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("recorded") / "dataset")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    return Store()


def test_the_defaults_are_the_seed_design_s():
    wanted = {
        "action_horizon": 10, "action_dim": 7, "gamma": 0.99, "beta": 1.0, "lambda_v": 1.0, "lambda_pi": 1.0,
        "lr": 3e-4, "batch_size": 32, "num_epochs": 100, "save_interval": 10, "log_interval": 100,
        "use_pi0_actions": False, "pi0_config": "pi05_libero",
    }  # fmt: skip
    mine = asdict(OfflineRL(dataset_dir="somewhere"))
    assert {name: mine[name] for name in wanted} == wanted


def test_a_dataset_becomes_a_policy_once(recorded, store):
    options = {"dataset_dir": str(recorded), "action_horizon": 4, "batch_size": 4, "action_dim": 4, "device": "cpu"}
    trainer = ChunkLevelOfflineRL(**options)
    folder = trainer.train(num_epochs=1)
    policy = load_policy(folder)
    assert policy.spec.config.head == "gaussian" and policy.spec.horizon == 4
    assert trainer.train(num_epochs=1) == folder
    further = ChunkLevelOfflineRL(**options, resume=str(folder), beta=3.0).train(num_epochs=1)
    assert further != folder and load_policy(further).spec == policy.spec


def test_what_cannot_be_is_refused_in_one_line(recorded, store):
    here = str(recorded)
    with pytest.raises(BadInput, match="has no option 'gama'"):
        ChunkLevelOfflineRL(dataset_dir=here, gama=0.9)
    with pytest.raises(BadInput, match="actions have 4 components, not 7; set action_dim"):
        ChunkLevelOfflineRL(dataset_dir=here, action_horizon=4).train(1)
    with pytest.raises(BadInput, match="add --algorithm sarsa_entropy"):
        ChunkLevelOfflineRL(dataset_dir=here, action_dim=4, use_pi0_actions=True).train(1)
    with pytest.raises(BadInput, match="`flywheel fetch pi05_libero` brings it"):
        pi0 = {"use_pi0_actions": True, "algorithm": "sarsa_entropy"}
        ChunkLevelOfflineRL(dataset_dir=here, action_dim=4, **pi0).train(1)
