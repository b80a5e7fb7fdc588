"""How features are split over ranks, and the only moments at which ranks speak.

A *replica* of a dictionary is split over the ranks of a tensor-parallel group: each holds a contiguous slice of every
group's features. Forward needs

    sum            all-reduce forward, identity backward: each rank's partial reconstruction → the whole one
    kth_largest    the k-th largest of values spread over ranks (values only, no gradient)

and a training step adds one mean of gradients over replicas and one small sum (norms and counts). Some settings add
small ones: an lp penalty that keeps its strength and a target of l0 a mean over the global batch (`mean_of_batches`),
z-scores and thresholds of inference a mean over replicas, a step that is measured the sum and the mean of its metrics.
Where a rank runs other code on the reconstruction (end-to-end training) the ranks agree on its gradient. Without a
process group all of them are no-ops, and nothing else in the mathematics knows how many ranks there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")


@dataclass(frozen=True)
class Shards:
    """This rank's place: `rank` of `size` in its replica, replica `replica` of `replicas`.

    `group` spans the ranks of the replica, `replica_group` the ranks that hold the same features in all replicas,
    `everyone` both; None where there is just one rank. `mesh` (replicas × shards) and `background` (everyone too, on
    CPUs, for a thread beside training) are for checkpoints.
    """

    rank: int = 0
    size: int = 1
    replica: int = 0
    replicas: int = 1
    group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    everyone: dist.ProcessGroup | None = None
    background: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    @staticmethod
    def of_world(size: int, device_type: str) -> Shards:
        """This process's place in the initialised process group: replicas × `size`, a replica's ranks side by side."""
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % size:
            raise ValueError(f"{world} ranks do not divide into replicas of {size}")
        mesh = init_device_mesh(device_type, (world // size, size), mesh_dim_names=("replica", "shard"))
        background = dist.new_group(backend="gloo")
        assert isinstance(background, dist.ProcessGroup), "every rank is in it"
        return Shards(
            rank % size,
            size,
            rank // size,
            world // size,
            mesh.get_group("shard") if size > 1 else None,
            mesh.get_group("replica") if world > size else None,
            dist.group.WORLD if world > 1 else None,
            background,
            mesh,
        )

    def bounds(self, features: int) -> tuple[int, int]:
        """First and past-the-last feature of this rank: ceil-sized pieces, as torch.chunk and DTensor cut them."""
        piece = -(-features // self.size)
        return min(self.rank * piece, features), min((self.rank + 1) * piece, features)

    def sum(self, partial: Tensor) -> Tensor:
        """Sum over the ranks of a replica; the gradient of each summand is the gradient of the sum."""
        return _Sum.apply(partial, self.group) if self.group is not None else partial

    def agreed(self, whole: Tensor) -> Tensor:
        """The same values, whose gradient becomes the mean of what the ranks of a replica computed of it.

        For gradients that each rank makes by itself with kernels that need not give the same bits twice: replicated
        parameters would drift apart."""
        return _Agreed.apply(whole, self.group) if self.group is not None else whole

    def mean_of_batches(self, partial: Tensor) -> Tensor:
        """Sum over the ranks of a replica and mean over replicas; gradient as if this replica were alone."""
        return _Mean.apply(partial, self.everyone, self.replicas) if self.everyone is not None else partial

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks of a replica, without gradient."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def mean_over_replicas_(self, values: Tensor) -> None:
        """Mean over replicas, in place."""
        if self.replica_group is not None:
            dist.all_reduce(values, group=self.replica_group)
            values /= self.replicas

    def told(self, mine: T) -> T:
        """What the first rank says, an object that can be pickled, on every rank (all ranks call this)."""
        said = [mine]
        if self.background is not None:
            dist.broadcast_object_list(said, src=0, group=self.background)
        return said[0]

    @property
    def first(self) -> bool:
        """Whether this is the first rank of all."""
        return self.rank == self.replica == 0

    def of_first_rank(self, values: Tensor) -> Tensor:
        """The first rank's values, on every rank."""
        if self.everyone is not None:
            dist.broadcast(values, src=0, group=self.everyone)
        return values

    def of_first_replica(self, values: Tensor) -> Tensor:
        """The first replica's values, on the ranks that hold the same features."""
        if self.replica_group is not None:
            dist.broadcast(values, src=dist.get_global_rank(self.replica_group, 0), group=self.replica_group)
        return values

    def kth_largest(self, pools: list[Pool]) -> list[Limit]:
        """For each pool: its k-th largest value over all ranks, and how many values equal to it this rank may keep.

        One collective serves all pools. Values are compared as they are; ties are resolved in rank order, so that
        exactly k values of a row are kept over all ranks.
        """
        tops = [pool.candidates() for pool in pools]
        batch = any(pool.whole_batch for pool in pools)
        group, size = (self.everyone, self.size * self.replicas) if batch else (self.group, self.size)
        if group is None:
            return [_limit(pool.k, top[None], 0) for pool, top in zip(pools, tops, strict=True)]
        flat = torch.cat([top.flatten() for top in tops])
        parts = flat.new_empty(size * flat.numel())
        dist.all_gather_into_tensor(parts, flat, group=group)
        pieces = parts.view(size, -1).split([top.numel() for top in tops], dim=1)
        limits = []
        for pool, top, piece in zip(pools, tops, pieces, strict=True):
            values, rank = piece.reshape(size, *top.shape), self.rank
            if pool.whole_batch:
                rank += self.replica * self.size
            elif batch:  # these rows are this replica's own
                values = values[self.replica * self.size : (self.replica + 1) * self.size]
            limits.append(_limit(pool.k, values, rank))
        return limits


