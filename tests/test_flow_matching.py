"""GR00T's action heads: the same numbers as LeRobot's, and what theirs does not promise."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_policy import ACTION, HORIZON, STATE, batch, generator, spec, stats
from torch.testing import assert_close

from data.errors import BadInput
from models.config import LoraOptions, PolicyConfig
from models.heads import flow_matching_1_5 as of_1_5
from models.heads.flow_matching import FlowMatchingConfig, FlowMatchingHead
from models.heads.flow_matching_1_5 import FlowMatching15Config, FlowMatching15Head
from models.layers.dit import DiT, DiTSize, bucket_of
from models.layers.embodiment import ActionEncoder, CategoryLinear, CategoryMLP
from models.layers.flow_dit import PRESETS, PROJECTOR, FlowDit
from models.policy import Policy
from models.types import Context, Sizes

WIDTH, TOKENS = 24, 5  # of the context
TINY = PRESETS["tiny"]
BOTH = pytest.mark.parametrize("name", ["flow_matching", "flow_matching_1_5"])


def make_head(name: str = "flow_matching", horizon: int = HORIZON, width: int = WIDTH, **options) -> FlowDit:
    torch.manual_seed(0)
    sizes = Sizes(context=width, state=STATE, horizon=horizon, action=ACTION)
    if name == "flow_matching":
        return FlowMatchingHead(FlowMatchingConfig(**{"preset": "tiny", **options}), sizes)
    return FlowMatching15Head(FlowMatching15Config(**{"preset": "tiny", **options}), sizes)


def draw(*shape: int, purpose: str = "x") -> torch.Tensor:
    return torch.randn(*shape, generator=generator(purpose))


def make_context(b: int, *, padded: bool = False) -> Context:
    """If padded, the samples have 5, 4, 3 ... tokens that count."""
    is_pad = (torch.arange(TOKENS) + torch.arange(b)[:, None] >= TOKENS) if padded else None
    return Context(
        tokens=draw(b, TOKENS, WIDTH, purpose="tokens"), token_is_pad=is_pad, state=draw(b, STATE, purpose="state")
    )


def everything(b: int, horizon: int = HORIZON) -> torch.Tensor:
    return torch.ones(b, horizon, ACTION, dtype=torch.bool)


# -- parity ----------------------------------------------------------------------------------------------------------


def lerobot_head(name: str):
    """LeRobot's head of N1.7, set to N1 or N1.5. With two blocks its alternating DiT is ours with a mask."""
    from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead, GR00TN17Config

    attention = {"positional_embeddings": None, "dropout": 0.0, "final_dropout": True}
    dit = {
        "num_layers": TINY.layers,
        "num_attention_heads": TINY.heads,
        "attention_head_dim": TINY.head,
        "output_dim": TINY.hidden,
        "norm_type": "ada_norm",
        "interleave_self_attention": True,
    }
    seen = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": WIDTH // 2}
    torch.manual_seed(1)
    reference = GR00TN17ActionHead(
        GR00TN17Config(
            max_state_dim=STATE,
            max_action_dim=ACTION,
            action_horizon=HORIZON,
            hidden_size=TINY.hidden,
            input_embedding_dim=TINY.heads * TINY.head,
            backbone_embedding_dim=WIDTH,
            max_seq_len=TINY.positions,
            max_num_embodiments=TINY.robots,
            num_inference_timesteps=3,
            state_dropout_prob=0.0,
            use_alternate_vl_dit=name == "flow_matching",
            use_vlln=name == "flow_matching_1_5",
            diffusion_model_cfg=dit | attention,
            vl_self_attention_cfg=seen | attention if name == "flow_matching_1_5" else None,
        )
    )
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(0.1 * torch.randn(p.shape))
    return reference


def sample_time_of_n1(b: int, device, dtype) -> torch.Tensor:
    """LeRobot's is N1.7's: (1 - Beta)·0.999. In our order, from the global generator."""
    return ((0.999 - torch.rand(b) ** (1 / 1.5)) / 0.999).clamp(min=0)


