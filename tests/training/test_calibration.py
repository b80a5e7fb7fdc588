"""The start of b_dec: the mean and the geometric median of each written site."""

import pytest
import torch

from tests.dictionary import make
from xlc_ray.dictionary import Wiring
from xlc_ray.training.calibration import geometric_median, start_bias


def points(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_known_geometric_medians():
    corners = points([[0, 0], [4, 0], [4, 4], [0, 4]])
    torch.testing.assert_close(geometric_median(corners), points([2, 2]))
    convex = points([[0, 0], [6, 0], [5, 4], [1, 2]])  # where the diagonals cross: x = t (5, 4) = (6, 0) + s (-5, 2)
    torch.testing.assert_close(geometric_median(convex), points([2.0, 1.6]), rtol=1e-6, atol=1e-6)
    equilateral = points([[0, 0], [1, 0], [0.5, 0.75**0.5]])
    torch.testing.assert_close(geometric_median(equilateral), equilateral.mean(dim=0), rtol=1e-8, atol=1e-8)


def test_it_is_what_weiszfelds_iteration_converges_to():
    cloud = make.random(40, 3, seed=8).exp().numpy()
    centre = cloud.mean(axis=0)
    for _ in range(2000):
        weights = [1 / sum((p - centre) ** 2) ** 0.5 for p in cloud]
        centre = sum(w * p for w, p in zip(weights, cloud, strict=True)) / sum(weights)
    torch.testing.assert_close(
        geometric_median(torch.from_numpy(cloud)), torch.from_numpy(centre), rtol=1e-8, atol=1e-8
    )


def test_an_outlier_hardly_moves_it():
    cloud = make.random(200, 3)
    spoilt = torch.cat([cloud, torch.full((5, 3), 1e6).double()])
    assert geometric_median(spoilt).norm() < 0.3
    assert spoilt.mean(dim=0).norm() > 1e4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_nearby_point_has_a_smaller_sum_of_distances(seed):
    cloud = make.random(30, 2, seed=seed).exp()
    found = geometric_median(cloud)

    def cost(candidates):
        return torch.cdist(candidates, cloud).sum(dim=1)

    best = cost(found.unsqueeze(0))
    for radius in (1.0, 0.1, 1e-2, 1e-3):
        step = torch.linspace(-radius, radius, 21, dtype=torch.float64)
        assert (cost(found + torch.cartesian_prod(step, step)) >= best - 1e-9).all()


def test_a_start_on_a_point_that_is_not_the_median_is_left():
    found = geometric_median(points([[-1.0], [-1.0], [-1.0], [0.0], [3.0]]))  # the mean is the point 0
    torch.testing.assert_close(found, points([-1.0]), rtol=0, atol=1e-3)


def test_equal_points_are_their_own_median():
    torch.testing.assert_close(geometric_median(points([[2.0, 3.0]] * 4)), points([2.0, 3.0]))


@pytest.mark.parametrize("kind", ["mean", "geometric_median"])
def test_start_bias_treats_each_site_alone(kind):
    wires = Wiring({"a": 2, "b": 3}, (("a",),), (("a", "b"),))
    d, y = make.dictionary(wires), make.random(40, 5).exp()
    d.write_mean.add_(2.0)
    d.write_scale.mul_(3.0)
    start_bias(d, lambda site: d.denormalize(y)[site], kind)
    of = geometric_median if kind == "geometric_median" else lambda v: v.mean(dim=0)
    torch.testing.assert_close(d.b_dec.detach(), torch.cat([of(y[:, :2]), of(y[:, 2:])]))
