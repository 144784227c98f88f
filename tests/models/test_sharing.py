"""Relaxed sharing: what is tied, how it is pulled, and what consolidation makes of it."""

import math

import pytest
import torch

from pipeline.models import create_model, list_models
from pipeline.models.cost import measure
from pipeline.models.denoising import Denoiser
from pipeline.models.folding import fold
from pipeline.models.sharing import TiedSet, consolidate, surplus
from pipeline.models.stage import RecursiveCell

# Tables 1 to 3, to the last digit.
PARAMETERS = {
    "rs_18": 1_732_010,
    "rs_18_middle": 1_437_098,
    "rs_18_middle_minimal": 1_434_026,
    "rs_18_all": 179_114,
    "rs_18_all_minimal": 168_266,
    "rs_3": 363_146,
    "rs_3_all": 169_610,
    "rs_3_all_minimal": 168_266,
}
UNSHARED = {"rs_18_middle": "rs_18", "rs_18_all": "rs_18", "rs_3_all": "rs_3"}
# One of each family, with all that is peculiar to it: gates, paths, biases without norms.
FAMILIES = {
    "r_resnet16": {},
    "dr_resnet16": {},
    "r_mobilenet_v2": {},
    "dr_resnet35": {},
    "rc_r2_3": {},
    "rc_r2": {},
    "rc_r4": {"norm": "shared"},
    "rc_r3_2": {"norm": "none"},
    "rs_3_all": {},
    "rs_3_middle": {"death_rate": 0.5},
}


def build(name, sharing="relaxed", **options):
    torch.manual_seed(0)
    model = create_model(name, sharing=sharing, **options)
    if isinstance(model, Denoiser):
        torch.nn.init.normal_(model.last.weight)  # which begins as nothing
    return model


def images(model):
    torch.manual_seed(1)
    side = 64 if model.image_size == 224 else 16
    return torch.rand(4, model.channels, side, side)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_tables(name):
    assert measure(create_model(name)).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", UNSHARED)
def test_a_relaxed_network_counts_as_consolidated(name):
    model = build(name)
    cost = measure(model)
    assert cost.parameters == PARAMETERS[name]
    assert cost.parameters + cost.surplus == counted(model) == PARAMETERS[UNSHARED[name]]
    assert cost.nominal == measure(create_model(UNSHARED[name])).nominal


@pytest.mark.parametrize("name", list_models())
def test_every_recursive_network_can_be_relaxed_and_no_other(name):
    with torch.device("meta"):
        model = create_model(name)
        if not any(isinstance(m, RecursiveCell) and m.steps > 1 for m in model.modules()):
            with pytest.raises(ValueError, match=r"sharing|unknown option"):
                create_model(name, sharing="relaxed")
            return
        relaxed = create_model(name, sharing="relaxed")
    assert counted(relaxed) - surplus(relaxed.tied_sets()) == counted(model)
    shared = [key for key, role in model.roles().items() if role == "shared"]
    tied = [key for key, role in relaxed.roles().items() if role == "tied"]
    assert len(relaxed.tied_sets()) == len(shared)
    assert len(tied) == sum(len(found.members) for found in relaxed.tied_sets())
    assert "shared" not in relaxed.roles().values()
    assert consolidate(relaxed.state_dict(), relaxed).keys() == model.state_dict().keys()


