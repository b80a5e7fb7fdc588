"""Measure a trained dictionary on held-out text: eval.json, report.html and a short table."""

from xlc_ray.cluster import cli
from xlc_ray.cluster.evaluate import evaluate
from xlc_ray.evaluation import table


def main(run_dir: str, changes: dict) -> None:
    found = evaluate(run_dir, changes)
    print(table(found))
    print(f"report: {found['report']}")


if __name__ == "__main__":
    cli.run_on(main, __doc__)
