"""openpi's checkpoints as LeRobot's: every array by name and shape, every axis by what the layers compute with it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.processor import PolicyProcessorPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pi0 import Size, policy, tiny
from tiny_policy import SCHEMA

from data.errors import BadInput
from data.normalize import Normalizer
from models.openpi import EXPERT_WORDS_OUT, WORDS_OUT, read_params, to_lerobot, to_openpi
from models.openpi_folder import convert, read_norms, write_folder, write_weights
from models.tokenizers import find_tokenizer, write_tiny_tokenizer

SIZE = Size(width=48, expert=24, head=10, mlp=3, vision=12, vision_mlp=20, vision_depth=2)  # no two axes alike
HEADS = {"heads": 8, "vision_heads": 2}
UNREAD = {WORDS_OUT, EXPERT_WORDS_OUT}
POLICIES = {"pi0": modeling_pi0.PI0Policy, "pi05": modeling_pi05.PI05Policy}
LIBERO = {  # as openpi keeps them: padded to the width of the model
    "state": {"mean": [0.5] * 8 + [0] * 24, "std": [0.25] * 8 + [0] * 24,
              "q01": [-1.0] * 8 + [0] * 24, "q99": [3.0] * 8 + [0] * 24},
    "actions": {"mean": [0.1] * 7 + [0] * 25, "std": [0.2] * 7 + [0] * 25,
                "q01": [-0.5] * 7 + [0] * 25, "q99": [0.5] * 7 + [0] * 25},
}  # fmt: skip


def published(kind):
    """Names and shapes of openpi's own checkpoints, as its code declares them."""
    shapes = {
        "img/embedding/kernel": (14, 14, 3, 1152), "img/embedding/bias": (1152,), "img/pos_embedding": (1, 256, 1152),
        "img/head/kernel": (1152, 2048), "img/head/bias": (2048,), "llm/embedder/input_embedding": (257152, 2048),
        "img/Transformer/encoder_norm/scale": (1152,), "img/Transformer/encoder_norm/bias": (1152,),
    }  # fmt: skip
    block = "img/Transformer/encoderblock"
    for n in (0, 1):
        shapes |= {f"{block}/LayerNorm_{n}/scale": (27, 1152), f"{block}/LayerNorm_{n}/bias": (27, 1152)}
    for n, (i, o) in enumerate(((1152, 4304), (4304, 1152))):
        shapes |= {f"{block}/MlpBlock_0/Dense_{n}/kernel": (27, i, o), f"{block}/MlpBlock_0/Dense_{n}/bias": (27, o)}
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for name in ("query", "key", "value"):
        shapes |= {f"{attention}/{name}/kernel": (27, 1152, 16, 72), f"{attention}/{name}/bias": (27, 16, 72)}
    shapes |= {f"{attention}/out/kernel": (27, 16, 72, 1152), f"{attention}/out/bias": (27, 1152)}
    for e, width, mlp in (("", 2048, 16384), ("_1", 1024, 4096)):
        at = "llm/layers"
        shapes |= {
            f"{at}/attn/q_einsum{e}/w": (18, 8, width, 256), f"{at}/attn/kv_einsum{e}/w": (18, 2, 1, width, 256),
            f"{at}/attn/attn_vec_einsum{e}/w": (18, 8, 256, width),
            f"{at}/mlp{e}/gating_einsum": (18, 2, width, mlp), f"{at}/mlp{e}/linear": (18, mlp, width),
        }  # fmt: skip
        for norm, layers in ((f"{at}/pre_attention_norm{e}", (18,)), (f"{at}/pre_ffw_norm{e}", (18,)),
                             (f"llm/final_norm{e}", ())):  # fmt: skip
            if kind == "pi05" and e:
                shapes |= {f"{norm}/Dense_0/kernel": (*layers, 1024, 3072), f"{norm}/Dense_0/bias": (*layers, 3072)}
            else:
                shapes[f"{norm}/scale"] = (*layers, width)
    shapes = {f"PaliGemma/{name}": shape for name, shape in shapes.items()}
    time = {"pi0": {"state_proj": (32, 1024), "action_time_mlp_in": (2048, 1024), "action_time_mlp_out": (1024, 1024)},
            "pi05": {"time_mlp_in": (1024, 1024), "time_mlp_out": (1024, 1024)}}[kind]  # fmt: skip
    for name, (i, o) in (time | {"action_in_proj": (32, 1024), "action_out_proj": (1024, 32)}).items():
        shapes |= {f"{name}/kernel": (i, o), f"{name}/bias": (o,)}
    return shapes


