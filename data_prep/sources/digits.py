"""scikit-learn's 1,797 handwritten digits: real scans that need no download."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.items import Item
from data_prep.listing import Listing, PixelReader

SIDE = 32
LEVELS = 16
TEST_IMAGES = 360


class DigitsSource:
    """The digits at 32x32 pixels, 8-bit grey, 1,437 for training and 360 for test.

    The split does not depend on the seed: it is scikit-learn's own, stratified by class, with
    random_state=0.
    """

    def open(self, scratch: Path) -> Listing:
        """Write the scaled pixels to ``scratch`` and list them."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        _, test = train_test_split(
            np.arange(len(digits.target)),
            test_size=TEST_IMAGES,
            stratify=digits.target,
            random_state=0,
        )
        test = set(test.tolist())
        file = scratch / "digits.bin"
        file.write_bytes(b"".join(_scaled(image) for image in digits.images))
        size = SIDE * SIDE
        return Listing(
            name="digits",
            classes=tuple(str(name) for name in digits.target_names),
            items=[
                Item("test" if n in test else "train", int(label), f"digit {n}", n * size, size)
                for n, label in enumerate(digits.target)
            ],
            rejected=[],
            reader=PixelReader(file, "L", SIDE, SIDE),
            settings={"source": "digits", "side": SIDE, "resampling": "bicubic"},
        )


def _scaled(values: np.ndarray) -> bytes:
    grey = np.rint(values * (255 / LEVELS)).astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).tobytes()
