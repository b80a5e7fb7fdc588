"""Write a trained dictionary in another program's format, with known answers and a model card; push it to the Hub."""

from pathlib import Path

from xlc_ray.cluster import cli
from xlc_ray.cluster.session import output_root, run_path
from xlc_ray.export.run import export
from xlc_ray.files import is_url, local


def main(run: str, format: str, out: str, push_to_hub: str | None) -> None:
    print(
        export(
            run_path(run),
            format,
            out if is_url(out) else str(output_root() / Path(local(out)).expanduser()),
            push_to_hub,
        )
    )


if __name__ == "__main__":
    needed = {"--run": "DIR, a run directory", "--format": "NAME, circuit_tracer, saelens or dictionary_learning"}
    needed["--out"] = "DIR, a new directory"
    cli.run_with(main, __doc__, needed, {"--push-to-hub": "USER/NAME, a model repository on the Hub"})