def made(kind, size=SIZE):
    """A random tiny policy of LeRobot's own class and its tensors. Use inside `tiny(size)`."""
    model = policy(kind, SCHEMA, size=size)
    return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def copied(tree):
    return {name: np.array(array) for name, array in tree.items()}


# -- names and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "arrays"), [("pi0", 50), ("pi05", 51)])
def test_every_array_of_the_published_size_finds_its_place_in_lerobot_s_model(kind, arrays):
    shapes = published(kind)
    assert len(shapes) == arrays and 3.2e9 < sum(np.prod(s, dtype=float) for s in shapes.values()) < 3.4e9
    tree = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}  # takes no memory
    found = {name: tensor.shape for name, tensor in to_lerobot(tree)}
    with torch.device("meta"):
        model = {"pi0": lambda: modeling_pi0.PI0Pytorch(PI0Config(device="cpu")),
                 "pi05": lambda: modeling_pi05.PI05Pytorch(PI05Config(device="cpu"))}[kind]()  # fmt: skip
    assert found == {f"model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_there_and_back_is_the_same_to_the_bit(kind):
    with tiny(SIZE):
        _, tensors = made(kind)
    back = dict(to_lerobot(to_openpi(tensors, **HEADS)))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors.keys() - UNREAD)
    assert np.array_equal(back[WORDS_OUT], next(v for n, v in tensors.items() if n.endswith("embed_tokens.weight")))
    assert back[EXPERT_WORDS_OUT].shape == tensors[EXPERT_WORDS_OUT].shape and not back[EXPERT_WORDS_OUT].any()


def test_what_is_left_over_missing_or_misshapen_is_named_in_one_line():
    with tiny(SIZE):
        tree = dict(to_openpi(made("pi0")[1], **HEADS))
    q = "PaliGemma/llm/layers/attn/q_einsum_1/w"
    lora, without = tree | {f"{q}/lora_a": tree[q]}, {n: v for n, v in tree.items() if n != q}
    out = "PaliGemma/llm/layers/attn/attn_vec_einsum_1/w"
    swapped = tree | {out: tree[out].swapaxes(2, 3)}
    flat = tree | {out: tree[out].reshape(2, -1)}
    for bad, said in (
        (lora, f"has unknown 1 .{q}/lora_a"),
        (without, f"lacks 1 .{q}"),
        (swapped, f"{out} has shape"),
        (flat, f"{out} has shape"),
        ({}, "lacks 51"),
    ):
        with pytest.raises(BadInput, match=said) as raised:
            list(to_lerobot(bad))
        line = str(raised.value)
        assert "\n" not in line and len(line) < 200
    tensors = dict(to_lerobot(tree))
    without = {n: v for n, v in tensors.items() if "layers.1.mlp.up" not in n}
    for bad, said in ((tensors | {"model.other": tree[q]}, "model.other"), (without, "layers.1.mlp.up")):
        with pytest.raises(BadInput, match=said):
            to_openpi(bad, **HEADS)


# -- what the layers compute -----------------------------------------------------------------------------------------


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def norm(tree, name, layer, x, condition):
    """openpi's RMSNorm -> (normalised, gate); adaptive where the checkpoint has it so."""
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    if f"{name}/scale" in tree:
        return x * (1 + tree[f"{name}/scale"][layer]), 1.0
    out = condition @ tree[f"{name}/Dense_0/kernel"][layer] + tree[f"{name}/Dense_0/bias"][layer]
    scale, shift, gate = np.split(out[:, None, :], 3, axis=-1)
    return x * (1 + scale) + shift, gate