def theirs(context: Context, robot: int, **more) -> tuple:
    from transformers.feature_extraction_utils import BatchFeature

    b = len(context.tokens)
    real = torch.ones(b, TOKENS, dtype=torch.bool) if context.token_is_pad is None else ~context.token_is_pad
    seen = {
        "backbone_features": context.tokens,
        "backbone_attention_mask": real,
        "image_mask": torch.zeros_like(real),
    }
    ids = torch.full((b,), robot)
    return BatchFeature(data=seen), BatchFeature(data={"state": context.state[:, None], "embodiment_id": ids, **more})


@pytest.fixture
def no_extra_tokens(monkeypatch):
    """N1.7 has none."""
    monkeypatch.setitem(of_1_5.PRESETS, "tiny", replace(of_1_5.PRESETS["tiny"], extra=0))


@BOTH
def test_loss_gradients_and_chunks_are_lerobot_s(name, no_extra_tokens):
    b, reference = 3, lerobot_head(name)
    reference.sample_time = sample_time_of_n1
    draws = {"flow_matching": "draws", "flow_matching_1_5": "expand_batch"}[name]
    head = make_head(name, steps=3, embodiment=1, **{draws: 1})
    head.load_state_dict(reference.state_dict())  # strictly: the names are GR00T's
    context, action = make_context(b, padded=name == "flow_matching"), draw(b, HORIZON, ACTION)
    mask = (torch.arange(HORIZON) < torch.tensor([4, 2, 1])[:, None])[..., None].expand(-1, -1, ACTION)

    torch.manual_seed(7)
    expected = reference(*theirs(context, 1, action=action, action_mask=mask))["loss"]
    expected.backward()
    loss, _ = head.loss(context, action, mask, torch.Generator().manual_seed(7))
    of_batch = (loss * mask.sum((1, 2))).sum() / mask.sum()  # theirs is a mean over the batch's entries
    of_batch.backward()
    assert_close(of_batch, expected, atol=1e-5, rtol=0)
    wanted = dict(reference.named_parameters())
    for n, p in head.named_parameters():
        assert_close(p.grad, wanted[n].grad, atol=1e-5, rtol=0, msg=n)

    torch.manual_seed(8)
    chunk = reference.get_action(*theirs(context, 1))["action_pred"]
    noise = torch.randn(b, HORIZON, ACTION, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        assert_close(head.sample(context, noise), chunk, atol=1e-5, rtol=0)


def test_a_dit_whose_every_block_cross_attends_is_lerobot_s():
    from lerobot.policies.groot.action_head.cross_attention_dit import DiT as LeRobotDiT

    torch.manual_seed(2)
    reference = LeRobotDiT(
        num_attention_heads=2,
        attention_head_dim=8,
        output_dim=6,
        num_layers=3,
        dropout=0.0,
        positional_embeddings=None,
        cross_attention_dim=WIDTH,
    )
    dit = DiT(DiTSize(layers=3, heads=2, head=8, out=6, interleave=False), WIDTH)
    dit.load_state_dict(reference.state_dict())
    x, tokens = draw(2, 4, 16).requires_grad_(), draw(2, TOKENS, WIDTH, purpose="tokens")
    bucket = torch.tensor([0, 999])
    expected, ours = reference(x, tokens, bucket), dit(x, bucket, dit.remember(tokens, None))
    assert_close(ours, expected, atol=1e-5, rtol=0)
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, expected)), atol=1e-5, rtol=1e-5)


