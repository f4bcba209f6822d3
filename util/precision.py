"""How a network's layers affect its precision and memory format."""

import torch
from torch import nn


def is_convolutional(net: nn.Module) -> bool:
    """True if a convolution's windows overlap or leave gaps; a patch embedding is a matrix product."""
    return any(isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in net.modules())


def place(net: nn.Module, device: torch.device) -> nn.Module:
    """`net` on its device; a convolutional one in channels_last, which is faster in cuDNN and oneDNN.

    Converting the weights is enough: the first convolution converts its input.
    """
    net.to(device)
    return net.to(memory_format=torch.channels_last) if is_convolutional(net) else net


# torch's bf16 weight gradient of a convolution on CPU (oneDNN; torch 2.14 on AVX512_BF16) is not always written where a
# kernel tap only sees padding: the gradient there is 0, but uninitialised memory may be returned. An example is a 3x3
# kernel of stride 2 on a 1x1 map, which only the centre tap sees:
#
#     conv, x, wrong = torch.nn.Conv2d(64, 64, 3, 2, 1), torch.randn(8, 64, 1, 1), 0
#     for _ in range(20):
#         junk = [torch.full(conv.weight.shape, float("nan"), dtype=torch.bfloat16) for _ in range(20)]
#         del junk
#         conv.zero_grad()
#         with torch.autocast("cpu", torch.bfloat16):
#             conv(x).sum().backward()
#         wrong += not conv.weight.grad.isfinite().all()
#
# ends with wrong between 5 and 19. With glibc's M_PERTURB filling all fresh memory, 707 of 6096 settings of Conv2d were
# wrong (kernels 1 to 7, strides 1 to 4, dilations, groups, maps of 1 to 8 pixels, both memory formats). All were of
# this kind; outputs and input gradients were right. Conv3d also fails where the padding is wider than the map.


def meets_only_padding(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """True if, in one dimension, a kernel tap never lies on the map, or the padding is at least as wide as the map."""
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return padding > 0 and (
        padding >= size
        or any(
            not any(0 <= tap * dilation - padding + i * stride < size for i in range(outputs)) for tap in range(kernel)
        )
    )


Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _InFp32(nn.Module):
    """Mixin for a convolution that computes in fp32 under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def keep_out_of_bf16(net: nn.Module, shape: tuple[int, int, int]) -> list[str]:
    """Make convolutions whose bf16 gradient is wrong on CPU compute in fp32; returns their names.

    shape: channels, height, width of net's images; a forward pass of one image finds the sizes of the maps.
    """
    padded = [(n, m) for n, m in net.named_modules() if isinstance(m, Conv) and widths(m)]
    found: dict[str, Conv] = {}
    hooks = []

    def looks(name: str, conv: Conv):
        def look(_, inputs: tuple) -> None:
            where = zip(inputs[0].shape[2:], conv.kernel_size, conv.stride, widths(conv), conv.dilation)
            if any(meets_only_padding(*numbers) for numbers in where):
                found[name] = conv

        return look

    if padded:
        modes = [(m, m.training) for m in net.modules()]
        try:
            hooks = [conv.register_forward_pre_hook(looks(name, conv)) for name, conv in padded]
            with torch.no_grad(), torch.random.fork_rng([]):
                net.eval()(torch.zeros(1, *shape))
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes:
                module.training = mode
    for conv in found.values():
        conv.__class__ = type(type(conv).__name__, (_InFp32, type(conv)), {})
    return list(found)


def widths(conv: Conv) -> tuple[int, ...]:
    """Zero padding per dimension; () for none."""
    if isinstance(conv.padding, tuple):
        return conv.padding if any(conv.padding) else ()
    return tuple(-(-d * (k - 1) // 2) for k, d in zip(conv.kernel_size, conv.dilation) if conv.padding == "same")
