"""Eagle: the same numbers as transformers' towers with GR00T's popped layers between them, and weights by name."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_policy import PX, STATE, batch, build, generator
from torch import nn
from torch.testing import assert_close

from data.errors import BadInput
from models.backbones.eagle import Eagle
from models.backbones.eagle_1_5 import IMAGE_TOKEN, Eagle15
from models.config import PolicyConfig
from models.layers.eagle import EagleConfig, pixel_shuffle
from models.layers.eagle_weights import our_names
from models.types import Observation

BOTH = pytest.mark.parametrize("kind", [Eagle, Eagle15])
CAMERAS = ("head", "wrist")
EVERYTHING = frozenset({"tokens", "pooled"})


def make(kind: Any = Eagle, *, give=EVERYTHING, seed=0, **options) -> Any:
    torch.manual_seed(seed)
    config = EagleConfig(**{"preset": "tiny", **options})
    return kind(config, cameras=CAMERAS, image_size=(PX, PX), state_width=STATE, give=give)


def observed(tasks=("pick", "put it down", ""), px: int = PX, purpose: str = "pictures") -> Observation:
    images = {name: torch.rand(len(tasks), 3, px, px, generator=generator(purpose, name)) for name in CAMERAS}
    return Observation(images=images, state=torch.zeros(len(tasks), STATE), tasks=tuple(tasks))


# -- parity ----------------------------------------------------------------------------------------------------------


def towers(model: Any) -> tuple[Any, Any]:
    """transformers' own, whole: SigLIP with its head, and a language model of all layers, popped as GR00T does."""
    from transformers import LlamaModel, Qwen3Model, SiglipVisionModel

    vision_options, language_options = model.vision.config.to_dict(), model.language.config.to_dict()
    vision = SiglipVisionModel(type(model.vision.config)(**vision_options | {"vision_use_head": True}))
    whole = language_options | {"num_hidden_layers": model.size.language.layers, "layer_types": None}
    whole = {name: value for name, value in whole.items() if value is not None}
    made: Any = {Eagle: LlamaModel, Eagle15: Qwen3Model}[type(model)]
    language = made(type(model.language.config)(**whole))
    while len(language.layers) > model.size.select:
        language.layers.pop(-1)
    for ours, theirs in ((model.vision, vision), (model.language, language)):
        fault = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert not fault.unexpected_keys and all(".head." in name for name in fault.missing_keys)
    return vision, language


def eagle_s_pixel_shuffle(x: torch.Tensor, scale: float) -> torch.Tensor:
    """As Eagle publishes it, step by step."""
    side = int(x.shape[1] ** 0.5)
    x = x.reshape(len(x), side, side, -1)
    n, w, h, c = x.shape
    x = x.reshape(n, w, int(h * scale), int(c / scale)).permute(0, 2, 1, 3)
    x = x.reshape(n, int(h * scale), int(w * scale), int(c / scale**2)).permute(0, 2, 1, 3)
    return x.reshape(n, -1, x.shape[-1])


