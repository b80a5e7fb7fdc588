"""Products of sparse features with dense weights: what differentiates them, and when they pay.

A *support* lists the entries (token, feature) at which a feature or its gradient may differ from zero, by token and
then by feature. With f the values there, W_dec [F, W], x [B, R] and g = ∂loss/∂ŷ:

    decode     ŷ  = f W_dec            ∂f = (g W_decᵀ) at the support      ∂W_dec = fᵀ g (+ ∂n / n · W_dec)
    encode_at  f  = (x W_encᵀ + b) at the support                          ∂W_enc = (∂f)ᵀ x

so that nothing of size [B, F] is made. n, the norms of the rows of W_dec, have their gradient ∂n added where ∂W_dec is
written: a penalty on norms needs no other pass over weights and gradients. Inputs are data: no gradient to x is
computed. ∂f is `xlc::dots`, all else is `xlc::combine`, over tokens or over features; both are in `kernels/`.
"""

# Annotations are not postponed here: torch.library reads the types, also through the wrappers of the test run.

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlc_ray.dictionary.kernels import HAS_TRITON
from xlc_ray.dictionary.kernels.combine import combine, combine_into
from xlc_ray.dictionary.kernels.dots import dots
from xlc_ray.dictionary.recycling import gradient_memory

BREAK_EVEN = 1 / 8
"""Density of features up to which sparse products are taken. Processor time of a group's products with all gradients,
dense over sparse in float32, at densities 1/16, 1/8 and 1/6: 3.3, 1.5, 1.3 (B=1024, F=1024, R=128, W=512), 4.0, 2.0,
1.3 (B=1024, F=3072, R=W=768) and 2.0, 1.0, 0.8 (B=512, F=3072, R=384, W=2304): at 1/8 they cost nowhere more."""


@dataclass(frozen=True)
class Support:
    """Entries of a [B, F] matrix: `entry` [n] = token · F + feature, ascending."""

    entry: Int[Tensor, "n"]
    shape: tuple[int, int]

    @cached_property
    def feature(self) -> Int[Tensor, "n"]:
        """The feature of each entry."""
        return self.entry % self.shape[1]

    @cached_property
    def token(self) -> Int[Tensor, "n"]:
        """The token of each entry."""
        return self.entry // self.shape[1]

    @cached_property
    def by_token(self) -> Int[Tensor, "B1"]:
        """Where each token's entries begin."""
        return _starts(self.token, self.shape[0])

    @cached_property
    def by_feature(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "F1"], Int[Tensor, "n"]]:
        """The same entries by feature, then token: their order, where each feature's begin, their tokens. One sort
        serves all products."""
        feature, order = torch.sort(self.feature, stable=True)
        return order, _starts(feature, self.shape[1]), self.token[order]

    def dense(self, values: Float[Tensor, "n"]) -> Float[Tensor, "B F"]:
        """The [B, F] matrix with zeros elsewhere. Differentiable."""
        return values.new_zeros(self.shape).flatten().index_put((self.entry,), values).view(self.shape)


def _starts(ascending: Int[Tensor, "n"], size: int) -> Int[Tensor, "size1"]:
    # Unlike bincount this needs no word from the device about the largest index.
    return torch.searchsorted(ascending, torch.arange(size + 1, device=ascending.device))


def decode(
    values: Float[Tensor, "n"],
    support: Support,
    W_dec: Float[Tensor, "F W"],
    norms: Float[Tensor, "F"] | None = None,
) -> tuple[Float[Tensor, "B W"], Float[Tensor, "F"] | None]:
    """ŷ = f W_dec over the support only, and `norms`, which are known to be those of the rows of W_dec.

    Gradients to the values and, from both results, to W_dec."""
    if torch.is_grad_enabled() and (values.requires_grad or W_dec.requires_grad):
        index = (support.by_token, support.token, support.feature, *support.by_feature)
        y, same = _decode(values, W_dec, *index, norms)
        return y, None if norms is None else same
    return combine(support.by_token, support.feature, values, W_dec), norms


