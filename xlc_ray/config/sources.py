"""Where training reads activations: a tagged union."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from xlc_ray.config.base import Name, Settings


def _server(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or "@" in url or parts.path.strip("/") or parts.query or not parts.netloc:
        raise ValueError(f"{url!r} should be http://host:port or https://host:port")
    return url.rstrip("/")


class Cache(Settings):
    """A local disk that keeps what was read from a URL; processes and runs may share it."""

    path: Name
    """A directory on a local disk of each node."""
    max_bytes: Annotated[int, Field(ge=1 << 20)] = 50_000_000_000
    """Bytes kept, at most; the longest unused go first."""


class Reading(Settings):
    """What all sources have in common."""

    slice_rows: Annotated[int, Field(ge=1)] = 64
    """Rows read in one piece: the unit that is shuffled over the whole store."""
    window_slices: Annotated[int, Field(ge=1)] = 256
    """Slices, drawn from all chunks, whose rows are mixed with each other."""
    mix_chunks: Annotated[int, Field(ge=1)] | None = None
    """Draw slices from so many consecutive chunks at a time, which move on through the store; null = from all."""
    make_if_missing: bool = False
    """Where the store (live: the text and the sample) is missing or incomplete, training first generates it."""
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


class LiveSource(Reading):
    """Activations that language-model actors make while training goes on; training rows are stored nowhere."""

    # For editors: a section without kind is a store.
    model_config = ConfigDict(
        json_schema_extra={"required": ["kind"], "anyOf": [{"required": ["path"]}, {"required": ["tee"]}]}
    )

    kind: Literal["live"] = "live"
    """The tag of this source."""
    path: Name
    """A directory or URL for the text, the held-out activations and the sample; with tee it need not be given."""
    tee: Name | None = None
    """Also write the store that jobs/generate.py would make, here, for later epochs and runs."""
    sample_tokens: Annotated[int, Field(ge=1)] = 65536
    """Training rows, the first, that are made beforehand and stored: their statistics are those of the run."""
    mix_chunks: Annotated[int, Field(ge=1)] = 8  # pyrefly: ignore[bad-override]
    """Draw slices from so many consecutive chunks at a time, which move on through the text."""
    held_chunks: Annotated[int, Field(ge=2)] = 12
    """Chunks in the object store at most: those that are mixed (a little over mix_chunks) and those made ahead."""

    @model_validator(mode="before")
    @classmethod
    def _tee_is_the_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tee") is not None and values.get("path") is None:
            return values | {"path": values["tee"]}
        return values

    @model_validator(mode="after")
    def _one_directory(self) -> LiveSource:
        if self.tee not in (None, self.path):
            raise ValueError(f"tee = {self.tee} already names the directory; leave out path = {self.path}")
        return self


Source = Annotated[StoreSource | HttpSource | LiveSource, Field(discriminator="kind")]
