"""The recurrent convolutional network of Liang and Hu (2015): a baseline of DRNN's Table 1.

    x_t = lrn(relu(W_f * u + W_r * x_{t-1} + b)),  t = 0 .. T,  x_{-1} = 0

Its layers are recurrent in another way than a recursive cell: every iteration sees the layer's
input u again, which a cell x <- F(x) forgets. So they are no stage of stage.py, and all samples
execute all iterations. RCNN-160 has 160 channels and T = 3.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.network import Network, Output, check_common_options
from pipeline.models.recurrent_layer import RecurrentLayer

RECURRENCES = 3
DROPOUT = 0.5


class RCNN(Network):
    """A 5x5 convolution, twice a pooling and two recurrent layers, a global maximum, a classifier.

    Dropout follows every recurrent layer but the last, and where a pooling follows, the pooling.
    Both poolings are 3x3 maxima of stride 2. The classifier starts small, as its inputs are large.
    """

    image_size = 32

    def __init__(self, channels: int, *, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 5, padding=2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                RecurrentLayer(channels, recurrences=RECURRENCES),
                nn.Dropout(DROPOUT),
                RecurrentLayer(channels, recurrences=RECURRENCES),
            )
            for _ in range(2)
        )
        self.classifier = nn.Linear(channels, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """images (N, 3, H, W), of any size that the poolings leave a pixel of."""
        self.steps_taken(steps)  # refuses every number
        x = F.relu(self.stem(images), inplace=True)
        for number, stage in enumerate(self.stages):
            x = F.max_pool2d(x, 3, stride=2, padding=1)
            if number:
                x = F.dropout(x, DROPOUT, self.training)
            x = stage(x)
        return Output(self.classifier(x.amax((2, 3))), ())


def _rcnn(channels: int, *, num_classes: int = 10) -> Network:
    check_common_options(num_classes, sync_norm=False)
    return RCNN(channels, num_classes=num_classes)


MODELS = {"rcnn160": partial(_rcnn, 160)}
