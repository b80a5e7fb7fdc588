"""The command line of every job: one YAML, and any setting of it replaced by its dotted path."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from xlc_ray.cluster.session import log_directory
from xlc_ray.config import Config, Unreachable, UserError, load_config, presets, yaml_text
from xlc_ray.config.sweep import SweepConfig

USAGE = "usage: python {job} {option} [--path.of.setting=value …]"
NEEDED = {"--config": "FILE.yaml, the settings of the run", "--run": "DIR, the directory of a trained run"}


def parse(argv: list[str]) -> Config:
    """Settings from `--config FILE` and overrides `--train.lr=3e-4`, `--dictionary.gate='{kind: jumprelu}'`.

    Values are YAML. Raises UserError, one line, on anything else.
    """
    return load_config(*words_of(argv, "--config"))


def words_of(argv: list[str], option: str) -> tuple[str, dict[str, Any]]:
    """The value of the one option that a job needs, and the overrides. Raises UserError, one line, on anything else."""
    needed, overrides = None, {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name == "--":
            raise UserError(f"{word}: expected {option} {NEEDED[option].split(',')[0]} or --path.of.setting=value")
        if not equals and name == option:
            value = next(words, "")
        elif not equals:
            raise UserError(f"{name}: needs a value: {name}=VALUE")
        if name == option:
            needed = value
        else:
            overrides[name[2:]] = yaml_text.parse(value, name)
    if not needed:
        raise UserError(f"{option}: missing; give {option} {NEEDED[option]}")
    return needed, overrides


def overrides_of(argv: list[str]) -> dict[str, Any]:
    """Nothing but overrides. Raises UserError on anything else."""
    return words_of([*argv, "--config", "-"], "--config")[1]


class Options(argparse.ArgumentParser):
    """Options of one job, by their names; a mistake is one line. Without a description: beside settings."""

    def __init__(self, description: str | None = None) -> None:
        beside = description is None
        super().__init__(
            description=description,
            usage=argparse.SUPPRESS if beside else None,
            add_help=not beside,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def pair(word: str) -> tuple[str, str]:
    """The type of an option NAME=VALUE: both words. Raises ArgumentTypeError on anything else."""
    name, _, value = word.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"{word!r} should be NAME=VALUE")
    return name, value


def run(main: Callable[..., object], about: str | None, own: Options | None = None) -> NoReturn:
    """Parse the command line of a job that takes `--config FILE`, run `main(config)` and exit.

    Options of its own go to `main` by their names."""
    _run(main, lambda words: (parse(words),), about, "--config", own or Options())


def run_on(main: Callable[..., object], about: str | None, own: Options | None = None) -> NoReturn:
    """Likewise for a job that takes `--run DIR`: `main(run_dir, overrides)`."""
    _run(main, lambda words: words_of(words, "--run"), about, "--run", own or Options())


def run_sweep(main: Callable[..., object], about: str | None, own: Options) -> NoReturn:
    """Likewise for a job on the settings of a sweep, whose file is one of its own options: `main(overrides)`."""
    _run(main, lambda words: (overrides_of(words),), about, "--config", own, SweepConfig)


def run_options(main: Callable[..., object], options: Options) -> NoReturn:
    """Likewise for a job that has options of its own and no settings: all go to `main` by their names."""
    _exit_with(lambda: main(**vars(options.parse_args())))


def _run(
    main: Callable[..., object],
    settings: Callable[[list[str]], tuple[Any, ...]],
    about: str | None,
    option: str,
    own: Options,
    model: type[BaseModel] = Config,
) -> NoReturn:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv or any(word.startswith("--help=") for word in argv):
        print(help_text(argv, about, option, own, model))
        sys.exit(0)

    def parsed() -> None:
        given, words = own.parse_known_args(argv)
        main(*settings(words), **vars(given))

    _exit_with(parsed)


def _exit_with(main: Callable[[], object]) -> NoReturn:
    """Exit with 0, or 2 after a user's mistake, or 130 when interrupted.

    Anything else is a defect, or machines that failed too often: exit 1, with its traceback and where the logs are."""
    sys.excepthook = _failed
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: what was written so far is kept; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except (UserError, RayError, TrainingFailedError) as error:
        mistake = find_user_error(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _failed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    if logs := log_directory():
        print(f"failed; output of the workers: {logs}/worker-*, of Ray Train: {logs}/train", file=sys.stderr)


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError that an exception is or was raised from, in another process too: Ray wraps what workers raise."""
    seen: set[int] = set()
    todo: list[BaseException] = [error]
    while todo:
        link = todo.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        if isinstance(link, UserError) and not isinstance(link, RayError):  # Ray's own kind has the whole trace as text
            return link
        inner = [link.__cause__, *(getattr(link, name, None) for name in ("cause", "controller_failure"))]
        inner += getattr(link, "worker_failures", {}).values()
        todo += [e for e in inner if isinstance(e, BaseException)]
    # Ray Data hands on of a function's exception just its text.
    said = re.search(r"^xlc_ray\.[\w.]+\.(UserError|Diverged|Unreachable): (.+)$", str(error), re.MULTILINE)
    return {"Unreachable": Unreachable}.get(said.group(1), UserError)(said.group(2)) if said else None


