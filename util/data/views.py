"""What prediction's loader processes read: all views of an image, which is decoded once."""

import torch

from augment.batch import resize
from augment.decoding import ImageError, open_file
from augment.decoding import to_channels as image_to_channels
from augment.image import build_eval_transform
from augment.views import saccadic_views
from util.data.datasets import ArrayDataset, Dataset
from util.data.datasets import to_channels as array_to_channels
from util.data.loader import Reader


class ViewReader(Reader):
    """reader[number]: an image's views uint8 [V, C, h, w] for each kind of input.

    inputs: distinct (height, width, channels, crop_pct); members with equal inputs share the tensor.
    margin: pixels that the centre views cut off, in place of each crop_pct.
    """

    def __init__(self, data: Dataset, inputs: list[tuple], views: list[int], margin: int | None = None):
        super().__init__(data)
        self.inputs, self.views, self.margin = inputs, views, margin

    def __getitem__(self, i: int):
        self.note(i)
        try:  # any other error is not the file's fault
            images = self.decode(i)
        except ImageError as error:
            return i, [], {i: self.fault(error, i)}, {}
        return i, [self.look(images[c], (h, w), *crop) for h, w, c, *crop in self.inputs], {}, {}

    def look(self, image, size: tuple[int, int], crop_pct: float | None = None) -> torch.Tensor:
        """The views uint8 [V, C, h, w]. Without --margin, view 1 equals what training's evaluation sees, bit for bit:
        resized and cropped (crop_pct) for a file, the whole image for one in memory."""
        if self.margin is not None:
            return saccadic_views(image, size, self.views, margin=self.margin)
        if isinstance(image, torch.Tensor):
            centre = resize(image[None], size)[0]
        else:
            centre = build_eval_transform(size, crop_pct)(image)
        return saccadic_views(image, size, self.views, centre=centre)

    def decode(self, i: int) -> dict:
        """channels -> image, for saccadic_views."""
        wanted = {c for _, _, c, *_ in self.inputs}
        if isinstance(self.data, ArrayDataset):
            one = self.data.subset(torch.tensor([i]))
            return {c: array_to_channels(one, c).images[0] for c in wanted}
        with open_file(self.path(i)) as image:
            return {c: image_to_channels(image, c) for c in wanted}
