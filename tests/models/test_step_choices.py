"""RC's norms, steps as a choice, and what of a network trains with which number of steps."""

import pytest
import torch
import torch.nn.functional as F
from recurrent import ADJUSTABLE, IMAGES, SIDE, build, logits

from pipeline.models import create_model, list_models
from pipeline.models.cost import measure
from pipeline.models.norms import BatchNorm, NoNorm, PerPathNorm, PerStepNorm, SharedNorm, Step
from pipeline.models.routers import Gate
from pipeline.models.stage import RecursiveCell

# One of each kind; the others differ in their numbers of steps alone.
KINDS = ["rc_r2_3", "rc_s2_3", "rc_s4_2", *ADJUSTABLE]


# -- norms -----------------------------------------------------------------------------------------


def same_norms(model, like):
    """Give every norm the values of the norm `like` (of the same channels) has."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            place = name.rpartition(".")[0]
            module.load_state_dict(like.get_submodule(f"{place}.0").state_dict())


@pytest.mark.parametrize(
    ("name", "steps"), [("rc_r2_3", None), ("rc_r2", 2), ("rc_r2", 3), ("rc_r4", 2)]
)
def test_equal_norms_equal_the_shared_norm(name, steps):
    shared = build(name, norm="shared")
    own = create_model(name)
    own.load_state_dict(shared.state_dict(), strict=False)
    same_norms(own, shared)
    assert torch.equal(logits(own, steps), logits(shared, steps))
    assert not torch.allclose(logits(build(name), steps), logits(shared, steps))


@pytest.mark.parametrize("name", ["rc_r2", "rc_r4"])
def test_per_path_norms_that_ignore_the_path_are_per_step_norms(name):
    """Sec. 4.1: the straightforward way, with n groups for n steps."""
    plain, paths = build(name, norm="per_step"), create_model(name)
    paths.load_state_dict(plain.state_dict(), strict=False)
    for place, bank in paths.named_modules():
        if isinstance(bank, PerPathNorm):
            for (_, index), number in bank._number.items():
                source = plain.get_submodule(f"{place}.norms.{index}")
                bank.norms[number].load_state_dict(source.state_dict())
    for steps in paths.step_choices:
        assert torch.equal(logits(paths, steps), logits(plain, steps))


BANK = {"none": NoNorm, "shared": SharedNorm, "per_step": PerStepNorm, "per_path": PerPathNorm}


@pytest.mark.parametrize("name", sorted({*list_models("rc_*")} - {*list_models("rc_?3_*")}))
@pytest.mark.parametrize("kind", BANK)
def test_every_norm_builds_or_is_refused(name, kind):
    recurrent = name.startswith("rc_r")
    if not recurrent:
        with pytest.raises(ValueError, match=f"unknown option 'norm' of {name}"):
            create_model(name, norm=kind)
    elif kind == "per_path" and name not in ADJUSTABLE:
        with pytest.raises(ValueError, match=r"'per_path' with a fixed number.*use norm='per_st"):
            create_model(name, norm=kind)
    else:
        cells = [m for m in create_model(name, norm=kind).modules() if isinstance(m, RecursiveCell)]
        assert {type(cell.cell.norm1) for cell in cells} == {BANK[kind]}
        if kind == "none":
            assert not any(isinstance(m, BatchNorm) for cell in cells for m in cell.modules())


def test_a_path_has_norms_of_its_own():
    bank = PerPathNorm(3, paths={2: 2, 3: 3})
    assert len(bank.norms) == 5
    x = torch.randn(4, 3, 2, 2)
    for index, upstream in ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3)):
        before = [int(norm.num_batches_tracked) for norm in bank.norms]
        bank(x, Step(index, upstream))
        after = [int(norm.num_batches_tracked) for norm in bank.norms]
        assert sum(after) - sum(before) == 1
    assert after == [1] * 5
    with pytest.raises(KeyError):
        bank(x, Step(2, 2))


# -- steps as a choice -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_models())
def test_a_number_that_was_not_built_for_is_refused_with_the_valid_ones(name):
    model = create_model(name)
    message = r"always takes the same steps: leave"
    if name in ADJUSTABLE:
        message = f"built for {', '.join(map(str, ADJUSTABLE[name]))} steps: give one"
    for steps in (0, 5, -1):
        with pytest.raises(ValueError, match=rf"^steps={steps}: .*{message}") as caught:
            model(torch.zeros(1, model.channels, SIDE, SIDE), steps)
        assert "\n" not in str(caught.value)
    if name not in ADJUSTABLE:
        assert model.step_choices == ()
        with pytest.raises(ValueError, match=message):
            measure(model, steps=3)


@pytest.mark.parametrize("steps", [[2], [], 3, [2, 2], [0, 1], [1.5, 2], ["2", "3"], [True, 2]])
def test_what_is_no_choice_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=r"steps=.* is no choice of steps: give at least two"):
        create_model("rc_r2", steps=steps)


def test_the_choices_are_an_option():
    model = create_model("rc_r2", steps=[4, 1])
    assert model.step_choices == (1, 4)
    assert [len(stage[0].cell.norm1.norms) for stage in model.stages] == [4, 5]


@pytest.mark.parametrize("name", KINDS)
def test_routes_say_which_steps_were_taken(name):
    model = create_model(name)
    cells = measure(model).cells
    for steps in model.step_choices or (None,):
        routes = model(IMAGES, steps).routes
        assert [route.cell for route in routes] == list(cells)
        rates = {route.cell: route.executed.float().mean(0).tolist() for route in routes}
        cost = measure(model, steps=steps)
        assert cost.executed(rates) == cost.nominal
        for number, route in enumerate(routes):
            taken = steps or cells[route.cell].steps
            if name == "rc_early_exit":
                taken = 3 if number < steps else 0
            assert rates[route.cell] == [1.0] * taken + [0.0] * (len(rates[route.cell]) - taken)
            assert torch.equal(route.weights > 0, route.executed)


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_has_its_role_and_a_gradient(name):
    model = create_model(name)
    roles = model.roles()
    recursive = [m for m in model.modules() if isinstance(m, RecursiveCell) and m.steps > 1]
    shared = {id(p) for cell in recursive for m in cell.modules()
              if isinstance(m, torch.nn.Conv2d) for p in m.parameters()}  # fmt: skip
    for key, parameter in model.named_parameters():
        assert (roles[key] == "shared") == (id(parameter) in shared), key
    losses = [
        F.cross_entropy(model(IMAGES, steps).logits, torch.arange(4))
        for steps in model.step_choices or (None,)
    ]
    sum(losses).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


def test_only_the_norms_of_other_paths_are_without_gradient():
    model = create_model("rc_r2")
    F.cross_entropy(model(IMAGES, 3).logits, torch.arange(4)).backward()
    without = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    rows = (0, 1, 5, 6, 7, 8)  # of 2 and of 4 steps
    assert without == {
        *(f"stages.0.0.cell.norm{i}.norms.3.{p}" for i in (1, 2) for p in ("weight", "bias")),
        *(
            f"stages.1.0.cell.norm{i}.norms.{n}.{p}"
            for i in (1, 2)
            for n in rows
            for p in ("weight", "bias")
        ),
    }


def test_the_gradient_of_shared_weights_is_the_sum_over_the_steps():
    """RC Eq. 5: R_2 with n equal cells in S_2 has the sum of their gradients."""
    recurrent, static = build("rc_r2_3").eval(), build("rc_s2_3").eval()
    for stage in range(2):
        source = recurrent.stages[stage][0].cell
        for index in range(3):
            target = static.stages[stage][index].cell
            for part in ("conv1", "conv2"):
                getattr(target, part).load_state_dict(getattr(source, part).state_dict())
            for part in ("norm1", "norm2"):
                norms = getattr(source, part).norms
                getattr(target, part).norms[0].load_state_dict(norms[index].state_dict())
    static.stem.load_state_dict(recurrent.stem.state_dict())
    static.classifier.load_state_dict(recurrent.classifier.state_dict())
    labels = torch.arange(4)
    found, wanted = recurrent(IMAGES).logits, static(IMAGES).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    F.cross_entropy(found, labels).backward()
    F.cross_entropy(wanted, labels).backward()
    for stage in range(2):
        gradient = recurrent.stages[stage][0].cell.conv1.weight.grad
        parts = [static.stages[stage][index].cell.conv1.weight.grad for index in range(3)]
        torch.testing.assert_close(gradient, sum(parts), rtol=1e-3, atol=1e-5)


def test_pooling_in_the_middle_needs_a_common_middle():
    cell = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"pool_midway.*no common middle: use the fixed router"):
        RecursiveCell("a", cell, steps=2, router=Gate(4, target=0.7), pool_midway=True)
