"""Relabelling: rows beside the chunk table, a function of the seed, resumed to the same bytes, and nobody's reward."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny_policy
import torch
from tiny_policy import ACTION, HORIZON, PX, SCHEMA, STATE

from data.chunks import COLUMNS, ChunkConfig, read_chunks, write_chunks
from data.errors import BadInput
from data.frames import build_frames
from data.relabel import folder_digest, read_proposals, refuse_misfit, write_proposals
from data.relabel_config import Relabel
from data.sim.policies import RandomPolicy
from data.store import sha256_file
from data.subgoals import RisingEdge
from models.checkpoint import publish, save_policy
from models.proposer import ActingProposer, ProposerPolicy, asking, open_proposer

LENGTHS = (5, 1, 8)
H = 3  # of the chunks; the policy looks HORIZON = 4 ahead


@dataclass
class Toy:
    """A collection in memory; its pictures are noise."""

    path: Path = Path("toy")
    schema: Any = SCHEMA

    @property
    def episodes(self) -> pl.DataFrame:
        start = np.cumsum(LENGTHS) - LENGTHS
        return pl.DataFrame({"episode_index": range(len(LENGTHS)), "start": start, "length": LENGTHS})

    @property
    def steps(self) -> pl.DataFrame:
        n, rng = sum(LENGTHS), np.random.default_rng(0)
        frame = np.concatenate([np.arange(length) for length in LENGTHS])
        columns = {
            "episode_index": np.repeat(np.arange(len(LENGTHS)), LENGTHS),
            "frame_index": frame,
            "task": ["pick up the cube"] * n,
            "observation.state": rng.normal(1, 2, (n, STATE)).astype(np.float32),
            "action": rng.uniform(-1, 1, (n, ACTION)).astype(np.float32),
            "terminated": np.append(frame[1:] == 0, True),
            "truncated": np.zeros(n, bool),
            "subgoal.half": frame >= 2,
        }
        return pl.DataFrame(columns)

    def decode(self, camera: str, episode: int) -> np.ndarray:
        rng = np.random.default_rng([len(camera), episode])
        return rng.integers(0, 256, (LENGTHS[episode], PX, PX, 3), np.uint8)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("collection")
    build_frames(Toy(), folder)
    reset = Toy().episodes.select("episode_index", pl.lit(False).alias("subgoal.half"))
    config = ChunkConfig(horizon=H)
    write_chunks(Toy().steps.lazy(), reset, folder / "chunks.parquet", config=config, labeler=RisingEdge())
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "step-1"
    policy = tiny_policy.build(tiny_policy.config("flow"))
    with torch.no_grad():  # its gates start at 0, where all noise leads to the same
        for parameter in policy.head.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=tiny_policy.generator("gates"))
    publish(folder, lambda hidden: save_policy(policy, hidden), step=1)
    return folder


def relabel(frames: Path, proposer, out: Path, *, ask=None, **options) -> Path:
    config = {"seed": 0, "samples": 2, "batch_size": 4, "collection": "c0", "work": out.with_suffix(".work")} | options
    ask = ask or asking(proposer, samples=config["samples"], seed=config["seed"])
    write_proposals(frames, frames / "chunks.parquet", out, ask=ask, proposer=proposer.provenance(), **config)
    return out


@pytest.fixture(scope="module")
def proposer(checkpoint):
    return open_proposer(checkpoint, SCHEMA)


@pytest.fixture(scope="module")
def written(frames, proposer, tmp_path_factory) -> Path:
    return relabel(frames, proposer, tmp_path_factory.mktemp("written") / "proposals.parquet")


def test_each_row_stands_beside_its_chunk_and_says_where_it_comes_from(frames, written, checkpoint):
    proposals, table = read_proposals(written), read_chunks(frames / "chunks.parquet").rows
    assert proposals.array.shape == (sum(LENGTHS), 2, H, ACTION) and proposals.array.dtype == np.float32
    for name, column in (("episode_index", proposals.episode), ("t", proposals.t), ("start", proposals.start)):
        np.testing.assert_array_equal(column, table[name].to_numpy())
    meta = proposals.meta
    assert meta.proposer["policy"] == folder_digest(checkpoint) and meta.proposer["kind"] == "pair"
    assert meta.proposer["steps"] == 4 and len(meta.proposer["normalization"]) == 64
    assert (meta.seed, meta.samples, meta.horizon, meta.collection) == (0, 2, H, "c0")
    assert meta.chunks == sha256_file(frames / "chunks.parquet")
    refuse_misfit(proposals, written, frames / "chunks.parquet")
    with pytest.raises(BadInput, match="another chunk table"):
        refuse_misfit(proposals, written, frames / "rows.parquet")


def test_they_are_columns_of_their_own_without_a_reward(frames, written):
    schema = pl.read_parquet_schema(written)
    assert list(schema) == ["episode_index", "t", "start", "relabel.0", "relabel.1"]
    assert schema["relabel.1"] == pl.Array(pl.Float32, H * ACTION)
    with pytest.raises(BadInput, match="no chunk table"):
        read_chunks(written)
    with pytest.raises(BadInput, match="no proposals"):
        read_proposals(frames / "chunks.parquet")


def test_what_was_executed_is_not_touched(frames, proposer, tmp_path):
    before = {p.name: sha256_file(p) for p in frames.iterdir()}
    relabel(frames, proposer, tmp_path / "p.parquet")
    assert {p.name: sha256_file(p) for p in frames.iterdir()} == before
    assert list(pl.read_parquet_schema(frames / "chunks.parquet")) == list(COLUMNS)


def test_proposals_are_the_policys_own_for_the_noise_of_their_chunk(frames, written, proposer):
    """Row by row: what the policy says of that row's observation, cut to the length of the chunks."""
    import data.loader as loader

    source = loader.ChunkSource.open([frames], [frames / "chunks.parquet"])
    row = np.array([9])
    columns = source.gather(row, source.buffers(1))
    alone = asking(proposer, samples=2, seed=0)(columns, ["c0/2/3"])
    assert alone.shape == (1, 2, HORIZON, ACTION)
    np.testing.assert_allclose(read_proposals(written).array[9], alone[0, :, :H], atol=1e-5)


