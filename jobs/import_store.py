"""Make a store of activations that another program cached: tensors of .pt, .npy, Parquet or Arrow files."""

from pathlib import Path

from xlc_ray.activations.importing import import_store
from xlc_ray.cluster import cli
from xlc_ray.cluster.session import output_root
from xlc_ray.files import is_url, local
from xlc_ray.progress import size

FLOATS = ("bfloat16", "float16", "float32")


options = cli.Options(description=__doc__)
options.add_argument("--out", required=True, metavar="DIR", help="a new directory, for source.path")
options.add_argument("--model", required=True, metavar="NAME", help="the language model that they are of")
options.add_argument(
    "--site", required=True, action="append", type=cli.pair, metavar="NAME=FILE[:COLUMN]", help="mlp_in.3=cache/*.pt"
)
options.add_argument("--held-out-fraction", type=float, default=0.05, metavar="F", help="the last rows (0.05)")
options.add_argument("--chunk-tokens", type=int, default=16384, metavar="N", help="rows of a chunk file (16384)")
options.add_argument("--dtype", choices=(*FLOATS, "int8"), help="of the store; default: the files'")
options.add_argument("--binary", choices=FLOATS, help="what columns of fixed_size_binary hold")
options.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of rows within a chunk")


def main(out: str, model: str, site: list[tuple[str, str]], **how) -> None:
    out = out if is_url(out) else str(output_root() / Path(local(out)).expanduser())
    made = import_store(out, model, site, **how)
    for held_out, manifest in made.items():
        total = sum(chunk.bytes for chunk in manifest.chunks)
        print(f"{manifest.tokens:,} {'held-out' if held_out else 'training'} rows, {size(total)}")
    print(f"{', '.join(made[False].sites)} at {out}")


if __name__ == "__main__":
    cli.run_options(main, options)
