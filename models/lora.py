"""Low-rank adapters: what a large policy learns of a new robot, while its own weights stand still.

```
 x ---- W, frozen -------------(+)--- y        y = W x + alpha / rank · B A x
  `-- A: rank x d -- B: e x rank -'            B is 0 at the start: a new adapter changes nothing
```
Hu et al. 2021 (arXiv 2106.09685); the adapters are peft's. A checkpoint holds the weights and the adapters, apart.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from data.errors import BadInput
from models.config import LoraOptions

# By which names transformers, diffusers and GR00T call the maps of attention and of the MLP behind it.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "to_q", "to_k", "to_v", r"to_out\.0")
MLP = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", r"net\.0\.proj", r"net\.2")
# These compute with the weights of the layers inside them and never call them: an adapter there would be passed by.
CLOSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def add_adapters(networks: Mapping[str, nn.Module], options: LoraOptions, *, seed: int) -> None:
    """Freeze `networks` but for new adapters, and for what their classes list as `lora_trains_fully`.

    Layers are chosen by `options.targets`, or by the class attribute `lora_targets`, or by what attention's and MLPs'
    maps are usually called: regular expressions for the end of a layer's name, from a dot on. Adapters are a function
    of `seed`. Raises `BadInput` if no layer is meant.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen = {name: list(_chosen(network, options.targets)) for name, network in networks.items()}
    if not any(chosen.values()):
        asked = f"{options.targets!r}" if options.targets else "the usual names of attention and MLPs"
        some = [f"{name}.{layer}" for name, network in networks.items() for layer in _adaptable(network)][:2]
        raise BadInput(f"policy.lora: no layer is called {asked:.60}; there are e.g. {', '.join(some)[:100] or 'none'}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, network in networks.items():
            whole = list(_whole(network))
            network.requires_grad_(False)
            if chosen[name]:
                config = LoraConfig(
                    r=options.rank,
                    lora_alpha=options.alpha,  # type: ignore[arg-type] (a float will do)
                    lora_dropout=options.dropout,
                    target_modules="|".join(map(re.escape, chosen[name])),
                )
                inject_adapter_in_model(config, network)
            for parameter in whole:
                parameter.requires_grad_()


def _chosen(network: nn.Module, targets: str) -> Iterator[str]:
    asked = targets or "|".join(getattr(type(network), "lora_targets", ATTENTION + MLP))
    try:
        pattern = re.compile(rf"(.*\.)?({asked})")
    except re.error as fault:
        raise BadInput(f"policy.lora.targets {targets!r:.60} is no regular expression: {fault}") from None
    return (name for name in _adaptable(network) if pattern.fullmatch(name))


def _adaptable(network: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the layers that have a weight matrix or kernel and are called."""
    for name, child in network.named_children():
        if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d):
            yield prefix + name
        elif not isinstance(child, CLOSED):
            yield from _adaptable(child, f"{prefix}{name}.")


def _whole(network: nn.Module) -> Iterator[nn.Parameter]:
    """The trained parameters of what trains as a whole."""
    pattern = re.compile("|".join(getattr(type(network), "lora_trains_fully", ())) or r"(?!)")
    for name, module in network.named_modules():
        if pattern.fullmatch(name):
            yield from (p for p in module.parameters() if p.requires_grad)
