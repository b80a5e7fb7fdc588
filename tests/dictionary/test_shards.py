"""Selection over ranks, with the ranks simulated: exactly k in total, whatever the ties (pitfalls 1 and 20)."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dictionary.make import within
from xlc_ray.dictionary import Shards
from xlc_ray.dictionary.shards import Pool, _limit, largest


def keep_over_ranks(values: torch.Tensor, k: int, ranks: int) -> torch.Tensor:
    """The mask that `ranks` ranks choose together, each knowing its own columns and everyone's candidates."""
    bounds = [Shards(rank=r, size=ranks).bounds(values.shape[1]) for r in range(ranks)]
    parts = [values[:, lo:hi] for lo, hi in bounds]
    gathered = torch.stack([Pool(p, k).candidates() for p in parts])
    return torch.cat([within(p, _limit(k, gathered, r)) for r, p in enumerate(parts)], dim=1)


@st.composite
def matrices(draw):
    rows, n = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    entries = st.lists(st.integers(-2, 3), min_size=rows * n, max_size=rows * n)
    return torch.tensor(draw(entries), dtype=torch.float64).view(rows, n)


@settings(deadline=None, max_examples=80)
@given(matrices(), st.integers(1, 10), st.integers(1, 4))
def test_ranks_together_keep_exactly_k_and_only_the_largest(values, k, ranks):
    kept = keep_over_ranks(values, k, ranks)
    positives = (values > 0).sum(dim=1)
    assert torch.equal(kept.sum(dim=1), positives.clamp(max=k))
    for row, mask in zip(values, kept, strict=True):
        chosen = row[mask].sort(descending=True).values
        assert torch.equal(chosen, row.sort(descending=True).values[: len(chosen)])


def test_ties_go_to_the_first_ranks():
    values = torch.ones(1, 6, dtype=torch.float64)
    values[0, 5] = 2
    assert keep_over_ranks(values, 3, 3).tolist() == [[True, True, False, False, False, True]]


def test_without_ranks_the_limit_is_the_kth_largest_positive_value():
    values = torch.tensor([[5.0, 3, 3, 1], [-1, 2, -3, 0], [-1, -1, -1, -1]], dtype=torch.float64)
    (limit,) = Shards().kth_largest([Pool(values, 2)])
    assert limit.value.tolist() == [[3.0], [2.0], [float("inf")]]
    assert limit.ties[0].item() == 1
    assert within(values, limit).tolist() == [[True, True, False, False], [False, True, False, False], [False] * 4]


@settings(deadline=None, max_examples=30)
@given(matrices(), st.data())
def test_largest(values, data):
    k = data.draw(st.integers(1, values.shape[1]))
    assert torch.equal(largest(values, k).sort().values, values.topk(k).values.sort().values)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 6))
def test_bounds_cut_as_torch_chunk_does(features, size):
    pieces = [Shards(rank=r, size=size).bounds(features) for r in range(size)]
    chunks = [len(c) for c in torch.arange(features).chunk(size)]
    assert [hi - lo for lo, hi in pieces if hi > lo] == chunks
    assert pieces[0][0] == 0
    assert pieces[-1][1] == features
    assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))


def test_without_a_group_every_collective_is_a_no_op():
    shards, values = Shards(), torch.arange(3.0)
    assert shards.sum(values) is values
    assert shards.total(values) is values
    assert shards.mean_of_batches(values) is values
    shards.mean_over_replicas_(values)
    assert values.tolist() == [0.0, 1.0, 2.0]
