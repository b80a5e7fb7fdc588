"""What a run will cost, before anything runs: pure arithmetic on the settings.

    encoder forward          2 Σ F R          FLOPs a token; F features, R read and W written width of a group
    encoder gradient         2 Σ n R          n active features (F where products are dense)
    decoder, ∂f, ∂W_dec      2 Σ n W  each
    optimizer                32 bytes a parameter and step (Adam, clipping included), 4 more for the gradient's norm
    communication            tensor parallel: ŷ once; replicas: the gradient once
    memory of a rank         16 bytes a parameter (weight, gradient, two moments), and a batch's activations

A step takes the sum of its phases, each as long as the slower of its arithmetic and its memory traffic; data are read
meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xlc_ray.config import Config, UserError
from xlc_ray.config.dictionary import BatchTopKGate, TopKGate
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
ENTRY_BYTES = 120  # moved by selection, sorting and index arithmetic for each active entry


@dataclass(frozen=True)
class Group:
    """One feature group: features, read and written width, columns of the decoder that it stores, active features a
    token, and whether products are sparse."""

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
    """Whether the gate says how many features are active."""
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
        """FLOPs of a token: `encode`, `products` (sparse) and `dense` ones."""
        encode = 2 * sum(g.features * g.read for g in self.groups)
        found = {"encode": encode, "sparse": 0.0, "dense": 0.0}
        for g in self.groups:
            found["sparse" if g.sparse else "dense"] += 2 * g.active * (3 * g.written + g.read)
        return found


def work(config: Config, wires: Wiring, active: float | None = None) -> Work:
    """What a step has to do. `active`: features a token, of all groups together, where the gate does not say."""
    d, train = config.dictionary, config.train
    gate, loss = d.gate, train.loss
    target = loss.sparsity.target_l0 if loss.sparsity else None
    known = isinstance(gate, TopKGate | BatchTopKGate) or target is not None
    if isinstance(gate, TopKGate | BatchTopKGate):
        each = gate.k / (1 if gate.pool == "group" else wires.groups)
    else:
        each = (target or active or ASSUMED_ACTIVE * wires.groups) / wires.groups
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
        tuple(groups),
        train.batch_tokens,
        wires.width(wires.read_sites),
        written,
        wires.width(wires.sites),
        extra,
        train.clip_norm is not None,
        known,
        8 if train.precision == "float64" else 4,
    )


# ---------------------------------------------------------------- memory


def memory(load: Work, tensor_parallel: int, replicas: int, accumulate: int) -> dict[str, float]:
    """Bytes of a rank at the worst moment of a step, by what they are for."""
    rows = load.tokens / replicas / accumulate
    own = -(-load.parameters // tensor_parallel)
    states = 4 * load.number * own
    widths = 2 * (load.read + load.written) + 4 * load.written + sum(g.written for g in load.groups)
    entries = rows * sum(g.active for g in load.groups) / tensor_parallel
    dense = rows * sum(g.features for g in load.groups if not g.sparse) / tensor_parallel
    found = {
        "parameters": float(load.number * own),
        "gradients and optimizer": states - load.number * own,
        "batch": load.number * rows * widths,
        "features": entries * SLACK * 24 + 3 * load.number * min(TILE, rows * max(g.features for g in load.groups)),
        "dense features": 4 * load.number * dense,
        "process": PROCESS,
    }
    if replicas > 1:
        found["gradients of replicas"] = float(load.number * own)
    return found


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
        "encode": slower(tokens * flops["encode"], number * encoders),
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
    passes = SELECT_PASSES * number * scores + ENTRY_BYTES * entries
    return Prediction(
        encode=tokens * flops["encode"] / rate / ranks,
        select=passes / device.bandwidth / ranks,
        products=products,
        optimizer=moved / device.bandwidth,
        communication=speak,
        data=batch * data / DATA_RATE,
    )


# ---------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """One way to place a run: ranks a replica, replicas, bytes of a rank, and the time of a step."""

    tensor_parallel: int
    replicas: int
    memory: Mapping[str, float]
    prediction: Prediction

    @property
    def bytes(self) -> float:
        """Of a rank."""
        return sum(self.memory.values())


def layout(config: Config, load: Work, device: Machine, tensor_parallel: int, replicas: int, data: float) -> Layout:
    """One placement, whether it fits or not."""
    held = memory(load, tensor_parallel, replicas, config.train.accumulate)
    time = predict(load, device, config.train.precision, tensor_parallel, replicas, data)
    return Layout(tensor_parallel, replicas, held, time)


def layouts(config: Config, load: Work, device: Machine, devices: int, data: float) -> list[Layout]:
    """Placements on so many devices that fit, fastest first. Raises UserError, which says why, where none does."""
    room, refused = USABLE * device.memory, []
    fitting = []
    for t in (n for n in range(1, devices + 1) if devices % n == 0):
        r = devices // t
        if t > device.node or device.node % t:
            refused.append(f"tp {t} would leave the node of {device.node}")
        elif t > config.dictionary.features:
            refused.append(f"tp {t} exceeds dictionary.features = {config.dictionary.features}")
        elif config.train.batch_tokens % (r * config.train.accumulate):
            refused.append(f"tp {t} x {r} replicas do not divide train.batch_tokens = {config.train.batch_tokens}")
        else:
            found = layout(config, load, device, t, r, data)
            if found.bytes <= room:
                fitting.append(found)
            else:
                refused.append(f"tp {t} needs {found.bytes / GB:.1f} of {room / GB:.1f} GB a rank")
    if not fitting:
        raise UserError(f"plan: no layout fits {devices} x {device.name}: {'; '.join(refused)}; use more devices")
    return sorted(fitting, key=lambda found: found.prediction.seconds)
