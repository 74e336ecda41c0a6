"""Mamba: its scan against the recurrence written out, its block against transformers', its step against itself."""

import logging
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_policy import generator

from models.layers import scan, scan_c
from models.layers.mamba import Mamba, MambaConfig, MambaStack
from models.layers.scan import BLOCK, compiled_scan, portable_scan, selective_scan
from models.types import Phase

TINY = MambaConfig(dim=32, state=4)
PARAMETERS = {  # of mamba-ssm's Mamba(256, d_state=16, d_conv=4, expand=2)
    "A_log": (512, 16),
    "D": (512,),
    "in_proj.weight": (1024, 256),
    "conv1d.weight": (512, 1, 4),
    "conv1d.bias": (512,),
    "x_proj.weight": (48, 512),
    "dt_proj.weight": (512, 16),
    "dt_proj.bias": (512,),
    "out_proj.weight": (256, 512),
}
BATCH, CHANNELS, STATES = 2, 24, 8
with_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler: apt-get install gcc")
each_scan = pytest.mark.parametrize("of", [portable_scan, pytest.param(compiled_scan, marks=with_compiler)])


def written_out(x, delta, A, B, C, D, gate):
    """The formula of models/layers/scan.py, one token after the other."""
    delta, h, y = F.softplus(delta), torch.zeros(()), []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1) + D * x[:, t])
    return torch.stack(y, dim=1) * F.silu(gate)


def arguments(length, seed=0, dtype=torch.float32, b=BATCH, d=CHANNELS, n=STATES):
    draw = generator(seed)
    shapes = [(b, length, d), (b, length, d), (d, n), (b, length, n), (b, length, n), (d,), (b, length, d)]
    x, delta, A, B, C, D, gate = (torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)
    return [t.requires_grad_() for t in (x, delta - 2, -8 * A.abs(), B, C, D, gate)]


def block(config=TINY, seed=0):
    torch.manual_seed(seed)
    return Mamba(config)


def tokens(length, config=TINY, b=BATCH):
    return torch.randn(b, length, config.dim, generator=generator("tokens"))


def relative(ours, other):
    return ((ours - other).abs().max() / other.abs().max()).item()


@with_compiler
def test_where_there_is_a_compiler_it_is_used():
    assert scan_c.recurrence(STATES)


@each_scan
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 395])
def test_the_scan_is_the_recurrence_forward_and_backward(length, of):
    given = arguments(length)
    y, expected = of(*given), written_out(*given)
    dy = torch.randn(y.shape, generator=generator("dy"))
    assert relative(y, expected) < 1e-5
    for ours, other in zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(expected, given, dy), strict=True):
        if other.any():  # A acts on a state that a single token does not have
            assert relative(ours, other) < 1e-5
        else:
            assert not ours.any()


def test_the_gradient_is_the_slope():
    given = arguments(BLOCK + 3, dtype=torch.float64, b=1, d=3, n=2)
    assert torch.autograd.gradcheck(portable_scan, given)


@each_scan
def test_fast_decay_neither_overflows_nor_loses_the_gradient(of):
    """exp(-sum of δA) would: 100 steps of 50 are e^5000."""
    given = arguments(100)
    with torch.no_grad():
        given[1] += 30
    y = of(*given)
    assert relative(y, written_out(*given)) < 1e-5
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), given))


@each_scan
def test_half_precision_scans_in_single(of):
    given = [t.detach().bfloat16() for t in arguments(200)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = of(*given)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, of(*(t.float() for t in given)).bfloat16())


