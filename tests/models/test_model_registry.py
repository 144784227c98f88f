"""What must hold for every network of the registry."""

import re

import pytest
import torch
import torch.nn.functional as F

from pipeline.models import create_model, list_models
from pipeline.models.norms import BANKS, BatchNorm
from pipeline.models.recurrent_layer import RecurrentLayer
from pipeline.models.reset import MODELS as RESET
from pipeline.models.routers import Gate, RandomDrop, Router
from pipeline.models.stage import RecursiveCell

SMALL = ["resnet20", "r_resnet16", "dr_resnet16", "sd_resnet20", "aig_resnet20"]
POOLS = ["resnet_2_1_1", "reset_3x2"]
LARGE = ["resnet50", "dr_resnet35", "aig_resnet50", "sd_resnet50", "dr_mobilenet_v2"]
GATED = ("dr_", "aig_")
REFUSED = {
    **{("static", norm): "uses every cell once" for norm in BANKS},
    ("fixed", "gated_per_step"): "needs a router that skips samples",
}


def _model(name, **options):
    torch.manual_seed(0)
    return create_model(name, **options)


def _router(name):
    return {"d": "gate", "r_": "fixed"}.get(name[:2].removesuffix("r"), "static")


def test_names():
    assert list_models("dr_resnet??") == [
        *("dr_resnet16", "dr_resnet32", "dr_resnet35", "dr_resnet40", "dr_resnet44", "dr_resnet47"),
        *("dr_resnet53", "dr_resnet54", "dr_resnet58", "dr_resnet65", "dr_resnet66", "dr_resnet74"),
    ]
    static = ["resnet101", "resnet110", "resnet20", "resnet50", "resnet56"]
    assert [name for name in list_models("resnet*") if name not in RESET] == static
    assert list_models("*mobilenet*") == ["dr_mobilenet_v2", "mobilenet_v2", "r_mobilenet_v2"]
    assert [name.removeprefix("r_") for name in list_models("r_*")] == [
        name.removeprefix("dr_") for name in list_models("dr_*")
    ]
    for prefix in ("sd_", "aig_"):
        assert list_models(f"{prefix}*") == [prefix + name for name in static]
    assert list_models("vgg*") == []
    assert list_models("rc_*3_*") == [f"rc_{kind}3_{n}" for kind in "rs" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "name",
    [n for n in list_models() if not n.startswith(("rc_", "rs_", "rcnn")) and n not in RESET],
)
def test_every_norm_with_every_router_builds_or_is_refused(name):
    for norm in BANKS:
        reason = REFUSED.get((_router(name), norm))
        if reason is not None:
            with pytest.raises(ValueError, match=rf"norm='{norm}'.*{reason}"):
                create_model(name, norm=norm)
            continue
        with torch.device("meta"):
            model = create_model(name, norm=norm)
            if _router(name) != "static":
                assert create_model(name, norm=norm, sharing="relaxed").tied_sets()
        for cell in model.modules():
            if isinstance(cell, RecursiveCell) and not cell.is_static:
                assert type(cell.cell.norm1) is type(cell.cell.norm2) is BANKS[norm]
                assert len(cell.cell.norm1.norms) == {"shared": 1, "none": 0}.get(norm, cell.steps)
                assert isinstance(cell.router, Gate) == (_router(name) == "gate")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dr_resnt16", {}, r"unknown model 'dr_resnt16': did you mean 'dr_resnet16'\?"),
        ("xyz", {}, r"unknown model 'xyz': choose one of aig_resnet101, .*sd_resnet56$"),
        ("resnet20", {"num_clases": 3}, r"'num_clases' of resnet20: did you mean 'num_classes'\?"),
        ("resnet20", {"q": 3}, "choose one of death_rate, norm, num_classes, sharing, sync_norm"),
        ("resnet20", {"num_classes": 0}, "num_classes=0 is not a positive integer"),
        ("resnet20", {"num_classes": "10"}, "num_classes='10' is not a positive integer"),
        ("resnet20", {"sync_norm": "no"}, "sync_norm='no' is neither true nor false"),
        ("resnet20", {"target_rate": 0.5}, "target_rate=0.5 with resnet20: it has no gates"),
        ("r_resnet16", {"target_rate": 0.5}, "target_rate=0.5 with r_resnet16: it has no gates"),
        ("dr_resnet16", {"target_rate": 1.5}, r"target_rate=1.5 is not in \(0, 1\]"),
        ("dr_resnet16", {"target_rate": 0}, r"target_rate=0 is not in \(0, 1\]"),
        ("dr_resnet16", {"norm": "lvbn"}, "norm='lvbn' is unknown: choose one of shared, per_step"),
        ("dr_resnet16", {"norm": []}, r"norm=\[\] is unknown"),
        ("sd_resnet20", {"target_rate": 0.5}, "target_rate=0.5 with sd_resnet20: it has no gates"),
        ("aig_resnet20", {"target_rate": 2}, r"target_rate=2 is not in \(0, 1\]"),
        ("mobilenet_v2", {"norm": "shared"}, "norm='shared' with mobilenet_v2: it uses every cell"),
        ("resnet50", {"stride_on": "5x5"}, "stride_on='5x5' is unknown: choose one of 1x1, 3x3"),
        ("mobilenet_v2", {"stride_on": "1x1"}, "unknown option 'stride_on' of mobilenet_v2"),
    ],
)
def test_bad_options_are_refused_on_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_model(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SMALL)
def test_routes_name_the_recursive_cells_and_carry_the_target(name):
    model = _model(name, **({"target_rate": 0.6} if name.startswith(GATED) else {}))
    recursive = {
        module_name: module
        for module_name, module in model.named_modules()
        if isinstance(module, RecursiveCell) and not module.is_static
    }
    for training in (True, False):
        logits, routes = model.train(training)(torch.randn(4, 3, 32, 32))
        assert logits.shape == (4, 10)
        assert [route.cell for route in routes] == list(recursive)
        for route in routes:
            assert route.weights.shape == (4, recursive[route.cell].steps)
            assert torch.equal(route.weights > 0, route.executed)
            assert route.executed.dtype == torch.bool
            assert route.target == (0.6 if name.startswith(GATED) else None)
            assert route.weights.requires_grad == (training and name.startswith(GATED))


