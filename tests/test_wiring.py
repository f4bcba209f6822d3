"""Every flag of every main reaches what it names.

One table: each flag has at least one row, with a value that is not its default, and a probe: a condition that holds of
the run with it, and not of the same run without it. What the part then does with the value is tested where it is.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold, train_test_split

import main_finetune
from augment.batch import resize
from augment.rand_augment import parse_rand_augment
from models import create_model
from tests.harness.wiring import BASE, Seen, few, scores, watch
from util.checkpoint import read_checkpoint
from util.cli.finetune import FinetuneOptions
from util.cli.linprobe import LinprobeOptions
from util.cli.parser import Parser
from util.cli.predict import PredictOptions
from util.cli.pretrain import PretrainOptions
from util.cli.sample import SampleOptions
from util.data.datasets import READERS, FileDataset
from util.data.loader import read_in_processes
from util.dist import World
from util.metrics import Evaluation
from util.seed import mix, seed_all

OPTIONS = {one.MAIN: one for one in (FinetuneOptions, PretrainOptions, LinprobeOptions, PredictOptions, SampleOptions)}


@dataclass(frozen=True)
class Row:
    """line: the flag and its value; given: what stands before it, with it and without it."""

    line: str
    holds: Callable[[Seen], object]
    given: str = ""
    evaluations: Sequence[Evaluation] = ()


PHOTOS = "--dataset folder --data_path {photos} --input_size 12 16 --mean 0.5 --std 0.25"
# By each score another epoch is the best; the last is the worst by all of them.
EPOCHS = (
    scores(acc1=90.0),
    scores(balanced_acc=90.0),
    scores(macro_f1=90.0),
    scores(loss=0.1),
    scores(acc1=1.0, balanced_acc=1.0, macro_f1=1.0, loss=9.0),
)
BEST = "--epochs 5 --output_dir {out}"


def digits(split: str = "train"):
    return few(READERS["digits"], split)


def of_steps(loader, kind: str):
    """The step of that class among those that loader processes apply to a file."""
    return next(step for step in loader.files.dataset.transform.transforms if type(step).__name__ == kind)


def pins(reading, seen: Seen) -> bool:
    """Whether batches would be pinned, were there a GPU."""
    return read_in_processes(seen.loader.files.dataset, [], reading, torch.device("cuda")).pin_memory


def tensors(seen: Seen, name: str) -> dict[str, torch.Tensor]:
    """The weights of a run that went before."""
    return read_checkpoint(f"{seen.paths[name]}/checkpoint-last.pth")["model"]


def holds_weights(state: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, weights[k]) for k, v in state.items())


def turned(path: str) -> torch.Tensor:
    """The file's position embeddings of 3 rows and 2 columns, for 2 rows and 3 columns."""
    pos = torch.load(path, weights_only=True)["pos_embed"]
    grid = pos[:, 1:].reshape(1, 3, 2, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(2, 3), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).mT], 1)


def split(size: float, seed: int) -> np.ndarray:
    """scikit-learn's stratified training part; size: of the other part."""
    targets = digits().targets.numpy()
    return train_test_split(np.arange(len(targets)), test_size=size, stratify=targets, random_state=seed)[0]


def folds(seed: int) -> list[np.ndarray]:
    """scikit-learn's training parts of 3 folds."""
    targets = digits().targets.numpy()
    return [t for t, _ in StratifiedKFold(3, shuffle=True, random_state=seed).split(targets, targets)]


def policy_fill(seen: Seen) -> tuple[int, ...]:
    """The colour of the corners that RandAugment uncovers."""
    return tuple(of_steps(seen.loader, "RandAugment").ops[0].kwargs["fillcolor"])


def mixup(seen: Seen):
    return seen.one("train_one_epoch")["mixup"]


def val(seen: Seen):
    """The images that it was validated on."""
    return seen.one("evaluate")["loader"].data


def evaluates_alone(seen: Seen) -> bool:
    """Whether the second of two processes would evaluate all images."""
    parts = seen.loader.data, val(seen)
    return main_finetune.build_loaders(seen.run.options, seen.meta, *parts, World(1, 2))[1].world.size == 1


def best_on_disk(seen: Seen) -> int:
    return read_checkpoint(str(seen.out / "checkpoint-best.pth"))["progress"]["best_epoch"]


def hooked(seen: Seen) -> list:
    """The modules whose input gets the noise."""
    return [m for m in seen.net.modules() if m._forward_pre_hooks]


def plain(seen: Seen) -> torch.Tensor:
    """The pixels of the images that were trained on, as evaluation resizes them."""
    order = torch.cat([torch.tensor([i for _, i in keys]) for keys in seen.loader.order])
    return resize(seen.loader.data.images[order], (8, 12)).float()


def pictures(seen: Seen) -> list[int]:
    return sorted(int(name.split("_")[2].removesuffix(".png")) for name in seen.names("reconstruction_epoch_*"))


def trained_on(seen: Seen, index) -> bool:
    return torch.equal(seen.loader.data.images, digits().images[torch.from_numpy(np.sort(index))])


def seeded_vit(seed: int, **keywords) -> dict[str, torch.Tensor]:
    """Weights that a new run starts with."""
    seed_all(seed, 0)
    sizes = dict(embed_dim=12, depth=2, num_heads=2)
    return create_model("vit_custom_patch4", num_classes=10, img_size=(8, 12), in_chans=1, **sizes).state_dict()


def class_weights(data) -> torch.Tensor:
    counts = torch.bincount(data.targets, minlength=10)
    return len(data) / (10 * counts)


def raw(seen: Seen) -> torch.Tensor:
    """The pixels 0 to 255 that the network was given, by the normalisation of digits."""
    return (seen.images * 0.3761 + 0.3053) * 255


