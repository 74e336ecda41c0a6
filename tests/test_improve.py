"""A whole cycle of improvement at its smallest: every stage for real, both arms on equal terms."""

import json

import pytest

from data.errors import BadInput
from data.store import Store
from flows.improve import improve
from flows.recipes import load
from models.checkpoint import load_critic, load_policy
from tasks.compare import read_comparison
from tasks.critic import CALIBRATION, CRITIC, FILM, read_values_of
from tasks.evaluate import read_score
from tasks.recipe import Recipe
from tasks.stages import Session, session
from tasks.train import ADVANTAGES, EFFECTIVE


def night(*overrides: str) -> Recipe:
    return load("improve-debug", [*overrides, "improve.relabel.samples=2"])


def ran(recipe: Recipe) -> tuple[Session, dict]:
    with session(Session()) as current:
        return current, improve(recipe)


@pytest.fixture(scope="module")
def cycle(tmp_path_factory, empty_mlflow):
    import shutil

    from conftest import new_root

    from tasks import tracking_client

    root = new_root(tmp_path_factory.mktemp("cycle"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWHEEL_ROOT", str(root))
        shutil.copytree(empty_mlflow, tracking_client.home(), dirs_exist_ok=True)
        yield ran(night())


def made(current: Session, stage: str, label: str = "") -> list:
    refs = {o.ref.key: o.ref for o in current.outcomes if o.stage == stage and label in o.label}
    return list(refs.values())


def test_both_arms_start_alike_and_learn_from_the_same_data(cycle):
    current, _ = cycle
    store = Store()
    [improved], [continued] = made(current, "train", "offline RL"), made(current, "train", "cloning, continued")
    ours, theirs = store.manifest(improved), store.manifest(continued)
    parents = [{p["digest"] for p in m["parents"] if p["stage"] != "critic"} for m in (ours, theirs)]
    assert parents[0] == parents[1]
    assert ours["params"]["fit"] == theirs["params"]["fit"]
    assert (ours["params"]["phase"], theirs["params"]["phase"]) == ("chunk_policy", "bc")
    assert load_policy(improved.dir).spec == load_policy(continued.dir).spec
    assert (improved.dir / EFFECTIVE).stat().st_size > 1000


def test_the_gain_is_that_of_the_scores_on_the_same_seeds(cycle):
    current, summary = cycle
    [comparison] = made(current, "compare")
    found = read_comparison(comparison)
    scores = [read_score(ref)["score"] for ref in made(current, "evaluate")]
    assert scores[0]["seeds"] == scores[1]["seeds"] and scores[0]["protocol"] == scores[1]["protocol"]
    rates = {score["policy"]: score["success_rate"] for score in scores}
    ranked = next(policy for policy in rates if "best of 2" in policy)
    other = next(policy for policy in rates if policy != ranked)
    assert found["gain_points"] == pytest.approx(100 * (rates[ranked] - rates[other]))
    assert summary["gain_points"] == found["gain_points"] and summary["p_value"] == found["p_value"]
    assert summary["control"]["success"] == rates[other] and summary["success"] == rates[ranked]


def test_the_critic_judges_every_chunk_and_draws_what_a_person_looks_at(cycle):
    current, _ = cycle
    [critic] = made(current, "critic")
    tables = made(current, "chunks")
    values = read_values_of(critic, len(tables))
    assert all(v.best is not None and set(v.best.tolist()) <= {0, 1} for v in values)
    assert load_critic(critic.dir / CRITIC).spec.kind == "critic"
    [improved] = made(current, "train", "offline RL")
    for picture in (critic.dir / CALIBRATION, critic.dir / FILM, improved.dir / ADVANTAGES):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_again_does_nothing_and_another_beta_trains_one_arm_only(cycle):
    _, summary = cycle
    again, second = ran(night())
    assert all(outcome.cached for outcome in again.outcomes) and second["success"] == summary["success"]
    third, _ = ran(night("improve.policy_loss.beta=3.0"))
    fresh = [(o.stage, o.label) for o in third.outcomes if not o.cached]
    assert fresh[0] == ("train", "offline RL, executed")
    assert [stage for stage, _ in fresh] == ["train", "evaluate", "compare"]


def test_best_of_k_and_executed_proposals_run_through(cycle):
    current, _ = ran(night("improve.policy_loss.imitate=best_of_k", "improve.relabel.execute=true"))
    assert made(current, "branch") and made(current, "train", "offline RL, best_of_k")
    members = [
        m["stage"]
        for ref in made(current, "dataset")
        for m in json.loads((ref.dir / "dataset.json").read_text())["members"]
    ]
    assert "branch" in members


def test_another_night_starts_from_the_champion_and_adds_rollouts_of_its_own(cycle):
    current, summary = ran(night("improve.start=champion", "collect.nights=2"))
    _, first = cycle
    assert summary["parent_digest"] == first["checkpoint_digest"]
    own = [Store().manifest(ref) for ref in made(current, "collect") if Store().manifest(ref)["parents"]]
    assert sorted(m["params"]["seeds"] for m in own) == [[s, s + 2] for s in (100000, 100002, 100004, 100006)]
    assert {m["parents"][0]["digest"] for m in own} == {summary["parent_digest"]}


def test_what_cannot_be_is_refused(cycle):
    with pytest.raises(BadInput, match=r"evaluate\.best_of 4 ranks by a critic"):
        load("debug", ["evaluate.best_of=4"])
    with pytest.raises(BadInput, match=r"improve\.start 'nowhere' is no checkpoint artefact"):
        improve(night("improve.start=nowhere"))
    with pytest.raises(BadInput, match=r"collect\.noise \[\] must be"):
        load("debug", ["collect.noise=[]"])
