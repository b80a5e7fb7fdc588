"""What a run will cost, before anything runs: pure arithmetic on the settings.

    encoder forward          2 Σ F R          FLOPs a token; F features, R read and W written width of a group
    encoder gradient         2 Σ n R          n features that products take in (F where they are dense)
    decoder, ∂f, ∂W_dec      2 Σ n W  each
    penalty on all pre       2 Σ F R          where products are sparse: a dense gradient
    optimizer                32 bytes a parameter and step (Adam, clipping included), 4 more for the gradient's norm
    communication            tensor parallel: ŷ once; replicas: the gradient once
    memory of a rank         16 bytes a parameter (weight, gradient, two moments), and a batch's activations; on CPUs
                             12 bytes more for the copy that checkpoints are written from

A step takes the sum of its phases, each as long as the slower of its arithmetic and its memory traffic; data are read
meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from xlc_ray.config import Config
from xlc_ray.config.dictionary import BatchTopKGate, JumpReluGate, TopKGate
from xlc_ray.dictionary.encoding import TILE
from xlc_ray.dictionary.selection import SLACK
from xlc_ray.dictionary.sparse import BREAK_EVEN
from xlc_ray.dictionary.wiring import Wiring
from xlc_ray.training.machine import GB, Machine

ROWS = {"jumprelu": 1, "gated": 3, "hard_concrete": 1, "gated_hard_concrete": 3}  # parameters a feature of a gate
ASSUMED_ACTIVE = 64  # features a token and group, where the gate does not say
PROCESS = 0.7 * GB  # what a rank holds besides: the interpreter and torch
USABLE = 0.92  # of a device's memory
DATA_RATE = 0.3 * GB  # bytes/s that one reader hands to its replica
SELECT_PASSES = 5  # times that selection reads or writes each pre-activation
PENALTY = {"preactivation": (2, 19), "hard_concrete": (2, 10), "gated_hard_concrete": (3, 13)}
"""Penalties on all pre-activations (the loss, or the l0 of a gate with `counts_all`): arrays [B, F] of each group that
one holds at once, and times that it reads or writes one."""
BLOCK = 256
"""Values of an int8 moment with a scale of 4 bytes; tensors of under 16 blocks, or not of whole ones, stay as they are
(torchao)."""
ENTRY_BYTES = 120  # moved by selection, sorting and index arithmetic for each active entry


@dataclass(frozen=True)
class Group:
    """One feature group: features, read and written width, columns of the decoder that it stores, features a token
    that products take in, and whether these are sparse."""

    features: int
    read: int
    written: int
    stored: int
    active: float
    sparse: bool


@dataclass(frozen=True)
class Work:
    """A step over all ranks: groups, tokens of the batch, summed width of sites read, written and either."""

    groups: tuple[Group, ...]
    tokens: int
    read: int
    written: int
    stored: int
    extra: int
    """Parameters besides encoders and decoders."""
    clip: bool
    known: bool
    """Whether anybody says how many features products take in."""
    ranks: bool
    """Whether the gate has a budget, for which entries are listed also where products are dense."""
    begins_dense: bool
    """Whether the first steps may be dense, whatever the later ones are."""
    penalty: tuple[int, int] | None
    """What PENALTY says of the one there is."""
    int8: bool
    """Whether moments are held in 8 bits."""
    copied: bool
    """Whether checkpoints are written from a copy in host memory."""
    number: int
    """Bytes of a parameter."""

    @property
    def parameters(self) -> int:
        """Of the whole dictionary."""
        return self.extra + sum(g.features * (g.read + g.stored + 1) for g in self.groups)

    @property
    def active(self) -> list[float]:
        """Features a token whose products are computed, of each group."""
        return [g.active for g in self.groups]

    @property
    def dense_flops(self) -> float:
        """FLOPs of a token if every feature took part."""
        return sum(2 * g.features * (2 * g.read + 3 * g.written) for g in self.groups)

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs of a token: of encoders forward (`encode`), and of `sparse` and `dense` products besides."""
        found = {"encode": 0.0, "sparse": 0.0, "dense": 0.0}
        for g in self.groups:
            found["encode"] += 2 * g.features * g.read
            found["sparse" if g.sparse else "dense"] += 2 * g.active * (3 * g.written + g.read)
            found["dense"] += 2 * g.features * g.read if self.penalty and g.sparse else 0
        return found

    def moments(self, own: int, tensor_parallel: int) -> float:
        """Bytes of both moments on a rank with so many parameters."""
        eight = 0
        if self.int8:
            rows = ((-(-g.features // tensor_parallel), g) for g in self.groups)
            sizes = [n for f, g in rows for n in (f * g.read, f * g.stored, f)]
            eight = sum(n for n in sizes if n >= 16 * BLOCK and n % BLOCK == 0)
        return 2 * (self.number * (own - eight) + (1 + 4 / BLOCK) * eight)

    def copy(self, tensor_parallel: int) -> float:
        """Bytes of host memory that a rank's copy for checkpoints takes: parameters and moments, unpacked."""
        return 3.0 * self.number * -(-self.parameters // tensor_parallel) if self.copied else 0.0


def work(config: Config, wires: Wiring, active: float | None = None) -> Work:
    """What a step has to do. `active`: features a token, of all groups together, where the gate does not say.

    Products of jumprelu take in all with pre > θ - ε/2, which are more than its l0 and not known before: without
    `active` they are taken to be dense, as they are when a run begins."""
    d, train = config.dictionary, config.train
    gate, loss = d.gate, train.loss
    target = loss.sparsity.target_l0 if loss.sparsity else None
    budget = isinstance(gate, TopKGate | BatchTopKGate)
    if isinstance(gate, TopKGate | BatchTopKGate):
        each = gate.k / (1 if gate.pool == "group" else wires.groups)
    elif isinstance(gate, JumpReluGate):
        each = active / wires.groups if active else d.features
    else:
        each = (target or active or ASSUMED_ACTIVE * wires.groups) / wires.groups
    told = active if isinstance(gate, JumpReluGate) else target or active
    counts_all = loss.sparsity is not None and loss.sparsity.kind == "l0" and getattr(gate, "input_dependent", True)
    penalty = PENALTY.get("preactivation" if loss.preactivation else gate.kind if counts_all else "")
    groups = []
    for g, (reads, writes) in enumerate(zip(wires.reads, wires.writes, strict=True)):
        share = min(each, d.features) / d.features
        sparse = d.products == "sparse" or (d.products == "auto" and share <= BREAK_EVEN)
        active_here = share * d.features if sparse else d.features
        widths = wires.width(reads), wires.width(writes), wires.decoder_width(g)
        groups.append(Group(d.features, *widths, active_here, sparse))
    written = wires.width(wires.written_sites)
    skips = sum(wires.width(r) * wires.width(w) for r, w in zip(wires.reads, wires.writes, strict=True))
    a_feature = ROWS.get(gate.kind, 0) + (wires.tied.scale + wires.tied.offset if wires.tied else 0)
    second = sum(wires.width(reads) for reads in wires.reads) if getattr(gate, "input_dependent", False) else 0
    extra = written + (skips if wires.skip else 0) + d.features * (wires.groups * a_feature + second)
    return Work(
        groups=tuple(groups),
        tokens=train.batch_tokens,
        read=wires.width(wires.read_sites),
        written=written,
        stored=wires.width(wires.sites),
        extra=extra,
        clip=train.clip_norm is not None,
        known=budget or told is not None,
        ranks=budget,
        begins_dense=d.products == "auto" and not budget,
        penalty=penalty,
        int8=train.optimizer.states == "int8",
        copied=train.async_checkpoints,
        number=8 if train.precision == "float64" else 4,
    )


# ---------------------------------------------------------------- memory


def memory(load: Work, tensor_parallel: int, replicas: int, accumulate: int, host: bool = False) -> dict[str, float]:
    """Bytes of a rank at its worst moment, by what they are for: in a step, or where a checkpoint is taken (moments of
    8 bits are unpacked for it). `host`: the device's memory is the host's, where copies for checkpoints lie."""
    rows = load.tokens / replicas / accumulate
    own = -(-load.parameters // tensor_parallel)
    moments = load.moments(own, tensor_parallel)
    widths = 2 * (load.read + load.written) + 4 * load.written + sum(g.written for g in load.groups)
    entries = rows * sum(g.active for g in load.groups if g.sparse or load.ranks) / tensor_parallel
    dense = rows * sum(g.features for g in load.groups if load.begins_dense or not g.sparse) / tensor_parallel
    always = {
        "parameters": float(load.number * own),
        "gradients and optimizer": load.number * own + moments,
        "process": PROCESS,
    }
    if host and load.copied:
        always["copy for checkpoints"] = load.copy(tensor_parallel)
    step = {
        "batch": load.number * rows * widths,
        "features": entries * SLACK * 24 + 3 * load.number * min(TILE, rows * max(g.features for g in load.groups)),
        "dense features": 4 * load.number * dense,
    }
    if load.penalty:  # pre itself is among what dense features hold
        held = load.penalty[0] * rows * sum(g.features for g in load.groups) / tensor_parallel - dense
        step["pre-activations"] = load.number * held
    if replicas > 1:
        step["gradients of replicas"] = float(load.number * own)
    taken = {"moments unpacked": 2.0 * load.number * own} if load.int8 else {}
    return always | max(step, taken, key=lambda moment: sum(moment.values()))


# ---------------------------------------------------------------- time


def roofline(load: Work, device: Machine, precision: str, ranks: int = 1) -> dict[str, float]:
    """Least seconds of a step's phases on `ranks` processors of which each has the device's rates.

    What no implementation can avoid: the encoder's FLOPs, the active features' FLOPs, one pass over weights, gradients
    and moments."""
    flops, rate = load.flops, device.flops(precision)
    encoders = sum(g.features * g.read for g in load.groups)
    decoders = sum(g.features * g.written for g in load.groups)
    number, tokens = load.number, load.tokens

    def slower(work: float, moved: float) -> float:
        return max(work / rate, moved / device.bandwidth) / ranks

    active = flops["sparse"] + flops["dense"]
    return {
        "encode": slower(tokens * 2 * encoders, number * encoders),
        "products": slower(tokens * active, number * (2 * decoders + load.parameters)),
        "optimizer": 7 * number * load.parameters / device.bandwidth / ranks,
    }


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step's parts; all but `data` follow one another, and `data` are read meanwhile."""

    encode: float
    select: float
    products: float
    optimizer: float
    communication: float
    data: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        own = self.encode + self.select + self.products + self.optimizer + self.communication
        return max(own, self.data)

    @property
    def binds(self) -> str:
        """Which of them takes longest: arithmetic, optimizer, communication, data."""
        parts = {
            "arithmetic": self.encode + self.select + self.products,
            "optimizer": self.optimizer,
            "communication": self.communication,
        }
        if self.data >= sum(parts.values()):
            return "data"
        return max(parts, key=parts.__getitem__)


def predict(
    load: Work, device: Machine, precision: str, tensor_parallel: int, replicas: int, data: float = 0.0
) -> Prediction:
    """Time of a step on tensor_parallel × replicas devices. `data`: bytes to read for a token, 0 = they are at hand."""
    ranks, tokens = tensor_parallel * replicas, load.tokens
    flops, rate, number = load.flops, device.flops(precision), load.number
    entries = tokens * sum(g.active for g in load.groups if g.sparse)
    scores = tokens * sum(g.features for g in load.groups)
    own = load.parameters / tensor_parallel
    link = device.link if ranks <= device.node else device.network
    products = tokens * (flops["sparse"] / device.gather + flops["dense"] / rate) / ranks
    moved = own * number * (8 + load.clip)  # each gradient is written, read for its norm, and read with three others
    batch = tokens / replicas
    speak = 0.0
    if tensor_parallel > 1:
        speak += 2 * (tensor_parallel - 1) / tensor_parallel * batch * load.written * number / device.link
    if replicas > 1:
        speak += 2 * (replicas - 1) / replicas * own * number / link
    passes = (SELECT_PASSES + (load.penalty or (0, 0))[1]) * number * scores + ENTRY_BYTES * entries
    return Prediction(
        encode=tokens * flops["encode"] / rate / ranks,
        select=passes / device.bandwidth / ranks,
        products=products,
        optimizer=moved / device.bandwidth,
        communication=speak,
        data=batch * data / DATA_RATE,
    )