# What both trainings have.
TRAINING = {
    "batch_size": [Row("--batch_size 19", lambda s: {len(x) for x, *_ in s.inputs} == {19})],
    "epochs": [Row("--epochs 2", lambda s: s.epochs == [0, 1])],
    "accum_iter": [Row("--accum_iter 2", lambda s: s.run.position.updates == 1 and len(s.inputs) == 2)],
    "lr": [Row("--lr 0.01", lambda s: s.lr(0) == s.run.described["lr"] == 0.01)],
    "blr": [Row("--blr 0.5", lambda s: s.lr(0) == pytest.approx(0.5 * 25 / 256))],
    "min_lr": [Row("--min_lr 0.5", lambda s: s.lr(1) == 0.5)],
    "warmup_epochs": [
        Row("--warmup_epochs 0.5", lambda s: s.lr(0) == 0 < s.lr(0.5) and 2 * s.lr(0.25) == pytest.approx(s.lr(0.5)))
    ],
    "weight_decay": [Row("--weight_decay 0.3", lambda s: {g["weight_decay"] for g in s.groups} == {0.0, 0.3})],
    "clip_grad": [
        Row("--clip_grad 0.25", lambda s: {c["max_norm"] for c in s.calls["clip_grads_with_norm_"]} == {0.25})
    ],
    "input_size": [Row("--input_size 12 8", lambda s: s.images.shape[-2:] == (12, 8))],
    "in_chans": [Row("--in_chans 3", lambda s: s.images.shape[1] == 3)],
    "mean": [Row("--mean 0.5", lambda s: s.images.min().item() == pytest.approx(-0.5 / 0.3761))],
    "std": [Row("--std 0.25", lambda s: s.images.min().item() == pytest.approx(-0.3053 / 0.25))],
    "data_path": [
        Row(
            "--data_path {photos}",
            lambda s: s.loader.data.root.endswith("photos/train"),
            "--dataset folder --data_path {broken} --input_size 12 16 --mean 0.5 --std 0.25 --on_bad_image skip",
        )
    ],
    "dataset": [
        Row(
            "--dataset folder",
            lambda s: isinstance(s.loader.data, FileDataset),
            PHOTOS.replace("--dataset folder", "--dataset digits --in_chans 3"),
        )
    ],
    "output_dir": [
        Row("--output_dir {out}/a", lambda s: s.names("a/*") >= {"args.json", "log.txt", "checkpoint-last.pth"})
    ],
    "log_dir": [Row("--log_dir {out}/tb", lambda s: s.names("tb/events.out.tfevents*"), "--output_dir {out}/a")],
    "logger": [
        Row("--logger csv", lambda s: "metrics.csv" in s.names() and not s.names("events*"), "--output_dir {out}"),
        Row("--logger none", lambda s: not s.names("events*"), "--output_dir {out}"),
    ],
    "start_epoch": [Row("--start_epoch 1", lambda s: s.epochs == [1], "--epochs 2")],
    "save_freq": [
        Row(
            "--save_freq 2",
            lambda s: s.names("checkpoint-?.pth") == {"checkpoint-1.pth", "checkpoint-2.pth"},
            "--epochs 3 --output_dir {out}",
        )
    ],
    "keep": [
        Row(
            "--keep 2",
            lambda s: s.names("checkpoint-?.pth") == {"checkpoint-1.pth", "checkpoint-2.pth"},
            "--epochs 3 --save_freq 1 --output_dir {out}",
        )
    ],
    "save_every_minutes": [
        Row("--save_every_minutes 1.5", lambda s: s.run.interrupts.period == 90),
        Row("--save_every_minutes 1e-9", lambda s: s.names("checkpoint-previous.pth"), "--output_dir {out}"),
    ],
    "print_freq": [Row("--print_freq 1", lambda s: s.said.count("Epoch: [0]") == 2)],
    "max_bad_steps": [
        Row(
            "--max_bad_steps 2",
            lambda s: s.error.startswith("--max_bad_steps 2:"),
            "--batch_size 9 --std 1e-6 --amp fp16",
        )
    ],
    "profile": [
        Row("--profile 1", lambda s: s.names() >= {"trace.json", "profile.txt"}, "--batch_size 9 --output_dir {out}")
    ],
    "overwrite": [Row("--overwrite", lambda s: not s.error and s.epochs == [0], "--output_dir {again}")],
    "dry_run": [Row("--dry_run", lambda s: not s.epochs and "\nparameters: " in s.said)],
    "num_workers": [Row("--num_workers 1", lambda s: s.loader.files.num_workers == 1, PHOTOS)],
    "pin_mem": [
        Row("--no_pin_mem", lambda s: not pins(s.loader.reading, s), PHOTOS),
        Row("--pin_mem", lambda s: pins(s.loader.reading, s), f"{PHOTOS} --no_pin_mem"),
    ],
    "on_bad_image": [Row("--on_bad_image skip", lambda s: not s.error, PHOTOS.replace("photos", "broken"))],
    "max_pixels": [Row("--max_pixels 1279", lambda s: "1280 pixels" in s.error, PHOTOS)],
    "device": [Row("--device cuda:1", lambda s: s.one("init_world")["device"] == "cuda:1")],
    "dist_url": [Row("--dist_url tcp://host:1", lambda s: s.one("init_world")["dist_url"] == "tcp://host:1")],
    "deterministic": [Row("--deterministic", lambda s: s.one("init_world")["deterministic"])],
    "timeout_minutes": [Row("--timeout_minutes 3", lambda s: s.one("init_world")["timeout_minutes"] == 3)],
    "seed": [
        Row("--seed 7", lambda s: s.loader.order.seed == s.loader.batch_transform.seed == 7),
        Row("--seed 7", lambda s: s.loader.files.dataset.seed == 7, PHOTOS),
    ],
    "amp": [
        Row("--amp bf16", lambda s: s.training.precision.dtype == torch.bfloat16, "--amp off"),
        Row("--use_amp", lambda s: s.training.precision.dtype == torch.bfloat16, "--amp off"),
        Row("--amp fp16", lambda s: s.training.precision.scaler.is_enabled()),
        Row("--amp off", lambda s: s.training.precision.dtype == torch.float32, "--amp bf16"),
    ],
}

