"""pi0 and pi0.5 as a backbone and a head: LeRobot's numbers from its weights, a prefix that is read once."""

from dataclasses import replace

import pytest
import tiny_pi0
import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks
from safetensors.torch import save_file
from tiny_paligemma import published_sizes
from tiny_policy import ACTION, PX, SCHEMA, STATE, batch, build, generator
from torch.testing import assert_close

from data.errors import BadInput
from models.backbones import paligemma_expert
from models.backbones.paligemma_expert import PaligemmaExpert, PaligemmaExpertConfig, state_bins
from models.config import PolicyConfig
from models.freeze import frozen_digest, train_mode
from models.heads.pi0_flow import Pi0FlowConfig, Pi0FlowHead
from models.layers.gemma import suffix_mask
from models.pair import Pair
from models.published.pi0 import renamed
from models.tokenizers import byte_tokenizer, write_tiny_tokenizer
from models.types import Context, Observation, Sizes

HORIZON, WIDE = 4, 32  # actions per chunk; what LeRobot pads state and action to
CAMERAS = SCHEMA.cameras
TASKS = ("pick up the cube", "pick_up\nit", "pick up the red cube\n")
KINDS = pytest.mark.parametrize("kind", ["pi0", "pi05"])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(kind: str = "pi0", preset: str = "tiny", **options) -> PolicyConfig:
    """`options` of the backbone and, with "head_" before their names, of the head."""
    pi05 = kind == "pi05"
    head = {name.removeprefix("head_"): v for name, v in options.items() if name.startswith("head_")}
    backbone = {name: v for name, v in options.items() if not name.startswith("head_")}
    return PolicyConfig(
        backbone="paligemma_expert",
        backbone_options={"preset": preset, "state_in_prompt": pi05, "longest": 200} | backbone,
        head="pi0_flow",
        head_options={"preset": preset, "pi05": pi05} | head,
        normalization="min_max" if pi05 else "mean_std",
        shift=0,
        pad_state=0 if pi05 else WIDE,
        pad_action=WIDE,
    )


def draw(*shape: int, purpose: str = "draw") -> torch.Tensor:
    return torch.randn(shape, generator=generator(purpose))


def observed(b: int = 3) -> Observation:
    """As a policy prepares it, with instructions of different lengths."""
    images = {name: torch.rand(b, 3, PX, PX, generator=generator(name)) for name in CAMERAS}
    return Observation(images=images, state=draw(b, STATE, purpose="state") * 0.7, tasks=TASKS[:b])


def contents(pair: Pair, seen: Observation) -> Context:
    state = torch.nn.functional.pad(seen.state, (0, pair.spec.state_width - STATE))
    return replace(pair.backbone(replace(seen, state=state)), state=state)


# -- parity ----------------------------------------------------------------------------------------------------------


def reference(kind: str, **options) -> tuple:
    """LeRobot's policy, every weight random, and ours with the same weights; inside `tiny` and `published_sizes`."""
    theirs = tiny_pi0.policy(kind, SCHEMA, horizon=HORIZON, **options)
    ours = build(config(kind, "published", head_steps=4)).eval()
    ours.load_state_dict(renamed(theirs.state_dict()))
    return theirs, ours


def their_inputs(theirs, seen: Observation) -> tuple:
    """What LeRobot's processors and policy make of an observation, up to its model: padded words, masks, pictures."""
    images, masks = theirs._preprocess_images({f"observation.images.{name}": p for name, p in seen.images.items()})
    if theirs.config.type == "pi0":
        prompts = [task if task.endswith("\n") else task + "\n" for task in seen.tasks]
    else:
        step = tiny_pi0.Pi05PrepareStateTokenizerProcessorStep()
        transition = {"observation": {"observation.state": seen.state}, "complementary_data": {"task": [*seen.tasks]}}
        prompts = step(transition)["complementary_data"]["task"]
    longest = theirs.config.tokenizer_max_length
    texts = [byte_tokenizer().encode(prompt).ids[:longest] for prompt in prompts]
    tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts])
    read = torch.arange(longest) < torch.tensor([len(ids) for ids in texts])[:, None]
    padded = (torch.nn.functional.pad(seen.state, (0, WIDE - STATE)),) if theirs.config.type == "pi0" else ()
    return images, masks, tokens, read, padded


