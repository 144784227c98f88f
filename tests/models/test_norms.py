"""Norm banks against plain references, by groups of samples."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.norms import BANKS, BatchNorm, Step

N, C, SIDE = 10, 6, 5
MIXED = [1, 0, 1, 1, 0, 1, 0, 1, 1, 0]


def _norm(seed=0):
    torch.manual_seed(seed)
    norm = BatchNorm(C)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def _reference(norm, x, executed):
    """Index each group, normalise it with torch's own batch norm, scatter it back."""
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    y = torch.zeros_like(x)
    for group, running in ((executed, (mean, var)), (~executed, (None, None))):
        index = group.nonzero().squeeze(1)
        if len(index):
            normalised = F.batch_norm(
                x[index], *running, norm.weight, norm.bias, True, norm.momentum, norm.eps
            )
            y = y.index_copy(0, index, normalised)
    return y, mean, var


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize(
    "executed", [MIXED, [1] * N, [0] * N, [0] * 9 + [1], [1] * 9 + [0]], ids=str
)
def test_executed_and_skipped_samples_are_normalised_apart(executed, offset, layout):
    norm = _norm()
    executed = torch.tensor(executed, dtype=torch.bool)
    x = (torch.randn(N, C, SIDE, SIDE) * 2 + offset).to(memory_format=layout).requires_grad_()
    upstream = torch.randn(N, C, SIDE, SIDE)
    expected, mean, var = _reference(norm, x, executed)
    gradients = torch.autograd.grad(expected, (x, norm.weight, norm.bias), upstream)

    y = norm(x, executed)

    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert y.is_contiguous(memory_format=layout)
    found = torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream)
    assert found[0].is_contiguous(memory_format=layout)
    for name, got, want in zip(("x", "weight", "bias"), found, gradients, strict=True):
        torch.testing.assert_close(
            got, want, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.running_var, var, atol=1e-5, rtol=1e-5)


class OnDevice(torch.Tensor):
    """Takes the way that devices take, whose moments come from one kernel."""

    is_cuda = True


def test_the_moments_of_a_device_are_the_same():
    norm = _norm()
    executed = torch.tensor(MIXED, dtype=torch.bool)
    x = torch.randn(N, C, SIDE, SIDE) * 2 + 1
    expected, mean, var = _reference(norm, x, executed)
    y = norm(x.as_subclass(OnDevice), executed)
    assert type(y) is OnDevice
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.running_var, var, atol=1e-5, rtol=1e-5)


def test_gradient_is_that_of_finite_differences_in_each_group():
    norm = _norm().eval()
    executed = torch.tensor(MIXED, dtype=torch.bool)
    norm.train()
    x = torch.randn(N, C, 2, 2)
    direction, upstream = torch.randn_like(x), torch.randn_like(x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x, executed), x, upstream)
    with torch.no_grad():
        ahead, behind = (norm(x + h * direction, executed) for h in (1e-2, -1e-2))
    slope = ((ahead - behind) * upstream).sum() / 2e-2
    torch.testing.assert_close((gradient * direction).sum(), slope, atol=2e-2, rtol=2e-2)


def test_nothing_executed_leaves_the_running_statistics():
    norm = _norm()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    y = norm(torch.randn(N, C, SIDE, SIDE), torch.zeros(N, dtype=torch.bool))
    assert torch.isfinite(y).all()
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_one_pixel_of_one_sample_is_finite():
    norm = _norm()
    x = torch.randn(3, C, 1, 1, requires_grad=True)
    y = norm(x, torch.tensor([True, False, False]))
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(norm.running_var).all()


def test_a_large_mean_does_not_spoil_the_variance():
    norm = BatchNorm(C)
    torch.manual_seed(0)
    x = torch.randn(64, C, 8, 8) + 1000
    norm(x, torch.arange(64) % 2 == 0)
    expected = x[::2].double().var((0, 2, 3))
    torch.testing.assert_close(
        norm.running_var.double(), 0.9 + 0.1 * expected, atol=1e-4, rtol=1e-4
    )


def test_statistics_are_fp32_for_a_bf16_input():
    norm, reference = _norm(), _norm()
    executed = torch.tensor(MIXED, dtype=torch.bool)
    x = (torch.randn(N, C, SIDE, SIDE) * 3 + 5).bfloat16()
    y = norm(x, executed)
    expected = reference(x.float(), executed)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=2e-2, rtol=1e-2)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, reference.running_mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(norm.running_var, reference.running_var, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["per_step", "gated_per_step"])
