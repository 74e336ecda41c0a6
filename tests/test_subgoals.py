"""Events are rising edges: earned once, by the action that caused them, and never for what held at reset."""

import polars as pl
import pytest

from data.errors import BadInput
from data.subgoals import LABELERS, RisingEdge, labeler_digest


def steps(**predicates: list[list[int]]) -> pl.LazyFrame:
    """Each predicate as one list of 0/1 per episode."""
    lengths = [len(episode) for episode in next(iter(predicates.values()))]
    columns = {
        "episode_index": [i for i, n in enumerate(lengths) for _ in range(n)],
        "frame_index": [t for n in lengths for t in range(n)],
    }
    levels = {f"subgoal.{name}": [bool(v) for e in levels for v in e] for name, levels in predicates.items()}
    return pl.LazyFrame(columns | levels)


def reset(**predicates: list[bool | None]) -> pl.DataFrame:
    n = len(next(iter(predicates.values())))
    return pl.DataFrame({"episode_index": range(n)} | {f"subgoal.{p}": v for p, v in predicates.items()})


def label(frame: pl.LazyFrame, at_reset: pl.DataFrame, labeler: RisingEdge | None = None) -> pl.DataFrame:
    return (labeler or RisingEdge())(frame, at_reset).collect()


def test_the_drawing():
    frame = steps(lifted=[[0, 1, 1, 0, 1]], open=[[1, 0, 0, 1, 1]])
    events = label(frame, reset(lifted=[False], open=[True]))
    assert events["event.lifted"].to_list() == [False, True, False, False, False]
    assert events["event.open"].to_list() == [False] * 5
    assert events["event"].to_list() == [0, 1, 0, 0, 0]


def test_a_level_pays_once_and_not_again_after_a_drop():
    events = label(steps(grasped=[[0, 1, 1, 0, 0, 1, 1]]), reset(grasped=[False]))
    assert events["event"].sum() == 1
    assert events["event"].to_list().index(1) == 1


def test_every_episode_starts_afresh():
    frame = steps(grasped=[[0, 1], [1, 1], [0, 0], [0, 1]])
    events = label(frame, reset(grasped=[False, False, False, True]))
    assert events["event"].to_list() == [0, 1, 1, 0, 0, 0, 0, 0]


def test_true_at_reset_never_pays_even_after_falling_and_rising():
    events = label(steps(on=[[0, 1, 0, 1]]), reset(on=[True]))
    assert events["event"].sum() == 0


def test_two_predicates_in_one_step_are_two_events():
    events = label(steps(a=[[0, 1]], b=[[0, 1]]), reset(a=[False], b=[False]))
    assert events["event"].to_list() == [0, 2]


def test_only_the_chosen_predicates_pay():
    frame, at_reset = steps(a=[[1, 1]], b=[[0, 1]]), reset(a=[False], b=[False])
    assert label(frame, at_reset, RisingEdge(predicates=("b",)))["event"].to_list() == [0, 1]
    with pytest.raises(BadInput, match="did you mean 'lifted'"):
        label(steps(lifted=[[0]]), reset(lifted=[False]), RisingEdge(predicates=("liftd",)))


@pytest.mark.parametrize(
    "at_reset",
    [reset(grasped=[False, None]), reset(grasped=[False]), reset(other=[False, False])],
    ids=["null", "episode missing", "predicate missing"],
)
def test_an_event_is_refused_when_the_reset_is_unknown(at_reset):
    with pytest.raises(BadInput, match=r"subgoal\.grasped: episode \d does not say whether it held at reset"):
        label(steps(grasped=[[0, 1], [0, 1]]), at_reset)


def test_a_predicate_that_never_holds_needs_no_reset():
    """An episode of a scene that does not have the predicate: the column is False throughout, the reset null."""
    events = label(steps(grasped=[[0, 1], [0, 0]]), reset(grasped=[False, None]))
    assert events["event"].to_list() == [0, 1, 0, 0]


def test_a_dataset_without_predicates_is_refused():
    with pytest.raises(BadInput, match=r"no subgoal\.\* column"):
        label(pl.LazyFrame({"episode_index": [0], "frame_index": [0]}), pl.DataFrame({"episode_index": [0]}))


def test_digest_follows_name_version_and_parameters():
    assert labeler_digest(RisingEdge()) == labeler_digest(RisingEdge())
    assert labeler_digest(RisingEdge()) != labeler_digest(RisingEdge(predicates=("a",)))

    class Newer(RisingEdge):
        version = RisingEdge.version + 1

    assert labeler_digest(RisingEdge()) != labeler_digest(Newer())


def test_the_registry_knows_it():
    assert LABELERS.resolve("rising_edge") is RisingEdge
    with pytest.raises(BadInput, match="did you mean 'rising_edge'"):
        LABELERS.resolve("rising_egde")
