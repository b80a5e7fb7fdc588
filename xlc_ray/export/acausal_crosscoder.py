"""Crosscoders of neelnanda-io/Crosscoders, in: one over the residual stream of all layers, with relu.

{n}.pt, {n}_cfg.json    W_enc [L, d, F], b_enc [F], W_dec [F, L, d], b_dec [L, d];  model_name, site, dict_size, …

That program divides each layer by a number (E‖x‖ / √d of GPT-2) that the file does not hold: what is loaded reads and
writes activations so divided.
"""

from __future__ import annotations

import re

from xlc_ray import files
from xlc_ray.dictionary import Dictionary
from xlc_ray.export.plain import crosscoder
from xlc_ray.export.weights import read_tensors


def detect(path: str, names: set[str]) -> bool:
    """Whether a directory with these files is one of that program."""
    return bool(_saved(names))


def read(path: str) -> Dictionary:
    """The crosscoder in such a directory, as it was saved last."""
    last = max(_saved(set(files.listdir(path))))
    name, facts = files.join(path, f"{last}.pt"), files.read_mapping(files.join(path, f"{last}_cfg.json"))
    site = facts.get("site", "resid_post")
    return crosscoder(name, read_tensors(name), lambda layers: [f"{site}.{layer}" for layer in range(layers)])


def _saved(names: set[str]) -> list[int]:
    """The numbers n of which there are both files."""
    found = [int(number[1]) for name in names if (number := re.fullmatch(r"(\d+)\.pt", name))]
    return [n for n in found if f"{n}_cfg.json" in names]
