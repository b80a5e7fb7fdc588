"""What a run will cost, before anything runs."""

from xlc_ray.cluster import cli
from xlc_ray.training.forecast import forecast

options = cli.Options()
options.add_argument("--gpu", metavar="NAME", help="h100, h200, a100 or l40s (default: this machine's processors)")
options.add_argument("--nodes", type=int, default=1, metavar="N", help="machines")
options.add_argument(
    "--active",
    type=float,
    metavar="K",
    help="features a token that products take in, for gates without a budget (jumprelu: half a bandwidth below too)",
)


def main(config, gpu, nodes, active) -> None:
    for line in forecast(config, gpu, nodes, active):
        print(line)


if __name__ == "__main__":
    cli.run(main, __doc__, options)
