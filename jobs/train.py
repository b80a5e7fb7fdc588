"""Train a sparse dictionary on stored activations, or go on with a run that was interrupted."""

from xlc_ray.cluster import cli
from xlc_ray.cluster.train import train
from xlc_ray.config import Config


def main(config: Config) -> None:
    last = train(config)
    print(
        f"step {last['step']:,}: loss {last['loss']:.4g}, explained variance {last['explained_variance']:.3f}, "
        f"l0 {last['l0']:.1f}, dead {last['dead_features']:.1%}"
    )
    print(f"run directory: {last['out']}")


if __name__ == "__main__":
    cli.run(main, __doc__)
