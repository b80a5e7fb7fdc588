"""Activations from each source into a training rank, against a raw read of the same bytes.

    python tests/benchmarks/data.py --json FILE

Stores of bfloat16, bfloat16_zstd and int8 at GPT-2's shape (12 sites in and out, 768 wide), and one of bfloat16 of as
many bytes with 64 layers, are made of random rows. A pass is the next epoch of batches that `training/feed.py` hands to
a rank, in a process of its own, in the order that training has; nothing is computed. In every round each source takes
one pass. `raw` reads the first store's files with `numpy.fromfile`, `raw_buffer` likewise into 4 MB that are used
again, which stay in the processor's cache where a training rank's batches cannot. `straddling` is `local` with batches
that do not divide a window. `cold` passes begin with the files' pages dropped from memory (Linux), so that the disk
takes part.

`store_share_of_raw` is `local` over `raw`, in bytes a second; `layers_share` is `many_layers` over `local`, in the
same; `tp2_cost_over_tp1` is the time for a token with two ranks over that with one; `live_share` is live.py's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import live, results, timing
from tests.benchmarks.serve import server
from xlc_ray.activations import source, store
from xlc_ray.activations.order import Order
from xlc_ray.config.sources import HttpSource
from xlc_ray.dictionary import Shards
from xlc_ray.training.feed import Shape, shared

CHUNKS = 4
BUFFER = 1 << 22
STORES = ("gpt2", "many_layers", "zstd", "int8")


def make(path: str, layers: int, width: int, rows: int, dtype: str) -> None:
    """A store of `rows` rows in CHUNKS chunks; the sites of a chunk are one random array, turned."""
    sites = {f"{kind}.{layer}": width for layer in range(layers) for kind in ("mlp_in", "mlp_out")}
    identity = {"model": {"name": "random"}, "sites": sites, "dtype": dtype, "chunk_tokens": rows // CHUNKS}
    store.begin(path, identity)
    for index in store.missing_chunks(path, CHUNKS):
        values = torch.randn(rows // CHUNKS, width, generator=torch.Generator().manual_seed(index))
        array = store.encode(values, dtype, path)
        store.write_chunk(path, index, {site: np.roll(array, n, axis=0) for n, site in enumerate(sites)}, dtype)
    store.write_plan(path, [rows // CHUNKS] * CHUNKS)
    store.finish(path, identity)


def chunk_files(path: str) -> list[str]:
    """The chunk files of a store."""
    return [f"{path}/{chunk.file}" for chunk in store.open_store(path).manifest.chunks]


def drop(path: str) -> None:
    """Forget what memory holds of a store's chunks."""
    for name in chunk_files(path):
        file = os.open(name, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_fresh(path: str) -> None:
    """All bytes of a store's chunks, each file into memory of its own."""
    for name in chunk_files(path):
        np.fromfile(name, np.uint8)


def read_buffer(path: str) -> None:
    """All bytes, into a small buffer."""
    buffer = bytearray(BUFFER)
    for name in chunk_files(path):
        with open(name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def epochs(path: str, batch: int, slices: int, shards: Shards) -> Iterator[None]:
    """All batches, an epoch at a time, as a rank of training gets them."""
    data = store.open_store(path)
    order = Order(data.chunk_rows, 0, 64, slices)
    widths, each = data.manifest.sites, order.epoch_rows // batch
    count = 1000 * each

    def read(memory: source.Memory) -> Iterator[dict[str, torch.Tensor]]:
        return source.batches(data, order, list(widths), source.Share(batch, 0, count), memory)

    shape = Shape(widths, batch, store.torch_dtype(data.dtype), 64 * slices)
    found = shared(read, count, shape, shards, torch.device("cpu"))
    while True:
        for batches in itertools.islice(found, each):
            assert len(batches) == len(widths)
        yield


READS: dict[str, Callable[[str], None]] = {"raw": read_fresh, "raw_buffer": read_buffer}


def serve_orders(rank: int, ranks: int, o: argparse.Namespace, meeting: str, orders: Any) -> None:
    """A rank: passes as it is told, until it is told None."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    shards = Shards.of_world(ranks, "cpu") if ranks > 1 else Shards()
    streams: dict[tuple[str, str], Iterator[None]] = {}
    while (order := orders.recv()) is not None:
        kind, path = order
        if kind in READS:
            READS[kind](path)
        else:
            if order not in streams:
                share = o.layers / o.many_layers if "many_layers" in path else 1  # batches and windows of as many bytes
                batch, slices = max(1, int(o.batch * share)), max(1, int(o.window_slices * share))
                batch = batch * 7 // 8 if kind == "straddling" else batch
                streams[order] = epochs(path, batch, slices, shards)
            next(streams[order])
        orders.send(True)
    dist.destroy_process_group()


@contextmanager
def replica(ranks: int, o: argparse.Namespace) -> Iterator[Callable[[str, str], None]]:
    """A replica of so many ranks: does a pass, given what and of which store."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = zip(*(context.Pipe() for _ in range(ranks)), strict=True), []
        ours, theirs = pipes
        for rank, pipe in enumerate(theirs):
            args = (rank, ranks, o, f"file://{folder}/meeting", pipe)
            processes.append(context.Process(target=serve_orders, args=args, daemon=True))
            processes[-1].start()
            pipe.close()

        def do(kind: str, path: str) -> None:
            for pipe in ours:
                pipe.send((kind, path))
            for pipe in ours:
                pipe.recv()

        yield do
        for pipe in ours:
            pipe.send(None)
        for process in processes:
            process.join()


def run(o: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Seconds of each source's passes, and what follows from them."""
    row_bytes = 2 * 2 * o.layers * o.width
    step = CHUNKS * o.batch
    rows = max(step, int(o.bytes) // row_bytes // step * step)
    fewer = max(1, rows // CHUNKS * o.layers // o.many_layers) * CHUNKS
    shapes = {
        "gpt2": (o.layers, rows, "bfloat16"),
        "many_layers": (o.many_layers, fewer, "bfloat16"),
        "zstd": (o.layers, rows, "bfloat16_zstd"),
        "int8": (o.layers, rows, "int8"),
    }
    paths = {name: f"{folder}/{name}/random" for name in STORES}
    for name, (layers, tokens, dtype) in shapes.items():
        make(paths[name], layers, o.width, tokens, dtype)
    with replica(1, o) as one, replica(2, o) as two, server(folder) as (url, _):
        served = HttpSource(url=url, dataset_id="gpt2/random").path

        def cold(do: Callable[[str, str], None], kind: str) -> None:
            drop(paths["gpt2"])
            do(kind, paths["gpt2"])

        passes: dict[str, timing.Step] = {
            "raw": lambda _: one("raw", paths["gpt2"]),
            "raw_buffer": lambda _: one("raw_buffer", paths["gpt2"]),
            "local": lambda _: one("batches", paths["gpt2"]),
            "straddling": lambda _: one("straddling", paths["gpt2"]),
            "many_layers": lambda _: one("batches", paths["many_layers"]),
            "zstd": lambda _: one("batches", paths["zstd"]),
            "int8": lambda _: one("batches", paths["int8"]),
            "http": lambda _: one("batches", served),
            "tp2": lambda _: two("batches", paths["gpt2"]),
        }
        if o.cold:
            passes["raw_cold"] = lambda _: cold(one, "raw")
            passes["local_cold"] = lambda _: cold(one, "batches")
        for each in passes.values():  # pages, imports and connections: not counted
            each(0)
        seconds = timing.rounds(passes, o.repeats, torch.device("cpu"))
    tokens = {name: fewer if name == "many_layers" else rows for name in passes}
    size = {name: sum(c.bytes for c in store.open_store(path).manifest.chunks) for name, path in paths.items()}
    return figures(seconds, tokens, size)


def figures(seconds: dict[str, list[float]], tokens: dict[str, int], size: dict[str, int]) -> dict[str, Any]:
    """Medians, and the ratios round by round."""
    stored = {name: size.get(name, size["gpt2"]) for name in seconds}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    a_byte = {name: [s / stored[name] for s in values] for name, values in seconds.items()}
    spread = {
        "store_share_of_raw": timing.ratio(seconds["raw"], seconds["local"]),
        "layers_share": timing.ratio(a_byte["local"], a_byte["many_layers"]),
        "tp2_cost_over_tp1": timing.ratio(seconds["tp2"], seconds["local"]),
    }
    if "local_cold" in seconds:
        spread["store_share_of_raw_cold"] = timing.ratio(seconds["raw_cold"], seconds["local_cold"])
    return {
        **{name: found["median"] for name, found in spread.items()},
        "spread": spread,
        "gb_per_s": {name: stored[name] / middle[name] / 1e9 for name in seconds},
        "tokens_per_s": {name: tokens[name] / middle[name] for name in seconds},
        "bytes_a_token": {name: stored[name] / tokens[name] for name in seconds},
        "seconds": seconds,
    }


def table(found: dict[str, Any]) -> str:
    """What people read."""
    lines = [f"{'':<12}{'GB/s':>8}{'tokens/s':>12}{'bytes a token':>15}"]
    for name, speed in found["gb_per_s"].items():
        lines.append(
            f"{name:<12}{speed:>8.3f}{found['tokens_per_s'][name]:>12,.0f}{found['bytes_a_token'][name]:>15,.0f}"
        )
    for name, spread in found["spread"].items():
        lines.append(f"{name} {spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})")
    return "\n".join(lines)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Settings of the run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--many-layers", type=int, default=64)
    p.add_argument("--width", type=int, default=768)
    p.add_argument("--bytes", type=float, default=1.2e9, help="of a store of bfloat16")
    p.add_argument("--batch", type=int, default=1024, help="tokens")
    p.add_argument("--window-slices", type=int, default=64, help="as source.window_slices")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--folder", metavar="DIR", help="keep the stores here, for the next run")
    p.add_argument("--cold", action=argparse.BooleanOptionalAction, default=hasattr(os, "posix_fadvise"))
    p.add_argument("--live", metavar="CONFIG", default=str(live.ROOT / "configs/quickstart.yaml"),
                   help="whose live training is compared with its parts (live.py; minutes); '' for none")  # fmt: skip
    results.option(p)
    return p.parse_args(words)


def main() -> None:
    o = arguments()
    with tempfile.TemporaryDirectory() as folder:
        found = run(o, o.folder or folder)
    shown = table(found)
    if o.live:
        alive = live.run(o.live, live.STEPS)
        found |= {"live_share": alive["live_share"], "live": alive}
        shown += "\n" + live.table(alive)
    results.deliver(found, shown, o.json)


if __name__ == "__main__":
    main()
