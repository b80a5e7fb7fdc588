"""One rank of a parity run: `python -m tests.equivalence.worker RANK WORLD TP STORE_FILE OUT SET`."""

import sys
from collections import Counter

import torch
import torch.distributed as dist

from tests.equivalence import cases
from xlc_ray.dictionary import Dictionary, Shards

COUNTED = ("all_reduce", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "all_gather", "all_to_all")


def count_collectives(found: dict) -> None:
    """Note for each case which collectives a forward pass makes, how many, and how many numbers they carry."""
    calls: list[tuple[str, int]] = []
    for name in COUNTED:
        plain = getattr(dist, name)

        def counted(*args, plain=plain, name=name, **kwargs):
            calls.append((name, args[1].numel() if name == "all_gather_into_tensor" else args[0].numel()))
            return plain(*args, **kwargs)

        setattr(dist, name, counted)
    analyse, decode = Dictionary.analyse, Dictionary.decode_all

    def analysed(self, *args, **kwargs):
        calls.clear()
        return analyse(self, *args, **kwargs)

    def decoded(self, *args, **kwargs):
        out = decode(self, *args, **kwargs)
        if self.training:  # not when resampling looks at its sample
            found.setdefault("forward", []).append((Counter(name for name, _ in calls), dict(calls)))
        return out

    Dictionary.analyse, Dictionary.decode_all = analysed, decoded


if __name__ == "__main__":
    rank, world, tp = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[4]}", rank=rank, world_size=world)
    shards = Shards.of_world(tp, "cpu")
    noted: dict = {}
    count_collectives(noted)
    results, forwards = {}, {}
    for case in cases.SETS[sys.argv[6]]:
        results[case] = cases.run(case, shards, **{"dictionary.products": "sparse"})
        forwards[case] = noted.pop("forward")
    torch.save((results, forwards), f"{sys.argv[5]}/rank_{rank}.pt")
    dist.destroy_process_group()