FINETUNE = {
    **TRAINING,
    "mean": [
        *TRAINING["mean"],
        # The colour of the corners that a rotation uncovers.
        Row(
            "--mean 1 0 0.2", lambda s: of_steps(s.loader, "RandomAffine").fill == [255, 0, 51], f"{PHOTOS} --aug photo"
        ),
        Row("--mean 1 0 0.2", lambda s: policy_fill(s) == (255, 0, 51), f"{PHOTOS} --aug mae"),
    ],
    "loader": [Row("--loader pil", lambda s: s.loader.files.dataset.fast is None, f"{PHOTOS} --aug light")],
    "layer_decay": [Row("--layer_decay 0.5", lambda s: {g["lr_scale"] for g in s.groups} == {0.125, 0.25, 0.5, 1.0})],
    "model": [Row("--model vit_custom_patch2", lambda s: s.net.patch_embed.patch_size == (2, 2))],
    "finetune": [Row("--finetune {run}/checkpoint-last.pth", lambda s: holds_weights(s.starts[0], tensors(s, "run")))],
    "global_pool": [
        Row("--cls_token", lambda s: s.net.global_pool == "token"),
        Row("--global_pool", lambda s: s.net.global_pool == "avg", "--finetune {token}"),
    ],
    "nb_classes": [Row("--nb_classes 13", lambda s: s.net.head.out_features == s.meta["num_classes"] == 13)],
    "drop_path": [Row("--drop_path 0.5", lambda s: s.net.blocks[1].drop_path2.drop_prob == 0.5)],
    "model_kwargs": [
        Row("--model_kwargs embed_dim=8 depth=3 num_heads=2", lambda s: len(s.net.blocks) == 3 and s.net.embed_dim == 8)
    ],
    "pretrained": [Row("--pretrained", lambda s: s.calls["load_pretrained"], "--model test_vit2 --model_kwargs")],
    "partial_load": [
        Row(
            "--partial_load", lambda s: not s.error and s.epochs == [0], "--finetune {part} --in_chans 1 --pos_grid 2 3"
        )
    ],
    "pos_grid": [
        Row(
            "--pos_grid 3 2",
            lambda s: torch.allclose(s.starts[0]["pos_embed"], turned(s.paths["grid"])),
            "--finetune {grid} --in_chans 1",
        )
    ],
    "grad_checkpointing": [Row("--grad_checkpointing", lambda s: s.net.grad_checkpointing)],
    "crop_pct": [
        Row(
            "--crop_pct 0.5",
            lambda s: of_steps(s.one("evaluate")["loader"], "ResizeKeepRatio").size == (24, 32),
            PHOTOS,
        )
    ],
    "val_split": [Row("--val_split 0.2", lambda s: len(s.loader.data) == 45 and len(val(s)) == 12)],
    "train_subset": [Row("--train_subset 31", lambda s: len(s.loader.data) == 31)],
    "kfold": [Row("--kfold 3", lambda s: len(s.loader.data) == 38 and len(val(s)) == 19, "--output_dir {out}")],
    "fold": [Row("--fold 1", lambda s: s.epochs == [0] and trained_on(s, folds(0)[1]), "--kfold 3 --output_dir {out}")],
    "split_seed": [
        Row("--split_seed 5", lambda s: trained_on(s, split(0.2, 5)), "--val_split 0.2"),
        Row("--split_seed 5", lambda s: trained_on(s, split(57 - 31, 5)), "--train_subset 31"),
        Row("--split_seed 5", lambda s: trained_on(s, folds(5)[1]), "--kfold 3 --fold 1"),
    ],
    "color_jitter": [
        Row("--color_jitter 0.4", lambda s: s.loader.batch_transform.color_jitter == 0.4, "--aug mae --aa none"),
        Row("--color_jitter 0.4", lambda s: s.loader.batch_transform.color_jitter == 0.4, "--aug photo"),
        Row(
            "--color_jitter 0.4",
            lambda s: of_steps(s.loader, "ColorJitter").contrast == (0.6, 1.4),
            f"{PHOTOS} --aug photo",
        ),
    ],
    "aa": [
        Row("--aa rand-m3-n1", lambda s: s.loader.batch_transform.aa == parse_rand_augment("rand-m3-n1"), "--aug mae"),
        Row("--aa rand-m3-n1", lambda s: of_steps(s.loader, "RandAugment").num_layers == 1, f"{PHOTOS} --aug mae"),
    ],
    "reprob": [Row("--reprob 0.9", lambda s: s.loader.batch_transform.erasing.prob == 0.9)],
    "remode": [Row("--remode const", lambda s: s.loader.batch_transform.erasing.mode == "const")],
    "recount": [Row("--recount 3", lambda s: s.loader.batch_transform.erasing.recount == 3)],
    "aug": [
        Row("--aug light", lambda s: s.loader.batch_transform.geometry.crop == "pad"),
        Row("--aug photo", lambda s: s.loader.batch_transform.geometry.scale == (0.7, 1.0)),
        Row("--aug photo", lambda s: s.loader.batch_transform.color_jitter == 0.3),
        Row("--aug photo", lambda s: s.loader.batch_transform.erasing.area == (0.02, 0.15)),
        Row("--aug photo", lambda s: of_steps(s.loader, "RandomAffine"), PHOTOS),
        Row("--aug none", lambda s: torch.equal(raw(s).round(), plain(s)), "--aug mae"),
    ],
    "hflip": [
        Row("--hflip 1", lambda s: s.loader.batch_transform.geometry.hflip == 1, "--aug light"),
        Row("--hflip 1", lambda s: of_steps(s.loader, "RandomHorizontalFlip").p == 1, f"{PHOTOS} --aug light"),
    ],
    "vflip": [
        Row("--vflip 0.7", lambda s: s.loader.batch_transform.geometry.vflip == 0.7, "--aug light"),
        Row("--vflip 0.7", lambda s: of_steps(s.loader, "RandomVerticalFlip").p == 0.7, f"{PHOTOS} --aug light"),
    ],
    "scale": [
        Row("--scale 0.5 0.6", lambda s: s.loader.batch_transform.geometry.scale == [0.5, 0.6], "--aug light"),
        Row(
            "--scale 0.5 0.6",
            lambda s: of_steps(s.loader, "RandomResizedCropAndInterpolation").scale == (0.5, 0.6),
            f"{PHOTOS} --aug light",
        ),
    ],
    "mixup": [Row("--mixup 0.7", lambda s: mixup(s).mixup_alpha == 0.7 and s.loader.order.batch_size == 24)],
    "cutmix": [Row("--cutmix 0.7", lambda s: mixup(s).cutmix_alpha == 0.7 and s.loader.order.batch_size == 24)],
    "cutmix_minmax": [Row("--cutmix_minmax 0.2 0.4", lambda s: mixup(s).cutmix_minmax == [0.2, 0.4])],
    "mixup_prob": [Row("--mixup_prob 0.3", lambda s: mixup(s).mix_prob == 0.3, "--mixup 1")],
    "mixup_switch_prob": [
        Row("--mixup_switch_prob 0.9", lambda s: mixup(s).switch_prob == 0.9, "--mixup 1 --cutmix 1")
    ],
    "mixup_mode": [Row("--mixup_mode elem", lambda s: mixup(s).mode == "elem", "--mixup 1")],
    "smoothing": [
        Row("--smoothing 0.3", lambda s: s.one("train_one_epoch")["criterion"].smoothing == 0.3),
        Row("--smoothing 0.3", lambda s: mixup(s).label_smoothing == 0.3, "--mixup 1"),
    ],
    "class_weights": [
        Row(
            "--class_weights balanced",
            lambda s: torch.allclose(s.one("train_one_epoch")["criterion"].weight, class_weights(digits())),
        )
    ],
    "eval": [
        Row(
            "--eval",
            lambda s: not s.epochs and "on the 23 test images" in s.said,
            "--finetune {run}/checkpoint-best.pth",
        )
    ],
    "dist_eval": [
        Row("--no_dist_eval", lambda s: evaluates_alone(s)),
        Row("--dist_eval", lambda s: not evaluates_alone(s), "--no_dist_eval"),
    ],
    "eval_metric": [
        Row(
            f"--eval_metric {metric}",
            lambda s, e=epoch: s.run.position.best_epoch == e and best_on_disk(s) == e,
            BEST,
            EPOCHS,
        )
        for metric, epoch in (("balanced_acc", 1), ("macro_f1", 2), ("loss", 3))
    ],
    "patience": [
        Row("--patience 2", lambda s: s.epochs == [0, 1, 2], "--epochs 5", EPOCHS),
        # An epoch of the head alone is none without a gain.
        Row("--patience 2", lambda s: s.epochs == [0, 1, 2, 3, 4], "--epochs 4 --head_epochs 2", (*EPOCHS, EPOCHS[-1])),
    ],
    "ema_decay": [
        Row("--ema_decay 0.7", lambda s: s.training.ema.decay == 0.7 and s.validated == [s.training.ema.module]),
        # The warm-up, after one update.
        Row("--ema_decay 0.9", lambda s: s.training.ema.get_decay(2) == pytest.approx(1 - 2 ** (-2 / 3))),
    ],
    "resume": [Row("--resume {run}/checkpoint-last.pth", lambda s: s.epochs == [1], "--epochs 2")],
    "force_resume": [
        Row("--force_resume", lambda s: s.epochs == [1], "--epochs 2 --smoothing 0 --resume {run}/checkpoint-last.pth")
    ],
    "compile": [Row("--compile", lambda s: s.calls["require_compiler"] and s.one("compile_net")["net"] is s.net)],
    "seed": [
        *TRAINING["seed"],
        Row("--seed 7", lambda s: all(torch.equal(v, s.starts[0][k]) for k, v in seeded_vit(7).items())),
    ],
    "alpha_blend": [Row("--alpha_blend 40", lambda s: s.noise.current_timestep == 40)],
    "noise_kind": [Row("--noise_kind additive", lambda s: type(s.noise.kind).__name__ == "Additive")],
    "noise_units": [Row("--noise_units relative", lambda s: s.noise.config.units == "relative")],
    "noise_snr": [Row("--noise_snr 12", lambda s: s.run.described["noise_snr_measured"] == pytest.approx(12, abs=0.3))],
    "noise_strength": [Row("--noise_strength 5", lambda s: s.noise.config.strength == 5, "--noise_kind neftune")],
    "noise_colour": [Row("--noise_colour green", lambda s: s.noise.config.colour == "green", "--noise_kind colour")],
    "noise_timestep": [Row("--noise_timestep uniform", lambda s: s.noise.config.schedule == "uniform")],
    "noise_prob": [Row("--noise_prob 0.3", lambda s: s.noise.config.prob == 0.3)],
    "noise_anneal": [
        # In the second of the two epochs of --epochs, 1/2 is done.
        Row(
            "--noise_anneal linear",
            lambda s: s.noise.current_timestep == 50,
            "--alpha_blend 100 --head_epochs 1 --epochs 2",
        )
    ],
    "noise_tokens": [Row("--noise_tokens patches", lambda s: s.noise.config.tokens == "patches")],
    "noise_space": [Row("--noise_space pixel", lambda s: hooked(s) == [s.net])],
    "noise_layer": [Row("--noise_layer 1", lambda s: hooked(s) == [s.net.blocks[1]])],
    "noise_beta_power": [
        Row(
            "--noise_beta_power 1",
            lambda s: s.noise.signal_scale[0].item() == pytest.approx(math.sqrt(1 - 1e-4), abs=1e-7),
        )
    ],
    "noise_curve": [Row("--noise_curve 31 5", lambda s: re.findall(r"noise of (\d+) dB: acc1", s.said) == ["31", "5"])],
    "noise_eval": [Row("--noise_eval", lambda s: s.net.eval() and s.noise.active)],
    "head_epochs": [
        Row(
            "--head_epochs 2",
            lambda s: (
                s.epochs == [0, 1, 2]
                and [len(names) for names in s.trains] == [2, 2, len(s.starts[0])]
                and (s.lr(2), s.lr(2.5), s.lr(3)) == (0, 0.01, 1e-6)
            ),
            "--lr 0.01 --warmup_epochs 0.5",
        ),
        Row(  # the head alone learns from whole images
            "--head_epochs 1",
            lambda s: [call["mixup"] is None for call in s.calls["train_one_epoch"]] == [True, False],
            "--mixup 1",
        ),
    ],
    "head_lr": [
        Row("--head_lr 0.02", lambda s: s.calls["train_one_epoch"][0]["training"].lr_at(0.7) == 0.02, "--head_epochs 1")
    ],
    "freeze_layers": [
        Row(
            "--freeze_layers 2",
            lambda s: (
                {n.split(".")[0] for n in s.trains[0]} == {"blocks", "fc_norm", "head"}
                and not any(n.startswith("blocks.0.") for n in s.trains[0])
            ),
        )
    ],
    "freeze_bn": [
        Row(
            "--freeze_bn",
            lambda s: s.norms_in_training == {False},
            "--model test_resnet --model_kwargs --input_size 16",
        )
    ],
}

