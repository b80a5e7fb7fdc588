"""Checkpoints: every rank writes its own shard, while training goes on; any number of ranks reads them back.

A run directory holds `checkpoints/step_N/`, written by torch.distributed.checkpoint, and in each, written last, a
`complete.json` with what is not a tensor, and the size of every other file. A checkpoint without that file does not
exist, one with other sizes is damaged: both are passed over. The layout of tensors is told by DTensor, whose only place
in xlc_ray this is.

Ranks agree on what is written through `Shards.background`, a group of its own: a thread's collectives must not meet
those of training. (dcp.async_save would do the same, but knows nothing of the marker and of pruning, which belong to
the same thread.)
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor, Replicate, Shard

from xlc_ray import files
from xlc_ray.config import Config, UserError, load_config_text
from xlc_ray.dictionary.build import build
from xlc_ray.dictionary.dictionary import Dictionary
from xlc_ray.dictionary.shards import Shards
from xlc_ray.dictionary.wiring import Tying, Wiring

MARKER, SIZES = "complete.json", "files"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of every save and load of one process


def save(
    run_dir: str,
    step: int,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    keep: int,
    shards: Shards,
    background: Background | None = None,
) -> None:
    """Write a checkpoint (all ranks call this), mark it complete, then prune to the newest `keep`.

    With `background` this returns when the tensors are copied, after waiting for the checkpoint before."""
    write = functools.partial(_write, run_dir, step, facts, keep, shards.background)
    if background is None:
        write(tensors)
    else:
        background.start(write, tensors)


def _write(
    run_dir: str, step: int, facts: dict[str, Any], keep: int, group: dist.ProcessGroup | None, tensors: dict
) -> None:
    path = _path(run_dir, step)
    leader = group is None or dist.get_rank(group) == 0
    if leader:
        files.remove(path)  # a part left by an interrupted save
        files.makedirs(path)
    if group is not None:
        dist.barrier(group)
    writer = FsspecWriter(path) if files.is_url(path) else dcp.FileSystemWriter(files.local(path))
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # holds what each rank met
        with files.writing(path):
            raise next(iter(error.failures.values()))[0] from None
    if leader:
        sizes = files.sizes(path)
        if lost := sorted(_files_of(path) - sizes.keys()):
            raise UserError(
                f"{path}: {lost[0]} is not there: a rank wrote it elsewhere; put `out` on a file system that all nodes "
                "share, or give a URL"
            )
        files.write_json(files.join(path, MARKER), {"step": step, **facts, SIZES: sizes})
        _prune(run_dir, steps(run_dir)[-keep:])
    if group is not None:
        dist.barrier(group)


def _files_of(path: str) -> set[str]:
    """Names of the files that the tensors of a checkpoint lie in, as its metadata say."""
    return {where.relative_path for where in _reader(path).read_metadata().storage_data.values()}


def _prune(run_dir: str, kept: list[int]) -> None:
    """Remove what is older than the checkpoints that are kept, parts of interrupted saves too."""
    for name in files.listdir(files.join(run_dir, "checkpoints")):
        if (step := _step_of(name)) is not None and step < kept[0]:
            _remove(run_dir, step)


def _remove(run_dir: str, step: int) -> None:
    path = _path(run_dir, step)
    files.remove(files.join(path, MARKER))  # first: what is removed by half is no checkpoint
    files.remove(path)


def adopt(run_dir: str, source: str, step: int) -> None:
    """Make a copy of the checkpoint of another run, `source`, the only one of this run (one process calls this, while
    nobody trains either). The copy's facts say whose it was: `adopted_from`."""
    for name in files.listdir(files.join(run_dir, "checkpoints")):
        if (old := _step_of(name)) is not None:
            _remove(run_dir, old)
    theirs, path = _path(source, step), _path(run_dir, step)
    files.makedirs(path)
    for name in files.listdir(theirs):
        if name != MARKER:
            files.copy(files.join(theirs, name), files.join(path, name))
    files.write_json(files.join(path, MARKER), facts(source, step) | {"adopted_from": files.name(source)})


