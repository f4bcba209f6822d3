"""Synthetic photographs for the benchmarks: JPEG files that take about as long to decode as real ones."""

import os

import numpy as np
from PIL import Image


def make_photos(folder: str, count: int, width: int, height: int, *, quality: int = 90, seed: int = 0) -> list[str]:
    """Write `count` JPEGs of colour noise with the decaying spectrum of a photograph; returns their paths.

    Octaves of random fields, each 0.8 times as strong as the next larger one, over a random colour. At quality 90 a
    500 x 375 image has about 70 kB (ImageNet's: 110 kB on average), one of 2000 x 1500 about 870 kB.
    """
    rng = np.random.default_rng(seed)
    os.makedirs(folder, exist_ok=True)
    paths = []
    for i in range(count):
        field = np.zeros((height, width, 3), np.float32)
        cells, strength = 4, 50.0
        while cells < max(width, height):
            rows = max(2, cells * height // max(width, height))
            noise = Image.fromarray(rng.integers(0, 256, (rows, cells, 3), dtype=np.uint8))
            octave = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 127.5
            field += octave * (strength / 74.0)
            cells, strength = cells * 2, strength * 0.8
        field += rng.uniform(90, 160, 3).astype(np.float32)
        path = os.path.join(folder, f"{i:05d}.jpg")
        Image.fromarray(field.clip(0, 255).astype(np.uint8)).save(path, quality=quality)
        paths.append(path)
    return paths