def rope(x, places):
    """x [b t n h]"""
    half = x.shape[-1] // 2
    angle = places[..., None, None] / 10_000 ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def openpi_layer(tree, layer, xs, condition):
    """One layer of both transformers by openpi's einsums, every token attending to every token."""
    at = "PaliGemma/llm/layers"
    conditions = (None, condition)
    normed = [norm(tree, f"{at}/pre_attention_norm{e}", layer, x, c)
              for e, x, c in zip(("", "_1"), xs, conditions, strict=True)]  # fmt: skip
    q, k, v = [], [], []
    for e, (x, _) in zip(("", "_1"), normed, strict=True):
        q.append(np.einsum("btd,ndh->btnh", x, tree[f"{at}/attn/q_einsum{e}/w"][layer]))
        keys, values = np.einsum("bsd,zkdh->zbskh", x, tree[f"{at}/attn/kv_einsum{e}/w"][layer])
        k.append(keys)
        v.append(values)
    q, k, v = (np.concatenate(part, axis=1) for part in (q, k, v))
    places = np.arange(q.shape[1])[None]
    q, k = rope(q, places) * q.shape[-1] ** -0.5, rope(k, places)
    attended = np.einsum("bnts,bsh->btnh", softmax(np.einsum("btnh,bsh->bnts", q, k[:, :, 0])), v[:, :, 0])
    out, start = [], 0
    for e, x, (_, gate), c in zip(("", "_1"), xs, normed, conditions, strict=True):
        own = attended[:, start : start + x.shape[1]]
        start += x.shape[1]
        x = x + gate * np.einsum("btnh,nhd->btd", own, tree[f"{at}/attn/attn_vec_einsum{e}/w"][layer])
        y, gate = norm(tree, f"{at}/pre_ffw_norm{e}", layer, x, c)
        gating = tree[f"{at}/mlp{e}/gating_einsum"][layer]
        out.append(x + gate * ((gelu(y @ gating[0]) * (y @ gating[1])) @ tree[f"{at}/mlp{e}/linear"][layer]))
    return out


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_layer_computes_by_openpi_s_einsums_what_lerobot_s_computes(kind):
    with tiny(SIZE):
        model, tensors = made(kind)
    tree = copied(to_openpi(tensors, **HEADS))
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(2, t, width)).astype(np.float32) for t, width in ((5, SIZE.width), (3, SIZE.expert))]
    condition = rng.normal(size=(2, SIZE.expert)).astype(np.float32) if kind == "pi05" else None
    inner = model.model.paligemma_with_expert
    words, expert = inner.paligemma.model.language_model, inner.gemma_expert.model
    with torch.no_grad():
        theirs = modeling_pi0.compute_layer_complete(
            [torch.tensor(x) for x in xs], torch.zeros(2, 1, 8, 8), torch.arange(8)[None].expand(2, 8),
            [None, None if condition is None else torch.tensor(condition)],
            layers=(words.layers[1], expert.layers[1]), rotary_emb=words.rotary_emb,
        )  # fmt: skip

    def distance(tree):
        ours = openpi_layer(tree, 1, xs, condition)
        return max(np.abs(a - b.numpy()).max() for a, b in zip(ours, theirs, strict=True))

    assert distance(tree) < 1e-5
    at, mistakes = "PaliGemma/llm/layers", {}
    for e in ("", "_1"):  # each of these keeps every shape, and must be seen
        q, kv, gate = f"{at}/attn/q_einsum{e}/w", f"{at}/attn/kv_einsum{e}/w", f"{at}/mlp{e}/gating_einsum"
        mistakes |= {q: tree[q][:, ::-1], kv: tree[kv][:, ::-1], gate: tree[gate][:, ::-1]}
        out = f"{at}/attn/attn_vec_einsum{e}/w"
        mistakes[out] = tree[out].swapaxes(1, 2).reshape(tree[out].shape)
        mistakes[f"{at}/mlp{e}/linear"] = tree[f"{at}/mlp{e}/linear"][::-1]  # the layers in the wrong order
    for name, mistake in mistakes.items():
        assert distance(tree | {name: mistake}) > 1e-3, name


