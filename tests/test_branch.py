"""Proposals as stages: relabelled once, executed from the recorded moment to the bit, with the rewards they earned."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_policy

from data.chunk_config import ChunkConfig
from data.errors import BadInput
from data.lerobot import open_dataset
from data.normalize import fit
from data.refs import Ref
from data.relabel import read_proposals
from data.relabel_config import Relabel
from data.schema import ACTION, STATE
from data.sim.branch import Branch, draw_branches, execute_branches
from data.sim.config import SimConfig
from data.sim.policies import OraclePolicy, RandomPolicy
from data.sim.rollout import rollout
from data.store import Store
from flows.recipes import load
from models.checkpoint import publish, save_policy
from models.policy import Policy, PolicySpec
from tasks.branch import BRANCHES, execute_proposals
from tasks.chunks import chunk_tables
from tasks.collect import collect_batches
from tasks.dataset import aggregate_batches, read_set
from tasks.frames import frame_stores
from tasks.relabel import PROPOSALS, relabel_chunks
from tasks.stages import Session, session
from tasks.train import train_checkpoint

SIM = SimConfig(scene="reach", renderer="none", cameras=(), max_steps=25)
OVERRIDES = ["sim.scene=reach", "sim.image_size=[16,16]", "sim.max_steps=16", "collect.episodes=4", "collect.batch=2"]


def recorded(seeds: range) -> list:
    return list(rollout(replace(SIM, expert=True), OraclePolicy(0.3), seeds, num_envs=1))


def branch(episode, t: int) -> Branch:
    proposal = RandomPolicy(horizon=4).act({}, [""], [99], [0])[0]
    return Branch(seed=episode.seed, prefix=episode.action[:t], state=episode.state[t], proposal=proposal)


def test_a_branch_repeats_what_was_recorded_to_the_bit_and_then_goes_its_own_way():
    episodes = recorded(range(3))
    branches = [branch(episode, t) for episode, t in zip(episodes, (0, 3, 7), strict=True)]
    then = RandomPolicy(horizon=5)
    made = list(execute_branches(SIM, branches, then, replan=2, num_envs=1))
    for episode, new, b in zip(episodes, made, branches, strict=True):
        t = len(b.prefix)
        np.testing.assert_array_equal(new.action[:t], episode.action[:t])
        np.testing.assert_array_equal(new.state[: t + 1], episode.state[: t + 1])
        np.testing.assert_array_equal(new.action[t : t + 4], b.proposal)
        np.testing.assert_array_equal(new.action[t + 4 : t + 6], then.act({}, [""], [new.seed], [t + 4])[0, :2])
        assert new.policy_digest == "branch:random" and new.seed == episode.seed
        replayed = next(rollout(SIM, Replay(new.action), [new.seed], num_envs=1))
        np.testing.assert_array_equal(replayed.reward, new.reward)  # what these actions earn, not the oracle's reward


class Replay:
    digest = "replay"

    def __init__(self, actions: np.ndarray) -> None:
        self.actions = actions

    def reset(self, lane: int, seed: int) -> None:
        pass

    def act(self, observation, tasks, seeds, steps) -> np.ndarray:
        return self.actions[None, steps[0] :]


def test_the_oracles_own_actions_as_proposal_earn_its_reward():
    [episode] = recorded(range(1))
    rest = Branch(seed=0, prefix=episode.action[:3], state=episode.state[3], proposal=episode.action[3:])
    [new] = execute_branches(SIM, [rest], RandomPolicy(), num_envs=1)
    assert episode.succeeded and new.succeeded
    np.testing.assert_array_equal(new.reward, episode.reward)


def test_another_moment_than_the_recorded_one_is_refused():
    [episode] = recorded(range(1))
    for change in ({"state": episode.state[4]}, {"prefix": episode.action[:5] + 1e-6}):
        with pytest.raises(BadInput, match="seed 0: step 5 is not as recorded") as raised:
            list(execute_branches(SIM, [replace(branch(episode, 5), **change)], RandomPolicy(), num_envs=1))
        assert len(str(raised.value)) < 200


# -- as stages -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def night():
    return load("debug", OVERRIDES)


@pytest.fixture(scope="module")
def policy(night, tmp_path_factory) -> Path:
    """A checkpoint that fits the night's observations; it has learnt nothing."""
    schema, rng = night.sim.schema(), np.random.default_rng(0)
    spec = PolicySpec(config=tiny_policy.config("flow"), schema=schema, horizon=12)
    widths = {"state": len(schema.state), "action": len(schema.action)}
    stats = {name: fit(rng.normal(0, 0.5, (50, width))) for name, width in widths.items()}
    folder = tmp_path_factory.mktemp("policy") / "step-1"
    publish(folder, lambda hidden: save_policy(Policy.build(spec, stats), hidden), step=1)
    return folder