@with_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("d", [1, 16, 37])
def test_the_compiled_scan_for_any_width_and_however_its_inputs_lie(d, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = [t.detach() for t in arguments(2 * BLOCK + 3, b=5, d=2 * d)]
        given = [t[..., 1::2] if i in (0, 1, 6) else t for i, t in enumerate(whole)]
        given[2], given[5] = whole[2][::2], whole[5][::2]
        given = [t.requires_grad_() for t in given]
        y, expected = compiled_scan(*given), portable_scan(*given)
        pairs = zip(*(torch.autograd.grad(a.square().sum(), given) for a in (y, expected)), strict=True)
        assert relative(y, expected) < 1e-5 and all(relative(a, b) < 1e-5 for a, b in pairs)
    finally:
        torch.set_num_threads(before)


@each_scan
def test_the_backward_pass_keeps_one_state_per_block(of):
    """The naive graph keeps several [b l d n]; ours, the inputs and the states before each block."""
    given, kept = arguments(20 * BLOCK), {}

    def seen(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
        of(*given)
    one = 4 * BATCH * 20 * BLOCK * CHANNELS * STATES
    assert sum(kept.values()) < 2 * one


def test_names_shapes_and_counts_of_parameters():
    assert {name: tuple(p.shape) for name, p in Mamba(MambaConfig()).state_dict().items()} == PARAMETERS
    assert sum(p.numel() for p in Mamba(MambaConfig()).parameters()) == 437_760
    stack = MambaStack(MambaConfig(), 12)
    assert sum(p.numel() for p in stack.get_submodule("layers.0").parameters()) == 438_016
    assert sum(p.numel() for p in stack.parameters()) == 5_256_448
    expected = {"norm.weight", *(f"mixer.{name}" for name in PARAMETERS)}  # as in mamba-ssm's MixerModel
    names = {name.removeprefix("layers.11.") for name in stack.state_dict() if name.startswith("layers.11.")}
    assert names == expected and "norm_f.weight" in stack.state_dict()


def test_the_gated_mlp_is_mamba_ssms():
    """Its names, its rounding of the width, its formula, its place behind the mixer, its initial scale."""
    stack = MambaStack(MambaConfig(dim=32, state=4, intermediate=96), 3)
    layer = stack.layers[1]
    added = {name: tuple(p.shape) for name, p in layer.named_parameters() if not name.startswith(("mixer", "norm."))}
    assert added == {"norm2.weight": (32,), "mlp.fc1.weight": (256, 32), "mlp.fc2.weight": (32, 128)}
    x = tokens(7)
    middle = x + layer.mixer(layer.norm(x))
    up, gate = F.linear(layer.norm2(middle), layer.mlp.fc1.weight).split(128, dim=-1)
    assert relative(layer(x), middle + F.linear(up * F.silu(gate), layer.mlp.fc2.weight)) < 1e-6
    limit = 128**-0.5 / 6**0.5  # nn.Linear's, over six residuals
    assert 0.95 * limit < layer.mlp.fc2.weight.abs().max() <= limit


def test_its_rates_are_not_decayed():
    """Decay would draw A to -1, and slow down what was fast."""

    class OfMamba(Phase):
        def __init__(self):
            super().__init__()
            self.policy = block()

    decayed = {group.decay: set(group.parameters) for group in OfMamba().parameter_groups()}
    assert "policy.A_log" in decayed[False] and "policy.in_proj.weight" in decayed[True]


def test_initial_values():
    mixer = Mamba(MambaConfig())
    assert torch.equal(mixer.A_log[7], torch.arange(1.0, 17).log()) and mixer.D.eq(1).all()
    dt = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.999 < dt.min() < 1.3e-3 and 0.08 < dt.max() < 0.1001
    assert abs(dt.log().mean().item() - torch.tensor(1e-2).log().item()) < 0.3  # log-uniform: the middle is 1e-2
    assert 0.24 < mixer.dt_proj.weight.abs().max() <= 0.25  # 16 ** -0.5
    std = 512**-0.5 / 3**0.5  # nn.Linear's standard deviation
    deep = MambaStack(MambaConfig(), 12).get_parameter("layers.3.mixer.out_proj.weight")
    assert deep.std().item() == pytest.approx(std / 12**0.5, rel=0.02)


def test_the_same_numbers_as_transformers():
    """Its parameters have the same names: ours load there, and theirs here, strictly."""
    from transformers import MambaConfig as TheirConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    ours = block()
    theirs = MambaMixer(TheirConfig.from_dict({"hidden_size": 32, "state_size": 4, "time_step_rank": 2}), layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    x = tokens(45).requires_grad_()
    y, expected = ours(x), theirs.slow_forward(x)
    assert relative(y, expected) < 1e-5
    dy = torch.randn(y.shape, generator=generator("dy"))
    names = dict(ours.named_parameters())
    ours_g = torch.autograd.grad(y, [x, *names.values()], dy)
    theirs_g = torch.autograd.grad(expected, [x, *(theirs.get_parameter(name) for name in names)], dy)
    for name, mine, other in zip(["x", *names], ours_g, theirs_g, strict=True):
        assert relative(mine, other) < 1e-5, name
    again = block(seed=1)
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(again(x), y)


def test_a_later_token_changes_no_earlier_output():
    torch.manual_seed(0)
    stack, x = MambaStack(TINY, 3), tokens(60)
    y = stack(x)
    for t in (1, BLOCK, 41):
        other = x.clone()
        other[:, t:] = torch.randn(other[:, t:].shape, generator=generator(t))
        changed = stack(other)
        assert torch.equal(changed[:, :t], y[:, :t])
        assert (changed[:, t] != y[:, t]).any(dim=-1).all()


def test_every_earlier_token_reaches_the_last_output():
    x = tokens(60).requires_grad_()
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(MambaStack(TINY, 2)(x)[:, -1].sum(), x)
    assert gradient.abs().amax(dim=(0, 2)).gt(0).all()


@pytest.mark.parametrize("config", [TINY, replace(TINY, intermediate=64)])
def test_step_by_step_is_the_whole_sequence(config):
    torch.manual_seed(0)
    stack, x = MambaStack(config, 3), tokens(50)
    states, y = stack.first_states(BATCH), []
    for t in range(50):
        now, states = stack.step(x[:, t], states)
        y.append(now)
    assert relative(torch.stack(y, dim=1), stack(x)) < 1e-5


def test_a_step_leaves_the_state_it_was_given():
    mixer = block()
    state = mixer.first_state(BATCH)
    _, after = mixer.step(tokens(1)[:, 0], state)
    assert not state.hidden.any() and not state.inputs.any() and after.hidden.any()


@pytest.fixture
def anew():
    for kept in (scan.scan_on, scan_c.recurrence):
        kept.cache_clear()
    yield
    for kept in (scan.scan_on, scan_c.recurrence):
        kept.cache_clear()


def test_mamba_ssms_kernel_is_given_what_it_wants(anew, monkeypatch):
    """It is [b d l] there; the kernel itself needs a GPU, so its place is taken by the formula in its layout."""

    def kernel(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert delta_softplus and delta_bias is None and z is not None
        return written_out(u.mT, delta.mT, A, B.mT, C.mT, D, z.mT).mT

    monkeypatch.setitem(
        sys.modules, "mamba_ssm.ops.selective_scan_interface", SimpleNamespace(selective_scan_fn=kernel)
    )
    given = arguments(21)
    assert relative(scan.scan_on("cuda")(*given), portable_scan(*given)) < 1e-5


def test_which_scan_is_said_once(anew, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)  # an import of it fails
    caplog.set_level(logging.INFO, logger="models.layers")
    for _ in range(3):
        selective_scan(*arguments(5))
        assert scan.scan_on("cuda").__name__ == "triton_scan"
    levels = [(r.levelname, r.getMessage().split(":")[0]) for r in caplog.records]
    assert levels == [("INFO", "Mamba's scan on cpu"), ("INFO", "Mamba's scan on cuda")]


@pytest.mark.parametrize(("compiler", "level"), [("no-such-compiler", "INFO"), ("false", "WARNING")])
def test_without_a_compiler_the_portable_scan_does_it_and_says_so(anew, monkeypatch, caplog, tmp_path, compiler, level):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    caplog.set_level(logging.INFO, logger=scan_c.__name__)
    given = arguments(5)
    for _ in range(2):
        assert torch.equal(selective_scan(*given), portable_scan(*given))
    (said,) = caplog.records
    assert said.levelname == level and "portable" in said.getMessage()
    assert not list(tmp_path.rglob("*.so"))
