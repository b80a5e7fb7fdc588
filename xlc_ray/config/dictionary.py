"""Settings of the dictionary: wiring, gate, normalisation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from xlc_ray.config.base import Fraction, Layers, Settings

Path = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


class SaeWiring(Settings):
    """Sparse autoencoders: one group of features a layer reads and writes the same site."""

    kind: Literal["sae"] = "sae"
    """The tag of this wiring."""
    site: str = "resid_post"
    """Kind of site, e.g. resid_post, mlp_out."""
    layers: Layers = "all"
    """Layers: all, or a list."""


class TranscoderWiring(Settings):
    """Per-layer transcoders: group l reads the MLP input of a layer and writes its MLP output."""

    kind: Literal["transcoder"] = "transcoder"
    """The tag of this wiring."""
    layers: Layers = "all"
    """Layers: all, or a list."""
    skip: bool = False
    """Add a linear path from input to output."""


class CltWiring(Settings):
    """Cross-layer transcoder: group l reads the MLP input of layer l and writes the MLP outputs of l and all later."""

    kind: Literal["clt"] = "clt"
    """The tag of this wiring."""
    layers: Layers = "all"
    """Layers: all, or a list."""
    skip: bool = False
    """Add linear paths from each input to the outputs of its layer and all later ones."""
    tied: Literal["per_source", "per_target"] | None = None
    """Share decoders: per_source: one a group, for all its targets; per_target: one a target, for all groups."""
    feature_scale: bool = False
    """With tied: each target multiplies every feature by a number of its own."""
    feature_offset: bool = False
    """With tied: each target adds a number of its own to every feature that is active."""

    @model_validator(mode="after")
    def _only_tied_decoders_have_them(self) -> CltWiring:
        for name in ("feature_scale", "feature_offset"):
            if getattr(self, name) and self.tied is None:
                raise ValueError(f"{name}: only with tied: per_source or per_target")
        return self


class CrosscoderWiring(Settings):
    """Crosscoder: features over several layers of one kind of site."""

    kind: Literal["crosscoder"] = "crosscoder"
    """The tag of this wiring."""
    site: str = "resid_post"
    """Kind of site."""
    layers: Layers = "all"
    """Layers: all, or a list."""
    causality: Literal["acausal", "weak", "strict"] = "acausal"
    """acausal: one group reads and writes all; weak: group l reads l, writes l and later; strict: writes only later."""


class ModelDiffWiring(Settings):
    """Model-diff crosscoder: one group reads and writes a site of `model` and the same site of `base_model`."""

    kind: Literal["model_diff"] = "model_diff"
    """The tag of this wiring."""
    site: str = "resid_post"
    """Kind of site."""
    layer: Annotated[int, Field(ge=0)]
    """The layer, in both models."""


class CustomWiring(Settings):
    """A wiring of your own: a function (layers, width, **options) that returns an xlc_ray.dictionary.Wiring."""

    kind: Literal["custom"] = "custom"
    """The tag of this wiring."""
    path: Path
    """module:function; the module is importable, or in the working directory."""
    options: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Handed to the function by name."""
    layers: Layers = "all"
    """Layers: all, or a list."""


Wiring = Annotated[
    SaeWiring | TranscoderWiring | CltWiring | CrosscoderWiring | ModelDiffWiring | CustomWiring,
    Field(discriminator="kind"),
]


class ReluGate(Settings):
    """f = ReLU(pre)."""

    kind: Literal["relu"] = "relu"
    """The tag of this gate."""


class JumpReluGate(Settings):
    """f = pre where pre exceeds a learned threshold a feature, else 0."""

    kind: Literal["jumprelu"] = "jumprelu"
    """The tag of this gate."""
    threshold: Annotated[float, Field(gt=0)] = 0.1
    """Initial threshold."""
    bandwidth: Annotated[float, Field(gt=0)] = 2.0
    """Width of the rectangle kernel of the straight-through gradient."""
    parameterisation: Literal["log", "direct", "crosslayer"] = "log"
    """log: theta = exp(t), step's gradient to all (Anthropic 2025); direct: to theta only (Rajamanoharan 2024);
    crosslayer: as crosslayer-coding, theta = exp(t), its gradient with pre in place of theta (bandwidth 1 there)."""


