"""How many features of a run are found again in another: mean max cosine similarity of decoder rows, both ways.

Writes compare.json to the first."""

from xlc_ray.cluster import cli
from xlc_ray.cluster.compare import compare
from xlc_ray.evaluation import comparison_table

options = cli.Options()
options.add_argument("--against", default="", metavar="DIR", help="the directory of the other run")

if __name__ == "__main__":
    cli.run_on(lambda run, changes, against: print(comparison_table(compare(run, against, changes))), __doc__, options)
