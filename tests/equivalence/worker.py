"""One rank of a parity run: `python -m tests.equivalence.worker RANK WORLD TP STORE_FILE OUT SET`."""

import sys
from collections import Counter

import torch
import torch.distributed as dist

from tests.equivalence import cases
from xlc_ray.dictionary import Dictionary, Shards
from xlc_ray.training import Learner

COUNTED = ("all_reduce", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "all_gather", "all_to_all")


def count_collectives(found: dict) -> None:
    """Note for each case which collectives a forward pass makes, how many, and how many numbers they carry; and of each
    step whether it is measured, and how many there are in all."""
    calls: list[tuple[str, int]] = []  # of a step
    begun = 0  # those before the forward pass
    for name in COUNTED:
        plain = getattr(dist, name)

        def counted(*args, plain=plain, name=name, **kwargs):
            calls.append((name, args[1].numel() if name == "all_gather_into_tensor" else args[0].numel()))
            return plain(*args, **kwargs)

        setattr(dist, name, counted)
    analyse, decode, train = Dictionary.analyse, Dictionary.decode_all, Learner.train_step

    def analysed(self, *args, **kwargs):
        nonlocal begun
        begun = len(calls)
        return analyse(self, *args, **kwargs)

    def decoded(self, *args, **kwargs):
        out = decode(self, *args, **kwargs)
        if self.training:  # not when resampling looks at its sample
            own = calls[begun:]
            found.setdefault("forward", []).append((Counter(name for name, _ in own), dict(own)))
        return out

    def trained(self, batch, measure):
        calls.clear()
        metrics = train(self, batch, measure)
        found.setdefault("step", []).append((measure, len(calls)))
        return metrics

    Dictionary.analyse, Dictionary.decode_all, Learner.train_step = analysed, decoded, trained


if __name__ == "__main__":
    rank, world, tp = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[4]}", rank=rank, world_size=world)
    shards = Shards.of_world(tp, "cpu")
    noted: dict = {}
    count_collectives(noted)
    results, spoken = {}, {}
    for case in cases.SETS[sys.argv[6]]:
        results[case] = cases.run(case, shards, **{"dictionary.products": "sparse"})
        spoken[case] = noted.pop("forward"), noted.pop("step")
    torch.save((results, spoken), f"{sys.argv[5]}/rank_{rank}.pt")
    dist.destroy_process_group()
