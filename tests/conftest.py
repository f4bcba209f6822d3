"""Fixtures of many tests: a folder of photos, whole runs, a way to run a script as users do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.harness.runs import NET, TINY, finetune, run_script
from tests.harness.sweeps import SCRIPT

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Path:
    """{train,val}/{blue,red}/*.png: two classes that a small model tells apart, 40 x 32 pixels."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, n in (("train", 16), ("val", 6)):
        for label, name in enumerate(("blue", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (32, 40, 3), dtype=np.uint8)
                pixels[..., 2 - 2 * label] += 120
                Image.fromarray(pixels).save(folder / f"{name}_{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def run():
    return run_script


@pytest.fixture
def posterize_to_no_bits(monkeypatch):
    """An image of 0 bits is black. Pillow 13 refuses what timm's policies, the oracle here, still ask it for."""
    real = ImageOps.posterize
    black = lambda image, bits: real(image, bits) if bits else Image.new(image.mode, image.size)  # noqa: E731
    monkeypatch.setattr(ImageOps, "posterize", black)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """An output folder of NET's run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert finetune(*NET, "--output_dir", out) == 0
    return out


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """An output folder of TINY's run that nothing disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert finetune(*TINY, "--output_dir", out) == 0
    return out


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder for a sweep of scripts that take a moment."""
    from util.sweep import jobs

    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("main_finetune.py", "main_pretrain_noprop.py"):
        (folder / name).write_text(SCRIPT)
    monkeypatch.setattr(jobs, "SCRIPTS_AT", str(folder))
    return tmp_path
