"""Write a trained dictionary in another program's format, with known answers and a model card; push it to the Hub."""

from xlc_ray.cluster import cli
from xlc_ray.cluster.session import output_path, run_path
from xlc_ray.export.run import export

options = cli.Options(description=__doc__)
options.add_argument("--run", required=True, metavar="DIR", help="a run directory")
options.add_argument("--format", required=True, metavar="NAME", help="circuit_tracer, saelens or dictionary_learning")
options.add_argument("--out", required=True, metavar="DIR", help="a new directory")
options.add_argument("--push-to-hub", metavar="USER/NAME", help="also publish it there; needs a token")


def main(run, format, out, push_to_hub) -> None:
    print(export(run_path(run), format, output_path(out), push_to_hub))


if __name__ == "__main__":
    cli.run_options(main, options)