@dataclass(frozen=True)
class Pool:
    """Values that compete for k places a row, of which only positive ones get one: `values` [rows, n].

    `whole_batch`: a row spans all replicas."""

    values: Float[Tensor, "rows n"]
    k: int
    whole_batch: bool = False

    def candidates(self) -> Float[Tensor, "rows k"]:
        """The k largest of each row, filled up with -inf."""
        n = self.values.shape[1]
        if n <= self.k:
            return torch.nn.functional.pad(self.values, (0, self.k - n), value=-torch.inf)
        return largest(self.values, self.k)


@dataclass(frozen=True)
class Limit:
    """`value` [rows, 1]: the least positive value that is kept (inf where none is); `ties` [rows, 1]: how many values
    equal to it this rank keeps."""

    value: Float[Tensor, "rows 1"]
    ties: Int[Tensor, "rows 1"]


def largest(values: Float[Tensor, "rows n"], k: int) -> Float[Tensor, "rows k"]:
    """The k largest of each row, in any order."""
    if values.device.type == "cpu":  # numpy's selection is several times faster than torch's, most on long rows
        return torch.from_numpy(np.partition(values.numpy(), values.shape[1] - k, axis=1)[:, -k:])
    return values.topk(k, dim=1, sorted=False).values


def _limit(k: int, gathered: Float[Tensor, "ranks rows k"], rank: int) -> Limit:
    ranks, rows = gathered.shape[:2]
    merged = gathered.transpose(0, 1).reshape(rows, ranks * gathered.shape[2])
    top = largest(merged, k) if ranks > 1 else merged
    least = top.masked_fill(top <= 0, torch.inf).amin(dim=1, keepdim=True)
    free = k - (merged > least).sum(dim=1, keepdim=True)
    taken = (gathered[:rank] == least).sum(dim=2).sum(dim=0).unsqueeze(1)
    return Limit(least, (free - taken).clamp(min=0))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, group):
        whole = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Agreed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, group):
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, grad):
        mean = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean, group=ctx.group)
        return mean / dist.get_world_size(ctx.group), None


class _Mean(torch.autograd.Function):
    """Sum over a replica's ranks, mean over replicas. Backward is the identity: the later mean of gradients over
    replicas makes of it the gradient of the global mean."""

    @staticmethod
    def forward(ctx, partial, group, replicas):
        whole = partial.clone()
        dist.all_reduce(whole, group=group)
        return whole / replicas

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None