def test_robots_of_one_batch_are_lerobot_s():
    """A number per sample, as LeRobot has it, or one for all."""
    from lerobot.policies.groot import groot_n1_7 as lerobot

    torch.manual_seed(3)
    robots, bucket, action, state = (
        torch.tensor([2, 0, 2]),
        torch.tensor([0, 500, 999]),
        draw(3, 4, ACTION),
        draw(3, 1, 5),
    )
    for ours, other, args in (
        (CategoryMLP(3, 5, 8, 6), lerobot.CategorySpecificMLP(3, 5, 8, 6), (state,)),
        (ActionEncoder(3, ACTION, 16), lerobot.MultiEmbodimentActionEncoder(ACTION, 16, 3), (action, bucket)),
    ):
        ours.load_state_dict(other.state_dict())
        expected = other(*args, robots)
        assert_close(ours(*args, robots), expected, atol=1e-6, rtol=0)
        for i, robot in enumerate(robots.tolist()):
            assert_close(ours(*(a[i : i + 1] for a in args), robot), expected[i : i + 1], atol=1e-6, rtol=0)


# -- known numbers ---------------------------------------------------------------------------------------------------


def test_training_times_have_gr00t_s_mean():
    """GOLD: .3994, so that the noisy end is favoured. A port that forgets to turn the Beta around has .6."""
    head = make_head(horizon=1, draws=8)
    buckets = []
    head.model.register_forward_pre_hook(lambda _, args: buckets.append(args[1]))
    with torch.no_grad():
        head.velocities(make_context(2000), draw(2000, 1, ACTION), generator("times"))
    assert (buckets[0].double().mean() / 1000).item() == pytest.approx(0.3994 - 0.0005, abs=0.005)
    assert buckets[0].min() == 0 and buckets[0].max() <= 999


def test_times_are_told_in_a_thousand_buckets():
    t = torch.tensor([-0.001, 0.0, 0.0009, 0.25, 0.9995, 1.0])
    assert bucket_of(t).tolist() == [0, 0, 0, 250, 999, 999]
    for steps in range(1, 11):  # LeRobot counts in double precision
        at = torch.tensor([k / steps for k in range(steps)])
        assert bucket_of(at).tolist() == [int(k / steps * 1000) for k in range(steps)]


@BOTH
@pytest.mark.parametrize("steps", range(1, 11))
def test_the_exact_field_of_one_point_leads_there(name, steps, monkeypatch):
    """Contract 5: from noise at t = 0 to data at t = 1."""
    head = make_head(name, steps=steps)
    point, noise = draw(2, HORIZON, ACTION, purpose="point"), draw(2, HORIZON, ACTION, purpose="noise")
    monkeypatch.setattr(head, "field", lambda context: lambda x, t: (point - x) / (1 - t)[:, None, None])
    assert_close(head.sample(make_context(2), noise), point, atol=1e-6, rtol=0)


def test_velocities_come_with_what_they_should_be():
    """The original's loss reads a `self.velocity` that nobody sets."""
    head, action = make_head(draws=3), draw(2, HORIZON, ACTION)
    predicted, target = head.velocities(make_context(2), action, generator("v"))
    again = generator("v")
    noise = torch.randn(6, HORIZON, ACTION, generator=again)
    assert torch.equal(target, action.repeat_interleave(3, dim=0) - noise)
    assert predicted.shape == target.shape
    loss, info = head.loss(make_context(2), action, everything(2), generator("v"))
    assert_close(loss, (predicted - target).square().unflatten(0, (2, 3)).mean((1, 2, 3)))
    assert info["velocity_mse"].item() == pytest.approx(loss.mean().item())


