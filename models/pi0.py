"""LeRobot's PI0 and PI05 from a folder: many chunks per observation, which is read once.

```
 pictures, words --SigLIP, Gemma--> keys and values of the prefix     once per observation
                                       |  read by every sample and every denoising step, never copied
 noise [b k h a] ----action expert-----+--> velocity, N Euler steps   one row of k·h tokens per observation;
                                                                      a sample's tokens see their own sample only
```
The prefix never attends to state or actions, so what LeRobot computes K times for K samples is the same each time.
Cameras that are not there, which LeRobot shows as black pictures and then masks, and the padding of the prompts are
left out: equal outputs. Physical Intelligence 2024 (arXiv 2410.24164); t = 1 is noise here, the opposite of the paper.

Only safetensors and JSON are read. Of the folder's processors the names and options count, never a class path.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d, resize_with_pad_torch
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.relative_action_processor import to_absolute_actions
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from data.errors import BadInput
from data.registry import did_you_mean
from data.schema import IMAGE, Schema
from data.store import canonical
from data.untrusted import fault, parse_json
from models.checkpoint import read_tensors, refuse_other_names
from models.devices import best_device
from models.flow import CONVENTIONS, euler
from models.policy import within_limits
from models.tokenizers import find_tokenizer
from models.types import Observation

CLASSES = {"pi0": PI0Policy, "pi05": PI05Policy}
CONFIG, WEIGHTS = "config.json", "model.safetensors"
BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
FETCH = "`flywheel fetch pi0_libero` or another fine-tuned one"
EMPTY = "empty_camera_"  # LeRobot's name for a camera that never is there
# What need not happen here: names are mapped and the device is chosen by us, a batch is one already, and actions become
# absolute in `Processors.in_units`, whenever the relative step is there.
SKIPPED = {"rename_observations_processor", "to_batch_processor", "device_processor", "absolute_actions_processor"}
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
WORDS_OUT = "model.paligemma_with_expert.paligemma.lm_head.weight"
UNREAD = {WORDS_OUT, "model.paligemma_with_expert.gemma_expert.lm_head.weight"}  # by acting; older files lack them


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What every sample and step reads of an observation."""

    cache: "PrefixCache"
    valid: Bool[Tensor, "b p"]  # false: padding of a prompt that is shorter than another's


