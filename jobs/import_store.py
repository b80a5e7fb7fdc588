"""Make a store of activations that another program cached: tensors of .pt, .npy, Parquet or Arrow files."""

from xlc_ray.activations.importing import described, import_store
from xlc_ray.cluster import cli
from xlc_ray.cluster.session import output_path
from xlc_ray.config.activations import Generate, Text

FLOATS = ("bfloat16", "float16", "float32")
SHARE, ROWS = Text.model_fields["held_out_fraction"].default, Generate.model_fields["chunk_tokens"].default
options = cli.Options(description=__doc__)
add = options.add_argument
add("--out", required=True, metavar="DIR", help="a new directory, for source.path")
add("--model", required=True, metavar="NAME", help="the language model that they are of")
add("--site", required=True, action="append", type=cli.pair, metavar="NAME=FILE[:COLUMN]", help="mlp_in.3=cache/*.pt")
add("--held-out-fraction", type=float, default=SHARE, metavar="F", help="the last rows (%(default)s)")
add("--chunk-tokens", type=int, default=ROWS, metavar="N", help="rows of a chunk file (%(default)s)")
add("--dtype", choices=(*FLOATS, "int8"), help="of the store; default: the files'")
add("--binary", choices=FLOATS, help="what columns of fixed_size_binary hold")
add("--seed", type=int, default=0, metavar="N", help="of the order of rows within a chunk")


def main(out: str, model: str, site: list[tuple[str, str]], **how) -> None:
    out = output_path(out)
    print("\n".join(described(out, import_store(out, model, site, **how))))


if __name__ == "__main__":
    cli.run_options(main, options)
