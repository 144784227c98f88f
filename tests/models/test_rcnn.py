"""Liang and Hu's recurrent convolutional network, written out by hand."""

import torch
import torch.nn.functional as F

from pipeline.models import create_model
from pipeline.models.cost import measure
from pipeline.models.recurrent_layer import RecurrentLayer
from pipeline.models.shapes import ShapesOnly


def _normalise(x):
    """x / (1 + alpha / n sum x^2)^beta over the n = channels / 8 + 1 channels around each."""
    channels = x.shape[1]
    n = channels // 8 + 1
    sums = torch.zeros_like(x)
    for channel in range(channels):
        around = x[:, max(0, channel - n // 2) : channel + (n + 1) // 2]
        sums[:, channel] = (around**2).sum(1)
    return x / (1 + 1e-3 / n * sums) ** 0.75


def _layer(u, layer):
    driven = F.conv2d(u, layer.feedforward.weight, layer.feedforward.bias, padding=1)
    x = torch.zeros_like(u)
    for _ in range(layer.recurrences + 1):
        x = _normalise((driven + F.conv2d(x, layer.recurrent.weight, padding=1)).relu())
    return x


def test_every_iteration_sees_the_layers_input():
    torch.manual_seed(0)
    for recurrences in (0, 1, 3):
        layer = RecurrentLayer(16, recurrences=recurrences)
        u = 10 * torch.randn(2, 16, 5, 4)
        torch.testing.assert_close(layer(u), _layer(u, layer))


def test_the_network():
    """A convolution, two times a pooling and two layers, a global maximum, a classifier."""
    torch.manual_seed(0)
    model = create_model("rcnn160").eval()
    images = torch.randn(2, 3, 12, 12)
    x = F.conv2d(images, model.stem.weight, model.stem.bias, padding=2).relu()
    layers = [module for module in model.modules() if isinstance(module, RecurrentLayer)]
    assert [layer.recurrences for layer in layers] == [3] * 4
    for number, layer in enumerate(layers):
        if number % 2 == 0:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = _layer(x, layer)
    assert x.shape == (2, 160, 3, 3)
    logits = x.flatten(2).amax(2) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(images).logits, logits)
    assert model(images).routes == ()


def test_dropout_follows_all_layers_but_the_last(monkeypatch):
    model = create_model("rcnn160").train()
    dropped = []

    def drop(x, p, training, inplace=False):
        dropped.append((tuple(x.shape[1:]), p, training))
        return x

    monkeypatch.setattr(F, "dropout", drop)
    model(torch.randn(1, 3, 12, 12))
    assert dropped == [((160, 6, 6), 0.5, True), ((160, 3, 3), 0.5, True), ((160, 3, 3), 0.5, True)]


def test_its_size_is_the_tables():
    """DRNN Table 1: 1.86 M parameters; all of a layer's are used at every iteration."""
    with ShapesOnly():
        model = create_model("rcnn160")
    assert measure(model).parameters == 1_857_610
    shared = {name for name, role in model.roles().items() if role == "shared"}
    assert shared == {name for name, _ in model.named_parameters() if name.startswith("stages.")}
