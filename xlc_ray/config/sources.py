"""Where training reads activations: a tagged union."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from xlc_ray.config.base import Name, Settings


def _server(url: str) -> str:
    if not url.startswith(("http://", "https://")) or "@" in url:
        raise ValueError(f"{url!r} should be http://host:port or https://host:port")
    return url.rstrip("/")


class Cache(Settings):
    """A local disk that keeps what was read from a URL; processes and runs may share it."""

    path: Name
    """A directory on a local disk of each node."""
    max_bytes: Annotated[int, Field(ge=1 << 20)] = 50_000_000_000
    """Bytes kept, at most; the longest unused go first."""


class Reading(Settings):
    """What all stored activations have in common."""

    slice_rows: Annotated[int, Field(ge=1)] = 64
    """Rows read in one piece: the unit that is shuffled over the whole store."""
    window_slices: Annotated[int, Field(ge=1)] = 256
    """Slices, drawn from all chunks, whose rows are mixed with each other."""
    make_if_missing: bool = False
    """Where the store is missing or incomplete, training first generates it."""
    verify: bool = True
    """Check every chunk's checksum before the first step; at a URL that reads it all, but for a server of ours."""


class StoreSource(Reading):
    """Activations in a directory (or at a URL) of chunk files."""

    kind: Literal["store"] = "store"
    """The tag of this source."""
    path: Name
    """The store: a directory or a URL that fsspec knows (s3://, gs://, hf://, http://, …)."""
    cache: Cache | None = None
    """For URLs: keep what was read on a local disk."""


class HttpSource(Reading):
    """Activations on a server (jobs/serve.py, or crosslayer-coding's). Generation writes them there."""

    kind: Literal["http"] = "http"
    """The tag of this source."""
    url: Annotated[Name, AfterValidator(_server)]
    """The server: http://host:port."""
    dataset_id: Annotated[str, Field(pattern=r"^[^?#\s]+$")]
    """The dataset there: model/dataset_split, a directory below the server's root."""
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable, on every node, that holds the server's bearer token."""

    @property
    def path(self) -> str:
        """The URL by which all else knows the store; it names the variable, never the token."""
        scheme, _, host = self.url.partition("://")
        return f"xlc+{scheme}://{f'{self.token_env}@' if self.token_env else ''}{host}/{self.dataset_id.strip('/')}"


Source = Annotated[StoreSource | HttpSource, Field(discriminator="kind")]
