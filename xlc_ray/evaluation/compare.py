"""How alike two dictionaries are: mean max cosine similarity of their decoder rows (Sharkey et al. 2022).

    mmcs(A → B) = mean_i max_j cos(d_i, d'_j)

d_i is a feature's whole decoder row over all sites that its group writes, in raw units, so that the normalisations of
two runs do not enter. Groups are compared that write the same sites; zero rows have no direction and are left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from xlc_ray.config import UserError
from xlc_ray.dictionary import Dictionary
from xlc_ray.dictionary.fold import expanded_decoder

ALIKE = 0.9
"""Cosine from which a feature counts as found again."""
BLOCK = 2**24
"""Cosines held at once: 64 MB."""


def max_cosines(rows: Tensor, others: Tensor) -> Tensor:
    """max_j cos(rows_i, others_j) of each row that is not zero; rows [F, W], others [F', W]."""
    rows, others = (nnf.normalize(v[v.norm(dim=1) > 0], dim=1) for v in (rows, others))
    if not len(rows) or not len(others):
        return rows.new_zeros(len(rows))
    size = max(1, BLOCK // len(others))
    return torch.cat([(part @ others.T).amax(1) for part in rows.split(size)])


@torch.no_grad()
def compare(dictionary: Dictionary, against: Dictionary) -> dict[str, Any]:
    """`forward` (each feature's nearest in `against`) and `backward` with mmcs and alike (share with cosine ≥ 0.9), for
    all features together and in `groups`, a list of the same with `writes`.

    Raises UserError where a group of the first writes sites that no group of the other, or more than one, writes alike.
    """
    pairs = _pairs(dictionary, against)
    forth, back, groups = [], [], []
    for g, h in pairs:
        rows, others = _raw_rows(dictionary, g), _raw_rows(against, h)
        forth.append(max_cosines(rows, others))
        back.append(max_cosines(others, rows))
        groups.append({"writes": list(dictionary.wiring.writes[g]), **_both(forth[-1], back[-1])})
    return {**_both(torch.cat(forth), torch.cat(back)), "groups": groups}


def comparison_table(found: dict[str, Any]) -> str:
    """A line a group and one for all. No trailing newline."""
    rows = [(", ".join(g["writes"][:2]) + (", …" if len(g["writes"]) > 2 else ""), g) for g in found["groups"]]
    rows.append(("all", found))
    wide = max(len(name) for name, _ in rows) + 2
    lines = [f"{'':<{wide}}{'mmcs':>8}{'≥ 0.9':>8}{'back':>9}{'≥ 0.9':>8}"]
    for name, one in rows:
        forth, back = one["forward"], one["backward"]
        lines.append(
            f"{name:<{wide}}{forth['mmcs']:>8.4f}{forth['alike']:>8.1%}{back['mmcs']:>9.4f}{back['alike']:>8.1%}"
        )
    return "\n".join(lines)


def _pairs(dictionary: Dictionary, against: Dictionary) -> list[tuple[int, int]]:
    pairs = []
    for g, writes in enumerate(dictionary.wiring.writes):
        same = [h for h, other in enumerate(against.wiring.writes) if other == writes]
        if len(same) != 1:
            known = "; ".join(", ".join(other) for other in against.wiring.writes)
            raise UserError(f"compare: {len(same)} groups of the other run write {', '.join(writes)}; it has: {known}")
        pairs.append((g, same[0]))
    widths = [[d.wiring.width(d.wiring.writes[n]) for n in numbers] for d, numbers in zip(
        (dictionary, against), zip(*pairs, strict=True), strict=True)]  # fmt: skip
    if widths[0] != widths[1]:
        raise UserError(f"compare: decoder rows of widths {widths[0]} and {widths[1]}: runs of different models")
    return pairs


def _raw_rows(dictionary: Dictionary, g: int) -> Tensor:
    """Decoder rows of a group in raw units [F, W]."""
    scales = [dictionary.write_scale[span] for span in dictionary.wiring.write_spans(g)]
    return expanded_decoder(dictionary, g) * torch.cat(scales)


def _both(forth: Tensor, back: Tensor) -> dict[str, dict[str, float]]:
    return {name: {"mmcs": float(v.double().mean()) if len(v) else 0.0,
                   "alike": float((v >= ALIKE).double().mean()) if len(v) else 0.0}
            for name, v in (("forward", forth), ("backward", back))}  # fmt: skip
