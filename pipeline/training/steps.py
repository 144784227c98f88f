"""How many steps a cost-adjustable network takes in training: RC Alg. 2, Sec. 4.2."""

from __future__ import annotations

import numpy as np

from pipeline.config import ConfigError, Steps
from pipeline.data.order import generator
from pipeline.models import Network


def taken(steps: Steps, seed: int, step: int, micro_batch: int) -> list[tuple[int | None, float]]:
    """Numbers of steps for a micro-batch, ascending, each with the weight of its loss.

    A pure function of the optimizer step and the micro-batch within it, so that all ranks take the
    same and a resumed run the same again. A network without choice takes None.
    """
    if not steps.probabilities:
        return [(None, 1.0)]
    weighted = sorted(steps.probabilities.items())
    if steps.draw == "all":
        return [*weighted]
    edges = np.cumsum([probability for _, probability in weighted])
    drawn = generator(seed, "steps", step, micro_batch).random() * edges[-1]
    return [(weighted[int(np.searchsorted(edges, drawn, side="right"))][0], 1.0)]


def check(model: Network, steps: Steps) -> None:
    """Refuse probabilities of other numbers of steps than the network's.

    Raises:
        ConfigError: a number that would never be trained, or that the network cannot take.
    """
    given, valid = sorted(steps.probabilities), list(model.step_choices)
    if given == valid:
        return
    if not valid:
        raise ConfigError(
            f"steps.probabilities={steps.probabilities}: this network always takes the same steps: "
            "remove them, or take a cost-adjustable network (rc_r2, rc_r4)"
        )
    raise ConfigError(
        f"steps.probabilities={steps.probabilities}: this network takes "
        f"{', '.join(map(str, valid))} steps: give each of them a probability, such as "
        f"steps.probabilities={_example(valid)}"
    )


def _example(numbers: list[int]) -> str:
    share = round(1 / len(numbers), 3)
    last = round(1 - share * (len(numbers) - 1), 3)
    shares = [share] * (len(numbers) - 1) + [last]
    return "{" + ", ".join(f"{n}: {p}" for n, p in zip(numbers, shares, strict=True)) + "}"
