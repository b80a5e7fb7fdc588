"""What training minimises, and how strengths change over a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from xlc_ray.config.base import Fraction, Name, Settings


class Constant(Settings):
    """The value, after a linear warm-up."""

    kind: Literal["constant"] = "constant"
    """The tag of this schedule."""
    warmup: Fraction = 0.0
    """Share of the run over which the value rises linearly from 0."""


class Linear(Settings):
    """Constant, then linear to `end` times the value over the last part of the run."""

    kind: Literal["linear"] = "linear"
    """The tag of this schedule."""
    warmup: Fraction = 0.0
    """Share of the run over which the value rises linearly from 0."""
    decay: Fraction = 0.2
    """Share of the run, at its end, over which the value falls."""
    end: Annotated[float, Field(ge=0)] = 0.0
    """What is left at the end, as a factor."""

    @model_validator(mode="after")
    def _fits_in_the_run(self) -> Linear:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup = {self.warmup:g} and decay = {self.decay:g} exceed the whole run, 1")
        return self


class Cosine(Settings):
    """Half a cosine from the value to `end` times it, restarted `cycles` times."""

    kind: Literal["cosine"] = "cosine"
    """The tag of this schedule."""
    warmup: Fraction = 0.0
    """Share of the run over which the value rises linearly from 0."""
    cycles: Annotated[int, Field(ge=1)] = 1
    """Number of half cosines (warm restarts)."""
    end: Annotated[float, Field(ge=0)] = 0.0
    """What is left at the end of a cycle, as a factor."""


Schedule = Annotated[Constant | Linear | Cosine, Field(discriminator="kind")]


class Sparsity(Settings):
    """A penalty on features, summed over features and averaged over tokens."""

    kind: Literal["l1", "tanh", "lp", "l0"]
    """l1: f n; tanh: tanh(c f n); lp: (f n)^p; l0: the number of active features, with the gradient that the gate
    gives it (jumprelu, hard_concrete, gated_hard_concrete). n = norm of the decoder row."""
    coefficient: Annotated[float, Field(ge=0)]
    """Weight of the penalty, lambda."""
    schedule: Schedule = Constant()
    """lambda over the run."""
    c: Annotated[float, Field(gt=0)] = 4.0
    """Steepness of tanh."""
    decoder_norm: bool = True
    """Weight l1, tanh and lp by the decoder row's norm."""
    p_end: Annotated[float, Field(gt=0, le=1)] = 0.2
    """With lp: p falls linearly from 1 to this over the run (Karvonen 2024)."""
    p_hold: Fraction = 0.0
    """With lp: share of the run before p moves."""
    keep_strength: bool = True
    """With lp: scale the penalty to what l1 would be on the same batch, so that its strength does not change with p."""
    target_l0: Annotated[float, Field(gt=0)] | None = None
    """With l0: penalise (L0 / target - 1)^2 instead of L0; L0 counts all groups."""

    @model_validator(mode="after")
    def _says_nothing_of_other_kinds(self) -> Sparsity:
        for name, kind in (("c", "tanh"), ("p_end", "lp"), ("p_hold", "lp"), ("keep_strength", "lp")):
            # By its value: the config.yaml of a run states every setting.
            if self.kind != kind and getattr(self, name) != Sparsity.model_fields[name].default:
                raise ValueError(f"{name}: only with kind {kind}")
        return self


class AuxK(Settings):
    """Dead features learn to reconstruct the error that is left (Gao et al. 2024)."""

    coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of the auxiliary loss."""
    k: Annotated[int, Field(ge=1)] | None = None
    """Dead features used a token and group; null = half the width of a written site."""


class Matryoshka(Settings):
    """Each prefix of a group's features is trained to reconstruct alone (Bussmann et al. 2025)."""

    prefixes: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=2)]
    """Shares of each group's features, rising to 1."""
    combine: Literal["mean", "sum"] = "mean"
    """Mean or sum of the prefixes' reconstruction errors."""

    @model_validator(mode="after")
    def _rises_to_one(self) -> Matryoshka:
        if list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[-1] != 1:
            raise ValueError(f"prefixes = {list(self.prefixes)} must rise, and end with 1")
        return self


class Ghost(Settings):
    """Ghost gradients: dead features learn, by exp of their pre-activations, from the error that is left."""

    coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Weight of this loss, whose value is scaled to the reconstruction loss."""


class Connection(Settings):
    """Few connections to another dictionary: at common sites, sum |<its decoder row, ours>|, mean over its features."""

    run: Name
    """Run directory of the other dictionary, which writes a site that this one writes."""
    coefficient: Annotated[float, Field(ge=0)]
    """Weight of the penalty."""


class Loss(Settings):
    """Reconstruction error (summed over width and sites, averaged over tokens) plus penalties."""

    scale: Literal["canonical", "per_dim"] = "canonical"
    """canonical: sum over width; per_dim: mean over each site's width."""
    sparsity: Sparsity | None = None
    """Penalty on active features."""
    preactivation: Annotated[float, Field(ge=0)] = 0.0
    """Weight of sum ReLU(theta - pre) n, which pulls dead features back."""
    auxk: AuxK | None = None
    """Auxiliary loss of dead features."""
    matryoshka: Matryoshka | None = None
    """Nested dictionaries; null = one."""
    ghost: Ghost | None = None
    """Ghost gradients of dead features, instead of auxk."""
    connection: Connection | None = None
    """Penalty on inner products with the decoder rows of another dictionary."""