def test_banks_with_equal_weights_equal_the_shared_norm_in_evaluation(name):
    torch.manual_seed(0)
    shared = BANKS["shared"](C, steps=3)
    shared.norms[0].load_state_dict(_norm().state_dict())
    bank = BANKS[name](C, steps=3)
    for norm in bank.norms:
        norm.load_state_dict(_norm().state_dict())
    x = torch.randn(N, C, SIDE, SIDE)
    executed = torch.tensor(MIXED, dtype=torch.bool)
    shared.eval(), bank.eval()
    for index in range(3):
        assert torch.equal(bank(x, Step(index, executed=executed)), shared(x, Step(index)))


@pytest.mark.parametrize(
    ("name", "updated"),
    [("shared", [0]), ("per_step", [1]), ("gated_per_step", [1])],
)
def test_a_step_updates_its_own_norm_only(name, updated):
    bank = BANKS[name](C, steps=3)
    bank(torch.randn(N, C, SIDE, SIDE) + 3, Step(1, executed=torch.ones(N, dtype=torch.bool)))
    moved = [i for i, norm in enumerate(bank.norms) if norm.running_mean.abs().max() > 0]
    assert moved == updated
    assert [int(norm.num_batches_tracked) for norm in bank.norms] == [
        int(i in updated) for i in range(len(bank.norms))
    ]


def test_only_the_gated_bank_looks_at_who_executed():
    x = torch.randn(N, C, SIDE, SIDE) * torch.arange(1, N + 1)[:, None, None, None]
    step = Step(0, executed=torch.tensor(MIXED, dtype=torch.bool))
    plain = F.batch_norm(x, None, None, training=True)
    for name in ("shared", "per_step", "gated_per_step"):
        bank = BANKS[name]
        same = torch.allclose(bank(C, steps=1)(x, step), plain, atol=1e-5)
        assert same == (name != "gated_per_step"), name


class Reads(TorchDispatchMode):
    """Notes the operations that need a value, or a size, which a GPU would be waited for."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or name.startswith(self.WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_on_the_host():
    norm = _norm()
    executed = torch.tensor(MIXED, dtype=torch.bool)
    x = torch.randn(N, C, SIDE, SIDE, requires_grad=True)
    with Reads() as control:
        _reference(norm, x, executed)
    assert control.found, "the plain reference must be seen to read"
    with Reads() as reads:
        norm(x, executed).square().sum().backward()
    assert reads.found == []


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("aot_eager", torch.float32),
        ("aot_eager", torch.bfloat16),
        pytest.param(
            "inductor",
            torch.float32,
            marks=pytest.mark.skipif(
                shutil.which("g++") is None, reason="inductor compiles C++ with g++"
            ),
        ),
    ],
)
def test_compiled_is_eager(backend, dtype):
    torch.compiler.reset()
    executed = torch.tensor(MIXED, dtype=torch.bool)
    results = []
    for compiled in (False, True):
        norm = _norm()
        call = torch.compile(norm, backend=backend, fullgraph=True) if compiled else norm
        torch.manual_seed(1)
        x = (torch.randn(N, C, SIDE, SIDE) * 2 + 3).to(dtype)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        for group in (executed, ~executed, torch.zeros_like(executed)):
            y = call(x, group)
        gradients = torch.autograd.grad(
            (y.float() * torch.randn(N, C, SIDE, SIDE)).sum(), (x, norm.weight, norm.bias)
        )
        results.append((y.detach(), *gradients, norm.running_mean, norm.running_var))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, wanted in zip(results[1], results[0], strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_the_reference_of_the_rounded_input(dtype):
    norm, reference = _norm(), _norm()
    executed = torch.tensor(MIXED, dtype=torch.bool)
    conv = torch.nn.Conv2d(C, C, 1)
    x = torch.randn(N, C, SIDE, SIDE)
    upstream = torch.randn(N, C, SIDE, SIDE)
    with torch.autocast("cpu", dtype):
        rounded = conv(x).detach().requires_grad_()
        y = norm(rounded, executed)
        assert y.dtype == rounded.dtype == dtype
        y.backward(upstream.to(dtype))
    exact = rounded.detach().float().requires_grad_()
    expected, mean, var = _reference(reference, exact, executed)
    expected.backward(upstream.to(dtype).float())
    torch.testing.assert_close(y, expected.to(dtype), atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(rounded.grad.float(), exact.grad, atol=2e-2, rtol=2e-2)
    for found, wanted in (
        (norm.running_mean, mean),
        (norm.running_var, var),
        (norm.weight.grad, reference.weight.grad),
        (norm.bias.grad, reference.bias.grad),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_no_norm_changes_nothing_and_has_nothing_to_train():
    bank = BANKS["none"](C, steps=3)
    x = torch.randn(N, C, SIDE, SIDE)
    assert torch.equal(bank(x, Step(2)), x)
    assert not [*bank.parameters(), *bank.buffers()]