def encode_at(
    x: Float[Tensor, "B R"],
    W_enc: Float[Tensor, "F R"],
    b_enc: Float[Tensor, "F"],
    support: Support,
    pre: Float[Tensor, "n"],
) -> Float[Tensor, "n"]:
    """Pre-activations at the support, whose values `pre` are known already. Gradients to W_enc and b_enc."""
    if torch.is_grad_enabled() and (W_enc.requires_grad or b_enc.requires_grad):
        return _encode_at(W_enc, b_enc, x, pre, *support.by_feature)
    return pre


def linear_at(
    x: Float[Tensor, "B R"], W: Float[Tensor, "F R"], b: Float[Tensor, "F"], support: Support
) -> Float[Tensor, "n"]:
    """x Wᵀ + b at the support only. Gradients to W and b."""
    rows = x.to(W.dtype).contiguous()
    with torch.no_grad():
        known = dots(rows, W, support.by_token, support.token, support.feature) + b[support.feature]
    return encode_at(rows, W, b, support, known)


@torch.library.custom_op("xlc::decode", mutates_args=())
def _decode(
    values: Tensor,
    W_dec: Tensor,
    by_token: Tensor,
    token: Tensor,
    feature: Tensor,
    order: Tensor,
    by_feature: Tensor,
    token_of: Tensor,
    norms: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return combine(by_token, feature, values, W_dec), W_dec.new_empty(0) if norms is None else norms.clone()


@_decode.register_fake
def _(values, W_dec, by_token, token, feature, order, by_feature, token_of, norms):
    y = W_dec.new_empty(by_token.shape[0] - 1, W_dec.shape[1])
    return y, W_dec.new_empty(0) if norms is None else torch.empty_like(norms)


def _decode_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _decode_backward(ctx, grad, grad_norms):
    values, W_dec, by_token, token, feature, order, by_feature, token_of, norms = ctx.saved_tensors
    grad = grad.contiguous()  # a slice of the gradient to all columns, as a rule: copied once, not by each product
    d_values = d_weights = None
    if ctx.needs_input_grad[0]:
        d_values = dots(grad, W_dec, by_token, token, feature)
    if ctx.needs_input_grad[1]:
        pull = None if norms is None else (grad_norms / norms).where(norms > 0, 0)  # of a zero row: 0
        d_weights = _weight_gradient(W_dec, by_feature, token_of, values[order], grad, pull)
    return d_values, d_weights, None, None, None, None, None, None, None


_decode.register_autograd(_decode_backward, setup_context=_decode_context)


@torch.library.custom_op("xlc::encode_at", mutates_args=())
def _encode_at(
    W_enc: Tensor, b_enc: Tensor, x: Tensor, pre: Tensor, order: Tensor, by_feature: Tensor, token_of: Tensor
) -> Tensor:
    return pre.clone()


@_encode_at.register_fake
def _(W_enc, b_enc, x, pre, order, by_feature, token_of):
    return torch.empty_like(pre)


def _encode_at_context(ctx, inputs, output):
    W_enc, _, x, _, *index = inputs
    ctx.save_for_backward(W_enc, x, *index)


def _encode_at_backward(ctx, grad):
    W_enc, x, order, by_feature, token_of = ctx.saved_tensors
    grad = grad[order]
    d_weights = d_bias = None
    if ctx.needs_input_grad[0]:
        d_weights = _weight_gradient(W_enc, by_feature, token_of, grad, x.to(grad.dtype))
    if ctx.needs_input_grad[1]:
        d_bias = combine(by_feature, token_of, grad, grad.new_ones(x.shape[0], 1)).squeeze(1)
    return d_weights, d_bias, None, None, None, None, None


_encode_at.register_autograd(_encode_at_backward, setup_context=_encode_at_context)


def _weight_gradient(
    weight: Tensor, starts: Tensor, index: Tensor, values: Tensor, rows: Tensor, pull: Tensor | None = None
) -> Tensor:
    """`combine` (+ pull · weight) in the memory of the weight's last gradient."""
    out = gradient_memory(weight)
    combine_into(out, starts, index, values, rows, pull, None if pull is None else weight)
    return out


def sparse_pays(products: str, active: int, entries: int, device: torch.device) -> bool:
    """Whether to multiply sparsely: as told, or (`auto`) below the break-even density where there are fast kernels."""
    if products != "auto":
        return products == "sparse"
    return active <= BREAK_EVEN * entries and (device.type == "cpu" or (device.type == "cuda" and HAS_TRITON))
