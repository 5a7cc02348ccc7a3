"""Fast layers do what torch's do."""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from softteacher.detectors import layers


@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v2"])
def test_folded_norms_change_nothing(network):
    import torchvision

    torch.manual_seed(0)
    plain = getattr(torchvision.models, network)(norm_layer=FrozenBatchNorm2d).eval()
    for norm in plain.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-1, 1)
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 64, 64)
    expected = plain(x)
    expected.square().mean().backward()
    gradients = {p.data_ptr(): p.grad.clone() for p in plain.parameters()}
    plain.zero_grad()
    layers.fold_frozen_norms(plain)
    assert not any(isinstance(m, nn.Conv2d) and type(m) is nn.Conv2d for m in plain.modules())
    found = plain(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    found.square().mean().backward()
    for p in plain.parameters():
        torch.testing.assert_close(p.grad, gradients[p.data_ptr()], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("leaf", [True, False])
def test_map_conv_is_the_convolution(monkeypatch, slow, leaf):
    monkeypatch.setattr(layers, "_SLOW_WEIGHT_GRADIENT", slow)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3, padding=1)
    ours = layers.MapConv(plain)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 6, 9, 12).contiguous(memory_format=torch.channels_last)
    xs = [x.clone().requires_grad_(leaf) for _ in range(2)]
    for conv, own in ((plain, xs[0]), (ours, xs[1])):
        conv(own).sin().sum().backward()
    torch.testing.assert_close(ours(xs[1]), plain(xs[0]))
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    if leaf:
        torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)


def test_strided_depthwise_convolutions_train_in_fp32_under_autocast():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False), FrozenBatchNorm2d(6)
    norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 6, 9, 12).bfloat16().requires_grad_()
    expected = norm(conv(x.float()))
    gradients = torch.autograd.grad(expected.sin().sum(), (x, conv.weight))
    with torch.autocast("cpu", torch.bfloat16):
        found = layers.FoldedConv(conv, norm)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16())  # a product in bf16 would be ten times farther off
    own = torch.autograd.grad(found.float().sin().sum(), (x, conv.weight))
    for a, b in zip(own, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
