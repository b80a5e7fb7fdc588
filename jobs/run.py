"""All of a run: make the activations, train on them, measure the result. What is there already is not made again."""

import evaluate
import generate
import train

from xlc_ray.cluster import cli
from xlc_ray.cluster.session import resolve
from xlc_ray.config import Config


def main(config: Config) -> None:
    config = resolve(config)
    generate.main(config)
    train.main(config)
    evaluate.main(config.out, {})


if __name__ == "__main__":
    cli.run(main, __doc__)
