"""Make the medical question-answering corpus: six datasets, each question with its options and answer a document."""

from xlc_ray.activations import medical
from xlc_ray.cluster import cli
from xlc_ray.cluster.session import output_path

options = cli.Options(description=__doc__)
options.add_argument("--out", required=True, help="new directory; `text.dataset` reads it")
options.add_argument("--sources", default=",".join(medical.SOURCES), help="some of the six (default: all)")
options.add_argument("--source", action="append", default=[], type=cli.pair, metavar="NAME=PATH", help="a local copy")
options.add_argument("--strict", action="store_true", help="with the slips of the published corpus")
options.add_argument("--push-to-hub", metavar="USER/NAME", help="also publish it there; needs a token")


def main(out, sources, source, strict, push_to_hub) -> None:
    out = output_path(out)
    made = medical.prepare(out, sources.split(","), dict(source), strict, push_to_hub)
    print("\n".join(f"{name:<28}{count:>9,}" for name, count in made.items()))
    print(f"{sum(made.values()):,} documents at {out}")


if __name__ == "__main__":
    cli.run_options(main, options)