def help_text(argv: list[str], about: str | None, option: str, own: Options, model: type[BaseModel] = Config) -> str:
    """What the job does, its own options and which sections there are; after `--help SECTION` (or --help=SECTION) the
    settings of that."""
    words = [word.removeprefix("--help=") for word in argv if word not in ("--help", "-h")]
    section = next((word for word in words if not word.startswith("-")), None)
    lines = [
        (about or "").strip(),
        "",
        USAGE.format(job=sys.argv[0], option=f"{option} {NEEDED[option].split(',')[0]}"),
        "",
    ]
    field = model.model_fields.get(section or "")
    if field is None:
        lines += [*own.format_help().splitlines(), ""] if vars(own.parse_known_args([])[0]) else []
        lines += ["Settings (details: --help SECTION):"]
        sections = {name: f.description or "" for name, f in model.model_fields.items()}
        if model is Config and option == "--config":
            sections["preset"] = f"A paper's or program's settings, under the file's: {', '.join(presets.names())}."
        lines += _in_columns(sections)
        example = "--train.lr=3e-4 --generate.sites='[mlp_in.0]'" if option == "--config" else "--evaluate.windows=256"
        if model is not Config:
            example = example.replace("--", "--base.")
        lines += ["", f"A value is YAML and replaces what the file says: {example}"]
    else:
        lines += [f"--{section}: {field.description}", *_settings(str(section), field.annotation)]
    return "\n".join(lines).strip()


def _in_columns(described: dict[str, str]) -> Iterator[str]:
    """Names, and what they are beside them, folded to the terminal."""
    column = max(map(len, described)) + 4
    for name, text in described.items():
        lines = textwrap.wrap(text, max(40, shutil.get_terminal_size((120, 24)).columns - column))
        yield f"  {name:<{column - 2}}{lines[0]}"
        yield from (" " * column + line for line in lines[1:])


def _settings(path: str, annotation: Any) -> Iterator[str]:
    """One line a setting below a section; the kinds of a tagged union one after another."""
    for model in _models(annotation):
        for name, field in model.model_fields.items():
            here = f"{path}.{name}"
            if name == "kind" and isinstance(field.default, str):
                yield f"  --{here}={field.default}"
            elif list(_models(field.annotation)):
                optional = (
                    "" if field.is_required() or type(None) not in get_args(field.annotation) else " (default null)"
                )
                yield f"  --{here}{optional}: {field.description}"
                yield from _settings(f"{here}[]" if _is_list(field.annotation) else here, field.annotation)
            else:
                yield f"  --{here} ({_default(field.default)}): {field.description}"


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(map(_is_list, get_args(annotation)))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return "null" if value is None else str(value)
