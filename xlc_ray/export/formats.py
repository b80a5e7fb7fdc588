"""Every format by name: which program's directory is this, and who reads and writes it."""

from __future__ import annotations

from collections.abc import Callable

from xlc_ray import files
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Dictionary, checkpoint
from xlc_ray.export import (
    acausal_crosscoder,
    circuit_tracer,
    crosslayer_coding,
    dictionary_learning,
    saelens,
    transcoder_circuits,
)

WRITERS: dict[str, Callable[[Dictionary, Config, str], Dictionary]] = {
    module.NAME: module.write for module in (circuit_tracer, saelens, dictionary_learning)
}
READERS: dict[str, tuple[Callable[[str, set[str]], bool], Callable[[str], Dictionary]]] = {
    "run": (lambda path, names: "checkpoints" in names, lambda path: checkpoint.load_dictionary(path)[0]),
    "circuit_tracer": (circuit_tracer.detect, circuit_tracer.read),
    "saelens": (saelens.detect, saelens.read),
    "dictionary_learning": (dictionary_learning.detect, dictionary_learning.read),
    "crosslayer_coding": (crosslayer_coding.detect, crosslayer_coding.read),
    "transcoder_circuits": (transcoder_circuits.detect, transcoder_circuits.read),
    "acausal_crosscoder": (acausal_crosscoder.detect, acausal_crosscoder.read),
}
"""In the order in which they are tried: (is it this?, read it)."""


def detect(path: str) -> str:
    """The name of the format of a directory. Raises UserError where it is none."""
    names = set(files.listdir(path))
    for name, (fits, _) in READERS.items():
        if fits(path, names):
            return name
    found = f"holds {', '.join(sorted(names)[:5])}" if names else "is empty or not there"
    raise UserError(f"{path}: no dictionary: it {found}; known: a run directory, {', '.join(list(READERS)[1:])}")


def load(path: str) -> Dictionary:
    """The dictionary in a run directory or in any directory that another program wrote, on the CPU in inference form.

    Raises UserError where nothing is known, or where what is there cannot be expressed here."""
    return READERS[detect(path)][1](path).eval()