class Background:
    """Writes one checkpoint at a time in a thread, from a copy in host memory, which is kept for the next.

    The copy takes as many bytes as the checkpoint's share of this rank. All ranks start and wait at the same steps. It
    ends as a context manager, after what is being written."""

    def __init__(self):
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, False))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None

    def start(self, write: Callable[[dict[str, Tensor]], None], tensors: dict[str, Tensor]) -> None:
        """Call `write` with tensors as they are now. Waits for the write before, and raises what made it fail."""
        self.wait()
        copies = self._stager.stage(tensors)
        assert isinstance(copies, dict), "staged at once, not in a thread"
        self._running = self._thread.submit(write, copies)

    def check(self) -> None:
        """Raise what made the write fail, if it did. Does not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises what made the write fail."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._stager.close()


def steps(run_dir: str) -> list[int]:
    """Steps of the complete checkpoints, ascending, without those that are damaged."""
    return look(run_dir)[0]


def damaged(run_dir: str) -> list[str]:
    """A line for each checkpoint that was complete and is not any more: a file is missing, cut or longer."""
    return look(run_dir)[1]


def look(run_dir: str) -> tuple[list[int], list[str]]:
    """`steps` and `damaged`, of one look at the directory."""
    found: dict[int, str | None] = {}
    for name in files.listdir(files.join(run_dir, "checkpoints")):
        if (step := _step_of(name)) is None:
            continue
        path = _path(run_dir, step)
        try:
            wanted = facts(run_dir, step).get(SIZES, {})
        except FileNotFoundError:
            continue
        except UserError:
            raise
        except ValueError as error:
            found[step] = f"{path}: damaged, passed over: {MARKER}: {error}"
            continue
        sizes = files.sizes(path)
        wrong = next((file for file, size in wanted.items() if sizes.get(file) != size), None)
        what = f"{wrong} has {sizes.get(wrong, 0):,} of {wanted[wrong]:,} bytes" if wrong else ""
        found[step] = f"{path}: damaged, passed over: {what}" if wrong else None
    complete = sorted(step for step, what in found.items() if what is None)
    return complete, [what for what in found.values() if what]


def newest(run_dir: str, shards: Shards) -> int | None:
    """The step of the newest complete checkpoint, as the first rank sees it (all ranks call this): others may still
    have an older list of the directory."""
    return shards.told((steps(run_dir) or [None])[-1] if shards.first else None)


def _path(run_dir: str, step: int) -> str:
    return files.join(run_dir, "checkpoints", f"step_{step}")


def _step_of(name: str) -> int | None:
    return int(name[5:]) if name.startswith("step_") and name[5:].isdigit() else None


def facts(run_dir: str, step: int) -> dict[str, Any]:
    """What `save` was given beside tensors. Raises ValueError where it is not readable."""
    found = files.read_json(files.join(_path(run_dir, step), MARKER))
    if not isinstance(found, dict) or "step" not in found:
        raise ValueError("not of a checkpoint")
    return found


def load(run_dir: str, step: int, tensors: dict[str, Tensor], shards: Shards) -> None:
    """Fill the tensors given, in place, from a checkpoint written by any number of ranks (all ranks call this)."""
    reader = _reader(_path(run_dir, step))
    group = shards.background
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


def _reader(path: str) -> dcp.FileSystemReader:
    return FsspecReader(path) if files.is_url(path) else dcp.FileSystemReader(files.local(path))


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


def settings(run_dir: str) -> Config:
    """The settings of a run that has a checkpoint. Raises UserError where it has none; warns of damaged ones."""
    return _settings(run_dir)[0]


def _settings(run_dir: str) -> tuple[Config, list[int]]:
    """Likewise, with the steps of its checkpoints."""
    found, lost = look(run_dir)
    for line in lost:
        warnings.warn(line, stacklevel=3)
    if not found:
        raise UserError(f"{run_dir}: no complete checkpoint here (expected checkpoints/step_N/{MARKER})")
    path = files.join(run_dir, "config.yaml")
    try:
        return load_config_text(files.read_bytes(path), path), found
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None


def load_dictionary(run_dir: str, step: int | None = None) -> tuple[Dictionary, Config]:
    """The whole dictionary of a run's checkpoint at `step` (None: the newest), on the CPU in inference form, and the
    run's settings. Raises UserError where there is no such checkpoint."""
    config, found = _settings(run_dir)
    step = found[-1] if step is None else step
    if step not in found:
        raise UserError(f"{run_dir}: no complete checkpoint of step {step}; there are: {', '.join(map(str, found))}")
    wiring = wiring_from(facts(run_dir, step)["wiring"])
    dictionary = build(config.dictionary, wiring, config.seed, Shards())
    if config.train.precision == "float64":
        dictionary.double()
    load(run_dir, step, dictionary_tensors(dictionary), dictionary.shards)
    return dictionary.float().eval(), config
