"""Inspection as a job: what a store or a run holds, on this machine, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator

from xlc_ray import files
from xlc_ray.activations import inspect as look
from xlc_ray.activations import summary
from xlc_ray.activations.store import Store, is_there, open_store
from xlc_ray.cluster.session import run_path
from xlc_ray.config import Model, UserError
from xlc_ray.evaluation.table import MEANINGS, show
from xlc_ray.progress import Progress
from xlc_ray.training.overview import overview


def inspect(
    path: str,
    *,
    verify: bool = False,
    against: str | None = None,
    rows: int = 8192,
    shown: int = 4,
    tokenizer: str | None = None,
) -> Iterator[str]:
    """Lines about a store or a run directory.

    Of a store: `rows` are drawn for its norms, `shown` of them (and as many outliers) traced to their text, which is
    ids without a `tokenizer` (its name or directory). `verify` reads every chunk, the held-out ones too, and `against`
    compares with another store's statistics instead. Raises UserError where something is damaged, or is not for a run.
    """
    if rows < 1 or shown < 0:
        raise UserError(f"--rows, --shown: {rows}, {shown}; allowed: 1 or more rows, 0 or more of them shown")
    path = run_path(path)
    if not files.exists(files.join(path, "config.yaml")):
        yield from _store(path, verify, against, rows, shown, tokenizer)
        return
    if verify or against or tokenizer:
        raise UserError(f"{path}: is a run; --verify, --against and --tokenizer are for stores (runs: jobs/compare.py)")
    yield from overview(path)
    evaluation = files.join(path, "eval.json")
    if files.exists(evaluation):
        found = files.read_mapping(evaluation)
        yield "evaluated: " + ", ".join(f"{name} {show(name, found.get(name))}" for name in MEANINGS)


def _store(path: str, verify: bool, against: str | None, rows: int, shown: int, tokenizer: str | None) -> Iterator[str]:
    store = open_store(path)
    yield from summary.described(store)
    if verify:
        yield _verified(store)
    if against:
        yield ""
        yield from summary.compared(store, open_store(run_path(against)))
        return
    sample = look.sample(store, rows, seed=0)
    words = _words(tokenizer)
    yield ""
    yield from summary.norms_table(store, sample)
    if shown:
        yield ""
        yield from summary.outliers(store, sample, shown, words)
        yield from summary.rows(store, sample, shown, words)
        if tokenizer is None and store.manifest.has_text:
            yield f"tokens as ids; --tokenizer NAME shows their text (model {store.manifest.model})"


def _verified(store: Store) -> str:
    held_out = files.join(store.path, "held_out")
    stores = [store, *([open_store(held_out)] if is_there(held_out) else [])]
    todo = [(one, chunk) for one in stores for chunk in range(len(one.chunk_rows))]
    tokens = 0
    with Progress("verify", "chunks", len(todo)) as progress:
        for done, (one, chunk) in enumerate(todo, 1):
            one.verify_chunk(chunk)
            tokens += one.chunk_rows[chunk]
            progress.update(done, tokens)
    how = "as their checksums say" if store.manifest.fingerprint else "readable (they have no checksums)"
    return f"verified: all {len(todo)} chunks are {how}"


def _words(tokenizer: str | None) -> summary.Words:
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids)).join("  " if len(ids) != 1 else ("", ""))
    from xlc_ray.activations.text import load_tokenizer  # with its libraries, which ids do not need

    loaded = load_tokenizer(Model(name=tokenizer))
    return lambda ids: loaded.decode(ids).replace("\n", "⏎")