@pytest.mark.parametrize("name", list_models())
def test_every_parameter_has_one_role(name):
    with torch.device("meta"):
        model = create_model(name)
    roles = model.roles()
    assert list(roles) == [parameter for parameter, _ in model.named_parameters()]
    counted = dict.fromkeys(("shared", "tied", "gate", "norm", "rest"), 0)
    for parameter, tensor in model.named_parameters():
        counted[roles[parameter]] += tensor.numel()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert counted["norm"] == sum(2 * norm.num_features for norm in norms)
    cells = [m for m in model.modules() if isinstance(m, RecursiveCell)]
    recursive = [cell for cell in cells if cell.steps > 1]
    used = [*recursive, *(unit for pool in model.pools for unit in pool.units)]
    convolutions = [m for c in used for m in c.modules() if isinstance(m, torch.nn.Conv2d)]
    layers = [m for m in model.modules() if isinstance(m, RecurrentLayer)]
    assert counted["shared"] == sum(m.weight.numel() for m in convolutions) + sum(
        parameter.numel() for layer in layers for parameter in layer.parameters()
    )
    gates = [m for m in model.modules() if isinstance(m, Gate)]
    gated = {"dr_": recursive, "aig_": cells}.get(name.partition("_")[0] + "_", [])
    assert len(gates) == len(gated)
    linear = [m for gate in gates for m in gate.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == len(gates) * (1 if "mobilenet" in name else 2)
    chosen = sum(p.numel() for pool in model.pools for p in pool.controller.parameters())
    assert counted["gate"] == chosen + sum(m.weight.numel() + m.out_features for m in linear)


def test_roles_of_the_smallest_dynamic_network():
    model = _model("dr_resnet16")
    roles = model.roles()
    assert roles["stages.1.1.cell.conv1.weight"] == "shared"
    assert roles["stages.1.1.cell.norm1.norms.1.weight"] == "norm"
    assert roles["stages.1.1.router.scores.bias"] == "gate"
    assert roles["stages.1.0.cell.conv1.weight"] == "rest"
    assert roles["norm.weight"] == "norm"
    assert roles["classifier.weight"] == "rest"


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet50", "mobilenet_v2", "rc_r2_2", "rc_r4", "rs_3", "reset38"]
)
def test_convolutions_start_with_the_variance_of_he(name):
    """He et al. 2015, Eq. 14: by the number of filters, of grouped ones too, as torch counts."""
    for module in _model(name).modules():
        if isinstance(module, torch.nn.Conv2d):
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            deviation = 1 / (2 * module.weight.numel()) ** 0.5  # of the estimate, relative
            tolerance = min(0.1, 4 * deviation)
            assert module.weight.std().item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", SMALL + POOLS)
def test_state_survives_a_round_trip(name, tmp_path):
    model = _model(name)
    model(torch.randn(4, 3, 32, 32))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = create_model(name)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model.eval()(images).logits, other.eval()(images).logits)