@BOTH
@pytest.mark.parametrize("shuffle", [1, 2])
def test_pictures_and_gradients_are_siglip_s(kind, shuffle):
    model = make(kind, shuffle=shuffle)
    vision, _ = towers(model)
    pictures = torch.rand(3, 3, PX, PX, generator=generator("x")) * 2 - 1
    patches = vision(pixel_values=pictures).last_hidden_state
    expected = model.connector(eagle_s_pixel_shuffle(patches, 1 / shuffle))
    expected.pow(2).sum().backward()
    model.zero_grad()
    seen = model.see(pictures)
    assert seen.shape[1] == (model.size.vision.picture // model.size.vision.patch // shuffle) ** 2
    assert_close(seen, expected, atol=1e-5, rtol=0)
    seen.pow(2).sum().backward()
    wanted = dict(vision.named_parameters())
    for name, p in model.vision.named_parameters():
        assert_close(p.grad, wanted[name].grad, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("select", [1, -1])
def test_tokens_and_gradients_are_those_of_the_popped_language_model(kind, select):
    """On the same embeddings, padded on the left with a mask, as GR00T has it: padding's side changes nothing."""
    model = make(kind, select_layer=select, project_to_dim=None)
    _, language = towers(model)
    seen = observed()
    context = model(seen)
    real = ~context.token_is_pad

    pictures = [model.see(seen.images[name] * 2 - 1) for name in CAMERAS]
    ids, _ = model.instructions(seen.tasks)
    embedded = torch.cat([*pictures, language.embed_tokens(ids)], dim=1).detach()
    assert context.tokens.shape == embedded.shape
    left = [torch.cat([row[~keep], row[keep]]) for row, keep in zip(embedded, real, strict=True)]
    attends = torch.stack([torch.cat([keep[~keep], keep[keep]]) for keep in real])
    answer = language(
        inputs_embeds=torch.stack(left), attention_mask=attends.long(), output_hidden_states=True, use_cache=False
    )
    expected = answer.hidden_states[model.size.select][attends]
    assert_close(context.tokens[real], expected, atol=1e-5, rtol=0)

    expected.pow(2).sum().backward()
    model.zero_grad()
    model.read(embedded)[real].pow(2).sum().backward()
    wanted = dict(language.named_parameters())
    for name, p in model.language.named_parameters():
        if name != "embed_tokens.weight":
            assert_close(p.grad, wanted[name].grad, atol=1e-4, rtol=1e-5)


def test_pixel_shuffle_joins_neighbours():
    """Patches that are their own index: 4 x 4 of them, two features each."""
    index = torch.arange(16)
    joined = pixel_shuffle(torch.stack([index, index + 100], dim=-1)[None], 2)[0]
    assert joined.shape == (4, 8)
    assert joined[:, ::2].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert (joined[:, 1::2] == joined[:, ::2] + 100).all()
    patches = torch.randn(2, 36, 5, generator=generator("p"))
    for factor in (1, 2, 3):
        assert torch.equal(pixel_shuffle(patches, factor), eagle_s_pixel_shuffle(patches, 1 / factor))


# -- published sizes -------------------------------------------------------------------------------------------------


def count(part: nn.Module) -> float:
    return sum(p.numel() for p in part.parameters()) / 1e6


def test_published_eagle_is_gr00t_n1_s():
    """1.34 B parameters in the vision-language model (arXiv 2503.14734); 64 tokens per picture of 1536."""
    with torch.device("meta"):
        model = make(Eagle, preset="published")
        seen = model.see(torch.zeros(1, 3, 224, 224))
    assert round(count(model) / 1000, 2) == 1.34
    assert seen.shape == (1, 64, 2048) and model.width == 1536
    assert len(model.language.layers) == 12 and model.size.language.layers == 24
    smol = model.language.config
    assert (smol.num_attention_heads, smol.rope_parameters["rope_theta"], smol.rms_norm_eps) == (32, 130_000, 1e-5)
    assert len(make(Eagle, select_layer=-1).language.layers) == 2
    assert 412 < count(model.vision) < 413  # SigLIP so400m without its head


def test_published_eagle_1_5_is_gr00t_n1_5_s():
    with torch.device("meta"):
        model = make(Eagle15, preset="published", project_to_dim=None)
        assert model.see(torch.zeros(1, 3, 224, 224)).shape == (1, 256, 2048)
        assert make(Eagle15, preset="published").width == 1536
    attention = model.language.layers[0].self_attn
    assert attention.q_proj.weight.shape == (16 * 128, 2048) and attention.k_proj.weight.shape == (8 * 128, 2048)
    assert len(model.language.layers) == 12 and model.size.language.layers == 28
    assert model.width == 2048 and count(model.project) == 0
    assert count(model.language.layers) == pytest.approx(12 * 50.336, rel=1e-3)


# -- promises --------------------------------------------------------------------------------------------------------


@BOTH
def test_padded_words_change_nothing(kind):
    """Neither where they stand in the batch, nor what they are."""
    model = make(kind).eval()
    seen = observed()
    together = model(seen)
    assert together.token_is_pad.sum(dim=1).tolist() == [7, 0, 11]
    for i in range(3):
        alone = model(seen.rows(slice(i, i + 1)))
        assert not alone.token_is_pad.any()
        assert_close(together.tokens[i][~together.token_is_pad[i]], alone.tokens[0], atol=1e-5, rtol=0)
        assert_close(together.pooled[i], alone.tokens[0].mean(dim=0), atol=1e-5, rtol=0)
        assert_close(together.pooled[i : i + 1], alone.pooled, atol=1e-5, rtol=0)
    model.instructions.pad = 5
    other = model(seen)
    assert torch.equal(other.pooled, together.pooled) and not torch.equal(other.tokens, together.tokens)


@BOTH
def test_every_camera_and_every_word_counts_and_every_parameter_learns(kind):
    model = make(kind)
    seen = observed()
    pooled = model(seen).pooled
    for name in CAMERAS:
        other = replace(seen, images=seen.images | {name: seen.images[name].flip(-1)})
        assert (model(other).pooled != pooled).any(dim=1).all()
    assert not torch.equal(model(replace(seen, tasks=("push", *seen.tasks[1:]))).pooled[0], pooled[0])
    context = model(seen)
    (context.tokens.pow(2).mean() + context.pooled.sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_pictures_of_another_size_are_scaled_inside():
    model = make(Eagle).eval()
    small = observed()
    large = replace(small, images={n: p.repeat_interleave(2, dim=-1) for n, p in small.images.items()})
    assert model(large).tokens.shape == model(small).tokens.shape
    flat = {name: torch.full((3, 3, 40, 24), 0.25) for name in CAMERAS}
    assert_close(model._scaled(flat["head"]), torch.full((3, 3, PX, PX), -0.5))


def test_a_crop_is_the_middle():
    """0.95 of 40 rows are 38, of 24 columns 22, as torchvision crops and scales them."""
    from torchvision.transforms.v2.functional import center_crop, resize

    model = make(Eagle, crop=0.95)
    picture = torch.rand(1, 3, 40, 24, generator=generator("picture"))
    expected = resize(center_crop(picture, [38, 22]), [PX, PX]) * 2 - 1
    assert_close(model._scaled(picture), expected, atol=1e-5, rtol=0)


def test_what_nobody_reads_is_not_given():
    assert make(Eagle, give=frozenset({"pooled"}))(observed()).tokens is None
    context = make(Eagle, give=frozenset({"tokens"}))(observed())
    assert context.pooled is None and context.token_is_pad is not None


@pytest.mark.parametrize(("backbone", "head"), [("eagle", "flow"), ("eagle_1_5", "flow")])
def test_it_learns_with_a_head(backbone, head):
    """A step downhill, from one observation to its chunk."""
    options = {"backbone": backbone, "backbone_options": {"preset": "tiny"}, "head": head, "shift": 0}
    policy, data = build(PolicyConfig(**options, head_options={"dim": 16, "layers": 1})), batch()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = policy.loss(data, generator("same"))[0].mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


# -- prepared inputs -------------------------------------------------------------------------------------------------


def prepared(model, seen: Observation, image_token: int, prefix: str = "eagle_") -> dict[str, torch.Tensor]:
    """As InternManip's processor does: a place for each token of a picture, padded on the left."""
    ids, is_pad = model.instructions(seen.tasks)
    pixels = torch.stack([seen.images[name] for name in CAMERAS], dim=1).flatten(0, 1) * 2 - 1
    places = torch.full((len(seen), len(CAMERAS) * model.see(pixels[:1]).shape[1]), image_token)
    rows = [torch.cat([row[pad], spot, row[~pad]]) for row, pad, spot in zip(ids, is_pad, places, strict=True)]
    counts = is_pad.sum(dim=1)[:, None]
    inputs = {"input_ids": torch.stack(rows), "pixel_values": pixels}
    inputs["attention_mask"] = (torch.arange(len(rows[0])) >= counts).long()
    return {prefix + name: value for name, value in inputs.items()}


@pytest.mark.parametrize("sizes", [{}, {"eagle_image_sizes": torch.zeros(6, 2)}])
def test_prepared_inputs_give_the_same_tokens(sizes):
    model, seen = make(Eagle15).eval(), observed()
    expected = model(seen)
    context = model.forward_prepared(prepared(model, seen, IMAGE_TOKEN) | sizes)
    real = ~expected.token_is_pad
    assert_close(context.tokens[~context.token_is_pad], expected.tokens[real], atol=1e-5, rtol=0)
    assert_close(context.pooled, expected.pooled, atol=1e-5, rtol=0)


def test_prepared_inputs_that_do_not_fit_are_refused():
    model, seen = make(Eagle15), observed()
    inputs = prepared(model, seen, IMAGE_TOKEN)
    del inputs["eagle_attention_mask"]
    with pytest.raises(BadInput, match="eagle_attention_mask is missing; there are eagle_input_ids"):
        model.forward_prepared(inputs)
    with pytest.raises(BadInput, match="room for 96 tokens of pictures, not 80"):
        inputs = prepared(model, seen, IMAGE_TOKEN)
        model.forward_prepared(inputs | {"eagle_pixel_values": inputs["eagle_pixel_values"][:5]})


# -- a published tokenizer -------------------------------------------------------------------------------------------


def write_tokenizer(folder, *tags: str) -> str:
    from models.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(list(tags))
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


TAGS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def test_a_published_tokenizer_brings_its_chat(tmp_path):
    model = make(Eagle15, tokenizer=write_tokenizer(tmp_path, *TAGS)).eval()
    read, tokenizer = [], model.instructions.tokenizer
    embed = model.language.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0]))
    context = model(observed(tasks=("go",)))
    embed.remove()
    texts = [tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=False) for ids in read]
    assert texts[0].endswith("<|im_start|>user\n<image 1><img>") and texts[1] == "</img><image 2><img>"
    assert texts[2] == "</img>" and texts[3].endswith("go<|im_end|>\n<|im_start|>assistant\n")
    assert read[0][0] == tokenizer.token_to_id("<|im_start|>")
    assert context.tokens.shape[1] == sum(ids.numel() for ids in read) + 2 * 16


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    folder = write_tokenizer(tmp_path, *TAGS[:2])
    with pytest.raises(BadInput, match=r"has no token <img>; name the folder of Eagle's own"):
        make(Eagle, tokenizer=folder)
    with pytest.raises(BadInput, match="tokenizer bytes knows 262 ids, the model 100"):
        make(Eagle, vocabulary=100)


