"""What the engine makes of a batch: accumulation, clipping, precision, and a state of its own."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import configure
from pipeline.distributed import World
from pipeline.models import Network, create_model
from pipeline.models.norms import BatchNorm
from pipeline.training.engine import Engine, LossScale
from tests.conftest import ROOT

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 10


def engine(
    lr: float = 1.0,
    factor: Any = lambda step: 1.0,
    *,
    model: str = "resnet20",
    **overrides: Any,
) -> Engine:
    """Over a static network with fixed statistics, so that a batch is the sum of its parts."""
    values = {
        "name": "engine",
        "model": model,
        "data": {"path": "unused"},
        "optimizer": {"lr": lr, "momentum": 0.0},
        "train": {"epochs": 1, "batch_size": 8},
    }
    settings = configure.build(values, [f"{key}={value}" for key, value in overrides.items()])
    world = World()
    world.start()
    torch.manual_seed(0)
    return Engine(fixed(create_model(model)), settings, world, factor)


def fixed(model: Network) -> Network:
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    return model


def step(engine: Engine, images: Tensor = IMAGES, labels: Tensor = LABELS) -> dict[str, Tensor]:
    """What one call of forward, backward and step changes."""
    before = {name: value.detach().clone() for name, value in engine.model.named_parameters()}
    engine.backward(F.cross_entropy(engine.forward(images).logits.float(), labels))
    engine.step()
    return {name: before[name] - value.detach() for name, value in engine.model.named_parameters()}


def norm(changes: dict[str, Tensor]) -> float:
    return float(torch.stack([change.square().sum() for change in changes.values()]).sum().sqrt())


def test_a_rank_does_not_load_mlflow_and_still_could() -> None:
    program = (
        "import sys; from tests.training.test_engine import engine; engine();"
        "print('mlflow' in sys.modules, 'deepspeed' in sys.modules); import mlflow"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "False True\n"


def test_a_single_rank_sums_its_gradients_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = engine()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: pytest.fail("summed"))
    assert norm(step(alone)) > 0


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, zero_stage: int) -> None:
    """To wait leaves the device idle while the next kernels are launched."""
    from deepspeed.accelerator import get_accelerator

    built = engine(lr=0.01, **{"train.zero_stage": zero_stage})
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: pytest.fail("waited"))
    for _ in range(4):  # DeepSpeed's timers begin after two
        assert norm(step(built)) > 0


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_accumulated_halves_make_the_step_of_the_whole(zero_stage: int) -> None:
    whole = step(engine(**{"train.zero_stage": zero_stage}))
    halves = engine(**{"train.accumulation": 2, "train.zero_stage": zero_stage})
    assert norm(step(halves, IMAGES[:4], LABELS[:4])) == 0
    assert not halves.updated
    second = step(halves, IMAGES[4:], LABELS[4:])
    assert halves.updated
    torch.testing.assert_close(second, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_gradient_is_clipped_to_its_global_norm(zero_stage: int) -> None:
    free = norm(step(engine(**{"train.zero_stage": zero_stage})))
    settings = {"train.zero_stage": zero_stage, "optimizer.clip_norm": free / 2}
    assert norm(step(engine(**settings))) == pytest.approx(free / 2, rel=1e-3)
    settings["optimizer.clip_norm"] = free * 2
    assert norm(step(engine(**settings))) == pytest.approx(free, rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_the_forward_pass_has_the_precision_and_the_weights_stay_fp32(
    precision: str, dtype: torch.dtype
) -> None:
    built = engine(**{"train.precision": precision})
    assert built.forward(IMAGES).logits.dtype == dtype
    assert {value.dtype for value in built.model.parameters()} == {torch.float32}
    assert (built.loss_scale() is not None) == (precision == "fp16")


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_loss_scale_that_overflows_is_lowered_and_nothing_is_updated(zero_stage: int) -> None:
    built = engine(**{"train.precision": "fp16", "train.zero_stage": zero_stage})
    scale = built.loss_scale()
    assert scale is not None
    before = {name: value.detach().clone() for name, value in built.model.named_parameters()}
    for _ in range(3):
        built.backward(F.cross_entropy(built.forward(IMAGES).logits.float(), LABELS) * 1e30)
        built.step()
    lowered = built.loss_scale()
    assert lowered is not None
    assert lowered == scale / 8
    assert all(torch.equal(before[name], value) for name, value in built.model.named_parameters())


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_scaled_step_is_the_step(zero_stage: int, clip_norm: float | None) -> None:
    clip = {"optimizer.clip_norm": clip_norm} if clip_norm else {}
    scaled = step(engine(**clip, **{"train.precision": "fp16", "train.zero_stage": zero_stage}))
    for name, gradient in by_hand(clip_norm).items():
        error = float((scaled[name] - gradient).norm() / gradient.norm())
        assert error < 2**-10, (name, error)  # gradients may travel in half precision


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_an_engine_is_not_scaled_because_another_is(zero_stage: int) -> None:
    settings = {"train.zero_stage": zero_stage, "optimizer.clip_norm": 0.5}
    engine(**settings, **{"train.precision": "fp16"})
    assert norm(step(engine(**settings))) == pytest.approx(0.5, rel=1e-3)


def by_hand(clip_norm: float | None) -> dict[str, Tensor]:
    """The unscaled, clipped gradients of one step in half precision."""
    torch.manual_seed(0)
    model = fixed(create_model("resnet20"))
    with torch.autocast("cpu", torch.float16):
        logits = model(IMAGES).logits
    (F.cross_entropy(logits.float(), LABELS) * 2**16).backward()
    for value in model.parameters():
        assert value.grad is not None
        value.grad /= 2**16
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def test_the_loss_scale_follows_gradscaler() -> None:
    ours = LossScale()
    theirs = torch.amp.GradScaler("cpu")
    theirs.scale(torch.zeros(1))
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for number in range(4100):
        overflow = number in (5, 6, 2500)
        weight.grad = torch.full((1,), float("inf") if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow)
        assert ours.value == theirs.get_scale(), number


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("stages", [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_a_state_goes_on_in_another_engine_of_any_stage(name: str, stages: tuple[int, int]) -> None:
    # Momentum is SGD's alone; the others have it at its default.
    settings = {"optimizer.name": name, "optimizer.weight_decay": 0.01, "optimizer.momentum": 0.9}

    def build(stage: int) -> Engine:
        factor = {0: 1.0, 1: 0.5, 2: 0.1}
        return engine(lr=0.01, factor=factor.__getitem__, **settings, **{"train.zero_stage": stage})

    first = build(stages[0])
    step(first)
    state, model = first.state_dict(), {k: v.clone() for k, v in first.model.state_dict().items()}
    second = build(stages[1])
    second.model.load_state_dict(model)
    second.load_state_dict(state)
    assert second.learning_rates() == first.learning_rates() == {"norm": 0.005, "rest": 0.005}
    torch.testing.assert_close(step(second), step(first), rtol=1e-6, atol=1e-8)


def test_a_state_of_other_parameters_is_refused() -> None:
    built = engine(**{"optimizer.momentum": 0.9})
    step(built)
    state = built.state_dict()
    state["moments"]["momentum_buffer"].pop("stem.weight")
    with pytest.raises(ValueError, match=r"momentum_buffer.*stem\.weight"):
        built.load_state_dict(state)
