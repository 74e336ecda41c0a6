"""Mamba-1: a token mixer of linear cost, causal, with a state of fixed size (Gu & Dao 2023, arXiv 2312.00752).

    [b l dim] --in_proj--> x --conv1d over time, SiLU--> x --x_proj--> delta (dt_proj), B, C --scan--> y --out_proj-->
                     `---> gate --------------------------------------------------------------^

    layer:  tokens -+- norm - mixer -(+)-+- norm2 - mlp -(+)-->       the second half only where `intermediate` is set
                    `----------------^   `---------------^

Parameters are named, shaped and initialised as in mamba-ssm, whose state dicts load here and the other way round.
Whole sequences go through `forward`, in training and wherever all tokens are known; `step` goes on by one token.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.layers.scan import selective_scan, selective_step

DT_RANGE = (1e-3, 1e-1)  # of softplus(dt_proj.bias) at the start: log-uniform
NORM_EPS = 1e-5
MLP_MULTIPLE = 128  # of a gated MLP's width, as in mamba-ssm


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Sizes of a Mamba block."""

    dim: int = 256  # width of a token
    state: int = 16  # states per channel
    conv: int = 4  # taps of the causal convolution, the token itself included
    expand: int = 2  # channels inside, in dims
    intermediate: int = 0  # width of the gated MLP after each block, rounded up to a multiple of 128; 0 = none

    @property
    def inner(self) -> int:
        return self.expand * self.dim

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.dim / 16)


class MambaState(NamedTuple):
    """What a block remembers of the tokens before."""

    inputs: Float[Tensor, "b d w"]  # the last conv - 1 inputs of the convolution, oldest first
    hidden: Float[Tensor, "b d n"]  # the scan's h, float32


class Mamba(nn.Module):
    """One block, without norm or residual."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        inner, rank, n = config.inner, config.dt_rank, config.state
        self.in_proj = nn.Linear(config.dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv, groups=inner, padding=config.conv - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, n + 1).float().log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.dim, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            low, high = map(math.log, DT_RANGE)
            dt = torch.empty(inner).uniform_(low, high).exp()
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def forward(self, tokens: Float[Tensor, "b l m"]) -> Float[Tensor, "b l m"]:
        x, gate = self.in_proj(tokens).chunk(2, dim=-1)
        x = F.silu(self._convolve(x))
        delta, B, C = self._selection(x)
        return self.out_proj(selective_scan(x, delta, self._A(), B, C, self.D, gate))

    def step(self, token: Float[Tensor, "b m"], state: MambaState) -> tuple[Float[Tensor, "b m"], MambaState]:
        """The output at one more token, and what to remember. `forward` gives the same, to rounding."""
        x, gate = self.in_proj(token).chunk(2, dim=-1)
        window = torch.cat([state.inputs, x[:, :, None]], dim=-1)
        convolved = F.conv1d(window, self.conv1d.weight, self.conv1d.bias, groups=self.config.inner)
        x = F.silu(convolved.squeeze(-1))
        delta, B, C = self._selection(x)
        y, hidden = selective_step(x, delta, self._A(), B, C, self.D, gate, state.hidden)
        return self.out_proj(y), MambaState(inputs=window[:, :, 1:], hidden=hidden)

    def first_state(self, batch: int) -> MambaState:
        """Before the first token: zeros, as the convolution pads."""
        inner, weight = self.config.inner, self.in_proj.weight
        return MambaState(
            inputs=weight.new_zeros(batch, inner, self.config.conv - 1),
            hidden=weight.new_zeros(batch, inner, self.config.state, dtype=torch.float32),
        )

    def _convolve(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """`conv1d` as a picture one pixel high: it may then keep channels last, where the scan wants them."""
        pictures = x.mT.unsqueeze(2)
        weight, bias = self.conv1d.weight.unsqueeze(2), self.conv1d.bias
        y = F.conv2d(pictures, weight, bias, padding=(0, self.config.conv - 1), groups=self.config.inner)
        return y.squeeze(2).mT[:, : x.shape[1]]

    def _selection(self, x: Float[Tensor, "*b d"]) -> tuple[Tensor, ...]:
        """What of the recurrence depends on the token: delta (before the softplus), B, C."""
        n = self.config.state
        low, B, C = self.x_proj(x).split([self.config.dt_rank, n, n], dim=-1)
        return self.dt_proj(low), B, C

    def _A(self) -> Float[Tensor, "d n"]:
        return -torch.exp(self.A_log.float())


class GatedMLP(nn.Module):
    """fc2(y · SiLU(gate)), where fc1 makes y and gate: mamba-ssm's, which its `d_intermediate` asks for."""

    def __init__(self, dim: int, intermediate: int) -> None:
        super().__init__()
        hidden = -(-intermediate // MLP_MULTIPLE) * MLP_MULTIPLE
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, tokens: Float[Tensor, "*b m"]) -> Float[Tensor, "*b m"]:
        y, gate = self.fc1(tokens).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


class MambaLayer(nn.Module):
    """Norm, block, residual; then, where it is asked for, norm, gated MLP, residual."""

    mlp: GatedMLP | None

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.mixer = Mamba(config)
        self.norm2 = nn.RMSNorm(config.dim, eps=NORM_EPS) if config.intermediate else None
        self.mlp = GatedMLP(config.dim, config.intermediate) if config.intermediate else None

    def forward(self, tokens: Float[Tensor, "b l m"]) -> Float[Tensor, "b l m"]:
        return self._through_mlp(tokens + self.mixer(self.norm(tokens)))

    def step(self, token: Float[Tensor, "b m"], state: MambaState) -> tuple[Float[Tensor, "b m"], MambaState]:
        y, state = self.mixer.step(self.norm(token), state)
        return self._through_mlp(token + y), state

    def _through_mlp(self, tokens: Float[Tensor, "*b m"]) -> Float[Tensor, "*b m"]:
        if self.norm2 is None or self.mlp is None:
            return tokens
        return tokens + self.mlp(self.norm2(tokens))


class MambaStack(nn.Module):
    """Layers and a last norm: the trunk of mamba-ssm's MixerModel, without its embedding."""

    def __init__(self, config: MambaConfig, layers: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(MambaLayer(config) for _ in range(layers))
        self.norm_f = nn.RMSNorm(config.dim, eps=NORM_EPS)
        residuals = layers * (2 if config.intermediate else 1)
        with torch.no_grad():
            for layer in self.layers:  # so that the residual stream does not grow with depth (GPT-2)
                layer.mixer.out_proj.weight /= math.sqrt(residuals)
                if layer.mlp:
                    layer.mlp.fc2.weight /= math.sqrt(residuals)

    def forward(self, tokens: Float[Tensor, "b l m"]) -> Float[Tensor, "b l m"]:
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm_f(tokens)

    def step(
        self, token: Float[Tensor, "b m"], states: list[MambaState]
    ) -> tuple[Float[Tensor, "b m"], list[MambaState]]:
        """`forward` by one token; `states` has one entry per layer."""
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            token, state = layer.step(token, state)
            after.append(state)
        return self.norm_f(token), after

    def first_states(self, batch: int) -> list[MambaState]:
        return [layer.mixer.first_state(batch) for layer in self.layers]