class GatedGate(Settings):
    """Active where pi = pre + b_gate > 0, with strength ReLU(e^r pre + b_mag) (Rajamanoharan 2024).

    l1, tanh and lp penalise ReLU(pi), not f. Use with unit_norm, or with penalties weighted by decoder norms."""

    kind: Literal["gated"] = "gated"
    """The tag of this gate."""
    auxiliary: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the reconstruction from ReLU(pi) by the frozen decoder, without which the gate learns nothing."""


class ConcreteSettings(Settings):
    """A random gate z between 0 and 1 multiplies each feature; the penalty l0 is the expected number of open ones."""

    gamma: Annotated[float, Field(lt=0)] = -0.1
    """z is stretched to (gamma, zeta), then cut to [0, 1]."""
    zeta: Annotated[float, Field(gt=1)] = 1.1
    """Upper end of the stretch."""
    alpha: float | None = None
    """Start of the gates' log-odds (of their bias, where they read the input); null = -3 where they read the input, 0
    where they are free. Above -2.4 a gate is open at inference, and Adam moves alpha by about the learning rate a step:
    gates that start at 0 need thousands of steps to close."""
    beta: Annotated[float, Field(gt=0)] = 0.5
    """Temperature at the start."""
    final_beta: Annotated[float, Field(gt=0)] | None = None
    """Temperature at the end, reached exponentially; null = constant."""
    beta_hold: Fraction = 0.1
    """Share of the run before the temperature moves."""

    @property
    def start(self) -> float:
        """`alpha`, or what null stands for."""
        return -3.0 if self.alpha is None else self.alpha


class HardConcreteGate(ConcreteSettings):
    """f = z m with a hard-concrete gate z and a magnitude m of any sign (Louizos 2017). Use with unit_norm."""

    kind: Literal["hard_concrete"] = "hard_concrete"
    """The tag of this gate."""
    input_dependent: bool = True
    """Gates read the input by a second encoder; else each feature has one free parameter, the same for all tokens."""

    @property
    def start(self) -> float:
        """`alpha`, or what null stands for."""
        return 0.0 if self.alpha is None and not self.input_dependent else super().start


class GatedHardConcreteGate(ConcreteSettings):
    """f = z ReLU(e^r pre + b_mag) with a hard-concrete gate z of pre + b_gate. Use with unit_norm."""

    kind: Literal["gated_hard_concrete"] = "gated_hard_concrete"
    """The tag of this gate."""
    auxiliary: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the reconstruction from z alone by the frozen decoder. Gates learn without it; as z is at most 1, it
    opens more features than the true ones where these are larger than 1, as they are in normalised units."""


class TopKGate(Settings):
    """The k largest ReLU'd pre-activations of each token."""

    kind: Literal["topk"] = "topk"
    """The tag of this gate."""
    k: Annotated[int, Field(ge=1)]
    """Active features a token: of each group, or of all groups together (`pool`)."""
    pool: Literal["group", "all"] = "all"
    """group: k a token and group; all: k a token, shared by all groups."""
    rank_by: Literal["activation", "decoder_norm", "zscore"] = "activation"
    """Compare activations as they are; times their decoder row's norm; or z-scores over the batch's tokens, of which
    pre-activations of any sign are kept (as crosslayer-coding)."""
    threshold_start: Annotated[int, Field(ge=0)] = 100
    """Training step from which the inference threshold of a pool over groups is averaged."""
    threshold_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of that average."""


class BatchTopKGate(Settings):
    """The k x B largest ReLU'd pre-activations of B tokens: the batch, or a micro-batch (train.accumulate) of all
    replicas. A learned threshold at inference."""

    kind: Literal["batchtopk"] = "batchtopk"
    """The tag of this gate."""
    k: Annotated[int, Field(ge=1)]
    """Mean active features a token: of each group, or of all groups together (`pool`)."""
    pool: Literal["group", "all"] = "all"
    """group: a budget for each group; all: one budget for the dictionary."""
    rank_by: Literal["activation", "decoder_norm", "zscore"] = "activation"
    """Compare activations as they are; times their decoder row's norm; or z-scores over the batch's tokens, of which
    pre-activations of any sign are kept (as crosslayer-coding)."""
    threshold_start: Annotated[int, Field(ge=0)] = 1000
    """Training step from which the inference threshold is averaged (until then it is the last batch's)."""
    threshold_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of that average."""


class CustomGate(Settings):
    """A gate of your own: a subclass of xlc_ray.dictionary.gates.Gate, made with (sizes, shards, **options)."""

    kind: Literal["custom"] = "custom"
    """The tag of this gate."""
    path: Path
    """module:Class; the module is importable, or in the working directory."""
    options: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Handed to the class by name."""


Gate = Annotated[
    ReluGate
    | JumpReluGate
    | GatedGate
    | HardConcreteGate
    | GatedHardConcreteGate
    | TopKGate
    | BatchTopKGate
    | CustomGate,
    Field(discriminator="kind"),
]


class Normalization(Settings):
    """What is done to every site before the dictionary sees it; undone in its output."""

    kind: Literal["none", "rms", "unit", "mean_norm", "mean_std"] = "rms"
    """rms: E|x|^2 = d; unit: E|x|^2 = 1; mean_norm: E|x| = sqrt(d); mean_std: each dimension by its deviation (always
    centred)."""
    center: bool | None = None
    """Subtract the site's mean; null = yes for clt and transcoder, no for the others."""


class Dictionary(Settings):
    """The sparse dictionary: what its features read and write, and what makes them sparse."""

    wiring: Wiring
    """Which sites each group of features reads and writes."""
    features: Annotated[int, Field(ge=1)]
    """Features of each group."""
    gate: Gate
    """Pre-activations to sparse features."""
    normalization: Normalization = Normalization()
    """Scale and centre of each site."""
    decoder_norm: Annotated[float, Field(gt=0)] = 0.1
    """Norm of a feature's whole decoder row at the start (tied per_target: of the first group's)."""
    tie_encoder_init: bool = True
    """Start W_enc as a copy of the decoder direction where read and written sites allow it, else at random."""
    bias_init: Literal["zeros", "mean", "geometric_median"] = "zeros"
    """Start of b_dec, in normalised units."""
    unit_norm: bool = False
    """Hold decoder rows at unit norm; the gradient along the row is removed."""
    products: Literal["auto", "dense", "sparse"] = "auto"
    """How features meet the decoder: auto takes sparse products when few features are active."""
