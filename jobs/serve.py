"""Serve stores of activations over HTTP, by crosslayer-coding's protocol: uploads, slices of rows, files."""

from xlc_ray.cluster import cli
from xlc_ray.cluster.serve import options, serve

if __name__ == "__main__":
    cli.run_options(serve, options(__doc__))