def test_published_sizes_are_gr00t_s():
    """550,386,688 is what GR00T N1.5 prints of its DiT when it is loaded; the rest is arithmetic."""

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        n1 = FlowMatchingHead(
            FlowMatchingConfig(preset="published", embodiment=31), Sizes(context=1536, state=64, horizon=16, action=32)
        )
        n1_5 = FlowMatching15Head(
            FlowMatching15Config(preset="published"), Sizes(context=2048, state=64, horizon=16, action=32)
        )
    assert count(n1_5.model) == 550_386_688
    assert count(n1_5.vl_self_attention) == 201_433_088
    assert round(count(n1) / 1e9, 2) == 0.85 and round(count(n1_5) / 1e9, 2) == 1.07
    shapes = {n: tuple(p.shape) for n, p in n1_5.named_parameters()}
    assert shapes["state_encoder.layer1.W"] == (32, 64, 1024) and shapes["state_encoder.layer2.W"] == (32, 1024, 1536)
    assert shapes["action_encoder.W2.W"] == (32, 3072, 1536) and shapes["action_decoder.layer2.b"] == (32, 32)
    assert shapes["position_embedding.weight"] == (1024, 1536) and shapes["future_tokens.weight"] == (32, 1536)
    assert shapes["model.transformer_blocks.0.attn1.to_k.weight"] == (1536, 2048)
    assert shapes["model.transformer_blocks.1.attn1.to_k.weight"] == (1536, 1536)
    assert shapes["model.proj_out_2.weight"] == (1024, 1536) and len(n1.model.transformer_blocks) == 16
    assert n1.model.transformer_blocks[0].attn1.to_out[1].p == pytest.approx(0.36)  # two masks of .2 in theirs


def test_a_published_head_begins_as_gr00t_s():
    torch.manual_seed(0)
    part = CategoryLinear(2, 300, 300)
    assert part.W.std().item() == pytest.approx(0.02, rel=0.02) and not part.b.any()


# -- promises --------------------------------------------------------------------------------------------------------


@BOTH
def test_padded_context_tokens_change_nothing(name):
    """In training and acting. The original marks them and then attends to them."""
    head, b = make_head(name), 3
    plain = make_context(b, padded=True)
    junk = plain.tokens.where(~plain.token_is_pad[..., None], 1e3 * draw(b, TOKENS, WIDTH, purpose="junk"))
    more = torch.cat([junk, 9 * torch.ones(b, 2, WIDTH)], dim=1)
    is_pad = torch.cat([plain.token_is_pad, torch.ones(b, 2, dtype=torch.bool)], dim=1)
    other = replace(plain, tokens=more, token_is_pad=is_pad)
    action, noise = draw(b, HORIZON, ACTION), draw(b, HORIZON, ACTION, purpose="noise")
    losses = [head.loss(c, action, everything(b), generator("l"))[0] for c in (plain, other)]
    chunks = [head.sample(c, noise) for c in (plain, other)]
    assert_close(*losses, atol=1e-5, rtol=0)
    assert_close(*chunks, atol=1e-5, rtol=0)
    unmarked = head.sample(replace(other, token_is_pad=None), noise)
    assert not torch.allclose(unmarked, chunks[0], atol=1e-2)


@BOTH
def test_a_sample_of_nothing_but_padding_costs_nothing(name):
    """Neither a chunk without executed steps, 0/0 in the original, nor a context without tokens is NaN."""
    head, context = make_head(name), make_context(2)
    context = replace(context, token_is_pad=torch.tensor([[False], [True]]).expand(-1, TOKENS))
    mask = everything(2)
    mask[1] = False
    loss, _ = head.loss(context, draw(2, HORIZON, ACTION), mask, generator("l"))
    loss.mean().backward()
    assert loss[0] > 0 and loss[1] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    assert head.sample(context, draw(2, HORIZON, ACTION)).isfinite().all()


def test_a_robot_s_data_teaches_its_own_rows_and_no_other_s():
    head = make_head(max_embodiments=5, embodiment=3)
    head.loss(make_context(2), draw(2, HORIZON, ACTION), everything(2), generator("l"))[0].mean().backward()
    own = [m for m in head.modules() if isinstance(m, CategoryLinear)]
    assert len(own) == 7
    for part in own:
        for p in (part.W, part.b):
            assert p.grad.flatten(1).any(dim=1).tolist() == [i == 3 for i in range(5)]


@BOTH
def test_the_sequence_is_state_then_actions_and_positions_are_the_actions(name):
    head, context, x_t = make_head(name), make_context(2), draw(2, HORIZON, ACTION)
    seen = []
    head.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    head.field(context)(x_t, torch.tensor([0.0, 0.5]))
    encoded = head.action_encoder(x_t, torch.tensor([0, 500]), 0)
    extra = [] if name == "flow_matching" else [head.future_tokens.weight.expand(2, -1, -1)]
    actions = encoded + head.position_embedding.weight[:HORIZON]
    assert torch.equal(seen[0], torch.cat([head.state_encoder(context.state[:, None], 0), *extra, actions], dim=1))