def test_a_function_of_the_seed_and_of_the_collection(frames, proposer, written, tmp_path):
    actions = read_proposals(written).array
    assert relabel(frames, proposer, tmp_path / "again.parquet").read_bytes() == written.read_bytes()
    for option in ({"seed": 1}, {"collection": "c1"}):
        other = read_proposals(relabel(frames, proposer, tmp_path / "other.parquet", **option)).array
        assert (np.abs(other - actions).max(axis=(2, 3)) > 1e-3).all()
    assert (np.abs(actions[:, 0] - actions[:, 1]).max(axis=(1, 2)) > 1e-3).all()  # samples differ
    more = read_proposals(relabel(frames, proposer, tmp_path / "more.parquet", samples=3)).array
    np.testing.assert_allclose(more[:, :2], actions, atol=1e-5)  # a further sample changes none before it
    few = read_proposals(relabel(frames, proposer, tmp_path / "few.parquet", batch_size=3)).array
    np.testing.assert_allclose(few, actions, atol=1e-5)  # up to rounding, the company does not matter


# -- killed, broken --------------------------------------------------------------------------------------------------


def test_a_relabelling_that_broke_goes_on_where_it_was(frames, proposer, written, tmp_path):
    asked = []

    def ask(columns, which):
        if len(asked) == 2:
            raise RuntimeError("out of memory")
        asked.append(which)
        return asking(proposer, samples=2, seed=0)(columns, which)

    out = tmp_path / "p.parquet"
    with pytest.raises(RuntimeError, match="out of memory"):  # an error is an error: no fall-back to what was executed
        relabel(frames, proposer, out, ask=ask)
    assert not out.exists()
    shards = sorted(out.with_suffix(".work").rglob("*.npy"))
    assert len(shards) == 2
    shards[1].write_bytes(shards[1].read_bytes()[:-7])  # a power cut
    again = []
    told = []

    def counted(columns, which):
        again.append(len(which))
        return asking(proposer, samples=2, seed=0)(columns, which)

    relabel(frames, proposer, out, ask=counted, on_chunks=told.append)
    assert again == [4, 4, 2] and told == [4, 4, 4, 2]
    assert out.read_bytes() == written.read_bytes()


