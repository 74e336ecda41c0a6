"""LeRobot's own ACT and diffusion policies, saved its own way, read as ours: the same chunks in the robot's units."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import generator
from torch.testing import assert_close

from data.errors import BadInput
from models.policy import Policy
from models.published import act, diffusion
from models.types import Observation

PX, STATE, ACTION, H = 48, 4, 3, 8
CAMERAS = ("top", "left_wrist")  # an underscore, which LeRobot's own migration of old folders stumbles over
AROUND = "observation.environment_state"
READ = {"act": act.read, "diffusion": diffusion.read}
SMALL = {
    "act": {
        "chunk_size": H, "n_action_steps": H, "dim_model": 32, "n_heads": 4, "dim_feedforward": 48,
        "n_encoder_layers": 2, "n_vae_encoder_layers": 1, "latent_dim": 6,
    },
    "diffusion": {
        "n_obs_steps": 1, "horizon": H, "n_action_steps": H, "down_dims": (16, 32), "kernel_size": 3,
        "diffusion_step_embed_dim": 16, "spatial_softmax_num_keypoints": 4, "num_inference_steps": 3,
        "noise_scheduler_type": "DDIM",
    },
}  # fmt: skip
VARIANTS = {
    "act": ("act", {}),
    "act before 0.4": ("act", {"old": True, "pre_norm": True}),
    "act, no style, environment": ("act", {"use_vae": False, "environment": 2, "scales": "MIN_MAX"}),
    "act, environment alone": ("act", {"environment": 2, "cameras": (), "state": 0}),
    "diffusion": ("diffusion", {"scales": "MIN_MAX", "crop_shape": (40, 44)}),
    "diffusion before 0.4": ("diffusion", {"old": True, "use_separate_rgb_encoder_per_camera": False,
                                           "use_group_norm": True}),
    "diffusion, resized": ("diffusion", {"resize_shape": (40, 36), "crop_ratio": 0.9, "scales": "QUANTILES",
                                         "use_film_scale_modulation": False, "prediction_type": "sample"}),
}  # fmt: skip


def classes(kind: str):
    if kind == "act":
        from lerobot.policies.act.configuration_act import ACTConfig as Config
        from lerobot.policies.act.modeling_act import ACTPolicy as Kind
        from lerobot.policies.act.processor_act import make_act_pre_post_processors as processors
    else:
        from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig as Config
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as Kind
        from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors as processors
    return Config, Kind, processors


def saved(folder, kind, *, old=False, scales="MEAN_STD", environment=0, cameras=CAMERAS, state=STATE, **options):
    """LeRobot's policy and its processors, written into `folder`."""
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature

    inputs = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, PX, PX)) for name in cameras}
    inputs |= {"observation.state": PolicyFeature(FeatureType.STATE, (state,))} if state else {}
    inputs |= {AROUND: PolicyFeature(FeatureType.ENV, (environment,))} if environment else {}
    mode = NormalizationMode(scales)
    config, policy, processors = classes(kind)
    torch.manual_seed(1)
    made = policy(
        config(
            device="cpu",
            input_features=inputs,
            output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
            normalization_mapping={"VISUAL": NormalizationMode.MEAN_STD, "STATE": mode, "ACTION": mode},
            pretrained_backbone_weights=None,
            push_to_hub=False,
            **SMALL[kind],
            **options,
        )
    ).eval()
    with torch.no_grad():  # no norm is the identity
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if tensor.is_floating_point() and ("norm" in name or "bn" in name or "downsample.1" in name):
                tensor.add_(torch.rand_like(tensor) * 0.2)
    statistics = {key: numbers(key, feature.shape) for key, feature in (inputs | made.config.output_features).items()}
    before, after = processors(made.config, statistics)
    made.save_pretrained(folder)
    if old:
        weights = load_file(folder / "model.safetensors")
        for prefix, keys in (("normalize_inputs", inputs), ("unnormalize_outputs", ["action"])):
            for key in keys:
                kept = {name: v for name, v in statistics[key].items() if name in ("mean", "std")}
                weights |= {f"{prefix}.buffer_{key.replace('.', '_')}.{n}": v.contiguous() for n, v in kept.items()}
        save_file(weights, folder / "model.safetensors")
    else:
        before.save_pretrained(folder)
        after.save_pretrained(folder)
    return made, before, after


