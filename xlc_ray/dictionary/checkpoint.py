"""Checkpoints: every rank writes its own shard; any number of ranks reads them back.

A run directory holds `checkpoints/step_N/`, written by torch.distributed.checkpoint, and in each, written last, a
`complete.json` with what is not a tensor. A checkpoint without that file does not exist. The layout of tensors is told
by DTensor, whose only place in xlc_ray this is.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate, Shard

from xlc_ray import files
from xlc_ray.config import Config, UserError, load_config_text
from xlc_ray.dictionary.build import build
from xlc_ray.dictionary.dictionary import Dictionary
from xlc_ray.dictionary.shards import Shards
from xlc_ray.dictionary.wiring import Tying, Wiring

MARKER = "complete.json"


def save(run_dir: str, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], keep: int) -> None:
    """Write a checkpoint (all ranks call this), mark it complete, then prune to the newest `keep`."""
    path = files.join(run_dir, "checkpoints", f"step_{step}")
    alone = not dist.is_initialized()
    leader = alone or dist.get_rank() == 0
    if leader:
        files.remove(path)  # a part left by an interrupted save
        files.makedirs(path)
    if not alone:
        dist.barrier()
    writer = FsspecWriter(path) if files.is_url(path) else dcp.FileSystemWriter(files.local(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.save(tensors, storage_writer=writer, no_dist=alone)
        except CheckpointException as error:  # holds what each rank met
            with files.writing(path):
                raise next(iter(error.failures.values()))[0] from None
    if leader:
        files.write_json(files.join(path, MARKER), {"step": step, **facts})
        for old in steps(run_dir)[:-keep]:
            files.remove(files.join(run_dir, "checkpoints", f"step_{old}"))
    if not alone:
        dist.barrier()


def steps(run_dir: str) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    base = files.join(run_dir, "checkpoints")
    names = [n for n in files.listdir(base) if n.startswith("step_") and n[5:].isdigit()]
    return sorted(int(n[5:]) for n in names if files.exists(files.join(base, n, MARKER)))


def facts(run_dir: str, step: int) -> dict[str, Any]:
    """What `save` was given beside tensors."""
    return files.read_json(files.join(run_dir, "checkpoints", f"step_{step}", MARKER))


def load(run_dir: str, step: int, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors given, in place, from a checkpoint written by any number of ranks (all ranks call this)."""
    path = files.join(run_dir, "checkpoints", f"step_{step}")
    reader = FsspecReader(path) if files.is_url(path) else dcp.FileSystemReader(files.local(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def sharded(local: Tensor, features: int, shards: Shards) -> Tensor:
    """This rank's slice of a tensor whose first dimension is all `features`, described so that any rank can read it."""
    if shards.mesh is None:
        return local
    layout = (Replicate(), Shard(0))
    shape = (features, *local.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, shards.mesh, layout, run_check=False, shape=torch.Size(shape), stride=stride)


def dictionary_tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    """Parameters and buffers by name, ready to be saved or filled."""
    found = {}
    parameters = dict(dictionary.named_parameters())
    for name, value in dictionary.state_dict().items():
        split = name in parameters and dictionary.is_sharded(name)
        features = dictionary.sizes[group_of(name)] if split else 0
        found[f"dictionary.{name}"] = sharded(value.detach(), features, dictionary.shards) if split else value.detach()
    return found


def group_of(name: str) -> int:
    """The feature group of a sharded parameter, from its name (`groups.3.W_enc`, `gate.raw_threshold.3`)."""
    return int(next(part for part in name.split(".") if part.isdigit()))


def describe(wiring: Wiring) -> dict[str, Any]:
    """A wiring as plain data."""
    plain = {"widths": dict(wiring.widths), "reads": wiring.reads, "writes": wiring.writes, "skip": wiring.skip}
    return plain | ({"tied": dataclasses.asdict(wiring.tied)} if wiring.tied else {})


def wiring_from(plain: dict[str, Any]) -> Wiring:
    """The wiring that `describe` described."""
    reads, writes = (tuple(tuple(row) for row in plain[key]) for key in ("reads", "writes"))
    tied = Tying(**plain["tied"]) if "tied" in plain else None
    return Wiring(plain["widths"], reads, writes, plain["skip"], tied)


def load_dictionary(run_dir: str, step: int | None = None) -> tuple[Dictionary, Config]:
    """The whole dictionary of a run's checkpoint at `step` (None: the newest), on the CPU in inference form, and the
    run's settings. Raises UserError where there is no such checkpoint."""
    if not (found := steps(run_dir)):
        raise UserError(f"{run_dir}: no complete checkpoint here (expected checkpoints/step_N/{MARKER})")
    step = found[-1] if step is None else step
    if step not in found:
        raise UserError(f"{run_dir}: no complete checkpoint of step {step}; there are: {', '.join(map(str, found))}")
    config = load_config_text(files.read_bytes(files.join(run_dir, "config.yaml")), f"{run_dir}/config.yaml")
    wiring = wiring_from(facts(run_dir, step)["wiring"])
    dictionary = build(config.dictionary, wiring, config.seed, Shards())
    if config.train.precision == "float64":
        dictionary.double()
    load(run_dir, step, dictionary_tensors(dictionary))
    return dictionary.float().eval(), config
