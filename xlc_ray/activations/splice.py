"""Splicing: one pass of the language model in which named sites are seen, or replaced, on the way.

Under autograd gradients flow from the logits, and from whatever a visit keeps, to the tensors that visits put in: the
model itself is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.sites import locate, order_key

Visit = Callable[[Tensor], "Tensor | None"]
"""Sees a site's value [n, context, width]; returns what shall take its place, or None."""


def logits_at(
    model: LanguageModel, tokens: Tensor, attention: Tensor, visits: Mapping[str, Visit], where: Tensor
) -> Tensor:
    """Logits [where, vocabulary] of one pass over windows tokens [n, context] in which each named site goes through
    its visit. `attention` [n, context]: 1 = real token; `where` [n, context] bool. All on the model's device."""
    places = [(*locate(model.hf, site), visits[site]) for site in sorted(visits, key=order_key)]
    traced, inputs = model.trace_model, {"input_ids": tokens, "attention_mask": attention}
    with traced.trace(inputs, use_cache=False):
        for path, side, visit in places:
            _visit(traced.get(path), side, visit)
        logits = traced.output.logits[where].save()
    return logits  # noqa: RET504 (a traced block cannot return)


def substitute(rows: Mapping[str, Tensor], keep: Tensor) -> dict[str, Visit]:
    """Visits that put rows [kept, width] of each site in the place of its kept positions."""
    return {site: lambda value, new=new: put(value, keep, new) for site, new in rows.items()}


def capture(names: Iterable[str], keep: Tensor, into: dict[str, Tensor]) -> dict[str, Visit]:
    """Visits that change nothing and leave each site's kept rows [kept, width], at least float32, in `into`."""

    def visit(site: str, value: Tensor) -> None:
        into[site] = value[keep].to(torch.promote_types(value.dtype, torch.float32))

    return {site: lambda value, site=site: visit(site, value) for site in names}


def put(value: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
    """A copy of a site's value [n, context, width] with rows [kept, width] at its kept positions."""
    new = value.clone()
    new[keep] = rows.to(new.dtype)
    return new


def _visit(envoy: Any, side: str, visit: Visit) -> None:
    """Inside a trace: hand the tensor at a module's input or output to the visit, and put back what it returns."""
    served = envoy.input if side == "input" else envoy.output
    value = served[0] if isinstance(served, tuple) else served
    new = visit(value)
    if new is None:
        return
    if side == "input":
        envoy.input = new
    else:
        envoy.output = (new, *served[1:]) if isinstance(served, tuple) else new
