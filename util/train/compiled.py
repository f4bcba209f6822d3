"""--compile: torch.compile for a network in place, so that state_dict keys, hooks and checkpoints stay as they are."""

import torch
from torch import nn

from util.errors import UserError, reason_of

BACKEND = "inductor"


def require_compiler(device: torch.device) -> None:
    """UserError, one line, where torch.compile has nothing to compile with (a C++ compiler, or Triton for CUDA)."""
    probe = torch.compile(lambda x: x.sin() * x, backend=BACKEND)
    try:
        probe(torch.ones(3, device=device))
    except Exception as error:  # whatever the compiler behind it raises
        raise UserError(
            f"--compile: does not work on this machine ({reason_of(error)}); install a C++ compiler (g++), or leave "
            "--compile away"
        ) from None


def compile_net(net: nn.Module) -> None:
    """Compile calls of `net` from now on; the first call of each input size, mode and phase takes minutes.

    Dropout and noise of compiled code come from its own generator: seeded as ever, so a run can be repeated and
    resumed, but with other numbers than without --compile.
    """
    # --noise_anneal changes AlphaBlend's timestep at every epoch: a variable of the graph, not a new graph each time.
    if hasattr(
        torch._dynamo.config, "allow_unspec_int_on_nn_module"
    ):  # torch 2.6 has no such choice, and compiles anew
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
    net.compile(backend=BACKEND)


def compile_noprop(net) -> None:
    """Compile NoPropMAE's encoder and decoders; what training calls goes through them, the T decoders share a graph."""
    net.encode = torch.compile(net.encode, backend=BACKEND)
    for decoder in net.decoders:
        decoder.compile(backend=BACKEND)