@BOTH
def test_draws_share_one_reading_of_the_context(name):
    head, context, k = make_head(name), make_context(2, padded=True), 3
    x_t, t = draw(2 * k, HORIZON, ACTION), torch.rand(2 * k, generator=generator("t"))
    assert_close(head.field(context)(x_t, t), head.field(context.repeat(k))(x_t, t), atol=1e-5, rtol=0)
    head.draws, read = 5, []
    head.model.transformer_blocks[0].attn1.to_k.register_forward_pre_hook(lambda _, args: read.append(len(args[0])))
    head.loss(context, draw(2, HORIZON, ACTION), everything(2), generator("l"))
    head.sample(context, draw(2, HORIZON, ACTION))
    assert read == [2, 2]  # for five draws, and for four steps


def test_draws_are_the_preset_s_unless_they_are_named():
    assert make_head().draws == TINY.draws and make_head(draws=2).draws == 2
    assert (
        make_head("flow_matching_1_5").draws == TINY.draws and make_head("flow_matching_1_5", expand_batch=3).draws == 3
    )


@pytest.mark.parametrize("interleave", [True, False])
def test_steps_see_the_state_and_each_other_only_by_self_attention(interleave):
    head = make_head(interleave_self_attention=interleave)
    assert (head.state_encoder is not None) is interleave
    context, x_t = make_context(1), draw(1, HORIZON, ACTION).requires_grad_()
    context.state.requires_grad_()
    moved = head.field(context)(x_t, torch.tensor([0.3]))[0, 0].square().sum()
    gradients = torch.autograd.grad(moved, (x_t, context.state), allow_unused=True)
    assert gradients[0].any(dim=-1).tolist() == [[True] + [interleave] * (HORIZON - 1)]
    assert (gradients[1] is not None) is interleave


@pytest.mark.parametrize("use_vlln", [True, False])
def test_the_ear_of_n1_5_is_an_option(use_vlln):
    head = make_head("flow_matching_1_5", use_vlln=use_vlln)
    assert hasattr(head, "vlln") is hasattr(head, "vl_self_attention") is use_vlln
    context = make_context(2)
    louder = replace(context, tokens=5 * context.tokens)
    assert torch.allclose(head.read(context), head.read(louder), atol=1e-3) is use_vlln


def test_only_the_extra_tokens_and_the_ear_tell_the_two_apart():
    one, other = (
        {n: tuple(p.shape) for n, p in make_head(n).named_parameters()} for n in ("flow_matching", "flow_matching_1_5")
    )
    more = other.keys() - one.keys()
    assert one.items() <= other.items()
    assert {name.split(".")[0] for name in more} == {"vlln", "vl_self_attention", "future_tokens"}


# -- published weights -----------------------------------------------------------------------------------------------


def save_as_gr00t(head: FlowDit, folder, **changes) -> None:
    weights = {f"action_head.{n}": w.clone() for n, w in head.state_dict().items()} | changes
    save_file({"backbone.eagle_linear.weight": torch.zeros(1), **weights}, folder / "model.safetensors")


@pytest.mark.parametrize("part", ["projector", "diffusion_model"])
@BOTH
def test_a_part_that_is_not_tuned_stays_as_published(name, part, tmp_path):
    published = make_head(name)
    with torch.no_grad():
        for p in published.parameters():
            p += 1
    save_as_gr00t(published, tmp_path)
    head = make_head(name, **{f"tune_{part}": False}, pretrained=str(tmp_path))
    head.load_pretrained()
    for n, p in head.named_parameters():
        assert torch.equal(p, published.state_dict()[n])
        frozen = n.split(".")[0] in (PROJECTOR if part == "projector" else ("model",))
        assert p.requires_grad is not frozen, n
    loss, _ = head.loss(make_context(2), draw(2, HORIZON, ACTION), everything(2), generator("l"))
    loss.mean().backward()
    assert all((p.grad is not None) is p.requires_grad for p in head.parameters())