PRETRAIN = {
    **TRAINING,
    "loader": [Row("--loader pil", lambda s: s.loader.files.dataset.fast is None, PHOTOS)],
    "mask_ratio": [Row("--mask_ratio 0.5", lambda s: {ids.shape[1] for _, ids in s.inputs} == {12})],
    "mask_ratio_max": [
        Row("--mask_ratio_max 1", lambda s: len({ids.shape[1] for _, ids in s.inputs}) > 2, "--batch_size 9")
    ],
    "vis_freq": [Row("--vis_freq 2", lambda s: pictures(s) == [1, 2], "--epochs 3 --output_dir {out}")],
    "vis_type": [Row("--vis_type heun", lambda s: s.one("reconstruct")["sampler"] == "heun", "--output_dir {out}")],
    "patch_size": [Row("--patch_size 4", lambda s: s.net.grid_size == (2, 3))],
    "embed_dim": [Row("--embed_dim 24", lambda s: s.net.cls_token.shape[-1] == 24)],
    "depth": [Row("--depth 2", lambda s: len(s.net.blocks) == 2)],
    "num_heads": [Row("--num_heads 2", lambda s: s.net.blocks[0].attn.num_heads == 2)],
    "decoder_embed_dim": [Row("--decoder_embed_dim 24", lambda s: s.net.decoders[0].pred.in_features == 24)],
    "decoder_depth": [Row("--decoder_depth 2", lambda s: [len(d.blocks) for d in s.net.decoders] == [2, 2])],
    "decoder_num_heads": [Row("--decoder_num_heads 2", lambda s: s.net.decoders[1].blocks[0].attn.num_heads == 2)],
    "mlp_ratio": [
        Row(
            "--mlp_ratio 2",
            lambda s: {b.mlp.fc1.out_features for b in (s.net.blocks[0], s.net.decoders[0].blocks[0])} == {24},
        )
    ],
    "T": [Row("--T 3", lambda s: len(s.net.decoders) == 3)],
    "sigma_min": [Row("--sigma_min 0.1", lambda s: s.net.sigmas[-2] == pytest.approx(0.1))],
    "sigma_max": [Row("--sigma_max 9", lambda s: s.net.sigmas[0] == pytest.approx(9))],
    "rho": [Row("--rho 1", lambda s: s.net.sigmas[1] == pytest.approx((80 + 0.002) / 2), "--T 3")],
    "sigma_data": [Row("--sigma_data 0.4", lambda s: s.net.sigma_data == 0.4)],
    "target": [Row("--target norm_pixel", lambda s: s.net.target == "norm_pixel")],
    "propagate": [Row("--propagate none", lambda s: s.net.encoder_head is not None and s.net.propagate == "none")],
    "loss_weighting": [
        Row(
            "--loss_weighting edm",
            lambda s: s.net.weights == pytest.approx([(v**2 + 0.25) / (v * 0.5) ** 2 for v in (80, 0.002)]),
            "--sigma_data 0.5",
        )
    ],
    "use_checkpoint": [Row("--use_checkpoint", lambda s: s.net.use_checkpoint and s.net.decoders[1].use_checkpoint)],
    "hflip": [
        Row("--hflip 1", lambda s: torch.equal(raw(s).round(), plain(s).flip(-1))),
        Row("--hflip 1", lambda s: of_steps(s.loader, "RandomHorizontalFlip").p == 1, PHOTOS),
    ],
    "resume": [Row("--resume {pre}/checkpoint-last.pth", lambda s: s.epochs == [1], "--epochs 2")],
    "force_resume": [
        Row(
            "--force_resume",
            lambda s: s.epochs == [1],
            "--epochs 2 --mask_ratio 0.5 --resume {pre}/checkpoint-last.pth",
        )
    ],
    "compile": [Row("--compile", lambda s: s.calls["require_compiler"] and s.one("compile_noprop")["net"] is s.net)],
}

