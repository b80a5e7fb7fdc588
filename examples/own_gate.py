"""A gate of your own: f = max(pre - θ, 0), the soft threshold, with θ learned by each feature.

    python jobs/train.py --config configs/quickstart.yaml --out=runs/soft \
        --dictionary.gate='{kind: custom, path: "examples.own_gate:SoftThreshold", options: {start: 0.5}}'
"""

import torch
from torch import nn

from xlc_ray.dictionary.gates import Gate, at


class SoftThreshold(Gate):
    def __init__(self, sizes, shards, start: float):
        super().__init__(sizes, shards)  # sizes: features of each group on this rank
        self.theta = nn.ParameterList([nn.Parameter(torch.full((n,), start)) for n in sizes])

    def lower(self, g):  # what pre must exceed for f, or its gradient, to differ from 0
        return self.theta[g].detach()

    def activate(self, pre, g, support):  # all entries [B, F], or the [n] of a support
        return torch.relu(pre - at(self.theta[g], support))