def test_a_picture_becomes_the_same_tokens_by_openpi_s_vision_tower():
    with tiny(SIZE):
        model, tensors = made("pi0")
    tree = {n.removeprefix("PaliGemma/img/"): v for n, v in copied(to_openpi(tensors, **HEADS)).items()}
    image = np.random.default_rng(0).uniform(-1, 1, (1, 28, 28, 3)).astype(np.float32)

    def layer_norm(x, name, layer: Any = ...):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * tree[f"{name}/scale"][layer] + tree[f"{name}/bias"][layer]

    patches = image.reshape(1, 2, 14, 2, 14, 3)
    x = np.einsum("bpyqxi,yxid->bpqd", patches, tree["embedding/kernel"]).reshape(1, 4, -1) + tree["embedding/bias"]
    x = x + tree["pos_embedding"]
    block = "Transformer/encoderblock"
    for n in range(SIZE.vision_depth):
        y, at = layer_norm(x, f"{block}/LayerNorm_0", n), f"{block}/MultiHeadDotProductAttention_0"
        q, k, v = (np.einsum("btd,dnh->btnh", y, tree[f"{at}/{m}/kernel"][n]) + tree[f"{at}/{m}/bias"][n]
                   for m in ("query", "key", "value"))  # fmt: skip
        weights = softmax(np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5)
        attended = np.einsum("bnts,bsnh->btnh", weights, v)
        x = x + np.einsum("btnh,nhd->btd", attended, tree[f"{at}/out/kernel"][n]) + tree[f"{at}/out/bias"][n]
        y = layer_norm(x, f"{block}/LayerNorm_1", n)
        y = gelu(y @ tree[f"{block}/MlpBlock_0/Dense_0/kernel"][n] + tree[f"{block}/MlpBlock_0/Dense_0/bias"][n])
        x = x + y @ tree[f"{block}/MlpBlock_0/Dense_1/kernel"][n] + tree[f"{block}/MlpBlock_0/Dense_1/bias"][n]
    ours = layer_norm(x, "Transformer/encoder_norm") @ tree["head/kernel"] + tree["head/bias"]
    inner = model.model.paligemma_with_expert.paligemma.model
    with torch.no_grad():
        seen = inner.vision_tower(torch.tensor(image).permute(0, 3, 1, 2)).last_hidden_state
        theirs = inner.multi_modal_projector(seen).numpy()
    assert np.abs(ours - theirs).max() < 1e-5


# -- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """openpi's folder without its `params/`: statistics of one asset."""
    path = tmp_path / "pi05_libero" / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"norm_stats": LIBERO}))
    return tmp_path / "pi05_libero"


def libero_tree(kind):
    """A tiny openpi checkpoint whose actions are 32 wide. Use inside `tiny(SIZE)`."""
    model, tensors = made(kind)
    return model, to_openpi(tensors, **HEADS)


@pytest.mark.parametrize(("kind", "name"), [("pi0", "pi0_libero"), ("pi05", "pi05_libero")])
def test_lerobot_opens_the_folder_and_has_every_weight(kind, name, checkpoint, tmp_path):
    with tiny(SIZE):
        model, tree = libero_tree(kind)
        write_folder(tmp_path, tree, read_norms(checkpoint, kind), name=name)
        loaded = POLICIES[kind].from_pretrained(tmp_path, strict=True)
    assert loaded.config.chunk_size == {"pi0": 50, "pi05": 10}[kind]
    assert loaded.config.use_relative_actions is (kind == "pi0")
    assert loaded.config.image_resolution == (28, 28)
    assert loaded.config.output_features["action"].shape == (7,)
    assert loaded.config.input_features["observation.state"].shape == (8,)
    theirs = loaded.state_dict()
    assert all(torch.equal(theirs[n], t) for n, t in model.state_dict().items() if n not in UNREAD)


