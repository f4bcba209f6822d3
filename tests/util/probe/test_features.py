"""Features of images: shared by the ranks, gathered by rank 0."""

import torch

from augment.batch import BatchTransform
from bench.ranks import Ranks
from models import create_model
from util.data.datasets import ArrayDataset
from util.data.loader import Loader
from util.dist import Precision, World, init_world
from util.probe import features
from util.probe.features import extract, gather_rows

KEYWORDS = dict(embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)


def test_ranks_share_the_images_and_together_have_all_of_them():
    torch.manual_seed(0)
    model = create_model("vit_custom_patch4", num_classes=0, img_size=(8, 16), in_chans=1, **KEYWORDS).eval()
    images = torch.randint(0, 256, (7, 1, 8, 16), dtype=torch.uint8)
    data = ArrayDataset(images, torch.arange(7), [str(i) for i in range(7)])

    def of(world):
        loader = Loader(data, batch_transform=BatchTransform((0.3,), (0.4,)), batch_size=2, train=False, world=world)
        return extract(model, loader, Precision("off", world.device), world, "mean")

    whole, targets = of(World())
    assert targets.tolist() == list(range(7))
    shares = [of(World(rank, 3)) for rank in range(3)]  # without a process group, a rank keeps to its own
    assert sorted(t for _, targets in shares for t in targets.tolist()) == list(range(7))
    for z, targets in shares:
        torch.testing.assert_close(z, whole[targets])


def test_rank_0_alone_gets_the_rows_of_all_ranks_in_order(monkeypatch):
    """Of 11 images on 3 ranks; number 4 could not be read, and rank 2 has seen none."""
    monkeypatch.setattr(features, "ELEMENTS", 10)  # pieces of 2 rows of 5 numbers
    whole = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    readable = {0: [0, 3, 6, 9], 1: [1, 7, 10], 2: []}

    def call() -> int:
        world = init_world("cpu", timeout_minutes=1)
        index = torch.tensor(readable[world.rank], dtype=torch.long)
        rows = whole[index] if len(index) else torch.empty(0, 0)
        got, where = gather_rows(rows, index)
        expected = [0, 1, 3, 6, 7, 9, 10] if world.is_main else readable[world.rank]
        assert where.tolist() == expected
        assert torch.equal(got, whole[where]) if expected else len(got) == 0
        return 0

    assert Ranks(3, call).exit_codes() == [0, 0, 0]