def test_a_new_policy_begins_from_the_weights_its_head_names(tmp_path):
    def policy(**options) -> Policy:
        backbone = {"width": 16, "keypoints": 4, "grid": 2}
        options = {"preset": "tiny"} | options
        return Policy.build(
            spec(PolicyConfig(backbone_options=backbone, head="flow_matching", head_options=options)), stats(), seed=7
        )

    published: FlowDit = policy().head  # pyright: ignore[reportAttributeAccessIssue] (it is a pair)
    with torch.no_grad():
        for p in published.parameters():
            p += 1
    save_as_gr00t(published, tmp_path)
    begun: FlowDit = policy(pretrained=str(tmp_path)).head  # pyright: ignore[reportAttributeAccessIssue]
    assert all(torch.equal(p, published.state_dict()[n]) for n, p in begun.named_parameters())


@BOTH
def test_adapters_leave_the_robot_s_own_to_train(name):
    from models.lora import add_adapters

    head = make_head(name)
    add_adapters({"head": head}, LoraOptions(rank=2), seed=0)
    trained = {n for n, p in head.named_parameters() if p.requires_grad}
    assert {n for n in trained if ".lora_" not in n} == {
        n for n, _ in head.named_parameters() if n.split(".")[0] in (*PROJECTOR, "future_tokens")
    }
    loss, _ = head.loss(make_context(2), draw(2, HORIZON, ACTION), everything(2), generator("l"))
    loss.mean().backward()
    assert all((p.grad is not None) is p.requires_grad for p in head.parameters())


def test_weights_that_do_not_fit_are_listed(tmp_path):
    head = make_head(pretrained=str(tmp_path))
    save_as_gr00t(
        head, tmp_path, **{"action_head.model.proj_out_2.bias": torch.zeros(2), "action_head.mask": torch.ones(1)}
    )
    with pytest.raises(
        BadInput, match=r"2 keys do not fit: mask \(unknown\), model.proj_out_2.bias \(\[2\], not"
    ) as fault:
        head.load_pretrained()
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flow_matching", {"steps": 0}, "steps is 0; give at least 1"),
        ("flow_matching", {"draws": -1}, "draws is -1; give at least 1"),
        ("flow_matching", {"embodiment": 2}, "embodiment is 2; give 0 to 1, or more max_embodiments"),
        ("flow_matching", {"tune_projector": False}, "tune_projector false would keep random weights"),
        ("flow_matching_1_5", {"tune_diffusion_model": False}, "tune_diffusion_model false would keep random weights"),
        ("flow_matching", {"preset": "huge"}, "head flow_matching: option preset"),
        ("flow_matching_1_5", {"draws": 2}, "head flow_matching_1_5 has no option 'draws'"),
    ],
)
def test_refused_when_built(name, options, message):
    policy = PolicyConfig(backbone_options={"width": 16}, head=name, head_options={"preset": "tiny", **options})
    with pytest.raises(BadInput, match=message) as fault:
        Policy.build(spec(policy), stats())
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="horizon 65 is above the 64 of tiny"):
        make_head(horizon=65)
    with pytest.raises(BadInput, match="2 heads do not divide a context 25 wide"):
        make_head("flow_matching_1_5", width=25)


@BOTH
def test_it_acts_and_learns_behind_resnet_s_tokens(name):
    """The recipe `flow_dit` at tiny size: every parameter gets a gradient."""
    policy = Policy.build(
        spec(PolicyConfig(backbone_options={"width": 16, "grid": 2}, head=name, head_options={"preset": "tiny"})),
        stats(),
    )
    loss, _ = policy.loss(batch(), generator("l"))
    loss.mean().backward()
    assert loss.shape == (8,) and [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []
