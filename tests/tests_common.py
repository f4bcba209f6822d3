"""Comparisons that several tests make."""

import torch

from util.checkpoint import read_checkpoint
from util.log import read_log


def assert_same_state(a: dict, b: dict, path: str = "") -> None:
    """Bit for bit, through nested containers."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_same_state(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), f"{path}: {a} {b}"


def comparable(path) -> dict:
    content = read_checkpoint(str(path))
    return {k: v for k, v in content.items() if k not in ("args",)}


def log_without_times(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(str(folder / "log.txt"))]
