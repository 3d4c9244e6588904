"""Which noise is whose: nothing is measured on noise that it was made with.

Every image that is sampled starts from the noise of a seed of its own, of which torch's generators on the
CPU heed 32 bits. In those the ranges below are disjoint, for every `--seed` (under MOST) and up to IMAGES
images each; evaluations with different seeds share none in the first STRIDE images.
"""

from __future__ import annotations

MOST = 1 << 20
IMAGES = 900_000
STRIDE = 3072

EVALUATION = 2_000_000
CALIBRATION = 3_500_000_000
RECOVERY = 3_600_000_000
TUNING = 3_700_000_000
ROUTING = 3_800_000_000


def of_capture(seed: int, pair: int) -> int:
    """Both sides of a pair start from the same noise."""
    return seed + pair


def of_evaluation(seed: int, image: int) -> int:
    return EVALUATION + STRIDE * seed + image


def of_recovery(image: int) -> int:
    """For what a model loses where activations are replaced by their reconstruction."""
    return RECOVERY + image
