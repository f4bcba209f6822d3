"""No step waits for the device, except where a line of progress is due: counted on a device that is not there."""

import pytest
import torch
from timm.data import Mixup

from augment.alpha_blend import AlphaBlend
from augment.batch import BatchTransform, Erasing
from augment.image import Geometry
from engine_finetune import Criterion, evaluate, train_one_epoch
from engine_pretrain import EncoderFirst
from engine_pretrain import train_one_epoch as pretrain_one_epoch
from models import create_model
from models.noprop_mae import NoPropMAE
from tests.harness.fake_device import GPU, FakeDevice
from tests.harness.training import new_run, new_training
from util.data.datasets import ArrayDataset
from util.data.loader import Loader
from util.dist import Precision, World
from util.log import RunLog
from util.optim import build_adamw, build_ema, param_groups

STEPS, PRINT_FREQ, BATCH, CLASSES = 8, 4, 6, 10
AUGMENTATIONS = {
    "small": dict(
        geometry=Geometry("pad", hflip=0.5, vflip=0.5), aa="rand-m9-mstd0.5-inc1", erasing=Erasing(0.5, recount=2)
    ),
    "photo": dict(geometry=Geometry("rrc", hflip=0.5), color_jitter=0.4, erasing=Erasing(0.5, "rand")),
    "none": dict(),
}


class Setup:
    """What a main gives its engine, on the device that is not there. `waits`: those of each step after the first."""

    def __init__(self, net, augmentation: dict, amp: str = "off", **loader):
        self.fake = FakeDevice()
        self.world = World(device=GPU)
        self.precision = Precision(amp, torch.device("cpu"))
        self.optimizer = build_adamw(param_groups(net, weight_decay=0.05), lr=1e-3)
        images = torch.randint(0, 256, (STEPS * BATCH, 3, 16, 16), dtype=torch.uint8)
        data = ArrayDataset(images, torch.arange(len(images)) % CLASSES, [str(i) for i in range(CLASSES)])
        transform = BatchTransform((0.5,) * 3, (0.25,) * 3, size=16, **augmentation)
        with self.fake:
            self.loader = Loader(data, batch_transform=transform, batch_size=BATCH, world=self.world, **loader)
        self.run = new_run(self.loader, world=self.world, log=RunLog(None, is_main=False), print_freq=PRINT_FREQ)
        self.run.interrupts.poll = self.poll
        self.waits: list[list] = []
        self.fake.put(*net.parameters(), *net.buffers())
        self.fake.waits.clear()

    def poll(self) -> tuple[bool, bool]:
        """As util.train.run.Interrupts', at the end of each update."""
        self.waits.append(list(self.fake.waits))
        self.fake.waits.clear()
        return False, False

    def between_lines(self) -> list:
        """Waits of the steps without a line; the first one, which makes what all of them use, is left out as well."""
        assert len(self.waits) == STEPS
        return [w for step, waits in enumerate(self.waits, 1) if step > 1 and step % PRINT_FREQ for w in waits]


CASES = [("vit_custom_patch8", a, "off") for a in AUGMENTATIONS]
CASES += [
    ("vit_custom_patch8", "none", "bf16"),
    ("vit_custom_patch8", "none", "fp16"),
    ("test_efficientnet", "none", "off"),
]


@pytest.mark.parametrize("model, augmentation, amp", CASES)
def test_a_fine_tuning_step_does_not_wait_for_the_device(model, augmentation, amp):
    sizes = dict(embed_dim=12, depth=1, num_heads=2) if model.startswith("vit") else {}
    noise = AlphaBlend(15, schedule="uniform", prob=0.5)
    net = create_model(model, num_classes=CLASSES, img_size=16, drop_path=0.1, alpha_blend=noise, **sizes)
    setup = Setup(net, AUGMENTATIONS[augmentation], amp, train=True)
    ema = build_ema(net, 0.9)
    setup.fake.put(*ema.module.parameters(), *ema.module.buffers())
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    with setup.fake:
        training = new_training(net, setup.optimizer, precision=setup.precision, ema=ema)
        stats = train_one_epoch(training, setup.loader, Criterion(), setup.run, mixup=mixup, clip_grad=1.0)
    assert 0 < stats["loss"] < 10
    assert setup.between_lines() == []
    assert len(setup.waits[PRINT_FREQ - 1]) > 0, "the line of progress reads what it shows"


def test_a_pretraining_step_does_not_wait_for_the_device():
    net = NoPropMAE(
        img_size=16,
        patch_size=4,
        embed_dim=12,
        depth=1,
        num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
        T=2,
    )
    setup = Setup(net, dict(geometry=Geometry(hflip=0.5)), train=True)
    with setup.fake:
        training = new_training(net, setup.optimizer, precision=setup.precision, model=EncoderFirst(net))
        pretrain_one_epoch(training, setup.loader, setup.run, mask_ratio=0.75)
    assert setup.between_lines() == []
    assert len(setup.waits[PRINT_FREQ - 1]) > 0


def test_evaluation_waits_once_at_its_end():
    net = create_model("vit_custom_patch8", num_classes=CLASSES, img_size=16, embed_dim=12, depth=1, num_heads=2)
    setup = Setup(net, {}, train=False)
    with setup.fake:
        result = evaluate(net, setup.loader, setup.precision, CLASSES, poll=setup.run.stop_requested)
    assert result.confusion.sum() == STEPS * BATCH
    assert [w for waits in setup.waits[2:] for w in waits] == []
