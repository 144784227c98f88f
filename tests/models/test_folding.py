"""Static weights in a recursive network: which cells become which."""

import pytest
import torch

from pipeline.models import create_model, list_models
from pipeline.models.folding import fold
from pipeline.models.norms import BANKS, Step
from pipeline.models.stage import RecursiveCell

STATIC = {
    **dict.fromkeys(("resnet16",), "resnet20"),
    **dict.fromkeys(("resnet32", "resnet40"), "resnet56"),
    **dict.fromkeys(("resnet54", "resnet58", "resnet66", "resnet74"), "resnet110"),
    **dict.fromkeys(("resnet35",), "resnet50"),
    **dict.fromkeys(("resnet44", "resnet47", "resnet53", "resnet65"), "resnet101"),
    "mobilenet_v2": "mobilenet_v2",
}


def _saved(name, seed=1):
    """The state of a static network in which every number is another."""
    torch.manual_seed(seed)
    model = create_model(name)
    state = model.state_dict()
    saved = {k: torch.randn_like(v) if v.is_floating_point() else v + 7 for k, v in state.items()}
    return {k: v.abs() if k.endswith("running_var") else v for k, v in saved.items()}


def test_mean_and_first_of_the_cells_that_are_replaced():
    saved = _saved("resnet56")
    model = create_model("dr_resnet32")  # stages 2 and 3: one plain cell, two cells of four steps
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for how in ("mean", "first"):
        found = fold(saved, model, how)
        assert found.keys() == before.keys()
        for ours, theirs in (("0.cell.conv1.weight", [0]), ("1.cell.conv2.weight", [1, 2, 3, 4])):
            cells = [saved[f"stages.1.{i}.{ours[2:]}"] for i in theirs]
            wanted = cells[0] if how == "first" else torch.stack(cells).mean(0)
            torch.testing.assert_close(found[f"stages.1.{ours}"], wanted)
        # The eight cells after the first are two runs of four; the norms of all steps start alike.
        for step in range(4):
            for kind in ("weight", "bias", "running_mean", "running_var"):
                cells = [saved[f"stages.2.{i}.cell.norm2.norms.0.{kind}"] for i in (5, 6, 7, 8)]
                wanted = cells[0] if how == "first" else torch.stack(cells).mean(0)
                name = f"stages.2.2.cell.norm2.norms.{step}.{kind}"
                torch.testing.assert_close(found[name], wanted)
            tracked = found[f"stages.2.2.cell.norm2.norms.{step}.num_batches_tracked"]
            assert (tracked.dtype, int(tracked)) == (torch.int64, 7)
        for name, value in found.items():
            if ".router." in name:
                assert torch.equal(value, before[name]), name
            elif name.startswith(("stem", "norm", "stages.0", "classifier")):
                assert torch.equal(value, saved[name]), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "folding must leave the model alone"


def test_the_first_cells_weights_make_the_first_step_that_cell():
    saved = _saved("resnet20")
    static, model = create_model("resnet20"), create_model("r_resnet16")
    static.load_state_dict(saved)
    model.load_state_dict(fold(saved, model, "first"))
    static.eval(), model.eval()
    images = torch.randn(2, 3, 32, 32)
    for name in ("stem", "norm"):
        torch.testing.assert_close(
            model.get_submodule(name).state_dict(), static.get_submodule(name).state_dict()
        )
    x = static.stages[0](static.norm(static.stem(images)).relu())[0]
    first = model.stages[1][1].cell
    ours = first(model.stages[1][0](x)[0], Step(0))
    theirs = static.stages[1][1](static.stages[1][0](x)[0])[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", STATIC)
def test_every_recursive_network_folds_from_its_counterpart(name):
    with torch.device("meta"):
        saved = create_model(STATIC[name]).state_dict()
        model = create_model(f"dr_{name}")
        assert fold(saved, model, "mean").keys() == model.state_dict().keys()
    assert {n.removeprefix("r_") for n in list_models("r_*")} == STATIC.keys()


def test_norms_are_not_thrown_away():
    with pytest.raises(ValueError, match=r"stages.1.1.cell.norm1.norms.0.bias \(unknown\)"):
        fold(_saved("resnet20"), create_model("r_resnet16", norm="none"), "mean")


@pytest.mark.parametrize("norm", sorted(BANKS.keys() - {"none"}))
def test_every_bank_can_be_folded_into(norm):
    saved = _saved("resnet20")
    model = create_model("dr_resnet16", norm=norm)
    model.load_state_dict(fold(saved, model, "mean"))
    cells = [m for m in model.modules() if isinstance(m, RecursiveCell) and m.steps > 1]
    for cell, stage in zip(cells, (1, 2), strict=True):
        wanted = torch.stack([saved[f"stages.{stage}.{i}.cell.conv1.weight"] for i in (1, 2)])
        torch.testing.assert_close(cell.cell.conv1.weight.data, wanted.mean(0))


def test_a_static_network_takes_its_own_weights():
    saved = _saved("resnet20")
    found = fold(saved, create_model("resnet20"), "mean")
    assert all(torch.equal(found[name], value) for name, value in saved.items())


@pytest.mark.parametrize("name", ["dr_resnet16", "r_resnet32", "dr_mobilenet_v2", "rc_r4"])
def test_a_network_takes_its_own_weights_as_they_are(name):
    saved = _saved(name)
    found = fold(saved, create_model(name), "mean")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key]) for key in saved)


def test_gates_can_be_added_to_a_recursive_network():
    saved = _saved("r_resnet16")
    model = create_model("dr_resnet16")
    found = fold(saved, model, "mean")
    for key, value in model.state_dict().items():
        assert torch.equal(found[key], value if ".router." in key else saved[key]), key


def test_only_fewer_cells_than_a_cell_has_steps_may_be_left_over():
    """Sec. 4.1: there are floor((cells - 1) / steps) recursive cells."""
    saved = _saved("resnet56")  # nine cells a stage: one, and two runs of four
    model = create_model("dr_resnet32")
    last = {name: value for name, value in saved.items() if name.startswith("stages.1.8.")}

    def longer(cells):
        further = {
            name.replace(".8.", f".{number}.", 1): value
            for number in range(9, cells)
            for name, value in last.items()
        }
        return saved | further

    assert fold(longer(12), model, "mean").keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=r"stages\.1\.\d+\.cell\.\S+ \(unknown\)"):
        fold(longer(13), model, "mean")


@pytest.mark.parametrize(
    ("static", "name", "options", "named"),
    [
        # Nine cells of the first stage would be left over.
        ("resnet110", "dr_resnet32", {}, r"stages.0.10.cell.conv1.weight \(unknown\)"),
        ("resnet20", "dr_resnet32", {}, r"stages.0.3.cell.conv1.weight \(missing\)"),
        (
            "resnet20",
            "dr_resnet16",
            {"num_classes": 4},
            r"classifier.bias \(10,\) instead of \(4,\), classifier.weight \(10, 64\) instead",
        ),
        ("aig_resnet20", "dr_resnet16", {}, r"stages.0.0.router.hidden.bias \(unknown\).* more$"),
        ("dr_resnet16", "r_resnet16", {}, r"stages.1.1.cell.norm1.norms.1.bias \(unknown\)"),
    ],
)
def test_other_weights_are_refused_by_name(static, name, options, named):
    refusal = f"not the weights of this network or of its static form: {named}"
    with pytest.raises(ValueError, match=refusal):
        fold(_saved(static), create_model(name, **options), "mean")
