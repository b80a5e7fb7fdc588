"""Resampling: dead features start anew on what is badly reconstructed (Bricken et al. 2023, "neuron resampling").

    row b of a sample drawn with probability ∝ ‖y_b - ŷ_b‖⁴ (its loss, squared), another for every dead feature
    W_enc ← scale · n̄_enc · x_b / ‖x_b‖      b_enc, gate ← as at the start    n̄: mean norm of living features' rows
    W_dec ← n̄_dec · v / ‖v‖                  v = y_b - ŷ_b, or y_b - b_dec (in the columns that the group writes)

The optimizer's moments of those features become zero, their counters of silence too. All ranks see the same sample and
the same draw, which is a function of (seed, step, losses); each rank writes its own features. A decoder that is tied
per source gets the sum of v over its targets. Unlike in the paper

    rows are drawn without replacement: two features with the same start would stay the same for ever
    x is what the encoder reads, centred only if the normalisation centres
    v is by default what is left of y, and not the input (which `decoder: target` comes near, where a group writes what
    it reads): living features explain most of that already, and in transcoders and CLTs W_dec writes other sites
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from xlc_ray.dictionary import losses
from xlc_ray.dictionary.build import make_gate
from xlc_ray.dictionary.checkpoint import group_of
from xlc_ray.dictionary.columns import columns
from xlc_ray.training import optimizers
from xlc_ray.training.learner import Diverged, Learner

Sample = Callable[[], Iterator[Mapping[str, Tensor]]]
"""Starts a pass over the sample: batches site → [rows, d], the same rows in the same order on all ranks."""


@torch.no_grad()
def resample(learner: Learner, sample: Sample) -> int:
    """Start dead features anew; returns how many, over all ranks. All ranks call this, with the same sample.

    Raises Diverged where a row's loss is not finite."""
    learner.dictionary.eval()  # every row for itself, whatever the size of batches
    masks = learner.dead_masks()
    dead, lengths = _exchange(learner, masks)
    if not dead.sum():
        return 0
    loss = torch.cat([_loss(learner, batch) for batch in sample()])
    loss = learner.shards.of_first_rank(loss)
    if not torch.isfinite(loss).all():
        raise Diverged(f"step {learner.step}: resampling: a row's loss is not finite; check the activations")
    rows = draw(loss.cpu().numpy(), int(dead.sum()), learner.config.seed, learner.step)
    own = _own_rows(rows, dead, learner.shards.rank)
    started = _starts(learner, sample, own)
    new = [
        mask.nonzero().squeeze(1)[torch.from_numpy(mine >= 0).to(mask.device)]
        for mask, mine in zip(masks, own, strict=True)
    ]
    for g, which in enumerate(new):
        _write(learner, g, which, *started[g], *lengths[g])
        learner.silent[g][which] = 0
    _restart(learner, new)
    drawn = np.split(rows >= 0, dead.sum(axis=0).cumsum()[:-1])
    learner.dead_totals = [int(n - d.sum()) for n, d in zip(dead.sum(axis=0), drawn, strict=True)]
    return int((rows >= 0).sum())


def draw(loss: np.ndarray, wanted: int, seed: int, step: int) -> np.ndarray:
    """For each of the features wanted a row of the sample, drawn ∝ loss²; -1 where no row with a loss is left."""
    generator = np.random.default_rng([seed, step])
    weight = (loss / max(loss.max(), np.finfo(loss.dtype).tiny)) ** 2
    able = min(wanted, np.count_nonzero(weight))
    found = np.full(wanted, -1)
    if able:
        chosen = generator.choice(len(loss), able, replace=False, p=weight / weight.sum())
        found[generator.permutation(wanted)[:able]] = chosen
    return found


