"""Batches of toy data whose every value is its own address, so that whatever is out of place is seen."""

import threading
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data.chunks import ChunkConfig, write_chunks
from data.errors import BadInput
from data.frames import build_frames
from data.loader import ChunkSource, batches, chosen, fake_batch, order
from data.schema import ACTION, IMAGE, STATE, Component, Schema
from data.subgoals import RisingEdge

H = 4
SCHEMA = Schema(
    cameras=("head", "wrist"),
    image_size=(2, 3),
    state=(Component(name="address", unit="1"),),
    action=(Component(name="address", unit="1"), Component(name="minus", unit="1")),
    fps=20,
    control_mode="delta_qpos",
)


def address(collection: int, row: int) -> int:
    return 1000 * collection + row


def pixel(camera: str, value: int) -> list[int]:
    """An address in the three channels of a pixel."""
    return [value // 256, value % 256, SCHEMA.cameras.index(camera)]


@dataclass
class Toy:
    """A collection in memory: row i's state, action and pictures all say `address(collection, i)`."""

    collection: int
    lengths: tuple[int, ...]
    schema: Schema = SCHEMA
    path: Path = Path("toy")

    @property
    def episodes(self) -> pl.DataFrame:
        start = np.cumsum(self.lengths) - self.lengths
        return pl.DataFrame({"episode_index": range(len(self.lengths)), "start": start, "length": self.lengths})

    @property
    def steps(self) -> pl.DataFrame:
        episode = np.repeat(np.arange(len(self.lengths)), self.lengths)
        frame = np.concatenate([np.arange(n) for n in self.lengths])
        said = np.array([address(self.collection, i) for i in range(len(frame))], np.float32)
        last = frame == np.array(self.lengths)[episode] - 1
        columns = {
            "episode_index": episode,
            "frame_index": frame,
            "task": [f"task {(self.collection + e) % 3}" for e in episode],
            STATE: said[:, None],
            ACTION: np.stack([said, -said], axis=1),
            "terminated": last & (episode % 2 == 0),
            "truncated": last & (episode % 2 == 1),
            "subgoal.half": frame >= 2,
        }
        return pl.DataFrame(columns)

    def decode(self, camera: str, episode: int) -> np.ndarray:
        _, start, length = self.episodes.row(episode)
        rows = [pixel(camera, address(self.collection, i)) for i in range(start, start + length)]
        return np.broadcast_to(np.array(rows, np.uint8)[:, None, None], (length, *self.schema.image_size, 3))


def write(toy: Toy, folder: Path, config: ChunkConfig | None = None) -> tuple[Path, Path]:
    folder.mkdir()
    build_frames(toy, folder)
    reset = toy.episodes.select("episode_index", pl.lit(False).alias("subgoal.half"))
    config = config or ChunkConfig(horizon=H)
    write_chunks(toy.steps.lazy(), reset, folder / "chunks.parquet", config=config, labeler=RisingEdge())
    return folder, folder / "chunks.parquet"


COLLECTIONS = ((5, 1, 7), (3,), (6, 2))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[list[Path], list[Path]]:
    root = tmp_path_factory.mktemp("collections")
    pairs = [write(Toy(i, lengths), root / str(i)) for i, lengths in enumerate(COLLECTIONS)]
    return [f for f, _ in pairs], [c for _, c in pairs]


@pytest.fixture
def source(written) -> ChunkSource:
    return ChunkSource.open(*written)


def copied(batch: dict) -> dict:
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def first(n: int, *args, **kwargs) -> list[dict]:
    """Copies of the first n batches: the arrays themselves are filled again."""
    generator = batches(*args, **kwargs)
    try:
        return [copied(b) for b in islice(generator, n)]
    finally:
        generator.close()


def assert_same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def chunks_in_words() -> list[tuple]:
    """(collection, row, end of its episode, task) of every chunk, in the order of the source."""
    chunks = []
    for i, lengths in enumerate(COLLECTIONS):
        start = 0
        for episode, length in enumerate(lengths):
            end = start + length
            chunks += [(i, row, end, f"task {(i + episode) % 3}") for row in range(start, end)]
            start = end
    return chunks


def test_every_chunk_is_gathered_from_its_own_rows(source: ChunkSource):
    everything = np.arange(len(source))
    batch = source.gather(everything, source.buffers(len(source), with_next=True))
    expected = chunks_in_words()
    assert len(source) == len(expected) == 24
    for j, (collection, row, end, task) in enumerate(expected):
        said = address(collection, row)
        rows = [min(row + k, end - 1) for k in range(H)]
        there = address(collection, min(row + H, end - 1))
        assert batch[STATE][j] == said
        assert batch[ACTION][j].tolist() == [[address(collection, r), -address(collection, r)] for r in rows]
        assert batch["action_is_pad"][j].tolist() == [row + k >= end for k in range(H)]
        assert batch["next." + STATE][j] == there
        assert batch["task"][j] == task
        for camera in SCHEMA.cameras:
            assert (batch[IMAGE + camera][j] == pixel(camera, said)).all()
            assert (batch["next." + IMAGE + camera][j] == pixel(camera, there)).all()


def test_reward_and_discount_belong_to_their_chunk(source: ChunkSource):
    """The sub-goal of an episode is earned at its step 2; even episodes end in success."""
    batch = source.gather(np.arange(13), source.buffers(13))
    assert batch["reward"].tolist() == [*[1, 1, 1, 0, 0], 0, *[1, 1, 1, 0, 0, 0, 0]]
    full, cut = np.float32(0.99**4), np.float32(0.99)
    np.testing.assert_allclose(batch["discount"], [full, 0, 0, 0, 0, cut, full, full, full, 0, 0, 0, 0])


def test_gather_takes_any_order(source: ChunkSource):
    rng = np.random.default_rng(0)
    mixed = rng.integers(0, len(source), 50)
    batch = source.gather(mixed, source.buffers(50))
    expected = chunks_in_words()
    assert batch[STATE][:, 0].tolist() == [address(*expected[i][:2]) for i in mixed]
    assert batch["index"].tolist() == mixed.tolist()


def test_only_the_wanted_episodes(written):
    source = ChunkSource.open(*written, episodes=[[0, 2], [], [1]])
    batch = source.gather(np.arange(len(source)), source.buffers(len(source)))
    rows = [*range(0, 5), *range(6, 13)]
    assert batch[STATE][:, 0].tolist() == [address(0, r) for r in rows] + [address(2, r) for r in (6, 7)]
    with pytest.raises(BadInput, match="no chunk to train on"):
        ChunkSource.open(*written, episodes=[[], [], []])


# ------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("n", [1, 2, 24, 1000])
def test_order_is_a_permutation(n: int):
    assert sorted(order(n, 0, 0)) == list(range(n))


def test_order_follows_seed_and_epoch():
    orders = [tuple(order(100, seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_order_is_the_same_for_ever():
    """Resuming on another machine or numpy must not reshuffle: these numbers were written down once."""
    assert order(10, 0, 0).tolist() == [7, 5, 4, 2, 8, 0, 9, 1, 6, 3]


def test_order_is_not_visibly_biased():
    """Each of 20 places sees each of 20 numbers about equally often over 2000 epochs (5 sigma)."""
    counts = np.zeros((20, 20))
    for epoch in range(2000):
        counts[np.arange(20), order.__wrapped__(20, 1, epoch)] += 1
    assert np.abs(counts - 100).max() < 5 * np.sqrt(100 * 0.95)


def test_every_epoch_shows_each_chunk_once():
    n, size = 10, 4
    seen = np.concatenate([chosen(n, size, 7, step) for step in range(5)])  # 20 positions are two epochs
    assert np.bincount(seen, minlength=n).tolist() == [2] * n
    first_epoch = np.concatenate([chosen(n, size, 7, 0), chosen(n, size, 7, 1)])
    assert len(set(first_epoch.tolist())) == 8


def test_a_batch_may_be_larger_than_the_source():
    assert np.bincount(chosen(3, 10, 0, 0), minlength=3).sum() == 10


def test_resuming_anywhere_is_as_if_undisturbed(source: ChunkSource):
    whole = first(20, source, 7, seed=3)
    for start in (0, 1, 3, 11, 19):
        assert_same(first(20 - start, source, 7, seed=3, start_step=start), whole[start:])


def test_another_seed_is_another_order(source: ChunkSource):
    a, b = first(1, source, 8, seed=0), first(1, source, 8, seed=1)
    assert a[0]["index"].tolist() != b[0]["index"].tolist()


@pytest.mark.parametrize(("threads", "depth"), [(1, 1), (1, 2), (2, 2), (2, 5)])
def test_prefetching_changes_nothing(source: ChunkSource, threads: int, depth: int):
    plain = first(30, source, 5, seed=1, threads=0, with_next=True)
    assert_same(first(30, source, 5, seed=1, threads=threads, depth=depth, with_next=True), plain)


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(source: ChunkSource, threads: int):
    generator = batches(source, 5, seed=0, threads=threads)
    for batch in islice(generator, 10):
        before = copied(batch)
        threading.Event().wait(0.01)  # time for the background to overwrite what it must not
        assert_same([batch], [before])
    generator.close()


def test_closing_ends_the_threads(source: ChunkSource):
    generator = batches(source, 5, seed=0, threads=2)
    next(generator)
    assert any(t.name.startswith("loader") for t in threading.enumerate())
    generator.close()
    assert not any(t.name.startswith("loader") for t in threading.enumerate())


def test_a_fault_in_the_background_reaches_the_caller(source: ChunkSource, monkeypatch):
    def broken(self, index, into):
        raise OSError("the disk is gone")

    monkeypatch.setattr(ChunkSource, "gather", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches(source, 5, seed=0))


# ------------------------------------------------------------------------------------------------ misfits


def test_collections_that_do_not_fit_are_refused(written, tmp_path: Path):
    frames, chunks = written
    other = Toy(3, (4,), schema=Schema(**{**SCHEMA.__dict__, "fps": 10}))
    folder, table = write(other, tmp_path / "fps")
    with pytest.raises(BadInput, match=r"fps is 10, but frame store .* expects 20"):
        ChunkSource.open([*frames, folder], [*chunks, table])
    folder, table = write(Toy(3, (4,)), tmp_path / "horizon", ChunkConfig(horizon=H + 1))
    with pytest.raises(BadInput, match="another horizon, reward or labeler"):
        ChunkSource.open([*frames, folder], [*chunks, table])


def test_a_table_of_another_collection_is_refused(written):
    frames, chunks = written
    with pytest.raises(BadInput, match="is not of the steps in"):
        ChunkSource.open([frames[1]], [chunks[0]])  # longer
    with pytest.raises(BadInput, match="is not of the steps in"):
        ChunkSource.open([frames[0]], [chunks[2]])  # shorter, cut elsewhere


def test_fake_batches_look_like_real_ones(source: ChunkSource):
    real = first(1, source, 3, seed=0, with_next=True)[0]
    fake = fake_batch(SCHEMA, batch_size=3, horizon=H, with_next=True)
    assert fake.keys() == real.keys()
    for name, value in real.items():
        if isinstance(value, np.ndarray):
            assert (fake[name].shape, fake[name].dtype) == (value.shape, value.dtype), name
    assert fake["action_is_pad"].any()
    assert_same([fake], [fake_batch(SCHEMA, batch_size=3, horizon=H, with_next=True)])
