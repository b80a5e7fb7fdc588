"""How many features of a run are found again in another: mean max cosine similarity of decoder rows, both ways.

--against DIR, the directory of the other run. Writes compare.json to the first."""

import argparse
import sys

from xlc_ray.cluster import cli
from xlc_ray.cluster.compare import compare
from xlc_ray.evaluation import comparison_table

if __name__ == "__main__":
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--against", default="")
    own, sys.argv[1:] = options.parse_known_args()
    cli.run_on(lambda run, changes: print(comparison_table(compare(run, own.against, changes))), __doc__)
