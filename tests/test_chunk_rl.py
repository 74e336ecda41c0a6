"""Chunk-level offline RL: every loss by its formula, and the rules that keep a critic honest."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from tiny_policy import ACTION, HEADS, HORIZON, SCHEMA, STATE, build, config, stats

from data.chunk_config import ChunkConfig
from data.chunks import METADATA, write_chunks
from data.errors import BadInput
from data.loader import ChunkSource, fake_batch
from data.store import canonical
from data.subgoals import RisingEdge
from models.acting import ActingPolicy, BestOf
from models.checkpoint import load_critic, load_policy
from models.config import ChunkCriticConfig, ChunkPolicyConfig, ChunkRLConfig, CriticConfig, FitConfig, PolicyConfig
from models.critic import Critic, CriticSpec
from models.fit import Diverged, fit
from models.phases.bc import BehaviourCloning
from models.phases.chunk_critic import ChunkCritic, critic_loss, td_target
from models.phases.chunk_policy import ChunkPolicy, advantage_weights, effective_sample_size
from models.phases.chunk_rl import ChunkRL
from models.phases.chunk_value import expectile_loss, soft_value_loss
from models.types import Batch, Judged, NoOptions, Observation, Transition

TRUNK = {"width": 16, "keypoints": 4, "grid": 0}
FIT = FitConfig(steps=4, batch_size=6, lr=1e-3, warmup_steps=1, save_every=2, threads=1)


def columns(seed: int = 0, batch_size: int = 6, proposals: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    batch = fake_batch(SCHEMA, batch_size=batch_size, horizon=HORIZON, seed=seed, with_next=True)
    if proposals:
        batch["proposals"] = rng.uniform(-1, 1, (batch_size, proposals, HORIZON, ACTION)).astype(np.float32)
    return batch


def critic(seed: int = 0, **options) -> Critic:
    spec = CriticSpec(
        config=CriticConfig(backbone_options=TRUNK, width=16, layers=1, **options), schema=SCHEMA, horizon=HORIZON
    )
    return Critic.build(spec, stats(), seed=seed)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# -- formulae --------------------------------------------------------------------------------------------------------


def test_gold_numbers():
    assert td_target(torch.zeros(1), torch.tensor([0.99**10]), torch.ones(1)).item() == pytest.approx(
        0.904382, abs=1e-6
    )
    difference = torch.tensor([-2.0, 0.5, 3.0])
    torch.testing.assert_close(expectile_loss(difference, 0.5), 0.5 * difference**2)
    torch.testing.assert_close(expectile_loss(difference, 0.7), torch.tensor([0.3 * 4, 0.7 * 0.25, 0.7 * 9]))
    # 70 dimensions of standard deviation 0.1: 62 nats of entropy in the seed design's V
    entropy = torch.distributions.Normal(torch.zeros(70), 0.1 * torch.ones(70)).entropy().sum()
    assert -entropy.item() == pytest.approx(61.9, abs=0.1)


def test_an_ended_task_is_worth_its_reward_and_nothing_more():
    reward, later = torch.tensor([1.0, 1.0]), torch.tensor([5.0, 5.0])
    assert td_target(reward, torch.tensor([0.0, 0.9]), later).tolist() == pytest.approx([1.0, 5.5])
    value = torch.ones(2, requires_grad=True)
    assert not td_target(reward, torch.ones(2), value).requires_grad


def test_both_qs_are_drawn_to_the_target():
    q = torch.tensor([[1.0, 3.0]], requires_grad=True)
    loss = critic_loss(q, torch.tensor([2.0]))
    assert loss.item() == 1.0
    loss.sum().backward()
    assert q.grad is not None and q.grad.tolist() == [[-1.0, 1.0]]


def test_weights_are_clipped_before_the_exponential():
    advantage = torch.tensor([1e4, 0.0, -1e4])
    assert advantage_weights(advantage, 1.0, 100.0).tolist() == pytest.approx([100.0, 1.0, 0.0], rel=1e-5)
    assert advantage_weights(advantage, 0.0, 100.0).tolist() == [1.0, 1.0, 1.0]
    assert effective_sample_size(torch.ones(8)).item() == 1.0
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0, 0.0])).item() == 0.25


def test_the_entropy_term_is_per_dimension_and_off_by_default():
    v, q, log_prob = torch.zeros(1), torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]])
    assert soft_value_loss(v, q, None, 0.0).item() == 4.0
    assert soft_value_loss(v, q, log_prob, 0.5).item() == 1.0
    assert ChunkCriticConfig().alpha == 0.0


# -- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["act", "flow", "gaussian"])
def test_beta_zero_is_cloning_to_the_bit(head):
    policy, raw = build(PolicyConfig(backbone_options=TRUNK, head=head, head_options=HEADS.get(head, {}))), columns()
    judged = Judged.of(raw | {"advantage": np.random.default_rng(0).normal(size=6).astype(np.float32)})
    cloned, _ = BehaviourCloning(policy, NoOptions())(Batch.of(raw), generator())
    phase = ChunkPolicy(policy, ChunkPolicyConfig(beta=0.0))
    same, info = phase(judged, generator())
    assert torch.equal(cloned, same) and info["ess"].item() == 1.0
    other, _ = ChunkPolicy(policy, ChunkPolicyConfig(beta=2.0))(judged, generator())
    torch.testing.assert_close(other, cloned * torch.exp(2 * judged.advantage))


def test_best_of_k_clones_the_best_proposal_where_both_qs_agree():
    policy, raw = build(), columns()
    rng = np.random.default_rng(1)
    best = rng.uniform(-1, 1, raw["action"].shape).astype(np.float32)
    agreed = np.array([True, False, True, True, False, True])
    judged = Judged.of(raw | {"advantage": np.zeros(6, np.float32), "best": best, "agreed": agreed})
    loss, _ = ChunkPolicy(policy, ChunkPolicyConfig(imitate="best_of_k"))(judged, generator())
    whole = Batch.of(raw | {"action": best, "action_is_pad": np.zeros_like(raw["action_is_pad"])})
    cloned, _ = policy.loss(whole, generator())
    torch.testing.assert_close(loss, cloned * torch.from_numpy(agreed))
    unranked = Judged.of(raw | {"advantage": np.zeros(6, np.float32)})
    with pytest.raises(BadInput, match="relabel before the critic judges"):
        ChunkPolicy(policy, ChunkPolicyConfig(imitate="best_of_k"))(unranked, generator())


def test_the_gaussian_head_knows_its_likelihood():
    policy = build(PolicyConfig(backbone_options=TRUNK, head="gaussian"))
    batch = Batch.of(columns())
    context, mask = policy.context(batch.observation), policy.mask(batch.action_is_pad)
    action = policy.normalised(batch.action, mask)
    mean, std = policy.head.moments(context)
    dense = torch.distributions.Normal(mean, std).log_prob(action)
    want = torch.stack([dense[i][mask[i]].mean() for i in range(len(batch))])
    torch.testing.assert_close(policy.head.log_prob(context, action, mask), want)


# -- the critic ------------------------------------------------------------------------------------------------------


def test_q_reads_the_task_and_what_was_executed_and_nothing_beyond_the_end():
    model, raw = critic(), columns()
    batch = Batch.of(raw)

    def q(batch: Batch) -> torch.Tensor:
        mask = model.mask(batch.action_is_pad)
        return model.q(model.prepare(batch.observation), model.normalised(batch.action, mask), mask)

    before = q(batch)
    assert before.shape == (6, 2) and not torch.equal(before[:, 0], before[:, 1])
    other_task = replace(batch, observation=replace(batch.observation, tasks=("another thing",) * 6))
    assert not torch.equal(q(other_task), before)
    beyond = batch.action.clone()
    beyond[-1, 1:] = 9.0  # padded: the last sample executed one action
    assert torch.equal(q(replace(batch, action=beyond)), before)
    within = batch.action.clone()
    within[-1, 0] += 0.5
    assert not torch.equal(q(replace(batch, action=within))[-1], before[-1])


def test_only_executed_chunks_teach_q():
    plain = fake_batch(SCHEMA, batch_size=2, horizon=HORIZON)
    with pytest.raises(KeyError):
        Transition.of({name: column for name, column in plain.items() if name not in ("reward", "discount")})
    phase = ChunkCritic(critic(), ChunkCriticConfig())
    with_proposals, _ = phase(Transition.of(columns(proposals=3)), generator())
    without, _ = phase(Transition.of(columns()), generator())
    assert torch.equal(with_proposals, without)  # iql asks Q about nothing else


def test_rewards_beside_relabelled_actions_are_no_data_for_q(line_of_steps, tmp_path):
    frames, table = line_of_steps
    source = ChunkSource.open([frames], [table])
    source.buffers(2, with_next=True)
    rows = pl.read_parquet(table)
    meta = pl.read_parquet_metadata(table)[METADATA]
    forged = tmp_path / "forged.parquet"
    rows.write_parquet(forged, metadata={METADATA: meta.replace('"executed"', '"relabel.0 of 1234"')})
    with pytest.raises(BadInput, match=r"executed actions' rewards with actions of relabel.0 of 1234.*Q-function"):
        ChunkSource.open([frames], [forged]).buffers(2, with_next=True)
    ChunkSource.open([frames], [forged]).buffers(2)  # cloning them is another matter


@pytest.fixture
def line_of_steps(tmp_path):
    """A frame store and chunk table of one short episode without cameras."""
    import json

    length = 7
    steps = pl.DataFrame(
        {
            "episode_index": [0] * length,
            "frame_index": list(range(length)),
            "task": ["walk"] * length,
            "subgoal.there": [False] * (length - 1) + [True],
            "terminated": [False] * (length - 1) + [True],
            "truncated": [False] * length,
        }
    )
    folder = tmp_path / "frames"
    folder.mkdir()
    schema = replace(SCHEMA, cameras=())
    np.save(folder / "state.npy", np.zeros((length, STATE), np.float32))
    np.save(folder / "action.npy", np.zeros((length, ACTION), np.float32))
    steps.select("episode_index", "frame_index", "task").write_parquet(folder / "rows.parquet")
    (folder / "frames.json").write_text(json.dumps({"format": 1, "schema": schema.to_json()}))
    at_reset = pl.DataFrame({"episode_index": [0], "subgoal.there": [False]})
    table = tmp_path / "chunks.parquet"
    write_chunks(steps.lazy(), at_reset, table, config=ChunkConfig(horizon=HORIZON), labeler=RisingEdge())
    assert canonical({"actions": "executed"})[1:-1] in pl.read_parquet_metadata(table)[METADATA]
    return folder, table


def test_the_target_follows_slowly_and_learns_nothing():
    phase = ChunkCritic(critic(), ChunkCriticConfig(tau=0.25))
    weight, slow = phase.policy.twin.chunk[0].weight, phase.target.twin.chunk[0].weight
    with torch.no_grad():
        weight.add_(1.0)
    before = slow.clone()
    phase.after_step(0)
    torch.testing.assert_close(slow, before + 0.25)
    loss, _ = phase(Transition.of(columns()), generator())
    loss.sum().backward()
    assert all(p.grad is None for p in phase.target.parameters())
    assert all(p.grad is not None for p in phase.policy.parameters())


def test_sarsa_learns_v_from_proposals_and_asks_for_them():
    phase = ChunkCritic(critic(), ChunkCriticConfig(algorithm="sarsa_entropy"))
    loss, _ = phase(Transition.of(columns(proposals=3)), generator())
    assert loss.shape == (6,)
    with pytest.raises(BadInput, match="relabel first"):
        phase(Transition.of(columns()), generator())


def test_a_critic_is_saved_resumed_and_loaded_to_the_bit(tmp_path):
    def train(folder, steps: int, resume: bool = True):
        made = lambda step: (columns(seed=k) for k in range(step, 100))  # noqa: E731
        return fit(critic(), made, replace(FIT, steps=steps), folder, phase_name="chunk_critic", resume=resume)

    whole = load_critic(train(tmp_path / "whole", 4))
    with pytest.raises(KeyboardInterrupt):
        made = lambda step: _interrupted(step, at=3)  # noqa: E731
        fit(critic(), made, FIT, tmp_path / "killed", phase_name="chunk_critic")
    again = load_critic(train(tmp_path / "killed", 4))
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(BadInput, match="holds a critic, not a policy"):
        load_policy(tmp_path / "whole/checkpoints/latest")


def _interrupted(step: int, at: int):
    for k in range(step, 100):
        if k == at:
            raise KeyboardInterrupt
        yield columns(seed=k)


def test_a_reward_that_is_no_number_names_its_chunks(tmp_path):
    bad = columns()
    bad["reward"][2] = np.nan
    with pytest.raises(Diverged, match=r"loss is nan in row 2 of its batch \(chunks 2\)"):
        fit(critic(), lambda step: iter([bad]), FIT, tmp_path, phase_name="chunk_critic")


# -- all at once -----------------------------------------------------------------------------------------------------


def trained(tmp_path, name: str, **options) -> dict[str, torch.Tensor]:
    policy = build(PolicyConfig(backbone_options=TRUNK, head="gaussian", head_options={"dim": 16}))
    folder = fit(
        policy,
        lambda step: (columns(seed=k) for k in range(step, 100)),
        FIT,
        tmp_path / name,
        phase_name="chunk_rl",
        phase_options={"critic": CriticConfig(backbone_options=TRUNK, width=16, layers=1), **options},
    )
    return load_policy(folder, weights="last").state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_lambdas_act_on_a_joint_objective_and_a_policy_apart_feels_none_of_them(tmp_path):
    joint = trained(tmp_path, "joint", joint=True)
    assert not same(joint, trained(tmp_path, "joint_v", joint=True, lambda_v=9.0))
    assert not same(joint, trained(tmp_path, "joint_pi", joint=True, lambda_pi=9.0))
    separate = trained(tmp_path, "separate", beta=0.0)
    assert same(separate, trained(tmp_path, "separate_v", beta=0.0, lambda_v=9.0))
    assert not same(joint, trained(tmp_path, "joint_0", joint=True, beta=0.0))


def test_the_seed_design_s_entropy_needs_a_likelihood(tmp_path):
    assert trained(tmp_path, "soft", algorithm="sarsa_entropy", alpha=1e-3)
    with pytest.raises(BadInput, match="use head gaussian"):
        ChunkRL(build(config("act")), ChunkRLConfig(algorithm="sarsa_entropy", alpha=1e-3))
    with pytest.raises(BadInput, match=r"alpha 0\.1 has no effect in iql"):
        ChunkRLConfig(alpha=0.1)


# -- acting ----------------------------------------------------------------------------------------------------------


def test_best_of_executes_the_proposal_that_the_critic_ranks_first():
    policy, model = build(config("flow")).eval(), critic().eval()
    observation = {name: np.asarray(c) for name, c in columns(batch_size=2).items() if name.startswith("observation.")}
    acting = BestOf(policy, model, "digest", k=5)
    chosen = acting.act(observation, ["a", "b"], [3, 4], [0, 7])
    assert chosen.shape == (2, HORIZON, ACTION)
    np.testing.assert_array_equal(chosen, acting.act(observation, ["a", "b"], [3, 4], [0, 7]))
    seen = Observation.of(observation, ["a", "b"])
    noise = torch.stack([torch.stack([acting._noise(s, t, k) for k in range(5)]) for s, t in ((3, 0), (4, 7))])
    proposals = policy.propose(seen, noise)
    q = model.ranked(model.prepare(seen), proposals).min(dim=-1).values
    for i in range(2):
        np.testing.assert_allclose(chosen[i], proposals[i, q[i].argmax()].numpy(), atol=1e-6)
    plain = ActingPolicy(policy, "digest").act(observation, ["a", "b"], [3, 4], [0, 7])
    assert not np.array_equal(plain, chosen)
    assert math.isfinite(float(q.sum()))
