"""What a device can do: published figures of GPUs, and of this machine's processors measured on the spot.

Rates are what large, plain operations reach, not what a data sheet promises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from xlc_ray.dictionary.sparse import Support, decode, encode_at

GB = 1e9
T = 1e12


@dataclass(frozen=True)
class Machine:
    """A device: FLOP/s of matrix products by precision and of sparse products; bytes/s of memory, of the link to its
    neighbours in a node, and of the network between nodes; bytes of memory; devices a node."""

    name: str
    matmul: dict[str, float]
    gather: float
    bandwidth: float
    link: float
    network: float
    memory: float
    node: int

    def flops(self, precision: str) -> float:
        """Matrix products of a training precision, FLOP/s."""
        return self.matmul[precision]


def _gpu(name: str, float32: float, bfloat16: float, bandwidth: float, link: float, memory: float) -> Machine:
    """From data-sheet figures: dense products reach about 0.7 of theirs, memory about 0.85. A sparse product does two
    FLOPs with each element that it reads, of which about half come from cache."""
    reached = 0.85 * bandwidth
    rates = {"float32": 0.8 * float32, "bfloat16": 0.7 * bfloat16, "float64": 0.4 * float32}
    return Machine(name, rates, reached, reached, 0.7 * link, 40 * GB, memory, 8)


GPUS = {
    "h100": _gpu("h100", 67 * T, 989 * T, 3350 * GB, 450 * GB, 80 * GB),
    "h200": _gpu("h200", 67 * T, 989 * T, 4800 * GB, 450 * GB, 141 * GB),
    "a100": _gpu("a100", 19.5 * T, 312 * T, 2039 * GB, 300 * GB, 80 * GB),
    "l40s": _gpu("l40s", 91.6 * T, 362 * T, 864 * GB, 32 * GB, 48 * GB),
}
"""Never run here: figures of the makers, dense without TF32."""


def best_time(step: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of a few runs, after one that does not count."""
    step()
    found = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        step()
        wait(device)
        found.append(time.perf_counter() - started)
    return min(found)


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of x Wᵀ with [size, size] · [size, 4 size]."""
    x = torch.randn(size, size, device=device, dtype=dtype)
    W = torch.randn(4 * size, size, device=device, dtype=dtype)
    return 8 * size**3 / best_time(lambda: x @ W.T, device)


def copy_rate(device: torch.device, count: int = 2**26) -> float:
    """Bytes/s of memory that a copy reads and writes, of blocks larger than any cache."""
    source = torch.zeros(count, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source), device)


def sparse_rate(device: torch.device, width: int = 4096, rows: int = 512, features: int = 4096, k: int = 16) -> float:
    """FLOP/s of the sparse products of a step, in forward and backward together."""
    draw = torch.Generator().manual_seed(0)
    entry = torch.rand(rows, features, generator=draw).topk(k, dim=1).indices.sort(dim=1).values
    entry = (entry + torch.arange(rows).unsqueeze(1) * features).flatten().to(device)
    W_enc, W_dec = (torch.randn(features, n, device=device).requires_grad_() for n in (width // 8, width))
    x, b, pre = torch.randn(rows, width // 8, device=device), W_dec.new_zeros(features), torch.rand(rows * k).to(device)

    def step() -> None:
        support = Support(entry, (rows, features))
        values = encode_at(x, W_enc, b, support, pre)
        W_enc.grad = W_dec.grad = None
        decode(values, support, W_dec)[0].square().sum().backward()

    return 2 * rows * k * (3 * width + width // 8) / best_time(step, device)


def faster_dtype(device: torch.device) -> str:
    """bfloat16 where its matrix products are clearly faster, else float32."""
    rates = {name: matmul_rate(device, getattr(torch, name), 512) for name in ("float32", "bfloat16")}
    return "bfloat16" if rates["bfloat16"] > 1.3 * rates["float32"] else "float32"


def measure(device: torch.device) -> Machine:
    """This machine's device, by small products and copies (seconds)."""
    rates = {name: matmul_rate(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    rates["float64"] = rates["float32"] / 2
    cpu = device.type == "cpu"
    memory = _memory() if cpu else torch.cuda.get_device_properties(device).total_memory
    bandwidth = copy_rate(device)
    made = Machine("cpu", rates, sparse_rate(device), bandwidth, bandwidth / 4, 1 * GB, memory, 1)
    return made if cpu else replace(made, name=torch.cuda.get_device_name(device), node=torch.cuda.device_count())


def _memory() -> float:
    """Bytes of this machine's memory."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemTotal:"):
            return 1024.0 * int(line.split()[1])
    return 16 * GB
