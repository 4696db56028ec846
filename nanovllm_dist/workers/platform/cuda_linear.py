"""A linear layer on a GPU: an own kernel for a few rows, cuBLAS for more. It knows nothing of shards or layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm_dist.workers.kernels.activation import silu_mul
from nanovllm_dist.workers.kernels.few_rows_linear import few_rows_gated, few_rows_linear, max_gated_rows, max_rows

# cuBLAS reads a weight of so many rows, an output vocabulary's, at 93% of the bandwidth
_LARGE = 2**16


class CudaLinear:
    """LinearKernel over the plain weight [out, in].

    Attributes:
        weight, bias: as they were given; the bias may be None.
        few_rows: up to so many rows the own kernel makes the product.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.few_rows = max_rows(weight) if len(weight) < _LARGE else 0
        self._few_gated_rows = min(self.few_rows, max_gated_rows(weight))

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See LinearKernel."""
        if self.bias is None:
            return self.product(x, out)
        output = F.linear(x, self.weight, self.bias)
        return output if out is None else out.copy_(output)

    def product(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> x @ weight.T [T, out], without the bias; written to `out` if that is given."""
        if len(x) <= self.few_rows:
            return few_rows_linear(x, self.weight, out)
        return F.linear(x, self.weight) if out is None else torch.mm(x, self.weight.t(), out=out)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """Add x @ weight.T, without the bias, to `total` [T, out]. The sum is rounded once, unless cuBLAS cuts the
        inputs."""
        if len(x) <= self.few_rows:
            few_rows_linear(x, self.weight, total, add=True)
        else:
            total.addmm_(x, self.weight.t())

    def gated(self, x: torch.Tensor, norm_eps: float | None = None) -> torch.Tensor:
        """x [T, in] -> silu of the first half of x @ weight.T, times the other half, [T, out / 2], without the bias.

        With `norm_eps` rows of the product are first divided by the root mean square of their row of x.
        """
        if len(x) <= self._few_gated_rows:
            return few_rows_gated(x, self.weight, norm_eps)
        product = self.product(x)
        return silu_mul(product) if norm_eps is None else silu_mul(product, x, norm_eps)
