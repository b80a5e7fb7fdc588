"""Products of sparse features with dense weights: the reference and the dispatch.

A *support* lists the entries (token, feature) at which a feature or its gradient may differ from zero, by token and
then by feature. With f the values there, W_dec [F, W], x [B, R] and g = ∂loss/∂ŷ:

    decode     ŷ  = f W_dec            ∂f = (g W_decᵀ) at the support      ∂W_dec = fᵀ g
    encode_at  f  = (x W_encᵀ + b) at the support                          ∂W_enc = (∂f)ᵀ x

so that nothing of size [B, F] is made. Inputs are data: no gradient to x is computed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

BREAK_EVEN = 1 / 8
"""Density below which sparse products are taken: on a CPU with MKL they take a twentieth of the time at 1 %."""

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


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
    def crow(self) -> Int[Tensor, "B1"]:
        """Where each token's entries begin (CSR row pointers)."""
        return _pointers(self.token, self.shape[0])

    @cached_property
    def by_feature(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "F1"], Int[Tensor, "n"]]:
        """The same entries by feature, then token: order, row pointers, tokens. One sort serves all products."""
        order = torch.argsort(self.feature, stable=True)
        return order, _pointers(self.feature, self.shape[1]), self.token[order]

    def matrix(self, values: Float[Tensor, "n"]) -> Tensor:
        """The [B, F] CSR matrix with these values."""
        return _csr(self.crow, self.feature, values, self.shape)

    def transposed(self, values: Float[Tensor, "n"]) -> Tensor:
        """The [F, B] CSR matrix with these values."""
        order, ccol, token = self.by_feature
        return _csr(ccol, token, values[order], self.shape[::-1])

    def dense(self, values: Float[Tensor, "n"]) -> Float[Tensor, "B F"]:
        """The [B, F] matrix with zeros elsewhere. Differentiable."""
        return values.new_zeros(self.shape).flatten().index_put((self.entry,), values).view(self.shape)


def _pointers(index: Int[Tensor, "n"], size: int) -> Int[Tensor, "size1"]:
    return torch.nn.functional.pad(torch.bincount(index, minlength=size).cumsum(0), (1, 0))


def _csr(crow: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(crow, column, values, shape, check_invariants=False)


def decode(values: Float[Tensor, "n"], support: Support, W_dec: Float[Tensor, "F W"]) -> Float[Tensor, "B W"]:
    """ŷ = f W_dec over the support only. Gradients to the values and to W_dec."""
    return _Decode.apply(values, W_dec, support)


def encode_at(
    x: Float[Tensor, "B R"],
    W_enc: Float[Tensor, "F R"],
    b_enc: Float[Tensor, "F"],
    support: Support,
    pre: Float[Tensor, "n"],
) -> Float[Tensor, "n"]:
    """Pre-activations at the support, whose values `pre` are known already. Gradients to W_enc and b_enc."""
    return _EncodeAt.apply(W_enc, b_enc, x, support, pre)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, support):
        ctx.save_for_backward(values, W_dec)
        ctx.support = support
        with torch.autocast(values.device.type, enabled=False):
            return support.matrix(values) @ W_dec

    @staticmethod
    def backward(ctx, grad):
        (values, W_dec), support = ctx.saved_tensors, ctx.support
        grad = grad.contiguous()
        d_values = d_weights = None
        if ctx.needs_input_grad[0]:
            pattern = support.matrix(torch.zeros_like(values))
            d_values = torch.sparse.sampled_addmm(pattern, grad, W_dec.T, beta=0.0).values()
        if ctx.needs_input_grad[1]:
            d_weights = support.transposed(values) @ grad
        return d_values, d_weights, None


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W_enc, b_enc, x, support, pre):
        ctx.save_for_backward(x)
        ctx.support = support
        return pre.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,), support = ctx.saved_tensors, ctx.support
        d_bias = grad.new_zeros(support.shape[1]).index_add(0, support.feature, grad)
        return support.transposed(grad) @ x.to(grad.dtype), d_bias, None, None, None


def sparse_pays(products: str, active: int, entries: int, device: torch.device) -> bool:
    """Whether to multiply sparsely: as told, or (`auto`) below the break-even density where the library can."""
    if products != "auto":
        return products == "sparse"
    return active <= BREAK_EVEN * entries and (device.type == "cuda" or torch.backends.mkl.is_available())