ENCODER = "--checkpoint {pre}/checkpoint-last.pth"
PROBED = "--checkpoint {pre}/checkpoint-last.pth --input_size 8 12"


def probed(seen: Seen, name: str):
    """Of the loader of training images, and of what the features are computed with."""
    return seen.calls["extract"][0][name]


def said_of(seen: Seen) -> str:
    return seen.said.splitlines()[0]


LINPROBE = {
    "model": [
        Row(
            "--model vit_custom_patch4",
            lambda s: probed(s, "model").patch_embed.patch_size == (4, 4),
            "--random_init --dataset digits --model vit_custom_patch2 --model_kwargs embed_dim=12 depth=1 num_heads=2",
        )
    ],
    "finetune": [
        Row("--finetune {run}/checkpoint-last.pth", lambda s: "{}/c".format(s.paths["run"]) in said_of(s), ENCODER),
        Row(
            "--checkpoint {run}/checkpoint-last.pth",
            lambda s: holds_weights(probed(s, "model").state_dict(), tensors(s, "run")),
            ENCODER,
        ),
    ],
    "pool": [
        Row("--cls_token", lambda s: probed(s, "pool") == "cls", ENCODER),
        Row("--global_pool", lambda s: probed(s, "pool") == "mean", "--checkpoint {run}/checkpoint-last.pth"),
    ],
    "model_kwargs": [
        Row(
            "--model_kwargs embed_dim=24 depth=2 num_heads=2",
            lambda s: len(probed(s, "model").blocks) == 2 and probed(s, "model").embed_dim == 24,
            f"{ENCODER} --random_init",
        )
    ],
    "pretrained": [
        Row("--pretrained", lambda s: s.calls["load_pretrained"], "--model test_vit2 --dataset digits --input_size 32")
    ],
    "random_init": [
        Row(
            "--random_init",
            lambda s: not torch.equal(probed(s, "model").cls_token, tensors(s, "pre")["cls_token"]),
            ENCODER,
        )
    ],
    "pos_grid": [
        Row(
            "--pos_grid 3 2",
            lambda s: torch.allclose(probed(s, "model").pos_embed, turned(s.paths["grid"])),
            "--checkpoint {grid} --model vit_custom_patch4 --model_kwargs embed_dim=12 depth=2 num_heads=2 "
            "--dataset digits --in_chans 1 --input_size 8 12",
        )
    ],
    "batch_size": [Row("--batch_size 19", lambda s: probed(s, "loader").order.batch_size == 19, ENCODER)],
    "knn_k": [Row("--knn_k 3", lambda s: s.one("knn_predict")["k"] == 3, ENCODER)],
    "knn_t": [Row("--knn_t 0.5", lambda s: s.one("knn_predict")["temperature"] == 0.5, ENCODER)],
    "input_size": [Row("--input_size 12 8", lambda s: probed(s, "loader").batch_transform.size == (12, 8), ENCODER)],
    "in_chans": [
        Row("--in_chans 3", lambda s: probed(s, "model").patch_embed.proj.in_channels == 3, f"{ENCODER} --random_init")
    ],
    "mean": [Row("--mean 0.5", lambda s: probed(s, "loader").batch_transform.mean == (0.5,), ENCODER)],
    "std": [Row("--std 0.25", lambda s: probed(s, "loader").batch_transform.std == (0.25,), ENCODER)],
    "data_path": [
        Row(
            "--data_path {photos}",
            lambda s: probed(s, "loader").data.root.endswith("photos/train"),
            f"{ENCODER} --dataset folder --data_path {{broken}} --on_bad_image skip",
        )
    ],
    "dataset": [
        Row(
            "--dataset folder",
            lambda s: isinstance(probed(s, "loader").data, FileDataset),
            f"{ENCODER} --data_path {{photos}}",
        )
    ],
    "val_split": [Row("--val_split 0.2", lambda s: len(probed(s, "loader").data) == 45, ENCODER)],
    "train_subset": [Row("--train_subset 31", lambda s: len(probed(s, "loader").data) == 31, ENCODER)],
    "split_seed": [
        Row(
            "--split_seed 5",
            lambda s: torch.equal(probed(s, "loader").data.targets, digits().targets[np.sort(split(0.2, 5))]),
            f"{ENCODER} --val_split 0.2",
        )
    ],
    "output_dir": [Row("--output_dir {out}", lambda s: s.names() >= {"report.md", "log.txt"}, ENCODER)],
    "num_workers": [
        Row(
            "--num_workers 1",
            lambda s: probed(s, "loader").files.num_workers == 1,
            f"{ENCODER} --dataset folder --data_path {{photos}}",
        )
    ],
    "pin_mem": [
        Row("--no_pin_mem", lambda s: not probed(s, "loader").reading.pin_mem, ENCODER),
        Row("--pin_mem", lambda s: probed(s, "loader").reading.pin_mem, f"{ENCODER} --no_pin_mem"),
    ],
    "on_bad_image": [
        Row("--on_bad_image skip", lambda s: not s.error, f"{ENCODER} --dataset folder --data_path {{broken}}")
    ],
    "max_pixels": [
        Row(
            "--max_pixels 1279",
            lambda s: "1280 pixels" in s.error,
            f"{ENCODER} --dataset folder --data_path {{photos}}",
        )
    ],
    "device": [Row("--device cuda:1", lambda s: s.one("init_world")["device"] == "cuda:1", ENCODER)],
    "seed": [
        Row("--seed 7", lambda s: s.one("choose_l2")["seed"] == 7, ENCODER),
        Row(
            "--seed 7",
            lambda s: torch.equal(probed(s, "model").patch_embed.proj.weight, seeded_vit(7)["patch_embed.proj.weight"]),
            "--random_init --dataset digits --input_size 8 12 --model vit_custom_patch4 --model_kwargs embed_dim=12 "
            "depth=2 num_heads=2",
        ),
    ],
    "dist_url": [Row("--dist_url tcp://h:1", lambda s: s.one("init_world")["dist_url"] == "tcp://h:1", ENCODER)],
    "amp": [
        Row("--amp bf16", lambda s: probed(s, "precision").dtype == torch.bfloat16, f"{ENCODER} --amp off"),
        Row("--use_amp", lambda s: probed(s, "precision").dtype == torch.bfloat16, f"{ENCODER} --amp off"),
    ],
    "deterministic": [Row("--deterministic", lambda s: s.one("init_world")["deterministic"], ENCODER)],
}

