"""ACT as LeRobot publishes it, as our pair `act` and `act`: every weight under our name."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from data.normalize import Normalizer
from models.config import PolicyConfig
from models.layers.trunks import STAGES
from models.policy import PolicySpec
from models.published.lerobot import AROUND, Folder, picture_scale

# LeRobot's module -> ours
MODULES = {
    "encoder_img_feat_input_proj": "backbone.picture",
    "encoder_robot_state_input_proj": "backbone.state",
    "encoder_env_state_input_proj": "backbone.environment",
    "encoder_latent_input_proj": "head.of_style",
    "encoder": "head.encoder",
    "decoder": "head.decoder",
    "action_head": "head.action",
    "vae_encoder": "head.style.encoder",
    "vae_encoder_robot_state_input_proj": "head.style.state",
    "vae_encoder_action_input_proj": "head.style.action",
    "vae_encoder_latent_output_proj": "head.style.moments",
}


def read(path: Path) -> tuple[PolicySpec, dict[str, Normalizer], dict[str, Tensor]]:
    """The policy in the folder `path`: its specification, how it scales, its weights by our names.

    Weights that it has beside ours keep their own names, for whoever fills them in to list. Raises `BadInput` for a
    folder that is none of LeRobot's ACT, and for an option that is not known here.
    """
    folder = Folder(path, "act")
    folder.refuse_unless(n_obs_steps=1, feedforward_activation="relu", replace_final_stride_with_dilation=False)
    around = folder.width(AROUND)
    head = {
        "preset": "published",
        "dim": folder.option("dim_model"),
        "heads": folder.option("n_heads"),
        "feedforward": folder.option("dim_feedforward"),
        "encoder_layers": folder.option("n_encoder_layers"),
        "decoder_layers": folder.option("n_decoder_layers"),
        "dropout": folder.option("dropout"),
        "pre_norm": folder.option("pre_norm"),
        "use_vae": folder.option("use_vae"),
        "latent": folder.option("latent_dim"),
        "vae_layers": folder.option("n_vae_encoder_layers"),
        "kl_weight": folder.option("kl_weight"),
        "environment": around,
    }
    backbone = {
        "preset": "published",
        "trunk": folder.option("vision_backbone"),
        "dim": folder.option("dim_model"),
        "environment": around,
        "frozen_norm": True,
        **(picture_scale(folder) if folder.cameras else {}),
    }
    config = PolicyConfig(
        backbone="act", backbone_options=backbone, head="act", head_options=head, normalization="mean_std", shift=0
    )
    spec = PolicySpec(config=config, schema=folder.schema, horizon=folder.option("chunk_size"))
    return spec, folder.normalizers(), renamed(folder.weights, use_vae=head["use_vae"])


def renamed(weights: Mapping[str, Tensor], *, use_vae: bool) -> dict[str, Tensor]:
    """Ours for LeRobot's, less what follows from the rest: fixed places, and what maps a style that is always 0."""
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, rest = name.removeprefix("model.").partition(".")
        if module == "encoder_1d_feature_pos_embed":  # of the style, the state, the environment
            ours["head.style_place"], ours["backbone.state_places"] = tensor[0], tensor[1:]
        elif module == "vae_encoder_cls_embed":
            ours["head.style.cls"] = tensor[0]
        elif module == "decoder_pos_embed":
            ours["head.queries"] = tensor
        elif module == "encoder_latent_input_proj" and not use_vae:
            ours |= {"head.no_style": tensor} if rest == "bias" else {}
        elif module == "backbone":
            stage, _, rest = rest.partition(".")
            ours[f"backbone.trunk.{STAGES.index(stage)}.{rest}" if stage in STAGES else name] = tensor
        elif module in MODULES:
            ours[f"{MODULES[module]}.{rest}"] = tensor
        elif module != "vae_encoder_pos_enc":
            ours[name] = tensor
    return ours