def numbers(key: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Statistics; one component of a vector never moved."""
    draw = generator(key)
    size = (shape[0], 1, 1) if len(shape) == 3 else shape
    low, high = -torch.rand(size, generator=draw), 1 + torch.rand(size, generator=draw)
    if len(shape) == 1:
        low[-1] = high[-1] = 0.5
    values = {"min": low, "max": high, "q01": low, "q99": high}
    return values | {"mean": torch.rand(size, generator=draw), "std": 0.2 + torch.rand(size, generator=draw)}


def observation(b: int, policy: Policy) -> tuple[Observation, dict[str, torch.Tensor]]:
    """As recorded, and as LeRobot gets it."""
    schema = policy.spec.schema
    pictures = {
        name: torch.randint(0, 256, (b, PX, PX, 3), dtype=torch.uint8, generator=generator(name))
        for name in schema.cameras
    }
    whole = torch.rand(b, len(schema.state), generator=generator("state"))
    robot = [c.name.startswith("state_") for c in schema.state]
    whole[:, sum(robot) - 1] = 0.5 if any(robot) else whole[:, -1]  # it never moved
    theirs = {f"observation.images.{n}": p.permute(0, 3, 1, 2).float() / 255 for n, p in pictures.items()}
    theirs |= {"observation.state": whole[:, : sum(robot)]} if any(robot) else {}
    theirs |= {AROUND: whole[:, sum(robot) :]} if not all(robot) else {}
    return Observation(images=pictures, state=whole, tasks=("",) * b), theirs


def read(folder, kind: str) -> Policy:
    spec, normalizers, weights = READ[kind](folder)
    policy = Policy.restore(type(spec).from_json(json.loads(json.dumps(spec.to_json()))), normalizers)
    policy.load_state_dict(weights)  # strictly: nothing is missing, nothing left over
    return policy.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_are_lerobot_s_in_the_robot_s_units(variant, tmp_path):
    kind, options = VARIANTS[variant]
    made, before, after = saved(tmp_path, kind, **options)
    policy = read(tmp_path, kind)
    assert policy.spec.horizon == H and policy.spec.schema.cameras == options.get("cameras", CAMERAS)
    seen, theirs = observation(3, policy)
    noise = torch.randn(3, *policy.noise_shape, generator=generator("noise"))
    prepared = before({**theirs, "action": torch.zeros(3, ACTION)})
    prepared.pop("action")
    if kind == "diffusion":
        prepared["observation.state"] = prepared["observation.state"][:, None]
        expected = made.predict_action_chunk(prepared, noise=noise)
    else:
        prepared.setdefault("observation.state", torch.zeros(3, 0))  # it asks for the batch's size there
        expected = made.predict_action_chunk(prepared)
    expected = after(expected)
    assert expected.std() > 0.01
    chunk = policy.predict_action(seen, noise=noise)
    moved = 1e-5 if options.get("scales", "MEAN_STD") == "MEAN_STD" else 1e-4  # what never moved is -1 up to rounding
    assert_close(chunk[..., :-1], expected[..., :-1], atol=moved, rtol=0)
    assert_close(chunk, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("diffusion", {"n_obs_steps": 2}, "it reads 2 observations at once"),
        ("diffusion", {"beta_schedule": "linear"}, "beta_schedule is linear; only squaredcos_cap_v2"),
        ("act", {"type": "diffusion"}, "type is 'diffusion', not 'act'"),
        ("act", {"feedforward_activation": "gelu"}, "feedforward_activation is gelu; only relu"),
        ("act", {"chunk_size": None}, "has no 'chunk_size'"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(kind, change, message, tmp_path):
    saved(tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    kept = {name: value for name, value in config.items() if change.get(name, value) is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(BadInput, match=message) as fault:
        READ[kind](tmp_path)
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


def test_scaling_that_is_not_known_is_refused_in_one_line(tmp_path):
    saved(tmp_path, "act")
    for path in tmp_path.glob("policy_p*processor_step_*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(path).items() if name != "observation.state.std"}
        save_file(kept, path)
    with pytest.raises(BadInput, match=r"no mean and std of 4 numbers to scale observation.state with"):
        READ["act"](tmp_path)
    processor = json.loads((tmp_path / "policy_preprocessor.json").read_text())
    processor["steps"].append({"registry_name": "delta_action_processor", "config": {}})
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps(processor))
    with pytest.raises(BadInput, match="step 'delta_action_processor' is not known here"):
        READ["act"](tmp_path)
    (tmp_path / "policy_preprocessor.json").unlink()
    with pytest.raises(BadInput, match=r"policy_preprocessor.json: is missing"):
        READ["act"](tmp_path)


def test_weights_beside_ours_keep_their_names(tmp_path):
    """So that whoever fills them in can list them."""
    for kind in READ:
        saved(tmp_path / kind, kind)
        weights = load_file(tmp_path / kind / "model.safetensors")
        save_file(weights | {"model.backbone.extra.weight": torch.zeros(1)}, tmp_path / kind / "model.safetensors")
        assert "model.backbone.extra.weight" in READ[kind](tmp_path / kind)[2]
