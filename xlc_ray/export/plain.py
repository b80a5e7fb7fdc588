"""The dictionary that other programs can hold: raw units, and one of four gates in inference form.

    relu        f = max(pre, 0)
    jumprelu    f = pre · 1[pre > θ]                       θ [F] of each group
    topk        max(pre, 0) of the k largest of a token, in each group
    gated       f = max(e^r pre + b_mag, 0) · 1[pre + b_gate > 0]

What shares its places between tokens or groups (BatchTopK, a pool over groups) has a threshold at inference, and so
is a jumprelu here: θ, or θ / n_i where entries compete by activation times decoder norm n_i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from xlc_ray import files
from xlc_ray.config import UserError
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Dictionary, Wiring, gates
from xlc_ray.dictionary.fold import fold, untie
from xlc_ray.dictionary.gated import Gated
from xlc_ray.dictionary.selection import LEAST
from xlc_ray.dictionary.shards import Shards
from xlc_ray.export.weights import pick

Weights = tuple[Tensor, Tensor, Tensor]
"""W_enc [F, R], b_enc [F], W_dec [F, W] of a group."""


def plain(dictionary: Dictionary) -> Dictionary:
    """A new whole dictionary in raw units with the gate ReLU, JumpReLU, Gated or TopK (a budget each token and group).

    Features and reconstructions are equal, but that a TopK which ranks by decoder norm gets unit decoder rows, so that
    its features are in units of n_i. Raises UserError for a gate that no format knows.
    """
    dictionary = untie(dictionary) if dictionary.wiring.tied else dictionary
    gate, parts = dictionary.gate, [(g.W_enc, g.b_enc, g.W_dec) for g in dictionary.groups]
    match gate:
        case gates.ReLU():
            simple: gates.Gate = gates.ReLU(dictionary.sizes, Shards())
        case gates.JumpReLU():
            simple = jumprelu([gate.threshold(g).detach() for g in range(len(parts))])
        case Gated():
            simple = gated(list(zip(gate.b_gate, gate.r_mag, gate.b_mag, strict=True)))
        case gates.TopK() if gate.zscores:
            raise UserError("export: no format here ranks by z-scores; the run itself can be loaded")
        case gates.TopK(shared=True):
            simple = jumprelu([_inference_threshold(gate, g, part[2]) for g, part in enumerate(parts)])
        case gates.TopK():
            simple = topk(dictionary.sizes, gate.k)
            parts = [unit_rows("dictionary", *part) for part in parts] if gate.needs_norms else parts
        case _:
            raise UserError(f"export: no format here has the gate {type(gate).__name__}; the run itself can be loaded")
    same = assemble("dictionary", dictionary.wiring, parts, dictionary.b_dec, simple, list(dictionary.W_skip))
    for name in ("read_mean", "read_scale", "write_mean", "write_scale"):
        setattr(same, name, getattr(dictionary, name))
    return fold(same)


def _inference_threshold(gate: gates.TopK, g: int, W_dec: Tensor) -> Tensor:
    theta = gate.inference_threshold[0 if gate.over_groups else g].expand(W_dec.shape[0])
    return theta / W_dec.detach().norm(dim=1).clamp(min=LEAST) if gate.needs_norms else theta


@torch.no_grad()
def unit_rows(where: str, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Weights:
    """The same group with decoder rows of norm 1 and features times their former norm n_i, for gates that allow it.

    A row of zeros becomes some unit row, and its feature is never active. Raises UserError, naming `where`, where the
    weights are not of the same features."""
    _check(where, "b_enc", b_enc, W_enc.shape[:1])
    _check(where, "W_dec", W_dec, (*W_enc.shape[:1], *W_dec.shape[-1:]))
    norms = W_dec.norm(dim=1)
    rows = torch.where((norms > 0).unsqueeze(1), W_dec / norms.clamp(min=LEAST).unsqueeze(1), 0)
    rows[:, 0] += (norms == 0).to(rows.dtype)
    return W_enc * norms.unsqueeze(1), b_enc * norms, rows


def uncentred(where: str, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """b_enc [F] for features of x where the given ones are of x - b_dec: b_enc - W_enc b_dec, W_enc [F, R], b_dec [R].

    Raises UserError, naming `where`, on shapes that do not fit."""
    _check(where, "b_enc", b_enc, W_enc.shape[:1])
    _check(where, "b_dec", b_dec, W_enc.shape[1:])
    return (b_enc.double() - W_enc.double() @ b_dec.double()).to(b_enc.dtype)


# ---------------------------------------------------------------- making one


def assemble(
    where: str, wiring: Wiring, groups: Sequence[Weights], b_dec: Tensor, gate: gates.Gate, skips: Sequence[Tensor] = ()
) -> Dictionary:
    """A dictionary of given weights, without normalisation, in inference form.

    b_dec [W]: all written sites, side by side; skips: W_skip of each group [written width, read width]. Raises
    UserError, naming `where`, on shapes that do not fit."""
    with torch.device("meta"):
        made = Dictionary(wiring, [len(b) for _, b, _ in groups], gate, Shards(), _default("products"))
    for g, (group, weights) in enumerate(zip(made.groups, groups, strict=True)):
        for name, value in zip(("W_enc", "b_enc", "W_dec"), weights, strict=True):
            _put(where, group, name, value, f"{name} of group {g}")
    _put(where, made, "b_dec", b_dec, "b_dec")
    for g, value in enumerate(skips):
        _put(where, made.W_skip, str(g), value, f"W_skip of group {g}")
    for name, value in dict(made.named_buffers(recurse=False)).items():
        whole = torch.zeros if name.endswith("mean") else torch.ones
        setattr(made, name, whole(value.shape, dtype=made.b_dec.dtype))
    return made.eval()


def _default(name: str) -> str:
    return settings.Dictionary.model_fields[name].default


def _put(where: str, module: object, name: str, value: Tensor, what: str) -> None:
    _check(where, what, value, getattr(module, name).shape)
    setattr(module, name, nn.Parameter(value.detach()))


def _check(where: str, what: str, value: Tensor, wanted: Sequence[int]) -> None:
    if value.shape != tuple(wanted):
        raise UserError(f"{where}: {what} is {list(value.shape)}, but {list(wanted)} is what fits the rest")


def crosscoder(where: str, tensors: Mapping[str, Tensor], sites_of: Callable[[int], Sequence[str]]) -> Dictionary:
    """An acausal relu crosscoder of L sites, `sites_of(L)`, from W_enc [L, d, F], b_enc [F], W_dec [F, L, d] and
    b_dec [L, d]. Raises UserError, naming `where`, where one of them is missing or of a shape that does not fit."""
    W_enc, b_enc, W_dec, b_dec = pick(tensors, where, "W_enc", "b_enc", "W_dec", "b_dec")
    if W_enc.ndim != 3 or W_dec.ndim != 3 or b_dec.ndim != 2:
        raise UserError(f"{where}: expected W_enc [L, d, F], W_dec [F, L, d] and b_dec [L, d]")
    count, width = b_dec.shape
    sites = tuple(sites_of(count))
    wiring = Wiring(dict.fromkeys(sites, width), (sites,), (sites,))
    weights = (W_enc.permute(2, 0, 1).flatten(1), b_enc, W_dec.flatten(1))
    return assemble(where, wiring, [weights], b_dec.flatten(), gates.ReLU([len(b_enc)], Shards()))


def jumprelu(thresholds: Sequence[Tensor]) -> gates.JumpReLU:
    """The gate with these thresholds [F], none below 0."""
    own = settings.JumpReluGate()
    gate = gates.JumpReLU([len(t) for t in thresholds], Shards(), own.threshold, own.bandwidth, "direct")
    for parameter, value in zip(gate.raw_threshold, thresholds, strict=True):
        parameter.data = value.detach().clamp(min=0)
    return gate


def gated(groups: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Gated:
    """The gate with b_gate, r_mag, b_mag [F] of each group."""
    gate = Gated([len(b) for b, _, _ in groups], Shards(), settings.GatedGate().auxiliary)
    for g, values in enumerate(groups):
        for name, value in zip(("b_gate", "r_mag", "b_mag"), values, strict=True):
            getattr(gate, name)[g].data = value.detach()
    return gate


def topk(sizes: list[int], k: int) -> gates.TopK:
    """The k largest of each token and group."""
    own = settings.TopKGate(k=k)
    return gates.TopK(sizes, Shards(), k, False, False, False, False, own.threshold_start, own.threshold_decay)


def batchtopk(sizes: list[int], k: int, thresholds: Tensor) -> gates.TopK:
    """k a token and group on average over the batch; `thresholds` [groups]: those of inference."""
    own = settings.BatchTopKGate(k=k)
    gate = gates.TopK(sizes, Shards(), k, True, False, False, False, own.threshold_start, own.threshold_decay)
    gate.inference_threshold.copy_(thresholds.clamp(min=0))
    return gate


# ---------------------------------------------------------------- what a format can hold


def shape_of(wiring: Wiring) -> str:
    """sae, transcoder, clt, crosscoder (acausal) or other: by what is read and written, whatever it was made from."""
    reads, writes = wiring.reads, wiring.writes
    if wiring.groups == 1 and reads == writes and len(reads[0]) > 1:
        return "crosscoder"
    if any(len(row) > 1 for row in reads):
        return "other"
    if all(len(row) == 1 for row in writes) and len(set(writes)) == len(writes):
        if reads == writes:
            return "sae"
        return "other" if set(reads) & set(writes) else "transcoder"
    ragged = all(row == writes[0][g:] for g, row in enumerate(writes)) and len(writes[0]) == wiring.groups
    return "clt" if ragged and not {row[0] for row in reads} & set(writes[0]) else "other"


def folder_of(dictionary: Dictionary, g: int, out: str) -> str:
    """Where group g goes in formats of one site a folder: `out` itself, or of several groups a folder named as what it
    reads."""
    return out if dictionary.wiring.groups == 1 else files.join(out, dictionary.wiring.reads[g][0])


def refuse(form: str, what: str, instead: str) -> UserError:
    """The error of a format that cannot express something."""
    return UserError(f"--format {form}: has no place for {what}; {instead}")


def kind_of(gate: gates.Gate) -> str:
    """relu, jumprelu, topk or gated: the gate of a plain dictionary."""
    match gate:
        case gates.ReLU():
            return "relu"
        case gates.JumpReLU():
            return "jumprelu"
        case Gated():
            return "gated"
    assert isinstance(gate, gates.TopK)
    return "topk"


def way_out(kind: str) -> str:
    """What to do with a gate that a format has no place for."""
    if kind == "topk":
        return "convert the run to jumprelu first with jobs/convert.py"
    return "the run itself loads with xlc_ray.load"


def thresholds_of(dictionary: Dictionary) -> list[Tensor] | None:
    """θ of each group of a plain dictionary with the gate JumpReLU, else None."""
    gate = dictionary.gate
    return [gate.threshold(g).detach() for g in range(len(gate.sizes))] if isinstance(gate, gates.JumpReLU) else None


@torch.no_grad()
def gated_biases(dictionary: Dictionary, g: int, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """b_gate, r_mag, b_mag [F] for formats without b_enc: `shared` [F], in its place, is added to both paths."""
    gate = dictionary.gate
    assert isinstance(gate, Gated)
    r = gate.r_mag[g].double()
    both = (gate.b_gate[g].double() + shared, r, gate.b_mag[g].double() + r.exp() * shared)
    b_gate, r_mag, b_mag = (value.to(gate.r_mag[g].dtype) for value in both)
    return b_gate, r_mag, b_mag
