"""Settings of the language model, its text, and the activations made from both."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from xlc_ray.config.base import Fraction, Name, Settings

Dtype = Literal["float32", "float16", "bfloat16"]


def _pairs_of_tokens(value: Any) -> Any:
    pairs = value if isinstance(value, list | tuple) else [None]
    tokens = [t for pair in pairs for t in (pair if isinstance(pair, list | tuple) and len(pair) == 2 else [None])]
    if all((type(t) is int and t >= 0) or (isinstance(t, str) and t) for t in tokens):
        return value
    raise ValueError(f"{reprlib.repr(value)} should be pairs of tokens or ids, such as [['<|im_start|>', 198]]")


TokenPairs = Annotated[tuple[tuple[int | str, int | str], ...], BeforeValidator(_pairs_of_tokens)]
"""Pairs of tokens, each as text or as its id."""


class Model(Settings):
    """The language model whose activations are explained."""

    section: ClassVar[str] = "model"
    """Where these settings stand, for messages."""

    name: Name
    """A Hugging Face name or a local directory."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Dtype = "float32"
    """Precision of the forward pass."""
    trust_remote_code: bool = False
    """Allow the model's repository to run its own code."""


class BaseOf(Model):
    """The model that `model` was fine-tuned from. It reads the same tokens; its sites are named resid_post.2@base."""

    section: ClassVar[str] = "base_model"

    replace_tokens: TokenPairs = ()
    """Pairs [token, other]: control tokens that the base never saw; it reads the other at their positions."""


class Documents(Settings):
    """A dataset, and which of its columns holds the documents."""

    dataset: Name
    """A Hugging Face dataset, `save_to_disk` directory, or file, directory, glob of .txt .jsonl .json .csv .parquet."""
    subset: str | None = None
    """The dataset's configuration name."""
    split: Name = "train"
    """The dataset's split."""
    column: Name = "text"
    """Holds text (of .txt files: always `text`), lists of token ids, or lists of messages {role, content}, which the
    tokenizer's chat template renders."""


class Share(Documents):
    """One dataset of a mixture."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the documents (not of the tokens), relative to the weights of the others."""


class Text(Documents):
    """The text the model reads, cut into windows of `context` tokens."""

    dataset: Name | None = None
    """A Hugging Face dataset, `save_to_disk` directory, or file, directory, glob of .txt .jsonl .json .csv .parquet."""
    mixture: Annotated[tuple[Share, ...], Field(min_length=1)] | None = None
    """Instead of `dataset`: several, interleaved document by document; it ends with the first of them that ends."""
    streaming: bool = False
    """Read a Hub dataset without downloading it whole."""
    paragraphs: Annotated[int, Field(ge=1)] = 20
    """A .txt file is cut into documents of this many paragraphs (separated by blank lines)."""
    context: Annotated[int, Field(ge=2)] = 128
    """Tokens in a window."""
    windows: Literal["packed", "one_per_document"] = "packed"
    """packed: documents are joined, each ended by EOS, and cut; one_per_document: each is a window, cut or padded."""
    prepend_bos: bool = True
    """Begin every window with the tokenizer's BOS (or EOS) token."""
    ignore_first: Annotated[int, Field(ge=0)] = 1
    """The first n tokens of each window are read by the model but never stored, trained on, or scored."""
    ignore_special: bool = True
    """Likewise for BOS, EOS, padding and other special tokens, wherever they stand."""
    held_out_fraction: Fraction = 0.05
    """Share of the documents, chosen by a hash of their text, that training never sees."""

    @model_validator(mode="after")
    def _keeps_something(self) -> Text:
        if self.ignore_first >= self.context:
            raise ValueError(f"ignore_first = {self.ignore_first} leaves nothing of windows of {self.context} tokens")
        return self

    @model_validator(mode="after")
    def _has_one_origin(self) -> Text:
        if (self.dataset is None) == (self.mixture is None):
            raise ValueError("give either dataset or mixture, a list of {dataset, subset, split, column, weight}")
        if self.mixture is not None:
            for name in ("subset", "split", "column"):
                if getattr(self, name) != Documents.model_fields[name].default:
                    raise ValueError(f"{name} does not apply to a mixture; give it with each dataset of the mixture")
        return self

    @property
    def label(self) -> str:
        """The names of its datasets."""
        return " + ".join(str(part.dataset) for part in self.parts())

    def parts(self) -> tuple[Text, ...]:
        """Each dataset as a Text of its own: itself, or those of the mixture."""
        if self.mixture is None:
            return (self,)
        origins = [share.model_dump(exclude={"weight"}) for share in self.mixture]
        return tuple(self.model_copy(update={"mixture": None, **origin}) for origin in origins)

    def renamed(self, rename: Callable[[str], str]) -> dict[str, Any]:
        """The override that gives each dataset the name `rename(name)`."""
        if self.mixture is None:
            return {"text.dataset": rename(str(self.dataset))}
        return {"text.mixture": [s.model_dump(mode="json") | {"dataset": rename(s.dataset)} for s in self.mixture]}


class Generate(Settings):
    """How many activations to make, and how to write them."""

    tokens: Annotated[int, Field(ge=1)]
    """Training tokens (rows) to store: met exactly, all distinct."""
    held_out_tokens: Annotated[int, Field(ge=1)]
    """Tokens to store from held-out documents, under `held_out/`."""
    chunk_tokens: Annotated[int, Field(ge=1)] = 16384
    """Rows of a chunk file, at most."""
    dtype: Dtype | Literal["bfloat16_zstd", "int8"] = "bfloat16"
    """Precision on disk; bfloat16 is kept bit-exact, by bfloat16_zstd in fewer bytes, for stores at URLs; int8 has a
    scale a channel and keeps outliers as they are."""
    sites: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Sites to store; null = those that the wiring reads and writes."""
    batch_windows: Annotated[int, Field(ge=1)] = 32
    """Windows in one forward pass of the model."""
    documents_per_task: Annotated[int, Field(ge=1)] = 64
    """Documents that one tokenising task packs into windows; part of the data's identity."""
