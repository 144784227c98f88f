"""Parameter groups by role."""

import pytest
import torch

from pipeline.config import ConfigError, Optimizer
from pipeline.models import create_model
from pipeline.training import optim


def test_groups_cover_every_parameter_once() -> None:
    model = create_model("dr_resnet16")
    groups = optim.groups(model, Optimizer())
    assert [group.role for group in groups] == ["shared", "gate", "norm", "rest"]
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(group.parameters for group in groups) == 179_198


def test_a_role_has_its_own_rate_and_decay() -> None:
    config = Optimizer.model_validate(
        {
            "lr": 0.2,
            "weight_decay": 0.01,
            "groups": {"shared": {"lr_factor": 0.5}, "norm": {"weight_decay": 0.0}},
        }
    )
    optimizer = optim.build(create_model("dr_resnet16"), config)
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        "shared": (0.1, 0.01),
        "gate": (0.2, 0.01),
        "norm": (0.2, 0.0),
        "rest": (0.2, 0.01),
    }


def test_a_role_that_the_network_lacks_is_refused() -> None:
    config = Optimizer.model_validate({"groups": {"gate": {"lr_factor": 2}}})
    with pytest.raises(ConfigError, match=r"groups.gate selects no parameter.*norm, rest"):
        optim.groups(create_model("resnet20"), config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_the_optimizer_is_the_one_asked_for(name: str, kind: type) -> None:
    own = {"momentum": 0.8} if name == "sgd" else {"betas": (0.5, 0.6)}
    config = Optimizer.model_validate({"name": name} | own)
    optimizer = optim.build(create_model("resnet20"), config)
    assert type(optimizer) is kind
    assert own.items() <= optimizer.param_groups[0].items()


def test_nesterov_reaches_the_optimizer() -> None:
    optimizer = optim.build(create_model("resnet20"), Optimizer(nesterov=True))
    assert optimizer.param_groups[0]["nesterov"] is True