def test_the_weights_are_a_safetensors_file_whose_zeros_take_no_room(tmp_path):
    with tiny(SIZE):
        _, tree = libero_tree("pi0")
    wide = dict(tree)
    embedding = "PaliGemma/llm/embedder/input_embedding"
    wide[embedding] = np.ones((60_000, 48), np.float32)
    names = [name for name, _ in to_lerobot(wide)]
    write_weights(tmp_path / "w.safetensors", wide, wanted=names)
    with safe_open(tmp_path / "w.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(names) and file.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "w.safetensors")
    assert all(np.array_equal(found[name].numpy(), tensor) for name, tensor in to_lerobot(wide))
    status = (tmp_path / "w.safetensors").stat()
    assert status.st_size - status.st_blocks * 512 > 60_000 * 24 * 4 * 0.9
    with pytest.raises(BadInput, match=names[0]):
        write_weights(tmp_path / "v.safetensors", wide, wanted=names[1:])


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_lerobot_s_processors_normalise_as_openpi_does(kind, checkpoint, tmp_path):
    name = f"{kind}_libero"
    with tiny(SIZE):
        write_folder(tmp_path, libero_tree(kind)[1], read_norms(checkpoint, kind), name=name)
    tokenizer = find_tokenizer(write_tiny_tokenizer(tmp_path))
    ours = {"tokenizer_processor": {"tokenizer": tokenizer, "tokenizer_name": None}}
    opened = PolicyProcessorPipeline.from_pretrained
    before: Any = opened(tmp_path, config_filename="policy_preprocessor.json", overrides=ours)
    after: Any = opened(tmp_path, config_filename="policy_postprocessor.json")
    state, chunk = torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 7)
    seen: Any = before({"observation.state": state, "task": "lift it"})
    q = LIBERO["state"], LIBERO["actions"]
    if kind == "pi0":
        expected, action = (state - 0.5) / (0.25 + 1e-6), chunk * (0.2 + 1e-6) + 0.1
    else:
        expected = (state - q[0]["q01"][0]) / (q[0]["q99"][0] - q[0]["q01"][0] + 1e-6) * 2 - 1
        action = (chunk + 1) / 2 * (q[1]["q99"][0] - q[1]["q01"][0] + 1e-6) + q[1]["q01"][0]
    assert torch.allclose(seen["observation.state"][0], expected, atol=1e-5)
    assert torch.allclose(after.steps[0]._normalize_action(chunk, inverse=True), action, atol=1e-5)
    words = seen["observation.language.tokens"][0][seen["observation.language.attention_mask"][0]]
    assert tokenizer.decode(words, skip_special_tokens=True) == "lift it\n"  # no state in pi05_libero's prompt


def test_statistics_become_normalizers_beside_the_weights(checkpoint, tmp_path):
    with tiny(SIZE):
        write_folder(tmp_path, libero_tree("pi05")[1], read_norms(checkpoint, "pi05"), name="pi05_libero")
    value = json.loads((tmp_path / "norm" / "physical-intelligence" / "libero.json").read_text())
    state, action = (Normalizer.from_json(value[name]) for name in ("observation.state", "action"))
    assert len(state.center) == 8 and len(action.center) == 7
    assert np.allclose(state.apply(np.array([-1.0, 1.0, 3.0, 0, 0, 0, 0, 0]))[:3], [-1, 0, 1])