@pytest.fixture(scope="module")
def line(night, policy, tmp_path_factory):
    """Rollouts, relabelled and executed, in a store of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWHEEL_ROOT", str(tmp_path_factory.mktemp("root")))
        batches = collect_batches(night)
        frames, chunks = frame_stores(night, batches), chunk_tables(night, batches)
        config = Relabel(source=str(policy), samples=2, execute=True)
        proposals = relabel_chunks(config, batches, frames, chunks, checkpoint=None)
        branches = execute_proposals(
            config, [night.sim] * len(batches), batches, proposals, checkpoint=None, replan=5, workers=1
        )
        yield batches, frames, chunks, proposals, branches


def test_every_batch_is_relabelled_once_and_a_moved_policy_is_the_same_policy(line, policy, tmp_path):
    import shutil

    batches, frames, chunks, proposals, _ = line
    assert [read_proposals(p.dir / PROPOSALS).meta.collection for p in proposals] == [b.digest for b in batches]
    moved = shutil.copytree(policy, tmp_path / "moved")
    with session(Session()) as current:
        again = relabel_chunks(Relabel(source=str(moved), samples=2), batches, frames, chunks, checkpoint=None)
        assert again == proposals and all(o.cached for o in current.outcomes)
    with session(Session(dry=True)) as current:
        relabel_chunks(Relabel(source=str(moved), samples=3), batches, frames, chunks, checkpoint=None)
        assert [o.why for o in current.outcomes] == ["samples 2 -> 3"] * 2


def test_branches_are_rollouts_like_any_other(line, night):
    batches, _, _, proposals, branches = line
    for batch, proposed, made in zip(batches, proposals, branches, strict=True):
        old, new = open_dataset(batch.dir), open_dataset(made.dir)
        drawn = draw_branches(old, read_proposals(proposed.dir / PROPOSALS), seed=0)
        said = json.loads((made.dir / BRANCHES).read_text())
        assert said == [{"seed": b.seed, "step": len(b.prefix), "sample": b.sample} for b in drawn]
        for i, b in enumerate(drawn):
            t, episode = len(b.prefix), new.read_episode(i)
            assert episode.seed == b.seed and episode.policy_digest.startswith("branch:")
            np.testing.assert_array_equal(episode.state[: t + 1], old.read_episode(i).state[: t + 1])
            h = min(len(b.proposal), len(episode) - t)
            np.testing.assert_array_equal(episode.action[t : t + h], np.clip(b.proposal, -1, 1)[:h])
    whole = read_set(aggregate_batches(load("debug", [*OVERRIDES, "dataset.failures=true"]), batches + branches))
    assert [m.stage for m in whole.members] == ["collect", "collect", "branch", "branch"]
    assert len(frame_stores(night, branches)) == len(chunk_tables(night, branches)) == 2
    assert {STATE, ACTION} <= set(open_dataset(branches[0].dir).steps.columns)


def test_the_nights_own_checkpoint_proposes_unless_another_is_named(line, night):
    batches, frames, chunks, *_ = line
    night = replace(night, fit=replace(night.fit, steps=1))
    checkpoint = train_checkpoint(night, aggregate_batches(night, batches), frames, chunks)
    [first, _] = relabel_chunks(Relabel(samples=1), batches, frames, chunks, checkpoint=checkpoint)
    told = read_proposals(first.dir / PROPOSALS).meta.proposer
    assert told["policy"] == checkpoint.digest
    code = Store().manifest(first)["code"]
    assert {"models.backbones.resnet", "models.pi0", "data.relabel"} <= set(code) and "data.sim.env" not in code


def test_without_a_policy_there_is_nothing_to_propose(line):
    batches, frames, chunks, *_ = line
    with pytest.raises(BadInput, match=r"relabel.source is empty"):
        relabel_chunks(Relabel(), batches, frames, chunks, checkpoint=None)
    with pytest.raises(BadInput, match=r"'/nowhere' is no folder; `flywheel fetch"):
        relabel_chunks(Relabel(source="/nowhere"), batches, frames, chunks, checkpoint=None)


def test_proposals_of_shorter_sight_are_refused_by_the_stage(line, night, policy):
    batches, frames, _, *_ = line
    longer = chunk_tables(replace(night, chunks=ChunkConfig(horizon=13)), batches)
    with pytest.raises(BadInput, match="the chunks have 13 of 8"):
        relabel_chunks(Relabel(source=str(policy)), batches, frames, longer, checkpoint=None)


def test_a_night_yet_to_be_trained_can_be_explained(line):
    batches, frames, chunks, *_ = line
    waiting = Ref(stage="train", key="k", digest="", path="")
    with session(Session(dry=True)) as current:
        relabel_chunks(Relabel(), batches, frames, chunks, checkpoint=waiting)
    assert [o.why for o in current.outcomes] == ["upstream train will be made anew"] * 2
