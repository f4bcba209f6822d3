"""--compile: torch.compile in place, so that state_dict keys, hooks and checkpoints do not change."""

import torch
from torch import nn

from util.errors import UserError, reason_of

BACKEND = "inductor"


def require_compiler(device: torch.device) -> None:
    """UserError if torch.compile finds no compiler (C++, or Triton for CUDA)."""
    probe = torch.compile(lambda x: x.sin() * x, backend=BACKEND)
    try:
        probe(torch.ones(3, device=device))
    except Exception as error:  # the compiler may raise any error
        raise UserError(
            f"--compile: does not work on this machine ({reason_of(error)}); install a C++ compiler (g++), or omit "
            "--compile"
        ) from None


def compile_net(net: nn.Module) -> None:
    """Compile later calls of `net`; the first call for each input size, mode and phase takes minutes.

    Compiled code draws dropout and noise from its own generator. It is seeded, so a run can be repeated and resumed,
    but the numbers differ from those without --compile.
    """
    # --noise_anneal changes AlphaBlend's timestep every epoch: make it a variable, or each epoch compiles a new graph.
    if hasattr(torch._dynamo.config, "allow_unspec_int_on_nn_module"):  # torch 2.6 lacks this option and recompiles
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
    net.compile(backend=BACKEND)


def compile_noprop(net) -> None:
    """Compile NoPropMAE's encoder and decoders, which training calls directly; the T decoders share a graph."""
    net.encode = torch.compile(net.encode, backend=BACKEND)
    for decoder in net.decoders:
        decoder.compile(backend=BACKEND)