def test_several_assets_leave_the_choice_open_and_an_unknown_training_is_told(checkpoint, tmp_path):
    (checkpoint / "assets" / "droid").mkdir()
    (checkpoint / "assets" / "droid" / "norm_stats.json").write_text(json.dumps({"norm_stats": LIBERO}))
    norms = read_norms(checkpoint, "pi0")
    assert sorted(norms) == ["droid", "physical-intelligence/libero"]
    said = []
    with tiny(SIZE):
        tree = libero_tree("pi0")[1]
        for folder, name in (("base", "pi0_base"), ("mine", "my_own")):
            (tmp_path / folder).mkdir()
            write_folder(tmp_path / folder, tree, norms, name=name, log=said.append)
    assert len(said) == 1 and "my_own" in said[0]
    assert json.loads((tmp_path / "base" / "config.json").read_text())["output_features"]["action"]["shape"] == [32]
    step = json.loads((tmp_path / "base" / "policy_postprocessor.json").read_text())["steps"][0]
    assert "state_file" not in step and not (tmp_path / "mine" / "policy_preprocessor.json").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not valid JSON"), ('{"norm_stats": {"state": {}}}', "statistics"),
     (json.dumps({"norm_stats": LIBERO | {"state": LIBERO["state"] | {"std": [1.0]}}}), "different lengths")],
)  # fmt: skip
def test_damaged_statistics_are_named(text, said, checkpoint):
    path = next(checkpoint.rglob("norm_stats.json"))
    path.write_text(text)
    with pytest.raises(BadInput, match=said) as raised:
        read_norms(checkpoint, "pi0")
    assert "norm_stats.json" in str(raised.value) and len(str(raised.value)) < 200


def test_widths_that_lerobot_does_not_know_are_refused(tmp_path):
    with tiny(SIZE):
        tree = libero_tree("pi0")[1]
    with pytest.raises(BadInput, match="only gemma_2b and gemma_300m") as raised:
        write_folder(tmp_path, tree, {}, name="pi0_base")
    assert len(str(raised.value)) < 250 and not list(tmp_path.iterdir())


# -- Orbax over OCDBT ------------------------------------------------------------------------------------------------


def write_params(folder, tree, *, value=True):
    """`tree` as Orbax writes it: zarr arrays in one OCDBT store, the tree's path joined by dots."""
    tensorstore = pytest.importorskip("tensorstore")
    for name, array in tree.items():
        path = f"params.{name.replace('/', '.')}{'.value' if value else ''}/"
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/params/"}, "path": path}
        array = np.ascontiguousarray(array)
        spec = {"driver": "zarr", "kvstore": store, "dtype": array.dtype.name}
        tensorstore.open({**spec, "metadata": {"shape": array.shape, "chunks": array.shape}}, create=True).result()[
            ...
        ].write(array).result()


@pytest.mark.parametrize("value", [True, False])
def test_a_checkpoint_on_disk_becomes_a_folder(value, checkpoint, tmp_path):
    with tiny(SIZE):
        model, tree = libero_tree("pi05")
        write_params(checkpoint, tree, value=value)
        out = tmp_path / "out"
        out.mkdir()
        convert(checkpoint, out, name="pi05_libero")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items() if n not in UNREAD)


def test_half_precision_stays_half_precision(checkpoint, tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with tiny(SIZE):
        tree = {name: array.astype(ml_dtypes.bfloat16) for name, array in libero_tree("pi0")[1].items()}
        write_params(checkpoint, tree)
        convert(checkpoint, tmp_path, name="pi0_base")
    found = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    bias = tree["action_in_proj/bias"].astype(np.float32)
    assert np.array_equal(found["model.action_in_proj.bias"].float().numpy(), bias)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_damaged_checkpoint_is_one_line(checkpoint):
    write_params(checkpoint, {"action_in_proj/kernel": np.ones((4, 4), np.float32)})
    for damage in ("flip", "remove"):
        for path in (checkpoint / "params").rglob("*"):
            if path.is_file() and damage == "flip":
                path.write_bytes(bytes(b ^ 255 for b in path.read_bytes()))
            elif path.is_file():
                path.unlink()
        with pytest.raises(BadInput) as raised:
            list(to_lerobot(read_params(checkpoint)))
        assert "pi05_libero" in str(raised.value) or "this checkpoint" in str(raised.value)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 250


def test_without_tensorstore_the_remedy_is_said(checkpoint, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="uv pip install"):
        read_params(checkpoint)
