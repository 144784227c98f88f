"""torchvision's weights for the same networks of this project.

The networks compute the same function, so that only names are translated. ResNets must have their
stride where torchvision has it, on the 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.models import mobilenet
from pipeline.models.cells import Bottleneck
from pipeline.models.network import Network

RESNET_STAGES = (3, 4, 23, 3)  # cells of ResNet-101; ResNet-50 has some of them


def translate(saved: Mapping[str, Tensor], model: Network) -> dict[str, Tensor]:
    """torchvision's state of ResNet-50, ResNet-101 or MobileNetV2 under this project's names.

    Args:
        saved: as `torchvision.models.resnet50().state_dict()` has it.
        model: what the weights are for, a network of the same family.

    Raises:
        ValueError: a family that torchvision's weights are not for, a ResNet with its stride
            elsewhere, or a name that torchvision's network of this family has not.
    """
    modules = _modules(model)
    translated = {}
    for name, tensor in saved.items():
        module, _, parameter = name.rpartition(".")
        if module not in modules:
            raise ValueError(
                f"{name!r} is no name in torchvision's counterpart of this "
                f"{type(model).__name__}: give the state_dict of that network"
            )
        translated[f"{modules[module]}.{parameter}"] = tensor
    return translated


def _modules(model: Network) -> dict[str, str]:
    """Module names, torchvision's -> ours."""
    if isinstance(model, mobilenet.MobileNetV2):
        return _mobilenet_v2()
    bottlenecks = [module for module in model.modules() if isinstance(module, Bottleneck)]
    if not bottlenecks:
        raise ValueError(
            f"torchvision has no counterpart of this {type(model).__name__}: its weights are for "
            "ResNets on ImageNet and for MobileNetV2"
        )
    if bottlenecks[0].stride_on != "3x3":
        raise ValueError(
            f"stride_on={bottlenecks[0].stride_on!r}: torchvision's ResNets have their stride on "
            "the 3x3 convolution; build this network with stride_on='3x3'"
        )
    return _resnet()


def _resnet() -> dict[str, str]:
    names = {"conv1": "stem", "bn1": "norm", "fc": "classifier"}
    for s, cells in enumerate(RESNET_STAGES):
        for c in range(cells):
            theirs, ours = f"layer{s + 1}.{c}", f"stages.{s}.{c}.cell"
            for n in (1, 2, 3):
                names[f"{theirs}.conv{n}"] = f"{ours}.conv{n}"
                names[f"{theirs}.bn{n}"] = f"{ours}.norm{n}.norms.0"
            names[f"{theirs}.downsample.0"] = f"{ours}.projection.conv"
            names[f"{theirs}.downsample.1"] = f"{ours}.projection.norm.norms.0"
    return names


def _mobilenet_v2() -> dict[str, str]:
    names = {"features.0.0": "stem", "features.0.1": "norm", "classifier.1": "classifier"}
    number = 0
    for s, (group, cells) in enumerate(zip(mobilenet.GROUPS, mobilenet.STATIC, strict=True)):
        for c in range(len(cells)):
            number += 1
            theirs, ours = f"features.{number}.conv", f"stages.{s}.{c}.cell"
            # Each convolution with its norm, the last two without a block of their own.
            pairs = [("0.0", "0.1"), ("1.0", "1.1"), ("2", "3")]
            if group.expansion == 1:
                pairs = [("0.0", "0.1"), ("1", "2")]
            for n, (conv, norm) in enumerate(pairs, start=4 - len(pairs)):
                names[f"{theirs}.{conv}"] = f"{ours}.conv{n}"
                names[f"{theirs}.{norm}"] = f"{ours}.norm{n}.norms.0"
    names[f"features.{number + 1}.0"] = "head"
    names[f"features.{number + 1}.1"] = "head_norm"
    return names
