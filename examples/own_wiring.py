"""A wiring of your own: a cross-layer transcoder whose features write `reach` layers, their own included.

    python jobs/train.py --config configs/quickstart.yaml --out=runs/near \
        --dictionary.wiring='{kind: custom, path: "examples.own_wiring:near", options: {reach: 2}}'
"""

from xlc_ray.dictionary import Wiring


def near(layers: list[int], width: int, reach: int) -> Wiring:
    ins, outs = [f"mlp_in.{n}" for n in layers], [f"mlp_out.{n}" for n in layers]
    return Wiring(
        widths=dict.fromkeys(ins + outs, width),  # every site, in the order of the columns
        reads=tuple((site,) for site in ins),  # a row for each group of features
        writes=tuple(tuple(outs[g : g + reach]) for g in range(len(layers))),
    )