class Pi0Proposer:
    """A `models.proposer.Proposer`."""

    def __init__(
        self, policy: Any, processors: "Processors", inputs: "Inputs", *, digest: str, steps: int | None = None
    ) -> None:
        """`policy` is a PI0Policy or PI05Policy on the device to compute on; `steps` None is its configuration's."""
        self.policy = policy.eval().requires_grad_(False)
        self.kind: str = policy.config.type
        self.digest = digest
        self.steps: int = steps or policy.config.num_inference_steps
        self.horizon: int = policy.config.chunk_size
        self.noise_shape = (self.horizon, policy.config.max_action_dim)
        self._processors = processors
        self._inputs = inputs
        for config in (self._inner.paligemma.model.language_model.config, self._inner.gemma_expert.model.config):
            config._attn_implementation = "sdpa"

    def provenance(self) -> dict[str, Any]:
        norm = self._processors.norm_digest
        return {"kind": self.kind, "policy": self.digest, "steps": self.steps, "normalization": norm}

    @torch.no_grad()
    def propose(self, observation: Observation, noise: Float[Tensor, "b k ..."]) -> Float[Tensor, "b k h a"]:
        """Chunks in the environment's units, a function of the observation and the noise."""
        b, k = noise.shape[:2]
        measured = self._inputs.state(observation).cpu()
        prompt = self._processors.prompt(measured, observation.tasks)
        prefix = self._read(self._inputs.images(observation, self.policy.config.image_resolution), prompt)
        state = pad(prompt[OBS_STATE], (0, self.policy.config.max_state_dim - prompt[OBS_STATE].shape[-1]))
        velocity = self._velocity(prefix, state.to(self._device), k)
        chunk = euler(CONVENTIONS["noise_at_1"], velocity, noise.to(self._device).flatten(0, 1), self.steps)
        chunk = chunk[..., : len(self._inputs.schema.action)].cpu()
        action = self._processors.in_units(chunk, measured.repeat_interleave(k, dim=0))
        return within_limits(action, self._inputs.schema.action).unflatten(0, (b, k))

    def _read(self, images: list[Float[Tensor, "b c h w"]], prompt: Mapping[str, Tensor]) -> Prefix:
        """Pictures and words as the keys and values of every layer."""
        images = [image.to(self._device) for image in images]
        mask = prompt[OBS_LANGUAGE_ATTENTION_MASK].to(self._device)
        longest = int(mask.sum(dim=1).max())
        tokens = prompt[OBS_LANGUAGE_TOKENS].to(self._device)[:, :longest]
        seen = [mask.new_ones(len(mask))] * len(images)
        embedded, valid, together = self.policy.model.embed_prefix(images, seen, tokens, mask[:, :longest])
        _, cache = self._inner(
            attention_mask=self._additive(make_att_2d_masks(valid, together)),
            position_ids=valid.cumsum(dim=1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        return Prefix(cache=PrefixCache([(keys, values) for keys, values, *_ in cache]), valid=valid)

    def _velocity(self, prefix: Prefix, state: Float[Tensor, "b s"], k: int) -> Any:
        """The field (x_t [b·k h a], t [b·k]) -> dx/dt, the samples of an observation side by side in one row."""
        b, p = prefix.valid.shape
        model, per_sample = self.policy.model, (state.repeat_interleave(k, dim=0),) if self.kind == "pi0" else ()

        def velocity(x_t: Float[Tensor, "bk h a"], t: Float[Tensor, " bk"]) -> Float[Tensor, "bk h a"]:
            embedded, valid, order, condition = model.embed_suffix(*per_sample, x_t, t)
            s = embedded.shape[1]
            own = make_att_2d_masks(valid[:1], order[:1])[0]
            others = torch.kron(torch.eye(k, dtype=torch.bool, device=own.device), own)
            seen = torch.cat([prefix.valid[:, None].expand(b, k * s, p), others.expand(b, k * s, k * s)], dim=2)
            places = prefix.valid.sum(dim=1, keepdim=True) + torch.arange(s, device=own.device).repeat(k)
            (_, out), _ = self._inner(
                attention_mask=self._additive(seen),
                position_ids=places,
                past_key_values=prefix.cache,
                inputs_embeds=[None, embedded.reshape(b, k * s, -1)],
                use_cache=False,
                adarms_cond=[None, None if condition is None else condition[::k]],  # t is the same for all
            )
            out = out.view(b * k, s, -1)[:, -self.horizon :]
            return model.action_out_proj(out.to(torch.float32))

        return velocity

    @property
    def _inner(self) -> Any:
        return self.policy.model.paligemma_with_expert

    @property
    def _device(self) -> torch.device:
        return self.policy.model.action_in_proj.weight.device

    def _additive(self, seen: Bool[Tensor, "b q k"]) -> Float[Tensor, "b 1 q k"]:
        dtype = self._inner.gemma_expert.model.layers[0].self_attn.q_proj.weight.dtype
        return prepare_attention_masks_4d(seen, dtype=dtype)


class PrefixCache:
    """Keys and values that are read and never grow: transformers' own cache would keep those of each step."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def get_seq_length(self, layer: int = 0) -> int:
        return self.layers[layer][0].shape[-2]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What attention reads: the prefix, then the tokens at hand."""
        before_keys, before_values = self.layers[layer]
        return torch.cat([before_keys, keys], dim=-2), torch.cat([before_values, values], dim=-2)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Which of a dataset's features are the policy's."""

    schema: Schema  # of the dataset
    cameras: tuple[str, ...]  # of the dataset, in the policy's order; those the policy goes without are left out
    components: tuple[int, ...]  # of the dataset's state, in the policy's order

    def images(self, observation: Observation, size: tuple[int, int]) -> list[Float[Tensor, "b c h w"]]:
        """Pictures as SigLIP wants them: in [-1, 1], black bars keeping their shape."""
        pictures = []
        for camera in self.cameras:
            image = observation.images[camera]
            image = image if image.shape[-1] == 3 else image.permute(0, 2, 3, 1)
            image = image.to(torch.float32) / 255
            if tuple(image.shape[1:3]) != tuple(size):
                image = resize_with_pad_torch(image, *size)
            pictures.append((image * 2 - 1).permute(0, 3, 1, 2))
        return pictures

    def state(self, observation: Observation) -> Float[Tensor, "b s"]:
        return observation.state.float()[:, list(self.components)]


@dataclass(frozen=True, kw_only=True)
class Processors:
    """LeRobot's steps around the model, and the digest of the numbers in them."""

    before: PolicyProcessorPipeline
    after: UnnormalizerProcessorStep
    relative: Any  # a RelativeActionsProcessorStep if the policy's actions are relative to the state, else None
    norm_digest: str

    def prompt(self, state: Float[Tensor, "b s"], tasks: tuple[str, ...]) -> dict[str, Tensor]:
        """Tokens and their mask, and the state normalised."""
        return self.before({OBS_STATE: state, "task": list(tasks)})

    def in_units(self, chunk: Float[Tensor, "b h a"], state: Float[Tensor, "b s"]) -> Float[Tensor, "b h a"]:
        """What the model answered, in the units it learnt; `state` as measured."""
        action = self.after._normalize_action(chunk, inverse=True)
        if self.relative is None:
            return action
        return to_absolute_actions(action, state, self.relative._build_mask(action.shape[-1]))


def load(
    folder: Path,
    schema: Schema,
    *,
    digest: str,
    steps: int | None = None,
    cameras: Mapping[str, str] | None = None,
    state: tuple[str, ...] = (),
) -> Pi0Proposer:
    """The PI0 or PI05 in `folder`, as LeRobot saves it, on the best device here.

    cameras: the policy's camera -> the dataset's, "" where the policy goes without; equal names need no entry.
    state: names of the dataset's components in the policy's order; () is all of them as they are.
    Raises `BadInput` for what is missing, damaged or does not fit the dataset.
    """
    config = _config(folder)
    inputs = _inputs(folder, config, schema, cameras or {}, state)
    processors = _processors(folder, config)
    policy = CLASSES[config.type](config)
    _fill(policy, folder / WEIGHTS)
    return Pi0Proposer(policy.to(best_device()), processors, inputs, digest=digest, steps=steps)


def _config(folder: Path) -> Any:
    import draccus

    try:
        config: Any = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, draccus.utils.DraccusException) as error:
        said = str(error).partition("\n")[0]
        raise fault(folder, CONFIG, f"is no configuration of LeRobot 0.6: {said}", "fetch it again") from None
    config.compile_model = config.gradient_checkpointing = False
    return config


def _inputs(folder: Path, config: Any, schema: Schema, cameras: Mapping[str, str], state: tuple[str, ...]) -> Inputs:
    names = [c.name for c in schema.state]
    for name in state:
        if name not in names:
            raise BadInput(f"relabel.state: the dataset has no component {name!r}{did_you_mean(name, names)}")
    components = tuple(names.index(name) for name in state) or tuple(range(len(names)))
    for what, feature, width in (
        ("state", config.robot_state_feature, len(components)),
        ("action", config.action_feature, len(schema.action)),
    ):
        if feature is None or feature.shape[0] != width:
            wants = "none" if feature is None else feature.shape[0]
            remedy = "say which with relabel.state" if what == "state" else "it acts on another robot"
            raise fault(folder, CONFIG, f"{what} has {wants} components, the dataset's {width}", remedy)
    return Inputs(schema=schema, cameras=_cameras(folder, config, schema, cameras), components=components)


def _cameras(folder: Path, config: Any, schema: Schema, wanted: Mapping[str, str]) -> tuple[str, ...]:
    """The dataset's camera for each of the policy's, without those that are left out."""
    known = [key.removeprefix(IMAGE) for key in config.image_features]
    for name in wanted:
        if name not in known:
            raise BadInput(f"relabel.cameras: the policy has no camera {name!r}{did_you_mean(name, known)}")
    taken = []
    for name in known:
        camera = wanted.get(name, "" if name.startswith(EMPTY) else name)
        if camera and camera not in schema.cameras:
            have = ", ".join(schema.cameras)
            raise fault(folder, CONFIG, f"camera {name!r} is none of the dataset's ({have})", "set relabel.cameras")
        taken += [camera] if camera else []
    if not taken:
        raise fault(folder, CONFIG, "no camera of the dataset is shown to the policy", "set relabel.cameras")
    return tuple(taken)


# -- processors ------------------------------------------------------------------------------------------------------


def _processors(folder: Path, config: Any) -> Processors:
    tokenizer = find_tokenizer(folder)
    makers = {
        "pi0_new_line_processor": lambda options: Pi0NewLineProcessor(),
        "pi05_prepare_state_tokenizer_processor_step": lambda options: Pi05PrepareStateTokenizerProcessorStep(
            **options
        ),
        "tokenizer_processor": lambda options: TokenizerProcessorStep(
            **{**options, "tokenizer_name": None, "tokenizer": tokenizer}
        ),
        "relative_actions_processor": lambda options: RelativeActionsProcessorStep(**options),
        "normalizer_processor": lambda options: NormalizerProcessorStep(**options),
        "unnormalizer_processor": lambda options: UnnormalizerProcessorStep(**options),
    }
    before, after = _steps(folder, BEFORE, makers), _steps(folder, AFTER, makers)
    normalizers = [step for step in before if isinstance(step, NormalizerProcessorStep)]
    if len(normalizers) != 1 or len(after) != 1 or not isinstance(after[0], UnnormalizerProcessorStep):
        raise fault(folder, BEFORE, f"it and {AFTER} must scale state and action once each", "fetch it again")
    _refuse_without_numbers(folder, config, normalizers[0], OBS_STATE, config.robot_state_feature)
    _refuse_without_numbers(folder, config, after[0], ACTION, config.action_feature)
    relative = next((s for s in before if isinstance(s, RelativeActionsProcessorStep) and s.enabled), None)
    if (relative is not None) != config.use_relative_actions:
        raise fault(folder, BEFORE, f"it and {CONFIG} disagree whether actions are relative", "fetch it again")
    return Processors(
        before=PolicyProcessorPipeline(steps=before, name="policy_preprocessor"),
        after=after[0],
        relative=relative,
        norm_digest=_norm_digest(normalizers[0], after[0]),
    )


def _steps(folder: Path, file: str, makers: Mapping[str, Any]) -> list[Any]:
    """The steps of a processor file, those that do something here. Their order is the file's: pi0.5 reads the state."""
    made = []
    try:
        content = parse_json(folder, file, (folder / file).read_bytes())
    except OSError:
        raise fault(folder, file, "is missing: how state and actions are scaled is not known", f"get {FETCH}") from None
    for entry in content["steps"]:
        name, options = entry.get("registry_name"), entry.get("config", {})
        if name in SKIPPED:
            continue
        if name not in makers:
            raise fault(folder, file, f"step {name or entry.get('class')!r} is not known here", "use a plain pi0")
        step = makers[name](options)
        if entry.get("state_file"):
            step.load_state_dict(read_tensors(folder / Path(entry["state_file"]).name))
        made.append(step)
    return made


def _refuse_without_numbers(folder: Path, config: Any, step: Any, key: str, feature: Any) -> None:
    """LeRobot's steps let pass unscaled what they have no numbers for."""
    mode = step.norm_map.get(FeatureType.ACTION if key == ACTION else FeatureType.STATE)
    if mode in (None, NormalizationMode.IDENTITY):
        return
    widths = {len(v) for name, v in step.state_dict().items() if name.startswith(f"{key}.") and v.ndim == 1}
    if feature.shape[0] not in widths:
        raise fault(folder, BEFORE, f"no statistics to scale {key} with; a base model has none", f"get {FETCH}")


def _norm_digest(*steps: Any) -> str:
    digest = hashlib.sha256()
    for step in steps:
        digest.update(canonical(step.get_config()).encode())
        for name, tensor in sorted(step.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# -- weights ---------------------------------------------------------------------------------------------------------


def _fill(policy: Any, path: Path) -> None:
    """Copy the tensors of `path` into `policy`: every name and shape must match. One tensor in memory at a time."""
    wanted = policy.state_dict()
    try:
        with safe_open(path, "pt") as file:
            found = {_full(name): name for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
            if EMBEDDING not in found and WORDS_OUT in found:  # one matrix, written once under either name
                found[EMBEDDING] = found[WORDS_OUT]
            refuse_other_names(path, found, {n: t for n, t in wanted.items() if n in found or n not in UNREAD})
            for name, inside in found.items():
                tensor = file.get_tensor(inside)
                if tensor.shape != wanted[name].shape:
                    shapes = f"{list(tensor.shape)}, the model's is {list(wanted[name].shape)}"
                    raise fault(path.parent, path.name, f"{name[-60:]} is {shapes}", "fetch it again")
                wanted[name].copy_(tensor)
    except (OSError, SafetensorError) as error:
        said = f"cannot be read as safetensors ({type(error).__name__})"
        raise fault(path.parent, path.name, said, f"get {FETCH}") from None


def _full(name: str) -> str:
    return name if name.startswith("model.") else f"model.{name}"