# -- published weights -----------------------------------------------------------------------------------------------

LAYOUTS = {
    "alone": ("", ""),
    "n1": ("backbone.model.", "backbone.linear."),
    "n1.5": ("backbone.eagle_model.", "backbone.eagle_linear."),
}
PARTS = {"vision.": "vision_model.", "connector.": "mlp1.", "language.": "language_model.model."}


def as_published(model, layout: str) -> dict[str, torch.Tensor]:
    wrapper, projection = LAYOUTS[layout]
    found = {}
    for name, tensor in model.state_dict().items():
        part = name[: name.index(".") + 1]
        if part in PARTS:
            found[wrapper + PARTS[part] + name.removeprefix(part)] = tensor.clone()
        elif projection:
            found[projection + name.removeprefix(part)] = tensor.clone()
    unread = ["language_model.lm_head.weight", "vision_model.vision_model.head.probe"]
    unread.append("language_model.model.layers.1.mlp.up_proj.weight")
    return found | {wrapper + name: torch.zeros(2) for name in unread}


@BOTH
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_published_weights_are_filled_in(kind, layout, tmp_path):
    other = make(kind, seed=1)
    found = as_published(other, layout)
    names = list(found)
    save_file({name: found[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {name: found[name] for name in names[1::2]} | {"action_head.model.x": torch.zeros(1)}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    model = make(kind, pretrained=str(tmp_path), tune_llm=False, tune_visual=False)
    before = model.project.weight.clone()
    model.load_pretrained()
    for name, tensor in model.state_dict().items():
        if layout != "alone" or not name.startswith("project."):
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert torch.equal(model.project.weight, before) is (layout == "alone")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"project.weight", "project.bias"}


def test_weights_that_do_not_fit_are_listed(tmp_path):
    found = as_published(make(Eagle), "n1.5")
    del found["backbone.eagle_model.mlp1.1.bias"]
    found["backbone.eagle_model.mlp2.bias"] = torch.zeros(1)
    found["backbone.eagle_model.mlp1.3.bias"] = torch.zeros(7)
    save_file(found, tmp_path / "model.safetensors")
    model = make(Eagle, pretrained=str(tmp_path))
    with pytest.raises(BadInput) as fault:
        model.load_pretrained()
    assert "3 keys do not fit: backbone.eagle_model.mlp2.bias (unknown), connector.1.bias (missing)" in str(fault.value)
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        make(Eagle, pretrained=str(tmp_path / "nowhere")).load_pretrained()
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        model.load_pretrained()


def test_names_that_are_not_eagle_s_are_left_out():
    assert our_names(["action_head.vlln.weight", "backbone.eagle_model.mlp1.0.bias", "lm_head.weight"], layers=1) == {
        "backbone.eagle_model.mlp1.0.bias": "connector.0.bias"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select_layer": 3}, "select_layer is 3; give 1 to 2, or -1 for all"),
        ({"select_layer": -2}, "select_layer is -2; give 1 to 2"),
        ({"tune_llm": False}, "tune_llm false would keep random weights; name weights in pretrained"),
        ({"tune_visual": False}, "tune_visual false would keep random weights"),
        ({"shuffle": 3}, "shuffle is 3, which does not divide the 4 patches of a side"),
        ({"crop": 0.0}, r"crop is 0.0; give a share in \(0, 1\]"),
        ({"longest": 0}, "longest is 0; give at least 1"),
    ],
)
def test_refused_when_built(options, message):
    with pytest.raises(BadInput, match=message) as fault:
        make(Eagle, **options)
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


def test_a_dataset_without_cameras_is_refused():
    with pytest.raises(BadInput, match="there is no camera to see with"):
        Eagle(EagleConfig(preset="tiny"), cameras=(), image_size=(PX, PX), state_width=STATE, give=EVERYTHING)


@BOTH
def test_all_layers_and_no_projection(kind):
    for every in (-1, None, 2):
        model = make(kind, select_layer=every, project_to_dim=None)
        assert len(model.language.layers) == 2 and model.width == model(observed()).tokens.shape[-1] == 32
