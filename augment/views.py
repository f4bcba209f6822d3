"""The 12 saccadic test-time views, like successive glances of an eye. Deterministic; an image is decoded once.

With side S and the whole image resized (bicubic, antialiased, aspect ratio kept) to cover S + 32, or
L = round(1.15 S), the views in the order of VIEW_NAMES are:

    centre, its mirror               centre crop of the S + 32 resize, or evaluation's crop
    large, its mirror                centre crop of L
    rotated +10, -10 degrees         counter-clockwise first, about the middle of L: its margin fills the corners
    bright                           `centre` with brightness x 1.2, then contrast x 1.2 (Pillow's enhancers)
    top/bottom left/right            the four corners of the L resize, far apart for an oblong image
    blur                             `centre` under a Gaussian 3x3 kernel, sigma 0.5
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TVF

from augment.pixel_ops import mean_grey
from util.choices import VIEW_NAMES

ENLARGE = 1.15  # L / S
DEGREES = 10.0
GAIN = 1.2  # for brightness and contrast
BLUR_SIGMA = 0.5
OF_CENTRE = {0, 1, 6, 11}  # views made from the centre crop; the others come from the large resize


def saccadic_views(
    image: Image.Image | torch.Tensor,
    size: int | tuple[int, int],
    views: Iterable[int] = range(12),
    *,
    margin: int = 32,
    centre: torch.Tensor | None = None,
) -> torch.Tensor:
    """Views of one image: uint8 [len(views), C, h, w], 0..255, on the image's device.

    uint8, so that each member of an ensemble can normalise with its own statistics (augment.batch.normalize).

    image: PIL `L` or `RGB` (see augment.image.to_channels), or uint8 [C, H, W], C = 1 or 3.
    size: S, or (h, w); then S + 32 and L apply to each side. views: numbers 0..11 into VIEW_NAMES, any order.
    margin: how many pixels larger than S the small resize is. The method's 32 suits photos of 224 to 384 pixels; for
        much smaller ones it would cut most of the image away.
    centre: the centre crop, uint8 [C, h, w], if made elsewhere: a checkpoint's evaluation has its own resize and margin
        (augment.image.build_eval_transform). Its mirror, `bright` and `blur` are then made from it.
    """
    views = list(views)
    if not views or any(v not in range(len(VIEW_NAMES)) for v in views):
        raise ValueError(f"views {views}: must be numbers from 0 to {len(VIEW_NAMES) - 1}")
    if isinstance(image, Image.Image):
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"image mode {image.mode}: must be L or RGB")
        pixels = TVF.pil_to_tensor(image)
    else:
        pixels = image
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"image: must be uint8 [1 or 3, H, W], got {pixels.dtype} {list(pixels.shape)}")
    h, w = (size, size) if isinstance(size, int) else size
    sources = {} if centre is None else {"centre": centre}
    if centre is None and not OF_CENTRE.isdisjoint(views):
        sources["centre"] = center_crop(resize_to_cover(pixels, h + margin, w + margin), h, w).contiguous()
    if not OF_CENTRE.issuperset(views):
        # Pillow's pixels are interleaved, and the resize keeps that; contiguous channels make the rest twice as fast.
        sources["large"] = resize_to_cover(pixels, round(ENLARGE * h), round(ENLARGE * w)).contiguous()
    out = torch.empty(len(views), pixels.shape[0], h, w, dtype=torch.uint8, device=pixels.device)
    for slot, view in zip(out, views):
        slot.copy_(_view(VIEW_NAMES[view], sources["centre" if view in OF_CENTRE else "large"], h, w))
    return out


def _view(name: str, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """View `name` as uint8 [C, h, w] from x: the centre crop, or the whole large resize."""
    match name:
        case "centre":
            return x
        case "centre_mirror":
            return x.flip(-1)
        case "large":
            return center_crop(x, h, w)
        case "large_mirror":
            return center_crop(x, h, w).flip(-1)
        case "rotate_left":
            return rotated_crop(x, DEGREES, h, w)
        case "rotate_right":
            return rotated_crop(x, -DEGREES, h, w)
        case "bright":
            return brighten(x)
        case "top_left":
            return x[:, :h, :w]
        case "top_right":
            return x[:, :h, -w:]
        case "bottom_left":
            return x[:, -h:, :w]
        case "bottom_right":
            return x[:, -h:, -w:]
        case "blur":
            return blur(x)
    raise ValueError(f"view {name!r}: must be one of {', '.join(VIEW_NAMES)}")


def resize_to_cover(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """uint8 [C, H, W] resized to the smallest size of its aspect ratio that covers h x w, bicubic with antialias.

    The other side is rounded down, as torchvision's Resize does with the longer side.
    """
    H, W = x.shape[-2:]
    if h * W >= w * H:  # the height decides
        w = max(w, int(h * W / H))
    else:
        h = max(h, int(w * H / W))
    return TVF.resize(x, [h, w], InterpolationMode.BICUBIC, antialias=True)


def center_crop(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    top, left = round((x.shape[-2] - h) / 2), round((x.shape[-1] - w) / 2)
    return x[..., top : top + h, left : left + w]


def rotated_crop(x: torch.Tensor, degrees: float, h: int, w: int) -> torch.Tensor:
    """The centre crop of uint8 [C, H, W] turned counter-clockwise about its middle, bilinear.

    Only the crop's pixels are computed. Outside the image the border is repeated: at 10 degrees and 1.15 times the
    size, a wedge of less than 1 % of the side at the crop's corners.
    """
    H, W = x.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Output pixels relative to the centre, then their positions in the image before rotation (y points down).
    dx = torch.arange(w, device=x.device) + (round((W - w) / 2) + 0.5 - W / 2)
    dy = (torch.arange(h, device=x.device) + (round((H - h) / 2) + 0.5 - H / 2))[:, None]
    u, v = dx * (cos * 2 / W) - dy * (sin * 2 / W), dx * (sin * 2 / H) + dy * (cos * 2 / H)  # -1..1 over the image
    grid = torch.stack([u, v], dim=-1)[None]
    y = F.grid_sample(x[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return y[0].round_().to(torch.uint8)


def brighten(x: torch.Tensor) -> torch.Tensor:
    """uint8 [C, H, W] with brightness and then contrast x 1.2, each truncated to 8 bits as in Pillow's ImageEnhance."""
    y = x.float().mul_(GAIN).clamp_(max=255).to(torch.uint8)
    mean = mean_grey(y[None]).float()
    return y.float().sub_(mean).mul_(GAIN).add_(mean).clamp_(0, 255).to(torch.uint8)


def blur(x: torch.Tensor) -> torch.Tensor:
    """uint8 [C, H, W] under the 3x3 Gaussian of torchvision's gaussian_blur: sampled weights, reflected border."""
    side = math.exp(-0.5 / BLUR_SIGMA**2)
    side, middle = side / (1 + 2 * side), 1 / (1 + 2 * side)
    y = F.pad(x[None].float(), (1, 1, 1, 1), mode="reflect")
    y = (y[..., :-2] + y[..., 2:]).mul_(side).add_(y[..., 1:-1], alpha=middle)
    y = (y[..., :-2, :] + y[..., 2:, :]).mul_(side).add_(y[..., 1:-1, :], alpha=middle)
    return y[0].round_().to(torch.uint8)
