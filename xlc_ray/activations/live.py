"""A store whose training rows are made while training goes on: the text of all chunks, the activations of the first.

Its directory is that of a store that is not complete: plan and text of every chunk (writing.py), a complete held-out
part, and the chunks of the *sample*, the first that hold `sample_tokens` rows together. Statistics are those of the
sample. Each chunk is a pure function of its text, so it is all one who makes it, when, or how often; cluster/live.py
does. With `tee` chunks are kept, and the directory ends as the store that generation would have made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xlc_ray import files
from xlc_ray.activations.manifest import FORMAT_VERSION, ChunkRecord, Manifest, SiteStatistics
from xlc_ray.activations.store import Store
from xlc_ray.activations.writing import complete_chunks, fingerprint, merged_moments, read_plan
from xlc_ray.config import UserError


def sample_chunks(chunk_rows: Sequence[int], tokens: int) -> int:
    """Chunks from the first on that hold so many rows together; all where they are fewer."""
    return int(min(len(chunk_rows), 1 + np.searchsorted(np.cumsum(chunk_rows), tokens)))


def is_ready(path: str, sample_tokens: int) -> bool:
    """Whether live training can start from a directory: text, held-out part and sample are there."""
    return _sample(path, read_plan(path), sample_tokens) is not None


def _sample(path: str, rows: Sequence[int] | None, tokens: int) -> list[ChunkRecord] | None:
    """Records of the sample; None where it, text or held-out part are not complete."""
    # By its manifest, not by store.is_there: of a store of ours, index.bin comes before it is complete.
    if rows is None or not files.exists(files.join(path, "held_out", "manifest.json")):
        return None
    count = sample_chunks(rows, tokens)
    found = list(complete_chunks(path, count).values())
    return found if len(found) == count else None


def open_live(path: str, sample_tokens: int) -> LiveStore:
    """Open such a directory. Raises UserError where something is missing."""
    rows = read_plan(path)
    stored = _sample(path, rows, sample_tokens)
    if rows is None or stored is None:
        raise UserError(f"{path}: text, held-out part or sample of live training are not complete; generate again")
    identity = files.read_mapping(files.join(path, "identity.json"))
    coming = [_coming(index, rows[index]) for index in range(len(stored), len(rows))]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        sites=identity["sites"],
        dtype=identity["dtype"],
        chunks=(*stored, *coming),
        tokens=sum(rows),
        model=identity["model"]["name"],
        fingerprint=fingerprint(identity),
        identity=identity,
    )
    return LiveStore(path, manifest, sample=len(stored))


def _coming(index: int, rows: int) -> ChunkRecord:
    return ChunkRecord(index=index, file="", rows=rows, bytes=0, checksum=None, offsets={})


@dataclass(frozen=True)
class LiveStore(Store):
    """`manifest` has all chunks; rows of the first `sample` of them can be read."""

    sample: int = 0

    @property
    def kept_rows(self) -> list[int]:
        return self.chunk_rows[: self.sample]

    def _check(self, chunk: np.ndarray, row: np.ndarray, sites: Sequence[str]) -> None:
        if len(chunk) and int(chunk.max()) >= self.sample:
            raise UserError(
                f"source.kind: live: rows beyond the sample at {self.path} are there only while jobs/train.py runs; "
                "give a store: source.kind: store"
            )
        super()._check(chunk, row, sites)

    def statistics(self) -> dict[str, SiteStatistics]:
        """Mean, unbiased deviation and mean norm of every site over the sample."""
        sample = self.manifest.chunks[: self.sample]
        return {site: moments.statistics() for site, moments in merged_moments(self.path, sample).items()}

    def verify(self) -> None:
        """Read every chunk of the sample whole. Raises UserError naming the first that is damaged."""
        for chunk in range(self.sample):
            self.verify_chunk(chunk)
