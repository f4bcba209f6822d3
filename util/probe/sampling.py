"""The pictures and measurements of main_sample.py: reconstructions, generated images, attention, Frechet distances."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat

from models.noprop_mae import NoPropMAE
from models.tokens import take
from util.data.loader import Loader
from util.probe.frechet import frechet_metric
from util.report import pictures
from util.report.pictures import denormalize
from util.seed import mix

GENERATED_COLUMNS = 8
ATTENTION_BLOCKS = 6  # shown for a deep encoder, evenly spaced, including first and last
_MASKS, _NOISE, _GENERATED = 0, 1, 2  # streams of counted seeds


@dataclass
class Study:
    """A pretrained model with fixed masks and noise: the same ones at batch `step` for every sampler and run.

    mean, std: the normalisation of its images. Methods take and return normalised images of net's size.
    """

    net: NoPropMAE
    mean: list[float]
    std: list[float]
    mask_ratio: float
    samplers: list[str]
    seed: int = 0

    def _generator(self, *counters: int) -> torch.Generator:
        return torch.Generator(self.net.pos_embed.device).manual_seed(mix(self.seed, *counters))

    def hide_and_sample(self, images: torch.Tensor, step: int, sampler: str) -> tuple[dict, tuple]:
        """NoPropMAE.reconstruct's result for batch `step`, and its (ids_keep, ids_mask)."""
        ids = self.net.random_masking(len(images), self.mask_ratio, self._generator(_MASKS, step))
        return self.net.reconstruct(images, ids=ids, sampler=sampler, generator=self._generator(_NOISE, step)), ids

    def generate(self, n: int, step: int, sampler: str) -> torch.Tensor:
        """Batch `step` of generated images, [n, C, H, W]."""
        return self.net.generate(n, sampler=sampler, generator=self._generator(_GENERATED, step))["final"]

    def reconstruct(self, loader: Loader, num: int, path: str) -> dict[str, float]:
        """PSNR in dB on the masked patches of all images, per sampler and baseline; pictures of the first `num`.

        One PSNR from the mean squared error over all images, for pixels clipped to [0, 1]. path: with {} for the
        sampler's name.
        """
        norm = self.mean, self.std
        errors: dict[str, list[torch.Tensor]] = {n: [] for n in ("mean colour", "mean visible patch", *self.samplers)}
        for step, batch in enumerate(loader.epoch()):
            images, target = batch.images, denormalize(batch.images, *norm)
            for sampler in self.samplers:
                out, ids = self.hide_and_sample(images, step, sampler)
                filled = {sampler: out["final"]}
                if sampler == self.samplers[0]:
                    filled |= {
                        "mean colour": out["masked"],
                        "mean visible patch": mean_visible_patch(self.net, images, ids),
                    }
                hidden = pictures.pixel_mask(out["mask"], *images.shape[-2:])
                for name, picture in filled.items():
                    score = pictures.psnr(denormalize(picture, *norm), target, 1.0, hidden)
                    errors[name].append(
                        10.0 ** (-score / 10.0)
                    )  # back to squared errors; every image has as many masked pixels
                if step == 0:
                    first = {k: out[k][:num] for k in ("masked", "final", "mask")}
                    first["steps"] = [x[:num] for x in out["steps"]]
                    pictures.reconstruction_grid(images[:num], first, *norm, path.format(sampler), self.net.sigmas[:-1])
        return {name: -10.0 * torch.cat(e).mean().log10().item() for name, e in errors.items()}

    def draw_generated(self, rows: int, path: str) -> None:
        """A picture of rows x 8 images per sampler; path: with {} for the sampler's name."""
        for sampler in self.samplers:
            images = self.generate(rows * GENERATED_COLUMNS, 0, sampler)
            pictures.image_grid(images, self.mean, self.std, path.format(sampler), columns=GENERATED_COLUMNS)

    def draw_attention(self, images: torch.Tensor, path: str) -> None:
        """Attention of the class token in whole images: heads of the last block, and the mean over heads per block.

        path: with {} for `heads` and `blocks`.
        """
        maps = self.net.attention_maps(images)[:, :, :, 0, 1:]
        maps = rearrange(maps, "depth b heads (h w) -> depth b heads h w", h=self.net.grid_size[0])
        depth, _, heads = maps.shape[:3]  # [depth, B, heads, rows, cols]
        shown = torch.linspace(0, depth - 1, min(depth, ATTENTION_BLOCKS)).round().long().tolist()
        columns = {
            "heads": {f"head {h + 1}": maps[-1, :, h] for h in range(heads)},
            "blocks": {f"block {b + 1}": maps[b].mean(dim=1) for b in shown},
        }
        pixels = pictures.to_pixels(images, self.mean, self.std)
        for name, titled in columns.items():
            overlays = [pictures.heat_overlay(pixels, m) for m in titled.values()]
            rows = [[pixels[r], *(o[r] for o in overlays)] for r in range(len(pixels))]
            pictures.draw_grid(rows, path.format(name), titles=["original", *titled])

    def frechet(self, features: torch.nn.Module, loader: Loader, others: Loader | None) -> dict[str, float]:
        """Distances from loader's images to `others` (real), to their reconstructions, to as many generated images."""
        metric = frechet_metric(features, self.net.pos_embed.device)

        def distance(batches: Iterable[torch.Tensor]) -> float:
            for images in batches:
                metric.update(self._to_uint8(images), real=False)
            value = metric.compute().item()
            metric.reset()
            return value

        for batch in loader.epoch():
            metric.update(self._to_uint8(batch.images), real=True)
        result = {} if others is None else {"other real images": distance(b.images for b in others.epoch())}
        for s in self.samplers:
            batches = enumerate(loader.epoch())
            reconstructed = (self.hide_and_sample(b.images, step, s)[0]["final"] for step, b in batches)
            result[f"reconstructed, {s}"] = distance(reconstructed)
        for s in self.samplers:
            batches = enumerate(loader.epoch())
            result[f"generated, {s}"] = distance(self.generate(len(b.images), step, s) for step, b in batches)
        return result

    def _to_uint8(self, images: torch.Tensor) -> torch.Tensor:
        return denormalize(images, self.mean, self.std).mul(255.0).round().to(torch.uint8)


def mean_visible_patch(net: NoPropMAE, images: torch.Tensor, ids: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Baseline: every masked patch is the mean of the image's visible patches (0 if there are none), [B, C, H, W]."""
    ids_keep, ids_mask = ids
    patches = net.patchify(images)  # [B, N, P]
    fill = take(patches, ids_keep).mean(dim=1, keepdim=True) if ids_keep.shape[1] else torch.zeros_like(patches[:, :1])
    index = repeat(ids_mask, "b m -> b m p", p=patches.shape[-1])
    return net.unpatchify(patches.scatter(1, index, fill.expand_as(index)))
