"""Every setting of xlc_ray: one YAML, validated whole, the same for all jobs.

An override is *(dotted path, value)* and replaces what is at that path. The same idea serves the command line
(`--train.lr=3e-4`, `--dictionary.gate='{kind: jumprelu}'`), Python (`config.override({"train.lr": 3e-4})`) and the axes
of a sweep. A default is stated here and nowhere else: the constructors behind take plain values. `preset: NAME` puts
the settings of a paper or program under those of the file (presets/).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from xlc_ray.config import presets, yaml_text
from xlc_ray.config.activations import BaseOf, Generate, Model, Text
from xlc_ray.config.base import Name, Settings
from xlc_ray.config.dictionary import BatchTopKGate, Dictionary, TopKGate
from xlc_ray.config.errors import Unreachable, UserError, explain
from xlc_ray.config.gate_losses import check_gate
from xlc_ray.config.sources import LiveSource, Source, StoreSource
from xlc_ray.config.training import Cluster, Evaluate, Train

__all__ = ["Config", "Unreachable", "UserError", "apply_overrides", "load_config", "load_config_text"]


class Config(Settings):
    """The whole of a run."""

    out: Name
    """Run directory: config.yaml, checkpoints/, metrics.jsonl, eval.json, report.html."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides initial weights and the order of data."""
    model: Model
    """The language model."""
    base_model: BaseOf | None = None
    """The model that it was fine-tuned from, where both are compared."""
    text: Text
    """The text it reads."""
    generate: Generate
    """The activations to store."""
    source: Source
    """Where training reads activations."""
    dictionary: Dictionary
    """What is trained."""
    train: Train
    """How."""
    evaluate: Evaluate = Evaluate()
    """How it is measured."""
    cluster: Cluster = Cluster()
    """On what."""

    @model_validator(mode="before")
    @classmethod
    def _store_is_the_usual_source(cls, values: Any) -> Any:
        source = values.get("source") if isinstance(values, dict) else None
        if isinstance(source, dict) and "kind" not in source:
            return values | {"source": {"kind": "store", **source}}
        return values

    @model_validator(mode="after")
    def _models_are_read(self) -> Config:
        kind, stored = self.dictionary.wiring.kind, self.generate.sites or ()
        if kind == "model_diff" and self.base_model is None:
            raise ValueError("base_model: missing; the wiring model_diff compares model with the one it was tuned from")
        based = any(site.endswith("@base") for site in stored)
        if based and self.base_model is None:
            raise ValueError("base_model: missing; generate.sites names sites of it (@base)")
        if self.base_model and not based and kind in ("sae", "transcoder", "clt", "crosscoder"):
            raise ValueError(f"base_model: the wiring {kind} does not read it; use model_diff, or base_model: null")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        gate, loss = self.dictionary.gate, self.train.loss
        share = self.cluster.replicas * self.train.accumulate
        if self.train.batch_tokens % share:
            raise ValueError(
                f"train.batch_tokens: {self.train.batch_tokens} is not divisible by replicas x accumulate = {share}"
            )
        if self.dictionary.features < self.cluster.tensor_parallel:
            raise ValueError(
                f"cluster.tensor_parallel: {self.cluster.tensor_parallel} ranks cannot share "
                f"dictionary.features = {self.dictionary.features}; use at most {self.dictionary.features}"
            )
        self._layouts_are_possible()
        pooled = gate if isinstance(gate, TopKGate | BatchTopKGate) and gate.pool == "group" else None
        if pooled and pooled.k > self.dictionary.features:
            raise ValueError(f"dictionary.gate.k: {pooled.k} exceeds dictionary.features = {self.dictionary.features}")
        if loss.matryoshka and 1 / self.dictionary.features > min(loss.matryoshka.prefixes):
            raise ValueError(
                f"train.loss.matryoshka.prefixes: {min(loss.matryoshka.prefixes):g} of dictionary.features = "
                f"{self.dictionary.features} is less than one feature"
            )
        end_to_end = self.train.end_to_end
        if loss.matryoshka and end_to_end and not end_to_end.reconstruction:
            raise ValueError(
                "train.loss.matryoshka: prefixes count by train.end_to_end.reconstruction, which is 0; allowed: more"
            )
        if (
            self.dictionary.unit_norm
            and self.dictionary.decoder_norm != Dictionary.model_fields["decoder_norm"].default
        ):
            raise ValueError("dictionary.decoder_norm: has no effect with unit_norm: true; leave one of the two out")
        check_gate(gate, loss)
        if loss.auxk and loss.ghost:
            raise ValueError("train.loss.ghost: revives dead features as auxk does; use one of the two")
        if self.train.resample:  # of a wiring of the user's own it is asked when that is built
            self.train.resample.check_tying(getattr(self.dictionary.wiring, "tied", None))
        if self.train.resample and isinstance(self.source, LiveSource):
            raise ValueError(
                "train.resample: reads rows that live training has not kept; use train.loss.auxk or train.loss.ghost, "
                "or source.kind: store"
            )
        if self.generate.dtype == "int8" and isinstance(self.source, LiveSource):
            raise ValueError(
                "generate.dtype: int8 rounds rows that are stored, not those that live training makes; "
                "allowed with source.kind: live: bfloat16, float16, float32"
            )
        if self.generate.dtype == "bfloat16_zstd" and not isinstance(self.source, StoreSource):
            raise ValueError(
                f"generate.dtype: bfloat16_zstd is for files, not for source.kind: {self.source.kind}; allowed: "
                "bfloat16, float16, float32"
            )
        if self.train.end_to_end and self.dictionary.wiring.kind not in ("sae", "transcoder"):
            raise ValueError(
                f"train.end_to_end: cannot train {self.dictionary.wiring.kind}, whose features write several sites; "
                "allowed dictionary.wiring.kind: sae, transcoder"
            )
        return self

    def _layouts_are_possible(self) -> None:
        cluster = self.cluster
        if cluster.min_replicas and cluster.min_replicas > cluster.replicas:
            raise ValueError(
                f"cluster.min_replicas: {cluster.min_replicas} exceeds cluster.replicas = {cluster.replicas}"
            )
        if (most := max(cluster.fallback_tensor_parallel, default=1)) > self.dictionary.features:
            raise ValueError(
                f"cluster.fallback_tensor_parallel: {most} ranks cannot share dictionary.features = "
                f"{self.dictionary.features}"
            )

    def override(self, changes: dict[str, Any]) -> Config:
        """A new Config with each dotted path replaced by its value. Raises UserError on a bad path or value."""
        if "preset" in changes:
            raise UserError(
                "override: preset: lies under a file as it is read; give it to load_config, or with --config"
            )
        return _validate(apply_overrides(self.model_dump(mode="json"), changes), "override")

    def yaml(self) -> str:
        """Exactly these settings, as YAML that `load_config` reads back."""
        return yaml_text.dump(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file over its preset, apply dotted overrides, validate.

    Raises UserError: file, path, value, choices, nearest."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return load_config_text(text, str(path), overrides)


def load_config_text(text: bytes, origin: str, overrides: dict[str, Any] | None = None) -> Config:
    """The same from the YAML itself; `origin` names it in errors."""
    changes, tree = dict(overrides or {}), yaml_text.parse_mapping(text, origin)
    named = tree.pop("preset", None)
    if (preset := changes.pop("preset", named)) is not None:
        tree = presets.under(tree, preset, origin)
    return _validate(apply_overrides(tree, changes), origin)


def apply_overrides(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of the tree with each dotted path replaced. Sections that are missing or null on the way are made."""
    tree = yaml_text.copy(tree)
    for path, value in changes.items():
        node, *rest = tree, *str(path).split(".")
        for key in rest[:-1]:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
            if not isinstance(node, dict):
                raise UserError(f"{path}: {key} is {node!r}, which has no settings inside")
        node[rest[-1]] = yaml_text.copy(value)
    return tree


def _validate(tree: dict[str, Any], origin: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Config)}") from None
