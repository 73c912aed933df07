"""Layers of StyleGAN2: equalised learning rates, the mapping network, and layers modulated by a style.

Letters: B samples, C channels, W numbers of a style w.
Source: StyleGAN2 (Karras et al. 2020, arXiv 1912.04958) sec. 2.2; ProGAN (arXiv 1710.10196) sec. 4.1 for the rates.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GAIN = math.sqrt(2)  # of a layer before a leaky ReLU, which then keeps the second moment
SLOPE = 0.2
LEAST = 1e-8


def lrelu(x: Tensor) -> Tensor:
    """Return the leaky ReLU of slope 0.2; the layers before it have the gain."""
    return F.leaky_relu(x, SLOPE)


def normalised(x: Tensor) -> Tensor:
    """Return x [B, C] with the second moment 1."""
    return x * (x.square().mean(1, keepdim=True) + LEAST).rsqrt()


class Linear(nn.Module):
    """A linear layer whose weights are N(0, 1) and scaled when used.

    Args:
        inputs, outputs: numbers.
        bias: its first value.
        rate: factor on the layer's learning rate.
        gain: of the outputs.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: float = 0.0, rate: float = 1.0, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.rate = gain * rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., outputs] of x [..., inputs]."""
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class Conv(nn.Module):
    """A convolution, padded, whose weights are N(0, 1) and scaled when used; `gain` of its outputs."""

    def __init__(self, inputs: int, outputs: int, size: int, *, gain: float = GAIN, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale = gain / math.sqrt(inputs * size * size)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outputs, H, W] of x [B, inputs, H, W]."""
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.weight.shape[-1] // 2)


class ModulatedConv(nn.Module):
    """A convolution whose input channels a style scales, and whose outputs are scaled back to unit variance.

    The weights of a sample are those of the layer times s_i, over the root of their squares' sum (StyleGAN2 eq. 1, 3).
    Inputs and outputs are scaled here instead, which is the same for all samples at once. A demodulated layer has the
    gain of one before a leaky ReLU.

    Args:
        inputs, outputs: channels. size: of the kernel, odd. width: W.
        demodulate: scale the outputs back.
    """

    def __init__(self, inputs: int, outputs: int, size: int, width: int, demodulate: bool = True) -> None:
        super().__init__()
        self.style = Linear(width, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale, self.demodulate = 1 / math.sqrt(inputs * size * size), demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Return [B, outputs, H, W] of x [B, inputs, H, W] under styles w [B, W]."""
        style, weight = self.style(w), self.weight * self.scale
        y = F.conv2d(x * style[:, :, None, None].to(x.dtype), weight, padding=weight.shape[-1] // 2)
        if self.demodulate:
            y = y * _strength(style, weight.square().sum((2, 3)))[:, :, None, None].to(y.dtype)
        return y + self.bias[:, None, None].to(y.dtype)

    def matrices(self, w: Tensor) -> Tensor:
        """Return the weights [B, inputs, outputs] of each sample, of a kernel of one pixel, without the bias."""
        style, weight = self.style(w), self.weight[:, :, 0, 0] * self.scale
        matrix = style[:, :, None] * weight.t()
        return matrix * _strength(style, weight.square())[:, None] if self.demodulate else matrix


def _strength(style: Tensor, squares: Tensor) -> Tensor:
    """The gain over the root of the sum of squared weights, [B, outputs]."""
    return GAIN * (style.square() @ squares.t() + LEAST).rsqrt()


class Mapping(nn.Module):
    """The mapping network from latents z [B, Z] to styles w [B, W]; its learning rate is a hundredth."""

    def __init__(self, latent: int, width: int, layers: int) -> None:
        super().__init__()
        sizes = [latent] + layers * [width]
        self.layers = nn.ModuleList(Linear(a, b, rate=0.01, gain=GAIN) for a, b in pairwise(sizes))

    def forward(self, z: Tensor) -> Tensor:
        """Return w [B, W]."""
        x = normalised(z)
        for layer in self.layers:
            x = lrelu(layer(x))
        return x
