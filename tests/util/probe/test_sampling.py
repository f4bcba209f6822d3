"""What main_sample.py measures, against plain loops."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from augment.batch import normalize, resize
from tests.harness.noprop import MEAN, STD, tiny_net
from util.data.datasets import read_split
from util.probe.sampling import Study, mean_visible_patch


class Batches:
    """What a Loader gives: `images` in batches of 4."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def epoch(self):
        return (Namespace(images=part) for part in self.images.split(4))


def test_psnr_is_that_of_a_plain_loop_over_hidden_pixels(tmp_path):
    images = normalize(resize(read_split("digits", ".", "val").images[:7], (8, 12)), MEAN, STD)
    study = Study(tiny_net(), list(MEAN), list(STD), 0.75, ["euler"], seed=3)
    scores = study.reconstruct(Batches(images), 2, str(tmp_path / "{}.png"))
    errors = {"mean colour": [], "mean visible patch": [], "euler": []}

    def patch(picture: torch.Tensor, i: int) -> np.ndarray:
        row, column = 2 * (i // 6), 2 * (i % 6)
        return (picture[0, row : row + 2, column : column + 2].double().numpy() * STD[0] + MEAN[0]).clip(0, 1)

    for step, batch in enumerate(images.split(4)):
        out, (keep, hide) = study.hide_and_sample(batch, step, "euler")
        for image, final, kept, hidden in zip(batch, out["final"], keep.tolist(), hide.tolist()):
            assert (len(kept), len(hidden)) == (6, 18)
            visible = np.mean([patch(image, i) for i in kept], axis=0)
            for i in hidden:
                errors["mean colour"].append((patch(image, i) - MEAN[0]) ** 2)
                errors["mean visible patch"].append((patch(image, i) - visible) ** 2)
                errors["euler"].append((patch(image, i) - patch(final, i)) ** 2)
    for name, squared in errors.items():
        assert scores[name] == pytest.approx(-10 * np.log10(np.mean(squared)), abs=1e-3)


def test_samplers_share_masks_and_the_baseline_keeps_visible_patches():
    net, images = tiny_net(), torch.randn(5, 1, 8, 12)
    study = Study(net, list(MEAN), list(STD), 0.75, [], seed=3)
    (a, ids), (b, _) = (study.hide_and_sample(images, 2, sampler) for sampler in ("heun", "stochastic"))
    assert torch.equal(a["mask"], b["mask"]) and not torch.equal(a["final"], b["final"])
    assert not torch.equal(a["mask"], study.hide_and_sample(images, 3, "heun")[0]["mask"])
    assert torch.equal(
        net.patchify(mean_visible_patch(net, images, ids))[a["mask"] == 0], net.patchify(images)[a["mask"] == 0]
    )
    nothing = Study(net, list(MEAN), list(STD), 1.0, []).hide_and_sample(images, 0, "heun")[1]
    assert torch.equal(mean_visible_patch(net, images, nothing), torch.zeros_like(images))