@pytest.mark.parametrize("name", SMALL + POOLS)
def test_training_uses_every_parameter_and_is_repeatable(name):
    first, second = _model(name), _model(name)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for module in (*first.modules(), *second.modules()):
        if isinstance(module, RandomDrop):
            module.survival = (1.0,) * len(module.survival)
    for model in (first, second):
        torch.manual_seed(1)
        logits, routes = model(images)
        loss = F.cross_entropy(logits, labels) + sum(route.weights.mean() for route in routes)
        loss.backward()
    for (key, found), wanted in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad), key
        # Under a fixed rate the two scores of a gate can cancel, but never the whole tensor.
        assert found.grad.abs().max() > 0, key


@pytest.mark.parametrize(
    ("name", "dtype"),
    # Convolutions in fp16 are slow on CPUs: one network has all that could go wrong.
    [*((name, torch.bfloat16) for name in SMALL + POOLS), ("dr_resnet16", torch.float16)],
)
def test_autocast_trains_and_keeps_the_statistics_fp32(name, dtype):
    model, reference = _model(name), _model(name)
    for module in (*model.modules(), *reference.modules()):
        if isinstance(module, Router):
            module.eval()  # decisions without noise are the same at every precision
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    with torch.autocast("cpu", dtype):
        logits, routes = model(images)
    expected = reference(images)
    torch.testing.assert_close(logits.float(), expected.logits, atol=0.1, rtol=0.1)
    for route, wanted in zip(routes, expected.routes, strict=True):
        # Decisions are the same at every precision; soft weights follow the features.
        tolerance = 0 if route.policy is None else 1e-2
        torch.testing.assert_close(route.weights, wanted.weights, atol=tolerance, rtol=0)
    F.cross_entropy(logits.float(), labels).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for key, buffer in model.named_buffers():
        assert buffer.dtype == (torch.int64 if "tracked" in key else torch.float32)
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert torch.isfinite(model.eval()(images).logits).all()


@pytest.mark.parametrize("name", LARGE)
def test_networks_for_large_images_train_and_evaluate(name):
    model = _model(name, num_classes=5)
    images = torch.randn(4, 3, 64, 64)
    logits, routes = model(images)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert logits.shape == (4, 5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(routes) == (0 if name.startswith(("res", "sd_")) else len(model.eval()(images)[1]))
    assert model.image_size == 224


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_gives_the_same(name):
    model = _model(name)
    images = torch.randn(8, 3, 32, 32)
    torch.manual_seed(1)
    expected = model(images).logits
    model = _model(name).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    found = model(images.to(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*SMALL, "dr_resnet35", "aig_resnet50", "dr_mobilenet_v2"])
def test_gradients_stay_channels_last(name):
    """One that does not makes all that it is added to, and the convolutions before it, slow."""
    model = _model(name)
    layouts = {}

    def watch(cell):
        def on_output(module, inputs, output):
            output[0].register_hook(
                lambda g: layouts.update({cell: g.is_contiguous(memory_format=torch.channels_last)})
            )

        return on_output

    cells = {n: m for n, m in model.named_modules() if isinstance(m, RecursiveCell)}
    for cell, module in cells.items():
        module.register_forward_hook(watch(cell))
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits, routes = model(images)
    (logits.float().square().sum() + sum(route.weights.mean() for route in routes)).backward()
    assert layouts == dict.fromkeys(reversed(cells), True)


def test_every_norm_of_a_network_is_found_by_its_type():
    model = _model("dr_resnet16", sync_norm=True)
    owners = {name.rpartition(".")[0] for name, _ in model.named_buffers()}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    assert owners == set(norms)
    assert all(norm.sync for norm in norms.values())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dr_resnet17", ": did you mean 'dr_resnet16'?"),
        ("resnet21", ": did you mean 'resnet20'?"),
        ("dr_resent16", ": did you mean 'dr_resnet16'?"),
        ("vgg", ": choose one of aig_resnet101, "),
    ],
)
def test_an_unknown_model_is_answered_with_what_is_near(name, hint):
    with pytest.raises(ValueError, match=f"unknown model '{name}'{re.escape(hint)}"):
        create_model(name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_never_waits_for_the_gpu(dtype):
    model = _model("dr_resnet16").cuda()
    images, labels = torch.randn(16, 3, 32, 32).cuda(), torch.arange(16).cuda() % 10
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images).logits, labels)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_the_gpu_gives_what_the_cpu_gives(name):
    model = _model(name).eval()
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        found = model.cuda()(images.cuda())
    torch.testing.assert_close(found.logits.cpu(), expected.logits, atol=1e-2, rtol=1e-2)
    for a, b in zip(found.routes, expected.routes, strict=True):
        assert torch.equal(a.executed.cpu(), b.executed)