MEMBER = "--checkpoints {photo_run} --data_path {photos}/val"
FOLDS = "--checkpoints {folds} --data_path {photos}/train"


def results(seen: Seen) -> dict:
    return json.loads((seen.out / "results.json").read_text())


PREDICT = {
    "checkpoints": [
        Row("--checkpoints {photo_run} {folds}", lambda s: len(s.one("load_nets")["returned"]) == 3, MEMBER)
    ],
    "weights": [
        Row(
            f"--weights {way}",
            lambda s, name=name: [r["name"] for r in results(s)["results"] if r["chosen"]] == [name],
            "--checkpoints {folds} {other_folds} --data_path {photos}/val",
        )
        for way, name in (("val", "weights by validation"), ("stacked", "stacked"))
    ],
    "views": [
        Row(
            "--views 3,12",
            lambda s: s.one("predict")["asked"].views == [2, 11] and results(s)["views"] == ["large", "blur"],
            MEMBER,
        )
    ],
    "margin": [
        Row("--margin 5", lambda s: s.one("predict")["asked"].margin == 5 and "--margin 5" in report(s), MEMBER)
    ],
    "batch_size": [Row("--batch_size 5", lambda s: "Predict:  [3/3]" in s.said, MEMBER)],
    "labels": [Row("--labels {labels}", lambda s: results(s)["labelled"] == 3, MEMBER)],
    "out_of_fold": [
        Row("--out_of_fold", lambda s: s.calls["predict_out_of_fold"] and "have not seen it" in report(s), FOLDS)
    ],
    "spreadsheet_safe": [
        Row(
            "--spreadsheet_safe",
            lambda s: "'=1.png" in (s.out / "predictions.csv").read_text(),
            MEMBER.replace("photos}/val", "formulas}"),
        )
    ],
    "data_path": [Row("--data_path {photos}/train", lambda s: len(s.one("write_all")["ids"]) == 32, MEMBER)],
    "dataset": [
        Row(
            "--dataset digits",
            lambda s: len(s.one("write_all")["ids"]) == 23,
            "--checkpoints {run} --data_path {photos}",
        )
    ],
    "output_dir": [Row("--output_dir {out}/a", lambda s: s.names("a/*") >= {"predictions.csv", "report.md"}, MEMBER)],
    "num_workers": [Row("--num_workers 1", lambda s: s.one("predict")["reading"].num_workers == 1, MEMBER)],
    "on_bad_image": [Row("--on_bad_image skip", lambda s: not s.error, MEMBER.replace("photos", "broken", 2))],
    "max_pixels": [Row("--max_pixels 1279", lambda s: "1280 pixels" in s.error, MEMBER)],
    "device": [Row("--device cuda:1", lambda s: s.one("init_world")["device"] == "cuda:1", MEMBER)],
    "dist_url": [Row("--dist_url tcp://h:1", lambda s: s.one("init_world")["dist_url"] == "tcp://h:1", MEMBER)],
    "amp": [
        Row(
            "--amp bf16",
            lambda s: s.one("load_nets")["returned"][0].precision.dtype == torch.bfloat16,
            f"{MEMBER} --amp off",
        ),
        Row(
            "--use_amp",
            lambda s: s.one("load_nets")["returned"][0].precision.dtype == torch.bfloat16,
            f"{MEMBER} --amp off",
        ),
    ],
}