@KINDS
def test_losses_and_gradients_are_lerobot_s(kind):
    with tiny_pi0.tiny(), published_sizes():
        theirs, ours = reference(kind)
        seen, action, noise = observed(), draw(3, HORIZON, WIDE), draw(3, HORIZON, WIDE, purpose="noise")
        t = torch.tensor([0.001, 0.4, 0.97])
        images, masks, tokens, read, state = their_inputs(theirs, seen)
        expected = theirs.model(images, masks, tokens, read, *state, action, noise=noise, time=t)
        errors = ours.head.errors(contents(ours, seen), action, noise, t)
        assert_close(errors, expected, atol=1e-5, rtol=1e-5)

        expected.mean().backward()
        errors.mean().backward()
        wanted = renamed({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
        gradients = {name: p.grad for name, p in ours.named_parameters()}
        assert gradients.keys() == wanted.keys()  # ours has no parameter that the loss does not reach
        for name, gradient in gradients.items():
            assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


@KINDS
def test_chunks_are_lerobot_s(kind):
    """A camera that LeRobot shows black and masks is one that ours goes without."""
    with tiny_pi0.tiny(), published_sizes():
        theirs, ours = reference(kind, empty_cameras=1)
        seen, noise = observed(), draw(3, HORIZON, WIDE, purpose="noise")
        images, masks, tokens, read, state = their_inputs(theirs, seen)
        assert len(images) == len(CAMERAS) + 1
        expected = theirs.model.sample_actions(images, masks, tokens, read, *(state or (seen.state,))[: kind == "pi0"],
                                               noise=noise, num_steps=4)  # fmt: skip
        with torch.no_grad():
            assert_close(ours.head.sample(contents(ours, seen), noise), expected, atol=1e-5, rtol=1e-5)


def test_the_prefix_is_transformers_paligemma():
    """One picture and words that are no padding; its positions begin with 1, which rotation does not notice."""
    from transformers import PaliGemmaForConditionalGeneration

    with published_sizes():
        backbone = make_backbone(("tokens", "pooled", "layers"), preset="published", cameras=CAMERAS[:1])
        paligemma = paligemma_expert._paligemma(
            backbone.config, paligemma_expert.PRESETS["published"], backbone.instructions, backbone.image_size
        )
    picture_id = tiny_pi0.VOCABULARY - 1
    paligemma.image_token_index = picture_id
    theirs = PaliGemmaForConditionalGeneration(paligemma).eval()
    theirs.model.load_state_dict(backbone.state_dict())
    side, n = backbone.image_size, 4
    picture = torch.rand(1, 3, side, side, generator=generator("picture"))
    ids = byte_tokenizer().encode("pick up\n").ids
    with torch.no_grad():
        found = backbone(Observation(images={CAMERAS[0]: picture}, state=torch.zeros(1, STATE), tasks=("pick up",)))
        expected = theirs.model(
            input_ids=torch.tensor([[picture_id] * n + ids]),
            pixel_values=picture * 2 - 1,
            attention_mask=torch.ones(1, n + len(ids), dtype=torch.long),
            token_type_ids=torch.zeros(1, n + len(ids), dtype=torch.long),
            position_ids=torch.arange(n + len(ids))[None],
            use_cache=True,
        )
    assert_close(found.tokens, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert_close(found.pooled, expected.last_hidden_state.mean(dim=1), atol=1e-5, rtol=1e-5)
    for layer, (keys, values) in zip(expected.past_key_values.layers, found.layers, strict=True):
        assert_close((layer.keys, layer.values), (keys, values), atol=1e-5, rtol=1e-5)


# -- known numbers ---------------------------------------------------------------------------------------------------


def test_gold_mask():
    """[P P S A A]: P sees P (the backbone sees nothing else), S sees P and S, A sees all."""
    seen = suffix_mask(torch.zeros(1, 2, dtype=torch.bool), (True, True, False))
    assert seen[0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    whole = make_att_2d_masks(torch.ones(1, 5, dtype=torch.bool), torch.tensor([[0, 0, 1, 1, 0]]))
    assert torch.equal(seen, whole[:, 2:])
    assert suffix_mask(torch.tensor([[False, True]]), (True, False))[0].int().tolist() == [[1, 0, 1, 1]] * 2


def test_gold_mean_of_the_training_times():
    head = make_head()
    assert head.convention.sample_time((200_000,), generator("t"), head.config.time).mean() == pytest.approx(
        0.6004, abs=2e-3
    )


def test_words_are_multiplied_by_the_root_of_the_width_and_pictures_are_not():
    """transformers has changed who does it between versions; the weights have not."""
    backbone, seen = make_backbone(("layers",)), observed()
    read = []
    backbone.read = lambda x, is_pad: (read.append(x), (x, []))[1]  # what Gemma is shown
    backbone(seen)
    pictures = backbone.embed_pictures([seen.images[name] for name in CAMERAS])
    towers = backbone.vision_tower(torch.cat([seen.images[name] for name in CAMERAS]) * 2 - 1).last_hidden_state
    projected = backbone.multi_modal_projector(towers)
    n = pictures.shape[1]
    assert_close(read[0][:, :n].norm(), projected.norm())
    assert_close(read[0][:, :n].flatten(0, 1), projected.view(2, 3, n // 2, -1).transpose(0, 1).reshape(3 * n, -1))
    bos = read[0][:, n]
    assert_close(bos, (backbone.language_model.embed_tokens.weight[2] * backbone.width**0.5).expand(3, -1))


def test_gold_sizes_of_the_published_preset():
    """Gemma 2B, SigLIP So400m/14, an expert of 311 M; what gives no key or value is not there."""
    with torch.device("meta"):
        backbone = make_backbone(("tokens",), preset="published", width=32)
        without_end = make_backbone(("layers",), preset="published", width=32)
        sizes = Sizes(context=2048, state=32, horizon=50, action=32, layers=backbone.layer_shape)
        head = Pi0FlowHead(Pi0FlowConfig(preset="published"), sizes)
        head05 = Pi0FlowHead(Pi0FlowConfig(preset="published", pi05=True), sizes)
    counts = {name: count(part) for name, part in backbone.named_children()}
    assert counts == {"vision_tower": 412_442_352, "multi_modal_projector": 2_361_344, "language_model": 2_508_531_712}
    last = 2048 * 2048 * 2 + 3 * 2048 * 16384 + 2 * 2048
    assert count(backbone) - count(without_end) == last
    assert count(head.expert) == 311_464_960
    assert count(head05.expert) == count(head.expert) + 37 * (3 * 1024 * 1024 + 3 * 1024 - 1024)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_bins_are_numpy_s_digitize():
    import numpy as np

    state = torch.cat([draw(200, STATE), torch.tensor([[-1.0, 1.0, 0.0, -1.5, 127 / 128]])])
    expected = np.digitize(state.numpy(), bins=np.linspace(-1, 1, 257)[:-1]) - 1
    assert state_bins(state).tolist() == expected.tolist()
    assert state_bins(state)[-1].tolist() == [0, 255, 128, -1, 255]


# -- promises --------------------------------------------------------------------------------------------------------


def make_backbone(give: tuple[str, ...], *, cameras=CAMERAS, width: int = STATE, **options) -> PaligemmaExpert:
    part = PaligemmaExpertConfig(**({"preset": "tiny"} | options))
    return PaligemmaExpert(part, cameras=cameras, image_size=(PX, PX), state_width=width, give=frozenset(give))


def make_head(**options) -> Pi0FlowHead:
    shape = paligemma_expert.PRESETS["tiny"].layers
    sizes = Sizes(context=32, state=STATE, horizon=HORIZON, action=ACTION, layers=shape)
    return Pi0FlowHead(Pi0FlowConfig(preset="tiny", **options), sizes)


@KINDS
def test_the_prefix_is_read_once(kind):
    """For every draw of the loss, and for every step of every proposed chunk."""
    pair, data = build(config(kind, head_draws=3, head_steps=5)).eval(), batch()
    read, asked = [], []
    pair.backbone.language_model.layers[0].register_forward_hook(lambda m, args, out: read.append(args[0].shape[0]))
    pair.head.expert.layers[0].register_forward_hook(lambda m, args, out: asked.append(args[0].shape[0]))
    pair.loss(data, generator("loss"))
    assert (read, asked) == ([8], [24])
    with torch.no_grad():
        pair.propose(data.observation, draw(8, 2, HORIZON, WIDE))
    assert (read, asked) == ([8, 8], [24, *[16] * 5])


@KINDS
def test_the_prefix_knows_nothing_of_state_and_actions(kind):
    """But through the words, if the state is in them."""
    backbone = make_backbone(("layers",), state_in_prompt=kind == "pi05")
    seen = observed()
    first, second = (backbone(replace(seen, state=state)).layers for state in (seen.state, -seen.state))
    assert all(torch.equal(a, b) for a, b in zip(first[-1], second[-1], strict=True)) is (kind == "pi0")


@KINDS
def test_padding_of_words_changes_nothing(kind):
    """A text is what it is alone, beside longer ones."""
    pair, seen = build(config(kind)).eval(), observed()
    noise = draw(3, HORIZON, WIDE, purpose="noise")
    with torch.no_grad():
        together = pair.head.sample(contents(pair, seen), noise)
        for i in range(3):
            one = contents(pair, seen.rows(slice(i, i + 1)))
            assert one.token_is_pad is None
            assert_close(pair.head.sample(one, noise[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("give", [("layers",), ("tokens",), ("pooled",), ("tokens", "layers")])
def test_every_parameter_is_read(give):
    """What nobody reads is not built; what is read does not depend on what else is."""
    backbone, whole = make_backbone(give), make_backbone(("tokens", "pooled", "layers"))
    whole.load_state_dict(backbone.state_dict(), strict=False)
    context, all_of_it = backbone(observed()), whole(observed())
    for name in ("tokens", "pooled", "layers"):
        assert (getattr(context, name) is not None) is (name in give)
    if "layers" in give:
        assert_close(context.layers, all_of_it.layers)
    read = [v for name in give for v in torch.utils._pytree.tree_leaves(getattr(context, name))]
    sum((v**2).sum() for v in read).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert set(dict(whole.named_parameters())) - set(dict(backbone.named_parameters())) == (
        set()
        if set(give) - {"layers"}
        else {"language_model.norm.weight"}
        | {f"language_model.layers.1.self_attn.{p}.weight" for p in ("q_proj", "o_proj")}
        | {f"language_model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        | {"language_model.layers.1.post_attention_layernorm.weight"}
    )


@KINDS
def test_attention_is_the_same_however_it_is_computed(kind):
    seen, action = observed(), draw(3, HORIZON, WIDE)
    errors = []
    for attention in ("eager", "sdpa"):
        pair = build(config(kind, attention=attention, head_attention=attention))
        assert pair.head.expert.config._attn_implementation == attention
        errors.append(pair.head.errors(contents(pair, seen), action, draw(3, HORIZON, WIDE), torch.full((3,), 0.3)))
    assert_close(*errors, atol=1e-5, rtol=1e-5)


def test_pictures_are_scaled_out_of_place():
    """InternManip's scaling changes its input, and maps [0, 1] to [-2, 0]."""
    backbone, shown = make_backbone(("layers",)), []
    backbone.vision_tower.register_forward_pre_hook(lambda tower, args: shown.append(args[0]))
    seen = observed()
    before = {name: picture.clone() for name, picture in seen.images.items()}
    for _ in range(2):
        backbone(seen)
    assert all(torch.equal(before[name], seen.images[name]) for name in CAMERAS)
    assert torch.equal(shown[0], shown[1]) and torch.equal(shown[0], torch.cat([before[n] * 2 - 1 for n in CAMERAS]))


def test_another_size_is_shown_with_black_bars():
    backbone, shown = make_backbone(("layers",), image_size=24), []
    backbone.vision_tower.register_forward_pre_hook(lambda tower, args: shown.append(args[0]))
    wide = {name: torch.ones(1, 3, 8, 16) for name in CAMERAS}
    backbone(Observation(images=wide, state=torch.zeros(1, STATE), tasks=("",)))
    assert shown[0].shape == (2, 3, 24, 24)
    assert (shown[0][:, :, 6:18] == 1).all() and (shown[0][:, :, :6] == -1).all() and (shown[0][:, :, 18:] == -1).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@KINDS
def test_the_exact_field_of_one_point_leads_to_the_point(kind, steps, monkeypatch):
    """Contract 5."""
    pair = build(config(kind, head_steps=steps)).eval()
    point, noise = draw(3, HORIZON, WIDE, purpose="point"), draw(3, HORIZON, WIDE, purpose="noise")
    monkeypatch.setattr(pair.head, "velocity", lambda x, t, around: (x - point) / t[:, None, None])
    assert_close(pair.head.sample(contents(pair, observed()), noise), point, atol=1e-5, rtol=0)


def test_adaptive_norms_begin_as_the_identity():
    """No layer of a new pi0.5 adds anything; LeRobot leaves the gates' bias random."""
    head = make_head(pi05=True)
    biases = [p for name, p in head.expert.named_parameters() if name.endswith("dense.bias")]
    assert len(biases) == 2 * paligemma_expert.PRESETS["tiny"].layers.layers + 1
    assert not any(bias.any() for bias in biases)


def test_frozen_is_what_was_learnt(tmp_path):
    write_tiny_tokenizer(tmp_path)
    learnt = make_backbone(("tokens", "layers")).state_dict()
    named = {f"model.{name}": w for name, w in learnt.items()}
    half = len(named) // 2
    shards = {"a.safetensors": dict([*named.items()][:half]), "b.safetensors": dict([*named.items()][half:])}
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    names = {"pretrained": str(tmp_path), "tokenizer": str(tmp_path)}
    for freeze, frozen in (
        ("freeze_vision_encoder", ("backbone.vision_tower.",)),
        ("train_expert_only", ("backbone.",)),
    ):
        pair = build(config(**names, **{freeze: True}))
        train_mode(pair)
        before = frozen_digest(pair)
        for name, weight in pair.backbone.state_dict().items():
            assert torch.equal(weight, learnt[name])
        assert all(p.requires_grad is not name.startswith(frozen) for name, p in pair.named_parameters())
        pair.loss(batch(), generator("loss"))[0].mean().backward()
        assert {name for name, p in pair.named_parameters() if p.grad is None} == {
            name for name, p in pair.named_parameters() if name.startswith(frozen)
        }
        assert frozen_digest(pair) == before
    save_file({n: w for n, w in named.items() if "projector" not in n}, tmp_path / "b.safetensors")
    with pytest.raises(BadInput, match=r"multi_modal_projector.linear.weight is missing"):
        build(config(**names))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_vision_encoder": True}, "freezing without pretrained would keep random weights"),
        ({"train_expert_only": True}, "freezing without pretrained would keep random weights"),
        ({"pretrained": "folder"}, "pretrained reads words, not bytes"),
        ({"image_size": 20}, "image_size 20 must be a multiple of the patch, 8"),
        ({"attention": "flash"}, "backbone paligemma_expert: option attention"),
        ({"head_draws": -1}, "draws -1 at least 0"),
        ({"head_attention": "flash"}, "head pi0_flow: option attention"),
    ],
)
def test_refused_when_built(options, message):
    with pytest.raises(BadInput, match=message) as fault:
        build(config(**options))
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


@pytest.mark.parametrize("where", ["attention", "head_attention"])
def test_flex_is_refused_where_it_is_not_compiled(where):
    with pytest.raises(BadInput, match="attention flex is compiled for GPUs, not for cpu; use attention sdpa"):
        build(config(**{where: "flex"})).loss(batch(), generator("loss"))


def test_a_backbone_without_layers_is_refused():
    with pytest.raises(BadInput, match=r"head 'pi0_flow' needs layers, which backbone 'resnet' does not give"):
        build(replace(config(), backbone="resnet", backbone_options={}))
