"""No noise serves two purposes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedig_core import seeds
from safedig_core.cli.parser import parser

SEED, IMAGE = st.integers(0, seeds.MOST - 1), st.integers(0, seeds.IMAGES - 1)
PURPOSES = {
    "capture": seeds.of_capture,
    "evaluation": seeds.of_evaluation,
    "calibration": lambda seed, image: seeds.CALIBRATION + image,
    "recovery": lambda seed, image: seeds.of_recovery(image),
    "tuning": lambda seed, image: seeds.TUNING + image,
    "routing": lambda seed, image: seeds.ROUTING + image,
}


def heeded(seed: int) -> int:
    """What a generator on the CPU makes of a seed."""
    return seed % (1 << 32)


def test_generators_heed_32_bits() -> None:
    def noise(seed: int) -> torch.Tensor:
        return torch.randn(8, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(noise(5), noise(5 + (1 << 32)))
    assert not torch.equal(noise(5), noise(5 + (1 << 31)))


@given(
    st.lists(st.sampled_from(sorted(PURPOSES)), min_size=2, max_size=2, unique=True),
    st.tuples(SEED, SEED),
    st.tuples(IMAGE, IMAGE),
)
def test_no_two_purposes_share_noise(names: list[str], seed: tuple[int, int], image: tuple[int, int]) -> None:
    one, other = (PURPOSES[name](s, i) for name, s, i in zip(names, seed, image, strict=True))
    assert heeded(one) != heeded(other)


def test_the_ends_of_the_ranges_stay_apart() -> None:
    """What is found where chance never looks."""
    ranges = []
    for seed_range in PURPOSES.values():
        ranges.append((seed_range(0, 0), seed_range(seeds.MOST - 1, seeds.IMAGES - 1)))
    ranges.sort()
    assert ranges[0][0] >= 0 and ranges[-1][1] < 1 << 32
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))


@given(st.tuples(SEED, SEED), st.tuples(*[st.integers(0, seeds.STRIDE - 1)] * 2))
def test_evaluations_share_no_noise(seed: tuple[int, int], image: tuple[int, int]) -> None:
    one, other = (seeds.of_evaluation(s, i) for s, i in zip(seed, image, strict=True))
    assert (heeded(one) == heeded(other)) == (seed[0] == seed[1] and image[0] == image[1])


def test_the_evaluation_with_seed_0_is_that_of_the_published_figures() -> None:
    assert [seeds.of_evaluation(0, image) for image in (0, 143)] == [2_000_000, 2_000_143]


@pytest.mark.parametrize("seed", ["-1", str(seeds.MOST), "1.5", "x"])
@pytest.mark.parametrize("command", [["demo"], ["capture", "--prompts", "p", "--store", "s"]])
def test_other_seeds_are_refused(command: list[str], seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([*command, "--seed", seed])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--seed: {seed} is not a whole number from 0 to 1048575" in line
    assert parser().parse_args([*command, "--seed", str(seeds.MOST - 1)]).seed == seeds.MOST - 1
