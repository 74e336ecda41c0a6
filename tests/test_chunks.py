"""Chunk transitions against the formulas, row by row, and against the drawing in the module."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chunks import COLUMNS, ChunkConfig, build_chunks, read_chunks, write_chunks
from data.errors import BadInput
from data.subgoals import RisingEdge, labeler_digest


def steps(*episodes: tuple[list[int], str]) -> pl.LazyFrame:
    """Labelled steps from (events at each step, how it ended: "success" or "clock")."""
    rows = [
        (i, t, event, t == len(events) - 1 and end == "success", t == len(events) - 1 and end == "clock")
        for i, (events, end) in enumerate(episodes)
        for t, event in enumerate(events)
    ]
    names = ["episode_index", "frame_index", "event", "terminated", "truncated"]
    return pl.LazyFrame(rows, schema=names, orient="row").with_columns(pl.col("event").cast(pl.UInt32))


def chunks(*episodes: tuple[list[int], str], **config) -> pl.DataFrame:
    return build_chunks(steps(*episodes), ChunkConfig(**config)).collect()


def by_definition(episodes: list[tuple[list[int], str]], config: ChunkConfig) -> list[tuple]:
    """Contract 2, read aloud."""
    H, rows, first = config.horizon, [], 0
    for number, (event, end) in enumerate(episodes):
        L = len(event)
        for t in range(0, L, config.stride):
            h = min(H, L - t)
            inside = event[t : t + h]
            terminal = end == "success" and t + h == L
            reward = {
                "indicator": float(any(inside)),
                "count": float(sum(inside)),
                "discounted": sum(config.gamma**k * e for k, e in enumerate(inside)),
            }[config.reward_mode]
            discount = config.gamma**h * (1 - terminal)
            last = first + min(t + h, L - 1)
            rows.append(
                (number, first + t, t, h, last, reward, discount, terminal, t + h == L and not terminal, H - h)
            )  # fmt: skip
        first += L
    return rows


def test_the_drawing():
    g = 0.99
    table = chunks(([0, 1, 0, 1], "success"), horizon=3, gamma=g)
    assert table["h"].to_list() == [3, 3, 2, 1]
    assert table["n_pad"].to_list() == [0, 0, 1, 2]
    assert table["next"].to_list() == [3, 3, 3, 3]
    assert table["terminal"].to_list() == [False, True, True, True]
    assert table["discount"].to_list() == pytest.approx([g**3, 0, 0, 0])
    rewards = {
        mode: chunks(([0, 1, 0, 1], "success"), horizon=3, gamma=g, reward_mode=mode)["reward"].to_list()
        for mode in ("indicator", "count", "discounted")
    }
    assert rewards["indicator"] == [1, 1, 1, 1]
    assert rewards["count"] == [1, 2, 1, 1]
    assert rewards["discounted"] == pytest.approx([g, 1 + g**2, g, 1])


def test_gold_discount_of_ten_steps():
    table = chunks(([0] * 25, "clock"))
    assert table["discount"][0] == pytest.approx(0.904382, abs=5e-7)


def test_truncation_is_not_termination():
    table = chunks(([0, 0, 0], "clock"), horizon=2)
    assert table["terminal"].to_list() == [False, False, False]
    assert table["truncated"].to_list() == [False, True, True]
    assert table["discount"].to_list() == pytest.approx([0.99**2, 0.99**2, 0.99])
    assert table["next"].to_list() == [2, 2, 2]  # o_3 was never recorded, o_2 stands in


def test_an_episode_shorter_than_a_chunk_is_kept():
    table = chunks(([1], "success"), ([0, 0], "clock"), horizon=10)
    assert table["h"].to_list() == [1, 2, 1]
    assert table["n_pad"].to_list() == [9, 8, 9]


def test_nothing_crosses_an_episode_border():
    """Only the second episode earns something; no chunk of the first may see it."""
    table = chunks(([0] * 5, "clock"), ([1, 0, 0], "success"), horizon=4, reward_mode="count")
    assert table["reward"].to_list() == [0] * 5 + [1, 0, 0]
    assert (table["next"].to_list()[:5], table["start"].to_list()[5:]) == ([4, 4, 4, 4, 4], [5, 6, 7])


@settings(max_examples=150, deadline=None)
@given(
    episodes=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.sampled_from(["success", "clock"])),
        min_size=1,
        max_size=6,
    ),
    horizon=st.integers(1, 15),
    gamma=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
    mode=st.sampled_from(["indicator", "count", "discounted"]),
    stride=st.integers(1, 5),
)
def test_every_row_is_as_defined(episodes, horizon, gamma, mode, stride):
    config = ChunkConfig(horizon=horizon, gamma=gamma, reward_mode=mode, stride=stride)
    expected = pl.DataFrame(by_definition(episodes, config), schema=COLUMNS, orient="row", strict=False)
    table = build_chunks(steps(*episodes), config).collect()
    assert table.schema == expected.schema
    for name in COLUMNS:
        np.testing.assert_allclose(table[name].to_numpy(), expected[name].to_numpy(), rtol=2e-6, err_msg=name)


def test_filters_behind_the_builder_do_not_reach_into_it():
    """A pushed-down filter would drop rows that the windows of other rows still need."""
    lazy = build_chunks(steps(([0, 1, 0, 1], "success")), ChunkConfig(horizon=3, reward_mode="count"))
    assert lazy.filter(pl.col("t") == 1).collect()["reward"].to_list() == [2]
    assert lazy.slice(1, 1).collect()["reward"].to_list() == [2]
    assert lazy.select("reward").collect()["reward"].to_list() == [1, 2, 1, 1]


# ------------------------------------------------------------------------------------------------ files


def recorded() -> tuple[pl.LazyFrame, pl.DataFrame]:
    """Unlabelled steps of two episodes and their reset, as a dataset gives them."""
    level = {"subgoal.grasped": pl.Series([False, True, True, True, False, False, True])}
    frame = steps(([0] * 4, "success"), ([0] * 3, "clock")).drop("event").with_columns(**level)
    return frame, pl.DataFrame({"episode_index": [0, 1], "subgoal.grasped": [False, False]})


def test_a_table_comes_back_with_what_made_it(tmp_path: Path):
    frame, at_reset = recorded()
    config = ChunkConfig(horizon=2, gamma=0.9, reward_mode="count", stride=1)
    meta = write_chunks(frame, at_reset, tmp_path / "chunks.parquet", config=config, labeler=RisingEdge())
    table = read_chunks(tmp_path / "chunks.parquet")
    assert table.meta == meta
    assert (meta.config, meta.labeler, meta.labeler_version) == (config, "rising_edge", 1)
    assert meta.labeler_digest == labeler_digest(RisingEdge())
    assert meta.actions == "executed"
    assert table.rows["reward"].to_list() == [1, 1, 0, 0, 0, 1, 1]
    assert table.rows.schema == COLUMNS


def test_the_same_steps_make_the_same_bytes(tmp_path: Path):
    frame, at_reset = recorded()
    for name in "ab":
        write_chunks(frame, at_reset, tmp_path / name, config=ChunkConfig(), labeler=RisingEdge())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_a_damaged_table_is_refused_in_one_line(tmp_path: Path, damage: str):
    path = tmp_path / "chunks.parquet"
    frame, at_reset = recorded()
    if damage == "foreign":
        at_reset.write_parquet(path)
    elif damage == "truncated":
        write_chunks(frame, at_reset, path, config=ChunkConfig(), labeler=RisingEdge())
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"chunks\.parquet: no chunk table .*build it again") as caught:
        read_chunks(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.reverse(), "frame_index: duplicated or out of order"),
        (lambda f: pl.concat([f, f]), "frame_index: duplicated or out of order in episode 0"),
        (lambda f: f.filter(pl.col("frame_index") != 1), "out of order in episode 0"),
        (lambda f: f.filter(pl.col("frame_index") != 0), "out of order in episode 0"),
        (lambda f: f.with_columns(terminated=pl.col("frame_index") == 1), "episode 0 goes on after its end"),
        (lambda f: f.drop("terminated"), "terminated: the dataset has no such column"),
    ],
    ids=["reversed", "twice", "a gap", "headless", "goes on", "no ends"],
)
def test_steps_out_of_order_are_refused(tmp_path: Path, change, message: str):
    frame, at_reset = recorded()
    with pytest.raises(BadInput, match=message):
        write_chunks(change(frame), at_reset, tmp_path / "c", config=ChunkConfig(), labeler=RisingEdge())
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward_mode": "indicater"}, "did you mean 'indicator'"),
        ({"horizon": 0}, "horizon 0"),
        ({"stride": 0}, "stride 0"),
        ({"gamma": 1.5}, "gamma 1.5"),
    ],
)
def test_a_configuration_without_sense_is_refused(fields, message):
    with pytest.raises(BadInput, match=message):
        ChunkConfig(**fields)