def counted(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_relaxed_with_equal_weights_is_raw_in_training(name):
    raw, relaxed = (build(name, sharing, **FAMILIES[name]) for sharing in ("raw", "relaxed"))
    made_equal(relaxed)
    raw.load_state_dict(consolidate(relaxed.state_dict(), relaxed))
    found = []
    for model in (raw, relaxed):
        x = images(model)
        torch.manual_seed(2)
        output = model.train()(x)
        output.prediction.square().sum().backward()
        found.append(output.prediction)
    torch.testing.assert_close(*found)
    for tied in relaxed.tied_sets():
        place = next(iter(tied.members)).split(".convs.")[0]
        kind = next(iter(tied.members)).rpartition(".")[2]
        total = sum(member.grad for member in tied.members.values())
        wanted = raw.get_parameter(f"{place}.{kind}").grad
        torch.testing.assert_close(total, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_consolidated_network_evaluates_as_the_raw_one_with_those_weights(name):
    relaxed = build(name, **FAMILIES[name])
    relaxed.train()(images(relaxed))  # statistics of its own
    raw = build(name, "raw", **FAMILIES[name])
    raw.load_state_dict(consolidate(relaxed.state_dict(), relaxed))
    with torch.no_grad():
        apart = relaxed.eval()(images(relaxed)).prediction
        made_equal(relaxed)
        expected = relaxed(images(relaxed)).prediction
        found = raw.eval()(images(raw)).prediction
    assert torch.equal(found, expected)
    assert not torch.allclose(apart, expected)


@torch.no_grad()
def made_equal(model):
    for tied in model.tied_sets():
        mean = torch.stack(list(tied.members.values())).mean(0)
        for member in tied.members.values():
            member.copy_(mean)


def test_the_convolutions_of_a_cell_are_tied_apart_and_biases_and_norms_not_at_all():
    model = build("rs_3_all")
    sets = {tied.name: [*tied.members] for tied in model.tied_sets()}
    assert sets["stages.1.1.conv2"] == [
        f"stages.1.1.cell.conv2.convs.{step}.weight" for step in range(3)
    ]
    assert [*sets] == [f"stages.{place}.conv{n}" for place in ("0.0", "1.1", "2.1") for n in (1, 2)]
    roles = model.roles()
    assert roles["stages.1.1.cell.conv1.convs.0.bias"] == "rest"
    assert roles["stages.1.1.cell.norm1.norms.2.bias"] == "norm"
    assert roles["stages.1.0.cell.conv1.weight"] == "rest"
    raw = build("rs_3_all", "raw").roles()
    assert raw["stages.1.1.cell.conv1.weight"] == "shared"
    assert raw["stages.1.1.cell.conv1.biases"] == "rest"


def test_the_pull_by_hand():
    """The sum over the members of |w - mean|^2, and its gradient 2 (w - mean)."""
    members = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([3.0, 4.0])}
    for member in members.values():
        member.requires_grad_()
    spread = TiedSet("ab", members).spread()
    spread.backward()
    assert spread.item() == (1 + 4) * 2
    assert members["a"].grad.tolist() == [-2, -4]
    assert members["b"].grad.tolist() == [2, 4]


def test_the_angle_is_the_largest_between_two_members():
    vectors = {"a": [2.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.1]}
    tied = TiedSet("abc", {name: torch.tensor(values) for name, values in vectors.items()})
    assert float(tied.angle()) == pytest.approx(90)
    base = torch.randn(64)
    close = TiedSet("close", {"a": base, "b": 3 * base})
    assert float(close.angle()) < 0.05
    half = math.radians(0.5)
    turned = torch.tensor([math.cos(half), math.sin(half)])
    angle = TiedSet("turned", {"a": torch.tensor([2.0, 0.0]), "b": turned}).angle()
    assert float(angle) == pytest.approx(0.5, rel=1e-3)


def test_a_tie_between_different_shapes_is_refused():
    members = {"a": torch.zeros(32, 16, 3, 3), "b": torch.zeros(32, 32, 3, 3)}
    with pytest.raises(
        ValueError, match=r"different shapes.*a \(32, 16, 3, 3\).*leave out the cell"
    ):
        TiedSet("stages.1.conv1", members)
    with pytest.raises(ValueError, match="ties 1 tensors: give two or more"):
        TiedSet("alone", {"a": torch.zeros(1)})


def test_at_first_the_weights_are_nearly_orthogonal():
    """Sec. 3.1."""
    angles = [float(tied.angle()) for tied in build("rs_3_all").tied_sets()]
    assert min(angles) > 85


@pytest.mark.parametrize(
    ("name", "sharing", "message"),
    [
        ("r_resnet16", "loose", "sharing='loose' is unknown: choose one of raw, relaxed"),
        ("resnet20", "relaxed", "with resnet20: it uses every cell once"),
        ("rs_3", "relaxed", "with rs_3: it uses every cell once"),
        ("rc_r2_1", "relaxed", "with rc_r2_1: it uses every cell once"),
        ("rc_s2_2", "relaxed", "unknown option 'sharing' of rc_s2_2"),
    ],
)
def test_sharing_that_makes_no_sense_is_refused(name, sharing, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, sharing=sharing)


def test_relaxed_steps_start_from_the_static_cells_they_replace():
    static = build("resnet20", "raw")
    relaxed = build("r_resnet16")
    relaxed.load_state_dict(fold(static.state_dict(), relaxed, "mean"))
    for step in range(2):
        found = relaxed.get_parameter(f"stages.1.1.cell.conv1.convs.{step}.weight")
        assert torch.equal(found, static.get_parameter(f"stages.1.{1 + step}.cell.conv1.weight"))
