"""Make of a TopK or BatchTopK run a JumpReLU run of the same l0: a table, and a run directory with conversion.json.

--out DIR, --per-feature (a threshold a feature from what it kept), --target-l0 X, --tolerance T, --fold (norms folded).
"""

import argparse
import sys

from xlc_ray.cluster import cli
from xlc_ray.cluster.convert import convert
from xlc_ray.evaluation.convert import conversion_table

if __name__ == "__main__":
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    options.add_argument("--out", default="")
    for flag in ("--per-feature", "--fold"):
        options.add_argument(flag, action="store_true")
    for number in ("--target-l0", "--tolerance"):
        options.add_argument(number, type=float)
    own, sys.argv[1:] = options.parse_known_args()
    cli.run_on(lambda run, changes: print(conversion_table(convert(run, changes=changes, **vars(own)))), __doc__)
