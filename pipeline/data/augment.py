"""What is done to images, described once for both readers.

Geometry is a crop box and a flip per image; colour is an affine map per image. Both are drawn for a
whole optimizer batch at once and then cut to the rows of a rank's micro-batch, so that what happens
to a sample does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config import Augmentation
from pipeline.data.order import BatchPlan, Plan, Rows, generator

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# From so many values on, torch shares a CPU's work among threads, which spin for a while afterwards
# where the decoders need the cores; so many also stay in the cache from one operation to the next.
PARALLEL = 2**15
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
# ITU-R 601-2 luma, PIL's conversion to grey.
LUMA = np.array([0.299, 0.587, 0.114])
ENHANCE_RANGE = (0.5, 1.5)
# Principal components of the colours of ImageNet's pixels in 0..1 (Krizhevsky et al. 2012,
# Sec. 4.1), as published with fb.resnet.torch; the columns are the eigenvectors.
LIGHTING_STD = 0.1
LIGHTING_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
LIGHTING_EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


@dataclass(frozen=True)
class Geometry:
    """Per image: the box to cut, and whether to mirror it.

    `boxes` (n, 4): top, left, height, width in pixels; what reaches outside the image is zero.
    `flips` (n,): mirrored left to right, after the crop.
    """

    boxes: Ints
    flips: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Colour:
    """Per image x' = matrix @ x + mean_matrix @ mean(x) + offset, pixel values in 0..255.

    `matrix`, `mean_matrix` (n, 3, 3), `offset` (n, 3), RGB.
    """

    matrix: Floats
    mean_matrix: Floats
    offset: Floats


@dataclass(frozen=True)
class Transform:
    """The way from a decoded image to the network's input, for the batches of a plan.

    In this order: crop, resize (bilinear, antialiased), centre crop, flip, quarter turns, colour,
    normalisation. `image_size` is the manifest's (min height, max height, min width, max width).
    For denoising images are grey, and evaluation takes them whole, at their own size.
    Raises ValueError where an image cannot hold the crop.
    """

    augment: Augmentation
    plan: Plan
    image_size: tuple[int, int, int, int]
    denoising: bool = False

    def __post_init__(self) -> None:
        smallest = min(self.image_size[0], self.image_size[2])
        if self.crop == "pad" and smallest + 2 * self.augment.padding < self.size:
            raise ValueError(
                f"crop=pad with size={self.size}, padding={self.augment.padding}: the set has "
                f"images of {smallest} pixels; give size <= {smallest + 2 * self.augment.padding} "
                "or crop=random_resized"
            )

    @property
    def size(self) -> int:
        """Height and width of the result."""
        return self.augment.size

    @property
    def crop(self) -> Literal["none", "pad", "random_resized"]:
        return self.augment.crop if isinstance(self.plan, BatchPlan) else "none"

    @property
    def flip(self) -> bool:
        return self.augment.flip and isinstance(self.plan, BatchPlan)

    @property
    def resize(self) -> int | None:
        """Height and width to resize to after the crop; None where no image needs it."""
        if self.crop == "pad" or (self.denoising and not isinstance(self.plan, BatchPlan)):
            return None
        target = self.size
        if isinstance(self.plan, BatchPlan):
            if self.crop == "random_resized":
                return target
        elif self.augment.eval_resize is not None:
            target = self.augment.eval_resize
        return None if set(self.image_size) == {target} else target

    @property
    def margin(self) -> int:
        """Rows and columns before the centre crop, which is taken after resizing."""
        return ((self.resize or self.size) - self.size) // 2

    def geometry(self, epoch: int, rows: Rows, sizes: Ints) -> Geometry:
        """Boxes and flips of a training micro-batch; `sizes` (n, 2) are heights and widths."""
        n = len(rows.rows)
        flips = np.zeros(n, dtype=bool)
        if self.flip:
            flips = self._random("flip", epoch, rows).random(self._total)[rows.rows] < 0.5
        if self.crop == "none":
            return Geometry(np.concatenate([np.zeros_like(sizes), sizes], axis=1), flips)
        random = self._random("crop", epoch, rows)
        if self.crop == "pad":
            draws = random.random((self._total, 2))[rows.rows]
            return Geometry(pad_crop_boxes(draws, sizes, self.size, self.augment.padding), flips)
        draws = random.random((self._total, CROP_ATTEMPTS, 4))[rows.rows]
        return Geometry(
            resized_crop_boxes(draws, sizes, self.augment.scale, self.augment.ratio), flips
        )

    def turns(self, epoch: int, rows: Rows) -> Ints | None:
        """Quarter turns, (n,) of 0 to 3, of a training micro-batch."""
        if not (self.augment.rotate and isinstance(self.plan, BatchPlan)):
            return None
        return self._random("turn", epoch, rows).integers(4, size=self._total)[rows.rows]

    def colour(self, epoch: int, rows: Rows) -> Colour | None:
        """Photometric distortion of a training micro-batch."""
        if not (self.augment.photometric and isinstance(self.plan, BatchPlan)):
            return None
        random = self._random("colour", epoch, rows)
        factors = random.uniform(*ENHANCE_RANGE, (self._total, 3))
        order = random.random((self._total, 3)).argsort(axis=1)
        lighting = random.normal(0.0, LIGHTING_STD, (self._total, 3))
        return photometric(factors[rows.rows], order[rows.rows], lighting[rows.rows])

    @property
    def _total(self) -> int:
        assert isinstance(self.plan, BatchPlan)
        return self.plan.global_batch

    def _random(self, purpose: str, epoch: int, rows: Rows) -> np.random.Generator:
        assert isinstance(self.plan, BatchPlan)
        return generator(self.plan.seed, purpose, epoch, rows.optimizer_step)


def pad_crop_boxes(draws: Floats, sizes: Ints, size: int, padding: int) -> Ints:
    """Boxes (n, 4) of `size` anywhere in the padded image; `draws` (n, 2) uniform in [0, 1)."""
    corners = np.floor(draws * (sizes + 2 * padding - size + 1)).astype(np.int64) - padding
    return np.concatenate([corners, np.full_like(corners, size)], axis=1)


def resized_crop_boxes(
    draws: Floats, sizes: Ints, scale: tuple[float, float], ratio: tuple[float, float]
) -> Ints:
    """Boxes (n, 4) of random area and aspect ratio inside the image.

    GoogLeNet's crop (Szegedy et al. 2015, Sec. 6) as torchvision draws it: area uniform in `scale`,
    aspect ratio log-uniform in `ratio`, the first of several attempts that fits, and else the
    largest central box of an allowed ratio. `draws` (n, attempts, 4) uniform in [0, 1): area,
    ratio, top, left.
    """
    heights, widths = sizes[:, :1], sizes[:, 1:]
    area = heights * widths * (scale[0] + draws[..., 0] * (scale[1] - scale[0]))
    low, high = np.log(ratio)
    aspect = np.exp(low + draws[..., 1] * (high - low))
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    first = np.arange(len(draws)), fits.argmax(axis=1)
    top = np.floor(draws[..., 2] * (heights - height + 1)).astype(np.int64)
    left = np.floor(draws[..., 3] * (widths - width + 1)).astype(np.int64)
    boxes = np.stack([part[first] for part in (top, left, height, width)], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), boxes, _central_boxes(sizes, ratio))


def _central_boxes(sizes: Ints, ratio: tuple[float, float]) -> Ints:
    height, width = sizes[:, 0], sizes[:, 1]
    box_width = np.minimum(width, np.rint(height * ratio[1])).astype(np.int64)
    box_height = np.minimum(height, np.rint(width / ratio[0])).astype(np.int64)
    return np.stack(
        [(height - box_height) // 2, (width - box_width) // 2, box_height, box_width], axis=1
    )


def photometric(factors: Floats, order: Ints, lighting: Floats) -> Colour:
    """Contrast, brightness and colour in random order, then lighting noise.

    The "photometric distortions" of DRNN Sec. 4.2: Howard 2013, Sec. 2.2 with PIL's ImageEnhance
    definitions, then Krizhevsky et al. 2012, Sec. 4.1. All four are affine in the pixel and the
    image's mean colour, and so is their composition. PIL clips and rounds between them; here values
    are clipped once, at the end.

    `factors` (n, 3): of contrast, brightness, colour; 1 changes nothing. `order` (n, 3): which of
    them comes first, second, third. `lighting` (n, 3): weights of the principal components.
    """
    n = len(factors)
    matrix = np.broadcast_to(np.eye(3), (n, 3, 3)).copy()
    mean_matrix = np.zeros((n, 3, 3))
    grey = np.broadcast_to(LUMA, (3, 3))
    for turn in range(3):
        operation = order[:, turn]
        factor = factors[np.arange(n), operation][:, None, None]
        # A pixel is mixed with a grey: none, its own, or that of the image's mean.
        own = (operation == 2)[:, None, None] * (1 - factor) * grey
        of_mean = (operation == 0)[:, None, None] * (1 - factor) * grey
        pixel = factor * np.eye(3) + own
        # The mean of the image so far is (matrix + mean_matrix) @ mean(x).
        mean_matrix = pixel @ mean_matrix + of_mean @ (matrix + mean_matrix)
        matrix = pixel @ matrix
    offset = 255 * (lighting * LIGHTING_EIGENVALUES) @ LIGHTING_EIGENVECTORS.T
    return Colour(matrix, mean_matrix, offset)


def resize(image: torch.Tensor, side: int) -> torch.Tensor:
    """(height, width, channels) uint8 on a CPU to (side, side, channels), bilinear, antialiased."""
    from torchvision.transforms.v2 import functional

    # Of a dense image torchvision keeps the order of memory, and takes two thirds of the time.
    channels_first = image.contiguous().permute(2, 0, 1)
    resized: torch.Tensor = functional.resize(channels_first, [side, side], antialias=True)
    return resized.permute(1, 2, 0)


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on the device, without waiting for what it has to do before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def turn(images: torch.Tensor, turns: Ints) -> torch.Tensor:
    """Square images (n, size, size, C), each turned counter-clockwise by its quarter turns."""
    turned = images.clone()
    for number in (1, 2, 3):
        chosen = upload(torch.from_numpy(np.flatnonzero(turns == number)), images.device)
        turned[chosen] = images[chosen].rot90(number, (1, 2))
    return turned


class Normalise:
    """uint8 images to the network's input: colour, clipping, channel statistics, layout.

    `mean` and `std` are the manifest's, in 0..1.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], size: int, device: torch.device
    ) -> None:
        means, stds = torch.tensor(mean), torch.tensor(std)
        # One factor per value of an image row, so that the arithmetic runs along memory.
        self.scale = (1 / (255 * stds)).repeat(size).to(device)
        self.bias = (-means / stds).repeat(size).to(device)

    def __call__(self, images: torch.Tensor, colour: Colour | None) -> torch.Tensor:
        """(n, size, size, 3) uint8 to (n, 3, size, size) float32, channels last in memory."""
        pixels = images if colour is None else _recolour(images.float(), colour)
        values = torch.empty(pixels.shape, device=pixels.device)
        width = self.scale.numel()
        targets, sources = values.view(-1, width), pixels.reshape(-1, width)
        some = max((PARALLEL - 1) // width, 1) if values.device.type == "cpu" else len(targets)
        for target, source in zip(targets.split(some), sources.split(some), strict=True):
            target.copy_(source).mul_(self.scale).add_(self.bias)
        return values.permute(0, 3, 1, 2)


def _recolour(images: torch.Tensor, colour: Colour) -> torch.Tensor:
    pixels = images.flatten(1, 2)
    matrix, mean_matrix, offset = (
        upload(torch.from_numpy(part).float(), images.device)
        for part in (colour.matrix, colour.mean_matrix, colour.offset)
    )
    constant = torch.einsum("nij,nj->ni", mean_matrix, pixels.mean(1)) + offset
    recoloured = torch.baddbmm(constant[:, None], pixels, matrix.transpose(1, 2))
    return recoloured.clamp_(0, 255).view(images.shape)
