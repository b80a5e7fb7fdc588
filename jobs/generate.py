"""Make the activations that a run trains on: text → the model's activations → a directory of chunk files."""

from xlc_ray.cluster import cli
from xlc_ray.cluster.generate import generate
from xlc_ray.config import Config
from xlc_ray.progress import duration, size


def main(config: Config) -> None:
    done = generate(config)
    print(f"{done['tokens']:,} training and {done['held_out_tokens']:,} held-out tokens, {len(done['sites'])} sites")
    print(f"{size(done['bytes'])} in {done['chunks']} chunks at {done['path']}")
    if done["live"]:
        print(f"{done['live']} more are made while training")
    if done["made"]:
        print(f"{done['made']} chunks made in {duration(done['seconds'])}, {done['tokens_per_s']:,.0f} tok/s")
    else:
        print("everything was already there")


if __name__ == "__main__":
    cli.run(main, __doc__)
