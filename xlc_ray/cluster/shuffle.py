"""A global shuffle as a job: both passes of activations/shuffling.py, a Ray task a chunk.

Every chunk is a pure function of the old store and the seed, so neither the number of workers nor an interruption
changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray

from xlc_ray import files
from xlc_ray.activations import store
from xlc_ray.activations.manifest import FORMAT_VERSION, Manifest
from xlc_ray.activations.shuffling import Shuffle, write_new, write_part
from xlc_ray.activations.store import Store, open_store
from xlc_ray.cluster.session import available, connect, run_path
from xlc_ray.config import UserError
from xlc_ray.progress import Progress


def shuffle(path: str, out: str, seed: int, chunk_tokens: int | None = None, workers: int | None = None) -> Manifest:
    """Write the rows of a store to `out`, an absolute path or URL, in the order of `seed`; its held-out part as it is.

    `chunk_tokens`: rows of a new chunk (as the largest old one); `workers`: chunks at once (one a CPU). A worker holds
    a chunk of all sites. Interrupted, the same call goes on. Returns the new store's manifest. Raises
    UserError where `path` has no store or one of int8, or `out` something else.
    """
    if seed < 0:
        raise UserError(f"--seed: {seed}; allowed: 0 or more")
    given = {"--workers": workers, "--chunk-tokens": chunk_tokens}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"{name}: {value}; allowed: 1 or more")
    old = open_store(run_path(path))
    if old.dtype == "int8":
        raise UserError(f"{path}: int8 rows would be rounded a second time; shuffle a store of another generate.dtype")
    how = Shuffle(tuple(old.chunk_rows), seed, chunk_tokens or max(old.chunk_rows))
    identity, parts = _identity(old, how), files.join(out, "parts")
    if files.listdir(parts) and not files.exists(files.join(parts, "identity.json")):
        raise UserError(f"{parts}: is of no shuffle; choose another --out")
    store.begin(out, identity)
    if not files.exists(files.join(out, "manifest.json")):
        connect()
        workers = workers or max(1, int(available("CPU")))
        none = [()] * len(old.chunk_rows)
        _pass("sort", write_part, how, old, parts, identity | {"parts": 2}, old.chunk_rows, none, workers)
        pieces = ((before,) for before in how.pieces())
        _pass("collect", write_new, how, open_store(parts), out, identity, how.plan, pieces, workers)
    _copy_held_out(old.path, out)
    files.remove(parts)
    return open_store(out).manifest


def _identity(old: Store, how: Shuffle) -> dict[str, Any]:
    """What decides the new store: what decided the old one, and the order."""
    manifest = old.manifest
    return manifest.identity | {
        "format_version": FORMAT_VERSION,
        "model": manifest.identity.get("model", {"name": manifest.model}),
        "sites": manifest.sites,
        "dtype": manifest.dtype,
        "tokens": manifest.tokens,
        "chunk_tokens": how.step,
        "shuffled": {"seed": how.seed, "of": manifest.fingerprint or files.name(old.path)},
    }


def _pass(
    label: str,
    write: Callable[..., None],
    how: Shuffle,
    source: Store,
    path: str,
    identity: dict[str, Any],
    plan: Sequence[int],
    extras: Iterable[tuple[Any, ...]],
    workers: int,
) -> None:
    """Make the chunks of a store that are missing, by `write(how, source, path, index, *extra)`, and complete it."""
    store.begin(path, identity)
    store.write_plan(path, plan)
    missing = set(store.missing_chunks(path, len(plan)))
    task, read = ray.remote(_task).options(num_cpus=1), ray.put(source)
    waiting: dict[ray.ObjectRef, int] = {}
    done, tokens = len(plan) - len(missing), sum(size for i, size in enumerate(plan) if i not in missing)
    with Progress(label, "chunks", len(plan), done, tokens) as progress:

        def finish_one() -> None:
            nonlocal done, tokens
            (ready,), _ = ray.wait(list(waiting))
            ray.get(ready)
            done, tokens = done + 1, tokens + plan[waiting.pop(ready)]
            progress.update(done, tokens)

        for index, extra in enumerate(extras):
            if index in missing:
                if len(waiting) == workers:
                    finish_one()
                waiting[task.remote(write, how, read, path, index, *extra)] = index
        while waiting:
            finish_one()
    store.finish(path, identity)


def _task(write: Callable[..., None], how: Shuffle, source: Store, path: str, index: int, *extra: Any) -> None:
    write(how, source, path, index, *extra)


def _copy_held_out(old: str, new: str) -> None:
    """The held-out part of a store as it is, file by file, by the names that its manifest implies: servers list no
    directories. Raises UserError where a chunk is missing, or the server gives no files."""
    source, target = files.join(old, "held_out"), files.join(new, "held_out")
    if not store.is_there(source):
        return
    complete = [name for name in ("index.bin", "manifest.json") if files.exists(files.join(source, name))]
    if not complete:
        raise UserError(f"{source}: this server gives rows, but no files; copy the dataset, and shuffle the copy")
    if files.exists(files.join(target, complete[-1])):
        return
    manifest = open_store(source).manifest
    chunks = {chunk.file for chunk in manifest.chunks}
    for name in store.names(manifest):
        try:
            content = files.read_bytes(files.join(source, name))
        except FileNotFoundError:
            if name in chunks:
                raise UserError(f"{files.join(source, name)}: the chunk is missing") from None
            continue
        files.write_bytes(files.join(target, name), content)