def report(seen: Seen) -> str:
    return (seen.out / "report.md").read_text()


PRE = "{pre}/checkpoint-last.pth"


def looked_at(seen: Seen):
    """The loader of the images that are reconstructed."""
    return seen.calls["evaluation_loader"][0]["returned"]


SAMPLE = {
    "checkpoint": [
        Row(
            "{other_pre}/checkpoint-last.pth",
            lambda s: torch.equal(s.one("Study")["net"].cls_token, tensors(s, "other_pre")["cls_token"]),
        )
    ],
    "mode": [
        Row(
            "--mode generate attention",
            lambda s: s.names("*.png") == {"generated_euler.png", "attention_heads.png", "attention_blocks.png"},
            PRE,
        )
    ],
    "sampler": [
        Row(
            "--sampler heun stochastic",
            lambda s: s.names("*.png") == {"reconstruction_heun.png", "reconstruction_stochastic.png"},
            PRE,
        )
    ],
    "mask_ratio": [
        Row(
            "--mask_ratio 0.5",
            lambda s: (
                s.one("Study")["mask_ratio"] == 0.5 and {c["ids"][0].shape[1] for c in s.calls["reconstruct"]} == {12}
            ),
            PRE,
        )
    ],
    "images": [
        Row(
            "--images {photos}/val/red",
            lambda s: len(looked_at(s).data) == 6 and isinstance(looked_at(s).data, FileDataset),
            PRE,
        )
    ],
    "num": [Row("--num 3", lambda s: len(s.one("reconstruction_grid")["originals"]) == 3, PRE)],
    "num_samples": [Row("--num_samples 7", lambda s: len(looked_at(s).data) == 7, PRE)],
    "inception_weights": [
        Row(
            "--inception_weights {run}/args.json",
            lambda s: s.one("load_inception")["path"] == f"{s.paths['run']}/args.json",
            f"{PRE} --mode frechet",
        )
    ],
    "batch_size": [Row("--batch_size 5", lambda s: looked_at(s).order.batch_size == 5, PRE)],
    "data_path": [
        Row(
            "--data_path {photos}",
            lambda s: looked_at(s).data.root.endswith("photos/val"),
            f"{PRE} --dataset folder --data_path {{photos}}/train",
        )
    ],
    "dataset": [
        Row("--dataset folder", lambda s: isinstance(looked_at(s).data, FileDataset), f"{PRE} --data_path {{photos}}")
    ],
    "output_dir": [Row("--output_dir {out}/a", lambda s: s.names("a/*") >= {"report.md", "log.txt"}, PRE)],
    "num_workers": [
        Row("--num_workers 1", lambda s: looked_at(s).files.num_workers == 1, f"{PRE} --images {{photos}}/val/red")
    ],
    "on_bad_image": [Row("--on_bad_image skip", lambda s: not s.error, f"{PRE} --images {{broken}}/val")],
    "max_pixels": [Row("--max_pixels 1279", lambda s: "1280 pixels" in s.error, f"{PRE} --images {{photos}}/val")],
    "device": [Row("--device cuda:1", lambda s: s.one("init_world")["device"] == "cuda:1", PRE)],
    "seed": [
        Row("--seed 7", lambda s: s.one("Study")["seed"] == 7, PRE),
        Row("--seed 7", lambda s: torch.equal(looked_at(s).data.images, held_out(7)), PRE),
    ],
}


