"""Layers that do what torch's do, faster."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

_SLOW_WEIGHT_GRADIENT = torch.backends.cpu.get_cpu_capability() in {"DEFAULT", "AVX2"}


class FoldedConv(nn.Conv2d):
    """A convolution and the frozen batch norm after it in one: scaling the weights is cheaper than scaling the maps."""

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
        geometry: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, False)
        super().__init__(conv.in_channels, conv.out_channels, *geometry)
        self.weight, self.norm = conv.weight, norm
        self.strided_depthwise = conv.groups == conv.in_channels > 1 and max(conv.stride) > 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        if self.strided_depthwise and x.is_cpu and x.requires_grad and torch.is_autocast_enabled("cpu"):
            # oneDNN takes several times longer over the input gradient of these in bf16 than in fp32
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(x.float(), weight, bias).to(torch.get_autocast_dtype("cpu"))
        return self._conv_forward(x, weight, bias)


def fold_frozen_norms(network: nn.Module) -> None:
    """Put a `FoldedConv` in place of each convolution that a frozen batch norm follows."""
    for parent in list(network.modules()):
        for (name, conv), (after, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d):
                setattr(parent, name, FoldedConv(conv, norm))
                setattr(parent, after, nn.Identity())


class MapConv(nn.Conv2d):
    """A 3x3 convolution of large maps, with the weights of another.

    Without AVX-512, oneDNN takes three times longer over the weight gradient of large channels_last maps than of
    contiguous ones; forward and input gradient are faster with channels_last.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1)
        self.load_state_dict(conv.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H, W]."""
        if _SLOW_WEIGHT_GRADIENT and x.is_cpu and x.requires_grad and not torch.is_autocast_enabled("cpu"):
            return _MapConv.apply(x, self.weight, self.bias)
        return super().forward(x)


class _MapConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        geometry = ([len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        gradient = torch.ops.aten.convolution_backward
        dx = gradient(grads[0], x, weight, *geometry, [True, False, False])[0] if ctx.needs_input_grad[0] else None
        plain = (t.contiguous() for t in (grads[0], x, weight))
        _, dweight, dbias = gradient(*plain, *geometry, [False, True, True])
        return dx, dweight, dbias
