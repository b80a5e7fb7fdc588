"""What a run will cost, before anything runs. Also: --gpu h100|h200|a100|l40s --nodes N (default: this machine's
processors) and --active K, the active features a token that a gate without a budget is expected to have."""

import argparse
import sys

from xlc_ray.cluster import cli
from xlc_ray.training.forecast import forecast

if __name__ == "__main__":
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--gpu")
    options.add_argument("--nodes", type=int, default=1)
    options.add_argument("--active", type=float)
    own, sys.argv[1:] = options.parse_known_args()
    cli.run(lambda config: [print(line) for line in forecast(config, own.gpu, own.nodes, own.active)], __doc__)