def held_out(seed: int) -> torch.Tensor:
    order = torch.randperm(23, generator=torch.Generator().manual_seed(mix(seed)))
    return digits("val").images[order[:9]]


TABLE = {"finetune": FINETUNE, "pretrain": PRETRAIN, "linprobe": LINPROBE, "predict": PREDICT, "sample": SAMPLE}
ROWS = [
    pytest.param(main, row, id=f"{main} {row.line}")
    for main, flags in TABLE.items()
    for rows in flags.values()
    for row in rows
]


@pytest.fixture(scope="module")
def paths(photo_folder, tmp_path_factory) -> dict[str, str]:
    """What the lines name: photos, runs, files of weights."""
    root = tmp_path_factory.mktemp("wiring")
    shutil.copytree(photo_folder, root / "photos")
    shutil.copytree(photo_folder, root / "broken")
    for split in ("train", "val"):
        (root / "broken" / split / "red" / "red_03.png").write_bytes(b"no image")
    (root / "formulas").mkdir()
    shutil.copy(photo_folder / "val" / "red" / "red_00.png", root / "formulas" / "=1.png")
    (root / "labels.csv").write_text("ID,label\nblue_00,red\nblue_01,blue\nred_01,red\n")
    photos = PHOTOS.format(photos=root / "photos").split()
    for name, main, line in (
        ("run", "finetune", []),
        ("token", "finetune", ["--cls_token"]),
        ("photo_run", "finetune", photos),
        ("folds", "finetune", [*photos, "--kfold", "2"]),
        ("other_folds", "finetune", [*photos, "--kfold", "2", "--seed", "1"]),
        ("pre", "pretrain", []),
        ("other_pre", "pretrain", ["--seed", "1"]),
    ):
        seen = watch(main, [*BASE[main], *line, "--output_dir", str(root / name)], root / name)
        assert not seen.error, seen.error
    state = read_checkpoint(str(root / "run" / "checkpoint-last.pth"))["model"]
    torch.save({**state, "pos_embed": torch.randn(1, 7, 12)}, root / "grid")
    torch.save({k: v for k, v in state.items() if "blocks.1" not in k}, root / "part")
    (root / "token.pth").write_bytes((root / "token" / "checkpoint-last.pth").read_bytes())
    return {path.name.removesuffix(".csv"): str(path) for path in root.iterdir()} | {"token": f"{root}/token.pth"}


@pytest.fixture(scope="module")
def without(paths, tmp_path_factory):
    """without(main, row): its run without the flag, made once for all rows that stand on the same line."""
    made: dict[tuple, Seen] = {}

    def make(main: str, row: Row) -> Seen:
        key = main, row.given, len(row.evaluations)
        if key not in made:
            made[key] = watched(main, row.given, row, paths, tmp_path_factory.mktemp("without"))
        return made[key]

    return make


def watched(main: str, line: str, row: Row, paths: dict[str, str], out) -> Seen:
    words = [*BASE[main], *line.split()]
    again = out / "again"
    if "{again}" in words:
        shutil.copytree(paths["run" if main == "finetune" else "pre"], again)
    words = [word.format(**paths, out=out, again=again) for word in words]
    return watch(main, words, out, row.evaluations, paths)


@pytest.mark.parametrize("main", OPTIONS)
def test_every_flag_has_a_row_with_another_value(main):
    """A new flag needs a row in the table of its main; a flag of which no row can be written goes."""
    flags, table, parser = OPTIONS[main].flags(), TABLE[main], Parser(OPTIONS[main])
    assert set(table) == set(flags)
    for dest, flag in flags.items():
        lines = [row.line.split() for row in table[dest]]
        options = [parser.parse_args([*(REQUIRED[main] * line[0].startswith("-")), *line]) for line in lines]
        assert any(getattr(one, dest) != flag.default for one in options), dest
        words = {line[0] for line in lines if line[0].startswith("-")}
        assert set(flag.also) <= words <= {*flag.names, *flag.also}, dest


REQUIRED = {"finetune": (), "pretrain": (), "linprobe": (), "predict": ("--checkpoints", "x"), "sample": ("x",)}


@pytest.mark.parametrize("main,row", ROWS)
def test_flag_reaches_what_it_names(main, row, without, paths, tmp_path):
    seen = watched(main, f"{row.given} {row.line}", row, paths, tmp_path)
    assert row.holds(seen), seen.error or seen.said
    try:
        idle = row.holds(without(main, row))
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, StopIteration, FileNotFoundError):
        idle = False  # there is no such part
    assert not idle, "the probe holds without the flag, too"