def test_work_of_another_seed_is_not_taken_for_ones_own(frames, proposer, written, tmp_path):
    work = tmp_path / "work"
    relabel(frames, proposer, tmp_path / "a.parquet", seed=1, work=work)
    assert relabel(frames, proposer, tmp_path / "b.parquet", work=work).read_bytes() == written.read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_relabel import SCHEMA, asking, open_proposer, relabel
proposer, asked = open_proposer({checkpoint!r}, SCHEMA), []
def ask(columns, which):
    asked.append(which)
    if len(asked) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return asking(proposer, samples=2, seed=0)(columns, which)
relabel(Path({frames!r}), proposer, Path({out!r}), ask=ask)
"""


def test_killed_and_resumed_ends_with_the_same_bytes(frames, proposer, checkpoint, written, tmp_path):
    out = tmp_path / "p.parquet"
    names = {"tests": str(Path(__file__).parent), "checkpoint": str(checkpoint), "frames": str(frames), "out": str(out)}
    done = subprocess.run([sys.executable, "-c", KILLED.format(**names)], env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == -signal.SIGKILL and not out.exists()
    assert len(list(out.with_suffix(".work").rglob("*.npy"))) == 2
    assert relabel(frames, proposer, out).read_bytes() == written.read_bytes()


def test_nan_is_refused_naming_episode_and_step(frames, proposer, tmp_path):
    def ask(columns, which):
        chunks = asking(proposer, samples=2, seed=0)(columns, which)
        chunks[np.array(which) == "c0/2/3", 1, 0, 0] = np.nan
        return chunks

    with pytest.raises(BadInput, match="NaN or infinity for episode 2, step 3") as raised:
        relabel(frames, proposer, tmp_path / "p.parquet", ask=ask)
    assert len(str(raised.value)) < 200 and not (tmp_path / "p.parquet").exists()


# -- who proposes ----------------------------------------------------------------------------------------------------


def test_anything_that_acts_proposes(frames, tmp_path):
    random = ActingProposer(RandomPolicy(action_dims=ACTION, horizon=5), horizon=5)
    first = read_proposals(relabel(frames, random, tmp_path / "a.parquet")).array
    again = read_proposals(relabel(frames, random, tmp_path / "b.parquet")).array
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first.reshape(-1, H * ACTION), axis=0)) == 2 * sum(LENGTHS)


def test_a_policy_that_looks_less_far_ahead_is_refused(frames, tmp_path):
    random = ActingProposer(RandomPolicy(action_dims=ACTION, horizon=2), horizon=2)
    with pytest.raises(BadInput, match=r"proposes 2 x 2 actions of 3 components, the chunks have 3 of 3"):
        relabel(frames, random, tmp_path / "p.parquet")


def test_a_proposer_acts_as_the_policy_it_is_does(checkpoint, proposer):
    from models.acting import ActingPolicy
    from models.checkpoint import load_policy

    observation = {"observation.state": np.ones((2, STATE), np.float32)}
    observation |= {f"observation.images.{c}": np.full((2, PX, PX, 3), 99, np.uint8) for c in SCHEMA.cameras}
    asked = (observation, ["lift", "lift"], [3, 4], [0, 7])
    direct = ActingPolicy(load_policy(checkpoint), "x").act(*asked)
    np.testing.assert_allclose(ProposerPolicy(proposer).act(*asked), direct, atol=1e-6)


def test_denoising_steps_can_be_chosen_where_there_are_some(checkpoint, frames, tmp_path):
    assert open_proposer(checkpoint, SCHEMA, steps=9).provenance()["steps"] == 9
    act = tmp_path / "act"
    publish(act, lambda hidden: save_policy(tiny_policy.build(), hidden), step=1)
    assert open_proposer(act, SCHEMA).provenance()["steps"] is None
    with pytest.raises(BadInput, match="head 'act' denoises nothing"):
        open_proposer(act, SCHEMA, steps=9)


def test_a_folder_of_nothing_known_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"neither LeRobot's pi0 nor a checkpoint.*flywheel fetch"):
        open_proposer(tmp_path, SCHEMA)


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch_size": 0}, {"steps": 0}])
def test_counts_are_counts(options):
    with pytest.raises(BadInput, match="at least 1"):
        Relabel(**options)
