"""Schedules by hand."""

import pytest

from xlc_ray.config.losses import Constant, Cosine, Linear
from xlc_ray.training.schedules import factor


def values(schedule, steps):
    return [factor(schedule, i, steps) for i in range(steps)]


def test_constant():
    assert values(Constant(), 3) == [1, 1, 1]
    assert values(Constant(warmup=0.5), 8) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert values(Constant(warmup=1.0), 4) == [0.25, 0.5, 0.75, 1]


def test_linear():
    assert values(Linear(), 10) == pytest.approx([1] * 9 + [0.5])
    assert values(Linear(decay=0.4), 10) == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert values(Linear(decay=0.4, end=0.2), 10)[6:] == pytest.approx([1, 0.8, 0.6, 0.4])
    assert values(Linear(warmup=0.2, decay=0.4), 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert values(Linear(decay=0), 4) == [1, 1, 1, 1]


def test_cosine():
    half = 0.5**0.5
    assert values(Cosine(), 4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert values(Cosine(end=0.2), 4)[2] == pytest.approx(0.6)
    assert values(Cosine(cycles=2), 8) == pytest.approx(values(Cosine(), 4) * 2)
    assert values(Cosine(warmup=0.2), 5) == pytest.approx([1, *values(Cosine(), 4)])


@pytest.mark.parametrize("schedule", [Constant(warmup=0.3), Linear(warmup=0.3), Cosine(warmup=0.1, cycles=3)])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_factors_stay_within_0_and_1_and_training_moves(schedule, steps):
    found = values(schedule, steps)
    assert all(0 < f <= 1 for f in found)
    assert max(found) == 1
