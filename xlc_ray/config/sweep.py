"""Settings of a sweep: a base, what varies over it, and how trials are chosen and cut short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from xlc_ray.config import Config, apply_overrides, presets, yaml_text
from xlc_ray.config.base import Fraction, Name, Settings
from xlc_ray.config.errors import UserError, explain, unknown

Values = Annotated[tuple[Any, ...], Field(min_length=1)]
AXES = ("choice", "grid", "uniform", "loguniform", "randint")
CHANGEABLE = (
    "train.lr",
    "train.lr_schedule",
    "train.clip_norm",
    "train.optimizer",
    "train.loss",
    "train.dead_after_tokens",
    "train.end_to_end.kl",
    "train.end_to_end.downstream",
    "train.end_to_end.reconstruction",
)
"""What may change while a run trains: these sections and all below them decide neither the shapes in a checkpoint nor
which rows come next, and keep no state of their own but the optimizer's moments, which fit all its settings."""


def _rises(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] >= ends[1]:
        raise ValueError(f"[{ends[0]:g}, {ends[1]:g}] must rise")
    return ends


Positive = Annotated[float, Field(gt=0)]


class Axis(Settings):
    """What one setting may be: give one of choice, grid, uniform, loguniform, randint."""

    choice: Values | None = None
    """Any of these; by the search grid all of them."""
    grid: Values | None = None
    """All of these: by the search random, each sample runs once with each."""
    uniform: Annotated[tuple[float, float], AfterValidator(_rises)] | None = None
    """Any number from [a, b]."""
    loguniform: Annotated[tuple[Positive, Positive], AfterValidator(_rises)] | None = None
    """Likewise, evenly in its logarithm."""
    randint: Annotated[tuple[int, int], AfterValidator(_rises)] | None = None
    """Any whole number from [a, b], both included."""
    when: Annotated[dict[str, Any], Field(default_factory=dict)]
    """{dotted path: value, or a list of values}: only where the settings say so; elsewhere the base's value stays."""

    @property
    def kind(self) -> str:
        """Which of AXES it is."""
        return next(name for name in AXES if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values of a choice or a grid; None of a range."""
        return self.choice or self.grid

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All values, or both ends of a range."""
        return self.values or getattr(self, self.kind)

    @model_validator(mode="after")
    def _is_one_kind(self) -> Axis:
        given = [name for name in AXES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} given; give one of {', '.join(AXES)}")
        if self.values and (twice := [v for i, v in enumerate(self.values) if v in self.values[:i]]):
            raise ValueError(f"{self.kind}: {twice[0]!r} is given twice")
        return self


class Search(Settings):
    """Which points of the space become trials, and by what they are judged."""

    kind: Literal["grid", "random", "optuna"] = "grid"
    """grid: every point, as nested loops over cases and then the axes in the order of the file, the last changing
    fastest; random: independent draws; optuna: draws that learn from finished trials (needs the extra `optuna`)."""
    num_samples: Annotated[int, Field(ge=1)] | None = None
    """Draws of random and optuna."""
    max_trials: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many trials."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials at once, at most; null = as many as the cluster holds."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the draws; the trials' own seed is the setting `seed` of the base."""
    metric: Literal[
        "frontier",
        "fvu",
        "explained_variance",
        "dead_features",
        "cosine_similarity",
        "ce_recovered",
        "kl",
        "top1_agreement",
    ] = "frontier"
    """Measured on held-out tokens, what cuts trials short and what optuna improves: frontier (how far fvu lies above
    what the other trials reach at the same l0; optuna takes fvu and l0 as two goals) or one number by itself. The last
    three run the language model at each stop."""

    @model_validator(mode="after")
    def _draws_are_counted(self) -> Search:
        if self.kind == "grid" and self.num_samples is not None:
            raise ValueError("num_samples: grid runs every point once; use max_trials, or kind: random")
        if self.kind != "grid" and self.num_samples is None:
            raise ValueError(f"num_samples: missing; kind {self.kind} needs the number of draws")
        return self


class Asha(Settings):
    """Asynchronous successive halving: at each rung the best share of the trials so far goes on (Li et al. 2018)."""

    grace: Annotated[int, Field(ge=1)]
    """Steps before the first rung."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """At a rung the best 1/reduction goes on; without `rungs`, each is so many times the steps of the one before."""
    rungs: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    """Steps of the rungs; null = grace, grace x reduction, … below train.steps."""

    @model_validator(mode="after")
    def _rungs_rise(self) -> Asha:
        if self.rungs and (list(self.rungs) != sorted(set(self.rungs)) or self.rungs[0] != self.grace):
            raise ValueError(f"rungs = {list(self.rungs)} must rise, and begin with grace = {self.grace}")
        return self


class Pbt(Settings):
    """Population based training: every `interval` steps the worst trials go on from the parameters of the best ones,
    with settings a little off theirs (Jaderberg et al. 2017). The trials of the search are the population."""

    interval: Annotated[int, Field(ge=1)]
    """Steps between comparisons, at which a trial waits for all others."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the population that is replaced, and from which the parameters come, at most."""
    factor: Annotated[float, Field(gt=1)] = 1.25
    """A number is multiplied or divided by this, within its range; of a choice it becomes the next value or the one
    before."""
    resample: Fraction = 0.25
    """Probability that a setting is drawn anew instead."""


class Resources(Settings):
    """What all trials together may take of the cluster; a trial takes what its `cluster` settings say."""

    cpus: Annotated[float, Field(gt=0)] | None = None
    """CPUs, at most; null = all."""
    gpus: Annotated[float, Field(gt=0)] | None = None
    """GPUs, at most; null = all."""
    sharing: Annotated[int, Field(ge=1)] | None = None
    """With share_activations: trials in one worker group, at most; its memory holds all of them. null = all that read
    the same."""


class SweepConfig(Settings):
    """The whole of a sweep."""

    out: Name
    """Sweep directory: sweep.yaml, sweep.json, metrics.parquet, and a run directory a trial under trials/."""
    base: Config
    """Settings that all trials share: a file (seen from the sweep's own), or the settings themselves."""
    override: Annotated[dict[str, Any], Field(default_factory=dict)]
    """{dotted path: value} replaced in the base, for all trials."""
    cases: Annotated[tuple[dict[str, Any], ...], Field(default_factory=tuple)]
    """Settings that go together, {dotted path: value} each: the outermost axis."""
    space: Annotated[dict[str, Axis], Field(default_factory=dict)]
    """Dotted path → what it may be."""
    search: Search = Search()
    """How trials are chosen and judged."""
    asha: Asha | None = None
    """Cuts short what is not worth its steps; null = all trials run to the end."""
    pbt: Pbt | None = None
    """Changes settings of trials while they train; null = none changes."""
    share_activations: bool = False
    """Trials that read the same rows (same source, sites, batch_tokens, seed and ranks) train in one worker group, each
    batch being read, or made by a live source's language models, once for all of them."""
    resources: Resources = Resources()
    """Limits on what is used at once."""

    @model_validator(mode="before")
    @classmethod
    def _base_has_a_directory(cls, tree: Any) -> Any:
        # Trials' directories are the sweep's to choose.
        if isinstance(tree, dict) and isinstance(tree.get("base"), dict):
            return tree | {"base": {"out": tree.get("out")} | tree["base"]}
        return tree

    @model_validator(mode="after")
    def _axes_fit(self) -> SweepConfig:
        if not self.space and not self.cases:
            raise ValueError("space: nothing varies; give space or cases")
        _check_paths("space.", self.space)
        for i, case in enumerate(self.cases):
            _check_paths(f"cases.{i}.", case)
        paths = list(self.space)
        for i, (path, axis) in enumerate(self.space.items()):
            if self.search.kind == "grid" and axis.values is None:
                raise ValueError(f"space.{path}: {axis.kind} has no list of values; use choice, or search.kind: random")
            if self.search.kind == "optuna" and axis.kind == "grid":
                raise ValueError(f"space.{path}: optuna chooses values itself; use choice, not grid")
            for asked in axis.when:
                if wrong := unknown(asked, Config):
                    raise ValueError(f"space.{path}.when: {wrong}")
                if late := [other for other in paths[i:] if _related(other, asked)]:
                    raise ValueError(f"space.{path}.when: {asked} is set by {late[0]}, which must stand before it")
        if self.share_activations and self.search.kind == "optuna":
            raise ValueError("share_activations: optuna chooses trials by what others found; use search.kind: random")
        if self.resources.sharing and not self.share_activations:
            raise ValueError("resources.sharing: does nothing without share_activations: true")
        varied = [*self.space, *(path for case in self.cases for path in case)]
        if self.asha and any(_related(path, "train.steps") for path in varied):
            raise ValueError("space.train.steps: rungs compare trials of equal length; set asha: null")
        last = (self.asha.rungs or (self.asha.grace,))[-1] if self.asha else 0
        if last >= (steps := self.base.train.steps):
            raise ValueError(f"asha: a rung at {last} is not before train.steps = {steps}; use less")
        if self.pbt:
            self._population_fits(self.pbt)
        return self

    def _population_fits(self, pbt: Pbt) -> None:
        if self.asha:
            raise ValueError("pbt: replaces trials where asha ends them; give one of the two")
        if self.search.kind == "optuna":
            raise ValueError(
                "search.kind: pbt wants its population at once, optuna chooses one by one; allowed: grid, random"
            )
        if self.cases:
            raise ValueError("cases: pbt changes axes by themselves; use override for what all trials share, and space")
        for path in self.space:
            if not any(f"{path}.".startswith(f"{allowed}.") for allowed in CHANGEABLE):
                raise ValueError(
                    f"space.{path}: cannot change while a trial trains, as pbt does; allowed: {', '.join(CHANGEABLE)}"
                )
        if pbt.interval >= (steps := self.base.train.steps):
            raise ValueError(
                f"pbt.interval: {pbt.interval} leaves no comparison before train.steps = {steps}; use less"
            )

    def yaml(self) -> str:
        """Exactly these settings, as YAML that `load_sweep` reads back."""
        return yaml_text.dump(self.model_dump(mode="json", exclude_none=False))


def _check_paths(where: str, paths: Iterable[str]) -> None:
    """Of what varies: each is a trial's to set, and undoes none before it."""
    before: list[str] = []
    for path in paths:
        if path.split(".")[0] in ("out", "generate", "text", "model", "base_model"):
            raise ValueError(f"{where}{path}: decides the activations, which all trials share, or where they go")
        if inside := [other for other in before if other.startswith(f"{path}.")]:
            raise ValueError(f"{where}{path}: would replace {inside[0]}, which stands before it; put it first")
        before.append(path)


def _related(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def load_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> SweepConfig:
    """Read a sweep's YAML, apply dotted overrides, validate. Raises UserError: file, path, value, choices, nearest."""
    return sweep_of(read_tree(path), path, overrides)


def sweep_of(tree: dict[str, Any], origin: str | Path, overrides: Mapping[str, Any] | None = None) -> SweepConfig:
    """The same from the mapping in the file `origin`."""
    here = Path(origin).parent
    given = dict(overrides or {})
    if isinstance(base := given.pop("base", None) or tree.get("base"), str):
        # On the command line a path is seen from the working directory, in the file from the file.
        file = base if overrides and overrides.get("base") else here / base
        base = read_tree(file)
        if (preset := given.pop("base.preset", base.pop("preset", None))) is not None:
            base = presets.under(base, preset, str(file))
    axes = {path: given.pop(path) for path in list(given) if path.startswith(("space.", "override."))}
    tree = apply_overrides(tree | {"base": base} if base is not None else tree, given)
    for path, value in axes.items():  # an axis is named by a dotted path, which is one key
        section, _, name = path.partition(".")
        tree[section] = (tree.get(section) or {}) | {name: value}
    try:
        if isinstance(tree.get("base"), dict) and isinstance(tree.get("override"), dict):
            tree |= {"base": apply_overrides(tree["base"], tree["override"]), "override": {}}
        return SweepConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, SweepConfig)}") from None


def read_tree(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError naming it."""
    try:
        return yaml_text.parse_mapping(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
