"""Diffusion policy as LeRobot publishes it, as our pair `diffusion_rgb` and `diffusion`: all weights by our names."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from data.normalize import Normalizer
from models.config import PolicyConfig
from models.heads.diffusion import GROUPS
from models.policy import PolicySpec
from models.published.lerobot import AROUND, Folder, picture_scale


def read(path: Path) -> tuple[PolicySpec, dict[str, Normalizer], dict[str, Tensor]]:
    """The policy in the folder `path`: its specification, how it scales, its weights by our names.

    Weights that it has beside ours keep their own names, for whoever fills them in to list. Raises `BadInput` for a
    folder that is none of LeRobot's diffusion policies, and for an option that is not known here.
    """
    folder = Folder(path, "diffusion")
    if (seen := folder.option("n_obs_steps")) != 1:
        raise folder.fault(
            f"it reads {seen} observations at once (n_obs_steps)", "here a policy reads one; train it so"
        )
    folder.refuse_unless(n_groups=GROUPS, beta_schedule="squaredcos_cap_v2")
    if folder.width(AROUND) or not folder.cameras:
        raise folder.fault("it reads a state of the environment, or no pictures", "only cameras and state are known")
    shared = not folder.option("use_separate_rgb_encoder_per_camera")
    backbone = {
        "preset": folder.option("vision_backbone"),
        "keypoints": folder.option("spatial_softmax_num_keypoints"),
        "resize": folder.config.get("resize_shape"),
        "crop": folder.option("crop_shape"),
        "shared": shared,
        "frozen_norm": not folder.option("use_group_norm"),
        **picture_scale(folder),
    }
    train_steps, clip = folder.option("num_train_timesteps"), folder.option("clip_sample_range")
    head = {
        "preset": "published",
        "down_dims": folder.option("down_dims"),
        "kernel": folder.option("kernel_size"),
        "time": folder.option("diffusion_step_embed_dim"),
        "film_scale": folder.option("use_film_scale_modulation"),
        "train_steps": train_steps,
        "prediction": folder.option("prediction_type"),
        "sampler": str(folder.option("noise_scheduler_type")).lower(),
        "steps": folder.option("num_inference_steps") or train_steps,
        "clip": clip if folder.option("clip_sample") else 0.0,
    }
    config = PolicyConfig(
        backbone="diffusion_rgb",
        backbone_options=backbone,
        head="diffusion",
        head_options=head,
        normalization="min_max",
        shift=0,
    )
    spec = PolicySpec(config=config, schema=folder.schema, horizon=folder.option("horizon"))
    return spec, folder.normalizers(), renamed(folder.weights, shared=shared)


def renamed(weights: Mapping[str, Tensor], *, shared: bool) -> dict[str, Tensor]:
    """Ours for LeRobot's. How many batches a norm has seen is of no use to one that stands still."""
    encoders = "backbone.encoders.0." if shared else "backbone.encoders."
    modules = {"diffusion.rgb_encoder.": encoders, "diffusion.unet.": "head.unet."}
    ours = {}
    for name, tensor in weights.items():
        if name.endswith(".num_batches_tracked"):
            continue
        theirs = next((prefix for prefix in modules if name.startswith(prefix)), "")
        ours[modules.get(theirs, "") + name.removeprefix(theirs)] = tensor
    return ours