def _exchange(learner: Learner, masks: list[Tensor]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Dead features [rank, group] of a replica; for each group the mean norms of living encoder and decoder rows (of
    all rows where none lives)."""
    shards, groups = learner.shards, learner.dictionary.groups
    counts = torch.zeros(shards.size, len(groups), dtype=torch.float64, device=learner.device)
    counts[shards.rank] = torch.stack([mask.sum() for mask in masks])
    sums = []
    for mask, group in zip(masks, groups, strict=True):
        norms = torch.stack([torch.linalg.vector_norm(group.W_enc, dim=1), group.norms(), torch.ones_like(group.b_enc)])
        sums.append(torch.stack([norms[:, ~mask].sum(dim=1), norms.sum(dim=1)]).double())
    shared = shards.total(torch.cat([counts.flatten(), torch.stack(sums).flatten()])).cpu()
    dead = shared[: counts.numel()].view(counts.shape).numpy().astype(np.int64)
    means = []
    for living, every in shared[counts.numel() :].view(-1, 2, 3):
        encoder, decoder, count = (living if living[2] else every).tolist()
        means.append((encoder / count, decoder / count))
    return dead, means


def _own_rows(rows: np.ndarray, dead: np.ndarray, rank: int) -> list[np.ndarray]:
    """Of rows for all dead features, by group and then by rank, those of this rank's features in each group."""
    ends = dead.T.flatten().cumsum().reshape(dead.T.shape)
    return [rows[end[rank] - n[rank] : end[rank]] for end, n in zip(ends, dead.T, strict=True)]


def _forward(learner: Learner, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    d = learner.dictionary
    batch = {site: values.to(learner.device) for site, values in batch.items()}
    x, y = d.normalize_inputs(batch), d.normalize_targets(batch)
    return x, y, d.decode(d.encode(x), x)


def _loss(learner: Learner, batch: Mapping[str, Tensor]) -> Tensor:
    """[rows] float64: each row's reconstruction loss."""
    _, y, y_hat = _forward(learner, batch)
    return losses.by_token(y_hat, y, learner.objective.weights).double()


def _starts(learner: Learner, sample: Sample, own: list[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
    """(x, v) of the rows drawn for this rank's features of each group, in the columns of their encoder and decoder."""
    d, settings = learner.dictionary, learner.config.train.resample
    assert settings is not None
    like = d.b_dec
    wires = d.wiring
    found = [
        (
            like.new_zeros((mine >= 0).sum(), wires.width(wires.reads[g])),
            like.new_zeros((mine >= 0).sum(), wires.decoder_width(g)),
        )
        for g, mine in enumerate(own)
    ]
    first = 0
    for batch in sample():
        x, y, y_hat = _forward(learner, batch)
        v = y - y_hat if settings.decoder == "error" else y - d.b_dec
        for g, mine in enumerate(own):
            place = mine[mine >= 0]
            here = torch.from_numpy((place >= first) & (place < first + len(x))).to(like.device)
            which = torch.from_numpy(place).to(like.device)[here] - first
            written = columns(v, wires.write_spans(g))[which]
            if wires.tied:
                written = written.unflatten(1, (len(wires.writes[g]), -1)).sum(dim=1)
            found[g][0][here] = columns(x, wires.read_spans(g))[which]
            found[g][1][here] = written
        first += len(x)
    return found


def _write(learner: Learner, g: int, which: Tensor, x: Tensor, v: Tensor, encoder: float, decoder: float) -> None:
    """The new rows of features `which`."""
    d, settings, shards = learner.dictionary, learner.config.train.resample, learner.shards
    assert settings is not None
    group = d.groups[g]
    # Replicas computed the same; where a device adds in another order each time, they shall not drift apart.
    group.W_enc[which] = shards.of_first_replica(nnf.normalize(x, dim=1) * settings.scale * encoder)
    group.W_dec[which] = shards.of_first_replica(nnf.normalize(v, dim=1) * decoder)


def _restart(learner: Learner, new: list[Tensor]) -> None:
    """b_enc and the gate of each group's features `new` as they start with the new encoders; zeros for all moments."""
    d = learner.dictionary
    gate = make_gate(learner.config.dictionary.gate, [len(s) for s in learner.silent], d.shards).to(d.b_dec)
    starts: list[tuple[Tensor, Tensor]] = [(group.W_enc, torch.zeros_like(group.b_enc)) for group in d.groups]
    gate.initialise(learner.config.seed, [d.shards.bounds(n)[0] for n in d.sizes], starts)
    fresh = dict(gate.named_parameters())
    for group, which, (_, bias) in zip(d.groups, new, starts, strict=True):
        group.b_enc[which] = bias[which]
    for name, parameter in learner.parameters.items():
        if not d.is_sharded(name) or name.endswith(("feature_scale", "feature_offset")):
            continue
        which = new[group_of(name)]
        if name.startswith("gate."):
            parameter[which] = fresh[name.removeprefix("gate.")][which]
        moments = optimizers.moments(learner.optimizer, parameter)
        for key in optimizers.MOMENTS:
            moments[key][which] = 0
        optimizers.put(learner.optimizer, parameter, moments)
