"""The settings of all mains, by group. Each field is a flag, declared only here (see flags.py).

Flags of MAE's scripts keep their names and defaults. If the default is None, the checkpoint or the data set decides;
the result is printed and stored in args.json.
"""

from dataclasses import dataclass, replace
from functools import partial

from util.choices import (
    ANNEALS,
    COLOURS,
    LEAST_CROP_PCT,
    LOSS_WEIGHTINGS,
    NOISE_KINDS,
    PROPAGATE,
    SAMPLERS,
    SCHEDULES,
    SPACES,
    TARGETS,
    TOKENS,
    UNITS,
    is_mae_name,
)
from util.cli.flags import by_main, flag
from util.cli.values import (
    count,
    device_name,
    fraction,
    keyword,
    logger_list,
    model_name,
    non_negative,
    number,
    pixel_mean,
    pixel_std,
    policy_or_none,
    positive,
    positive_int,
    rate,
    sigma,
    sigma_data,
    view_list,
)
from util.data_specs import DATASETS
from util.errors import UserError

TRAINING = "finetune pretrain"
of_finetune = partial(flag, mains="finetune")
of_training = partial(flag, mains=TRAINING)
keeps_results = partial(flag, mains=TRAINING, changes_results=False)  # the numbers of a run do not depend on it
scheduled = partial(flag, free_at_resume=True)


def of_source(text: str, otherwise: str = "the data set's") -> by_main:
    """Help texts for a flag whose default is the checkpoint's in mains that start from one."""
    started = f"{text} (default: the checkpoint's, else {otherwise})"
    return by_main(finetune=started, linprobe=started, pretrain=f"{text} (default: the data set's)")


@dataclass(frozen=True)
class Run:
    """run: output, resuming"""

    output_dir: str = flag(
        by_main(finetune="./output_dir", pretrain="./output_dir", linprobe="", predict="./predictions", sample=None),
        by_main(
            finetune="the run's folder; '' saves nothing",
            pretrain="the run's folder; '' saves nothing",
            linprobe="where to write the report (default: nowhere)",
            predict="where to write the tables, pictures and report",
            sample="where to write the pictures and the report (default: the folder `samples` beside the checkpoint)",
        ),
        changes_results=False,
    )
    log_dir: str | None = keeps_results(
        None,
        "folder for TensorBoard's files, where an epoch is 1000 steps, as in MAE; each fold gets a folder of its own "
        "in it (default: --output_dir)",
    )
    resume: str = keeps_results(
        "",
        by_main(
            finetune="checkpoint to resume from, or `auto`: the newest in --output_dir; with --eval the checkpoint to "
            "evaluate (default: a new run)",
            pretrain="checkpoint to resume from, or `auto`: the newest in --output_dir (default: a new run)",
        ),
    )
    start_epoch: int = of_training(
        0, "first epoch of a new run, counted from 0; --resume sets it by itself", free_at_resume=True, type=count
    )
    logger: list[str] = keeps_results(
        ["tensorboard"],
        "where numbers and pictures go: tensorboard, wandb, mlflow, trackio, csv (metrics.csv), a list with commas, or "
        "none",
        type=logger_list,
        metavar="LIST|none",
    )
    force_resume: bool = keeps_results(
        False, "resume even if flags that change the results, or the images per step, differ from the checkpoint's"
    )
    save_freq: int = keeps_results(
        20, "keep a checkpoint-{epoch}.pth every N epochs and at the end; 0: none", type=count
    )
    keep: int = keeps_results(0, "keep only the newest N of these; 0: all", type=count)
    save_every_minutes: float = keeps_results(
        0.0, "also save in the middle of an epoch, every N minutes; 0: never", type=non_negative
    )
    print_freq: int = keeps_results(20, "steps between progress lines", type=positive_int)
    max_bad_steps: int = keeps_results(
        10,
        "end the run after this many non-finite steps in a row, each of which is skipped; fp16's first "
        "search for a loss scale does not count",
        type=positive_int,
    )
    profile: int = keeps_results(
        0,
        "time N micro-steps, then trace N more: trace.json, profile.txt and the rates in --output_dir; 0: off",
        type=count,
        metavar="N",
    )
    overwrite: bool = keeps_results(False, "start over in an --output_dir that contains a run; its files are deleted")
    dry_run: bool = keeps_results(
        False, "print every resolved value, the parameter groups and an estimate of the memory, then stop"
    )


@dataclass(frozen=True)
class Machine:
    """machine: device, precision, processes"""

    device: str = flag(
        "auto",
        "auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one",
        changes_results=False,
        type=device_name,
    )
    seed: int = flag(
        0,
        "seed of the initial weights, the order of samples and the augmentation",
        mains="finetune pretrain linprobe sample",
        type=number(int, 0, 2**62),
    )
    dist_url: str = flag(
        "env://",
        "rendezvous address of torchrun's processes",
        mains="finetune pretrain linprobe predict",
        changes_results=False,
    )
    amp: str | None = scheduled(
        None,
        "off: fp32; bf16; fp16; mixed, or the flag alone: bf16, or fp16 on GPUs without bf16 (default: the "
        "faster one for this device and kind of network)",
        mains="finetune pretrain linprobe predict",
        names=("--amp", "--use_amp"),
        nargs="?",
        choices=("off", "mixed", "bf16", "fp16"),
        const="mixed",
    )
    deterministic: bool = flag(
        False,
        "on CUDA, use only deterministic operations, which are slower; a CPU is deterministic anyway",
        mains="finetune pretrain linprobe",
        changes_results=False,
    )
    compile: bool = keeps_results(
        False, "run the network through torch.compile: needs a C++ compiler and takes minutes to start"
    )
    timeout_minutes: float = keeps_results(
        10.0, "end the job when a process has waited this long for another", type=number(float, 0, 1e6, open_low=True)
    )


@dataclass(frozen=True)
class Optimizer:
    """optimizer (AdamW, warm-up, half a cosine)"""

    batch_size: int = scheduled(
        by_main(finetune=64, pretrain=128), "images per process and micro-step", type=positive_int
    )
    epochs: int = scheduled(by_main(finetune=50, pretrain=1600), "passes over the training set", type=count)
    accum_iter: int = flag(1, "micro-steps per update of the weights, at most those of an epoch", type=positive_int)
    lr: float | None = scheduled(None, "peak learning rate (default: from --blr)", type=rate)
    blr: float = scheduled(
        by_main(finetune=1e-3, pretrain=3e-4),  # 3e-4 is the method's lr of 1.5e-4 at batch 128
        "base learning rate: lr = blr * batch_size * accum_iter * processes / 256",
        type=rate,
    )
    min_lr: float = scheduled(1e-6, "learning rate at the end of the cosine", type=rate)
    warmup_epochs: float = scheduled(
        by_main(finetune=5, pretrain=10), "epochs in which the learning rate rises linearly from 0", type=non_negative
    )
    weight_decay: float = scheduled(0.05, "AdamW's weight decay; biases, norms and other vectors have none", type=rate)
    layer_decay: float = of_finetune(
        0.75,
        "factor on the learning rate from each layer to the one below it",
        free_at_resume=True,
        type=number(float, 0, 1, open_low=True),
    )
    clip_grad: float | None = scheduled(None, "clip the gradient to this norm (default: no clipping)", type=positive)

    def lr_for(self, global_batch: int) -> float:
        """The absolute learning rate for `global_batch` images per update over all processes."""
        return self.blr * global_batch / 256 if self.lr is None else self.lr


@dataclass(frozen=True)
class Data:
    """data"""

    data_path: str | None = flag(
        None,
        by_main(
            finetune="the data set's folder (default: data; digits need none; with --eval the checkpoint's)",
            pretrain="the data set's folder (default: data; digits need none)",
            linprobe="the data set's folder (default: the checkpoint's, else data)",
            predict="folder of the images to predict, or the data set's (default: for a named --dataset or "
            "--out_of_fold, the first checkpoint's)",
            sample="the data set's folder (default: the checkpoint's, else data)",
        ),
    )
    dataset: str = flag(
        by_main(finetune=None, pretrain="cifar10", linprobe=None, predict=None, sample=None),
        by_main(
            finetune="the data set's name; folder: {train,val}/<class>/<images> (default: folder; with --eval the "
            "checkpoint's)",
            pretrain="the data set's name; folder: any folder of images",
            linprobe="the data set's name; folder: {train,val}/<class>/<images> (default: the checkpoint's, else "
            "folder)",
            predict="folder, or the name of a data set whose test split is predicted (default: folder; without "
            "--data_path the first checkpoint's)",
            sample="the data set's name; folder: any folder of images (default: the checkpoint's, else folder)",
        ),
        choices=sorted(DATASETS),
    )
    val_split: float = flag(
        0.0,
        "hold out this share of each class of train/ if there is no val/; 0: none",
        mains="finetune linprobe",
        type=number(float, 0, 1, open_high=True),
    )
    train_subset: int | None = flag(
        None,
        "train on this many images, the same share of each class (default: all)",
        mains="finetune linprobe",
        type=positive_int,
    )
    kfold: int = of_finetune(
        0, "train on each of K stratified folds of train/ in turn; 0: off", type=number(int, 0, 1000)
    )
    fold: str = of_finetune("all", "with --kfold, train only this fold: 0 to K - 1, or all", changes_results=False)
    split_seed: int = flag(
        0, "seed of --val_split, --kfold and --train_subset", mains="finetune linprobe", type=number(int, 0, 2**32 - 1)
    )


@dataclass(frozen=True)
class Input:
    """input of the network"""

    input_size: list[int] | None = flag(
        None,
        of_source(
            "image size in pixels: N, or height and width", "that of the pretrained weights, else the data set's"
        ),
        names=("--input_size", "--img_size"),
        type=number(int, 1, 16384),
        nargs="+",
        metavar="N",
    )
    in_chans: int | None = flag(None, of_source("channels: 1 for grey, 3 for colour"), type=int, choices=(1, 3))
    mean: list[float] | None = flag(
        None,
        of_source("mean of the pixels in [0, 1], one value per channel or one for all"),
        type=pixel_mean,
        nargs="+",
    )
    std: list[float] | None = flag(
        None, of_source("standard deviation of the pixels, likewise"), type=pixel_std, nargs="+"
    )
    crop_pct: float | None = of_finetune(
        None,
        "share of the resized image that evaluation, and view 1 of main_predict.py, see (default: the "
        "checkpoint's, else 0.875 up to 224 pixels and 1 above)",
        type=number(float, LEAST_CROP_PCT, 1),
    )

    def __post_init__(self):
        if self.input_size is not None and len(self.input_size) > 2:
            raise UserError(f"--input_size {' '.join(map(str, self.input_size))}: give N or H W")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) that --input_size gives."""
        return None if self.input_size is None else (self.input_size[0], self.input_size[-1])

    def normalisation(self, in_chans: int, default: tuple) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std), a value per channel: --mean and --std, else the default's."""
        result = []
        for name, own, values in (("--mean", self.mean, default[0]), ("--std", self.std, default[1])):
            values = tuple(own) if own is not None else tuple(values)
            if len(values) == 1:
                values = values * in_chans
            if len(values) != in_chans:
                if own is None and in_chans == 1:
                    values = (sum(values) / len(values),)
                else:
                    raise UserError(f"{name} {' '.join(map(str, values))}: give 1 or {in_chans} values")
            result.append(values)
        return result[0], result[1]


@dataclass(frozen=True)
class Reading:
    """reading of images"""

    num_workers: int = flag(10, "loader processes, at most one per core", changes_results=False, type=count)
    pin_mem: bool = flag(
        True,
        "pin the loader's memory, for faster copies to the GPU (default: on)",
        mains="finetune pretrain linprobe",
        changes_results=False,
        also={"--no_pin_mem": dict(action="store_false", help="do not pin the loader's memory")},
    )
    loader: str | None = of_training(
        None,
        "how training reads JPEG files: fast decodes and resizes them with OpenCV at the scale that their "
        "crop needs, with the same crops and pixels within a few levels; evaluation always uses pil (default: "
        "fast if OpenCV can be imported, else pil)",
        choices=("pil", "fast"),
    )
    on_bad_image: str = scheduled(
        "error",
        "error: an unreadable image ends the run; skip: training replaces it, evaluation leaves it out, "
        "predictions.csv has an empty row for it",
        choices=("error", "skip"),
    )
    max_pixels: int = scheduled(
        178956970,
        "refuse image files with more pixels before they are decoded, against decompression bombs",
        type=positive_int,
        metavar="N",
    )


@dataclass(frozen=True)
class Model:
    """model"""

    model: str | None = flag(
        None,
        by_main(
            finetune="one of MAE's names or any timm model (default: the checkpoint's, else vit_large_patch16)",
            linprobe="one of MAE's names or any timm model (default: the checkpoint's)",
        ),
        type=model_name,
        metavar="NAME",
    )
    finetune: str = flag(
        "",
        by_main(
            finetune="start from the weights in this .pth or .safetensors file: a checkpoint of this project, or "
            "weights from elsewhere with their --model (default: none)",
            linprobe="the weights, in a .pth or .safetensors file: a checkpoint of this project, or weights from "
            "elsewhere with their --model (default: none)",
        ),
        names=by_main(linprobe=("--checkpoint", "--finetune")),
        metavar="FILE",
    )
    # True if neither flag is given; a checkpoint's pooling then takes precedence.
    global_pool: bool | str = of_finetune(
        True,
        "average the patch tokens for the classifier (default: the checkpoint's, else on)",
        action="store_const",
        const="avg",
        also={"--cls_token": dict(action="store_false", help="give the classifier the class token instead")},
    )
    pool: str | None = flag(
        None,
        "probe the mean of the patch tokens (default: on for encoders without a classifier; for others, "
        "what the classifier reads)",
        mains="linprobe",
        names=("--global_pool",),
        action="store_const",
        const="mean",
        also={"--cls_token": dict(action="store_const", const="cls", help="probe the class token instead")},
    )
    nb_classes: int | None = of_finetune(
        None,
        "outputs of the classifier (default: the checkpoint's for the same classes, else the data's)",
        type=positive_int,
    )
    drop_path: float = of_finetune(
        0.1,
        "stochastic depth: the last block is dropped with this probability, earlier ones with less",
        type=number(float, 0, 1, open_high=True),
    )
    model_kwargs: list[tuple[str, object]] = flag(
        [],
        "keywords for the model, e.g. embed_dim=96 depth=6 num_heads=3 drop_rate=0.2 (default: none)",
        type=keyword,
        nargs="*",
        metavar="NAME=VALUE",
    )
    pretrained: bool = flag(False, "start from timm's weights for the model, which are downloaded")
    random_init: bool = flag(False, "probe the same architecture untrained, for comparison", mains="linprobe")
    partial_load: bool = of_finetune(False, "load what fits from --finetune's file and initialise the rest")
    pos_grid: list[int] | None = flag(
        None,
        "patch grid of the position embeddings in --finetune's file (default: what the file says, else a square)",
        type=number(int, 1, 65536),
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
    )
    grad_checkpointing: bool = of_finetune(
        False, "recompute activations in the backward pass: less memory, more time", changes_results=False
    )


@dataclass(frozen=True)
class Noise:
    """DiffNoise: noise in training, alpha-blended or of another kind"""

    alpha_blend: int | None = flag(
        None,
        "strength as a timestep t of the schedule, 1 to 999: the signal-to-noise ratio is abar / (1 - abar); 0: no "
        "noise (default: 15; 0 for networks with BatchNorm)",
        type=number(int, 0, 999),
    )
    noise_kind: str = flag("alpha_blend", "kind of noise; see docs/noise.md", choices=tuple(NOISE_KINDS))
    noise_units: str | None = flag(
        None,
        "absolute: as in the released code, where the ratio differs between networks; relative: the noise is scaled by "
        "the root mean square of its input, so that t is the same ratio everywhere (default: absolute for MAE's ViTs, "
        "else relative)",
        choices=UNITS,
    )
    noise_snr: float | None = flag(
        None,
        "strength as the signal-to-noise ratio in dB; --alpha_blend 15 is 31.1 dB (default: from --alpha_blend)",
        type=number(float, -100, 100),
        metavar="DB",
    )
    noise_strength: float | None = flag(
        None,
        "strength of kinds that have no ratio; neftune and manifold_mixup: alpha; token_drop: the share of patches "
        "left out (default: none)",
        type=number(float, 0, 1e6, open_low=True),
    )
    noise_colour: str = flag("red", "for --noise_kind colour: low, middle or high frequencies", choices=COLOURS)
    noise_timestep: str = flag(
        "fixed", "fixed: t for all samples; uniform: t drawn from 1 to --alpha_blend per sample", choices=SCHEDULES
    )
    noise_prob: float = flag(1.0, "share of samples that get noise", type=fraction)
    noise_anneal: str = flag("none", "lower t towards 0 over the epochs", choices=ANNEALS)
    noise_tokens: str = flag("all", "all tokens, or patches: class and register tokens stay clean", choices=TOKENS)
    noise_space: str = flag(
        "embedding", "what gets the noise: the patch embedding, or the normalised pixels", choices=SPACES
    )
    noise_layer: list[int] = flag([0], "blocks whose input gets the noise; 0: the first", nargs="+", type=count)
    noise_beta_power: float = flag(
        1.2, "exponent on DDPM's linear betas; 1: DDPM's schedule", type=number(float, 0, 100, open_low=True)
    )
    noise_eval: bool = flag(False, "keep the noise in evaluation, as the released code does")

    def __post_init__(self):
        own = self.noise_kind in ("token_drop", "manifold_mixup")
        given = [
            f"{name} {value:g}"
            for name, value in (
                ("--alpha_blend", self.alpha_blend),
                ("--noise_snr", self.noise_snr),
                ("--noise_strength", self.noise_strength),
            )
            if value is not None
        ]
        if len(given) > 1 and self.alpha_blend != 0:
            raise UserError(f"{given[0]}: not together with {given[1]}; give the strength once")
        if own and self.noise_strength is None and self.alpha_blend != 0:
            raise UserError(
                f"--noise_kind {self.noise_kind}: give its --noise_strength; its strength is not a ratio in dB"
            )
        if self.noise_strength is not None and not (own or self.noise_kind == "neftune"):
            raise UserError(
                f"--noise_strength {self.noise_strength:g}: --noise_kind {self.noise_kind} takes --noise_snr or "
                "--alpha_blend"
            )
        if self.noise_kind == "token_drop" and self.noise_strength is not None and self.noise_strength >= 1:
            raise UserError(f"--noise_strength {self.noise_strength:g}: token_drop needs less than 1")

    def resolved(self, model: str, has_batchnorm: bool) -> "Noise":
        """With the strength and units that this network has by default, where they are not given.

        MAE's ViTs: t = 15 in absolute units, as released. Others: t = 15 in relative units; with BatchNorm none, whose
        statistics under noise are not those of evaluation (docs/noise.md has the measurements).
        """
        default = None if (self.noise_snr, self.noise_strength) != (None, None) else 0 if has_batchnorm else 15
        return replace(
            self,
            alpha_blend=default if self.alpha_blend is None else self.alpha_blend,
            noise_units=self.noise_units or ("absolute" if is_mae_name(model) else "relative"),
        )


@dataclass(frozen=True)
class Augmentation:
    """augmentation of an image"""

    color_jitter: float | None = of_finetune(
        None,
        "strength of the colour jitter; --aug mae uses it only without --aa (default: none; --aug photo: 0.3)",
        type=number(float, 0, 10),
    )
    aa: str | None = of_finetune(
        "rand-m9-mstd0.5-inc1",
        "timm's policy for --aug mae: rand, original, originalr, v0, v0r, 3a or augmix with numbers, or none",
        type=policy_or_none,
    )
    reprob: float | None = of_finetune(
        None, "probability of random erasing (default: 0.25; --aug photo: 0.2; light and none: 0)", type=fraction
    )
    remode: str = of_finetune(
        "pixel",
        "fill of an erased box; const: the mean colour, rand: one random colour, pixel: random pixels",
        choices=("const", "rand", "pixel"),
    )
    recount: int = of_finetune(1, "maximum number of boxes erased in an image", type=positive_int)
    aug: str = of_finetune(
        "mae",
        "mae: crop, flip and RandAugment; photo: for a folder of photos; light: crop and flip; none",
        choices=("mae", "photo", "light", "none"),
    )
    hflip: float | None = flag(None, "probability of a mirror image (default: 0.5; digits: 0)", type=fraction)
    vflip: float = of_finetune(0.0, "probability of an upside-down image, for views from above", type=fraction)
    scale: list[float] | None = of_finetune(
        None,
        "share of the image's area that a random crop keeps (default: 0.08 1; --aug photo: 0.7 1)",
        type=fraction,
        nargs=2,
        metavar=("MIN", "MAX"),
    )

    def __post_init__(self):
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"--scale {self.scale[0]} {self.scale[1]}: should be MIN MAX above 0")
        if self.aug == "none" and (self.scale or self.vflip):
            raise UserError("--aug none: neither crops nor flips; omit --scale and --vflip")
        if self.color_jitter is not None and self.aug in ("light", "none"):
            raise UserError(
                f"--color_jitter {self.color_jitter}: --aug {self.aug} changes no colours; use --aug photo, or mae "
                "with --aa none"
            )


@dataclass(frozen=True)
class Loss:
    """loss: mixup, cutmix, smoothing, class weights"""

    mixup: float = flag(0.0, "alpha of mixup's Beta(alpha, alpha); 0: off", type=number(float, 0, 1e6))
    cutmix: float = flag(0.0, "alpha of cutmix; 0: off", type=number(float, 0, 1e6))
    cutmix_minmax: list[float] | None = flag(
        None,
        "range of the box's side as a share of the image's, instead of --cutmix (default: none)",
        type=fraction,
        nargs=2,
        metavar=("MIN", "MAX"),
    )
    mixup_prob: float = flag(1.0, "probability of mixing a batch", type=fraction)
    mixup_switch_prob: float = flag(0.5, "probability of cutmix if both are on", type=fraction)
    mixup_mode: str = flag(
        "batch", "draw one lambda per batch, per pair or per image", choices=("batch", "pair", "elem")
    )
    smoothing: float = flag(
        0.1,
        "label smoothing in training; the validation loss is plain cross entropy",
        type=number(float, 0, 1, open_high=True),
    )
    class_weights: str = flag(
        "none", "balanced: weight a sample by images / (classes * images of its class)", choices=("none", "balanced")
    )

    def __post_init__(self):
        if self.cutmix_minmax is not None and self.cutmix_minmax[0] > self.cutmix_minmax[1]:
            raise UserError(f"--cutmix_minmax {self.cutmix_minmax[0]} {self.cutmix_minmax[1]}: should be MIN MAX")

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class Phases:
    """phases: head first, frozen layers"""

    head_epochs: int = flag(0, "epochs that train only the head on a frozen backbone, before --epochs", type=count)
    head_lr: float = scheduled(1e-3, "constant learning rate of the head epochs", type=rate)
    freeze_layers: int = flag(0, "freeze the first N layers, counting the embedding", type=count)
    freeze_bn: bool = flag(False, "freeze BatchNorm's pretrained statistics")


@dataclass(frozen=True)
class Selection:
    """evaluation and selection"""

    eval: bool = flag(
        False,
        "evaluate the weights of --resume or --finetune, then stop; the data are the checkpoint's unless "
        "flags say otherwise",
        changes_results=False,
    )
    dist_eval: bool = flag(
        True,
        "split the evaluation over the processes, each image once; the accuracy is the same (default: on)",
        changes_results=False,
        also={"--no_dist_eval": dict(action="store_false", help="let every process evaluate all images")},
    )
    noise_curve: list[float] | None = flag(
        None,
        "also evaluate with noise of these signal-to-noise ratios, after the last epoch or with --eval: accuracy, "
        "agreement and change against dB (default: no)",
        changes_results=False,
        type=number(float, -100, 100),
        nargs="+",
        metavar="DB",
    )
    eval_metric: str = flag(
        "acc1",
        "metric for checkpoint-best.pth and --patience; loss: plain cross entropy",
        choices=("acc1", "balanced_acc", "macro_f1", "loss"),
    )
    patience: int = scheduled(0, "stop after this many epochs without a better value; 0: never", type=count)
    ema_decay: float = flag(
        0.0,
        "decay of an average of the weights (EMA), which is then validated and saved as best; 0: off",
        type=number(float, 0, 1, open_high=True),
    )


@dataclass(frozen=True)
class NoProp:
    """NoProp-MAE"""

    patch_size: int | None = flag(
        None,
        "side of a patch in pixels (default: 2 for images below 16 pixels, 4 up to 64, else 16)",
        type=positive_int,
    )
    embed_dim: int = flag(192, "width of the encoder", type=positive_int)
    depth: int = flag(12, "blocks of the encoder", type=positive_int)
    num_heads: int = flag(3, "heads of the encoder", type=positive_int)
    decoder_embed_dim: int = flag(96, "width of each decoder", type=positive_int)
    decoder_depth: int = flag(4, "blocks of each decoder", type=positive_int)
    decoder_num_heads: int = flag(3, "heads of each decoder", type=positive_int)
    mlp_ratio: float = flag(
        4.0, "hidden width of a block's MLP, relative to the block's width", type=number(float, 0, 64, open_low=True)
    )
    T: int = flag(4, "number of noise levels, each with a decoder", type=positive_int)
    sigma_min: float = flag(0.002, "lowest noise level", type=sigma)
    sigma_max: float = flag(80.0, "highest noise level", type=sigma)
    rho: float = flag(7.0, "spacing of the levels (EDM, eq. 5)", type=number(float, 0.1, 1e3))
    sigma_data: float | None = flag(
        None,
        "standard deviation of the normalised data, or auto, which measures it (default: auto)",
        type=sigma_data,
        metavar="auto|FLOAT",
    )
    target: str = flag(
        "pixel", "what a decoder predicts: pixels, or norm_pixel: pixels normalised per patch", choices=TARGETS
    )
    propagate: str = flag(
        "latent",
        "latent: all losses train the encoder; none: the encoder learns from a head of its own",
        choices=PROPAGATE,
    )
    loss_weighting: str = flag("none", "edm: 1 / c_out^2, which weights the levels equally", choices=LOSS_WEIGHTINGS)
    use_checkpoint: bool = flag(
        False, "recompute activations in the backward pass: less memory, more time", changes_results=False
    )

    def __post_init__(self):
        if self.sigma_min >= self.sigma_max:
            raise UserError(f"--sigma_min {self.sigma_min}: should be below --sigma_max {self.sigma_max}")


@dataclass(frozen=True)
class Masking:
    """masking and pictures"""

    mask_ratio: float = flag(0.75, "share of patches that are masked", type=number(float, 0, 1, open_low=True))
    mask_ratio_max: float | None = flag(
        None,
        "draw each batch's ratio from [--mask_ratio, this]; 1 also trains generation (default: --mask_ratio)",
        type=number(float, 0, 1, open_low=True),
    )
    vis_freq: int = flag(50, "epochs between pictures of reconstructions; 0: none", changes_results=False, type=count)
    vis_type: str = flag("stochastic", "sampler for these pictures", changes_results=False, choices=SAMPLERS)

    def __post_init__(self):
        if self.mask_ratio_max is not None and self.mask_ratio_max < self.mask_ratio:
            raise UserError(
                f"--mask_ratio_max {self.mask_ratio_max}: should not be below --mask_ratio {self.mask_ratio}"
            )


@dataclass(frozen=True)
class Probe:
    """probe"""

    batch_size: int = flag(256, "images per process", type=positive_int)
    knn_k: int = flag(20, "number of neighbours", type=positive_int)
    knn_t: float = flag(0.07, "temperature of the neighbours' votes", type=number(float, 1e-4, 1e4))


@dataclass(frozen=True)
class Sampling:
    """samples"""

    checkpoint: str = flag("", "a checkpoint of main_pretrain_noprop.py", names=("checkpoint",))
    mode: list[str] = flag(
        ["reconstruct"],
        "what to draw and measure, one or more",
        nargs="+",
        choices=("reconstruct", "generate", "attention", "frechet"),
    )
    sampler: list[str] = flag(list(SAMPLERS), "how to denoise, one or more", nargs="+", choices=SAMPLERS)
    mask_ratio: float | None = flag(
        None, "share of patches that are masked (default: as in training)", type=number(float, 0, 1, open_low=True)
    )
    images: list[str] | None = flag(
        None,
        "image files, or folders of them, to reconstruct (default: the data set's held-out images)",
        nargs="+",
        metavar="PATH",
    )
    num: int = flag(8, "images in a picture", type=positive_int)
    num_samples: int = flag(1000, "held-out images to measure PSNR and Frechet distance on", type=positive_int)
    inception_weights: str | None = flag(
        None,
        "torch-fidelity's Inception file for the Frechet distance, or `download` (default: an earlier "
        "download, else the encoder's own features)",
        metavar="FILE|download",
    )
    batch_size: int = flag(100, "images per batch", type=positive_int)


@dataclass(frozen=True)
class Prediction:
    """prediction"""

    checkpoints: list[str] = flag(
        [],
        "the members: .pth files, run folders, or k-fold run folders, whose folds are one member",
        nargs="+",
        required=True,
        metavar="PATH",
    )
    weights: str = flag(
        "equal",
        "weights of the members: equal, val: by validation accuracy, or stacked: a logistic regression on "
        "their out-of-fold predictions",
        choices=("equal", "val", "stacked"),
    )
    views: list[int] = flag(
        list(range(12)),
        "1: centre crop; 12: all; or a list of numbers or names, such as 1,2,5 or centre,blur (default: 12)",
        type=view_list,
        metavar="1|12|LIST",
    )
    margin: int | None = flag(
        None,
        "the image is resized to cover input + margin, and the centre views cut these pixels off; 0: "
        "whole images (default: as each checkpoint was evaluated, its --crop_pct)",
        type=count,
    )
    batch_size: int = flag(64, "images times views per process", type=positive_int)
    labels: str | None = flag(
        None,
        "CSV file with labels of some or all images, columns ID (path or file name) and label "
        "(default: the folders' names)",
        metavar="CSV",
    )
    out_of_fold: bool = flag(
        False,
        "--data_path is the k-fold members' training set: predict each image with the networks that have not seen it",
    )
    spreadsheet_safe: bool = flag(
        False,
        "put an apostrophe before names in predictions.csv that a spreadsheet would run as formulas, "
        "because they begin with = + - or @; joining on the ID then misses these rows",
    )


@dataclass(frozen=True)
class Sweep:
    """sweep"""

    grid: list[list[str]] = flag(
        [],
        "axes: NAME=VALUES, all combinations; values a,b,c or 0..4 or lin(0,1,5) or log(1e-4,1e-2,5) or @file; `-` "
        "leaves the flag out, on and off set a switch, a+b gives two values; pretrain.NAME is for that stage alone. "
        "Given again: more arms",
        nargs="+",
        action="append",
        required=True,
        metavar="NAME=VALUES",
    )
    paired: str | None = flag(None, "the axis whose values make pairs, e.g. seed (default: none, runs are independent)")
    base: list[str] | None = flag(
        None, "the arm that the others are compared with (default: the first)", nargs="+", metavar="NAME=VALUE"
    )
    within: str | None = flag(None, "an axis: arms are compared within each of its values (default: all with one base)")
    metric: list[str] = flag(
        ["val_acc1"],
        "what arms are compared by, of log.txt or a prediction's results.json, one or more; STAGE.NAME for an earlier "
        "stage's",
        nargs="+",
        metavar="NAME",
    )
    pick: str = flag("best", "the epoch with the best first metric, or the last one", choices=("best", "last"))
    search: str | None = flag(
        None,
        "try combinations that Optuna chooses from lists and from ranges such as log(1e-4,1e-2) or 1..8, and stop poor "
        "ones early; by the first metric (default: all combinations)",
        choices=("optuna",),
    )
    trials: int = flag(30, "combinations to try with --search", type=positive_int)
    jobs: int = flag(1, "runs at a time; local ones share the cores", type=positive_int)
    launcher: str = flag("local", "where runs are processes of this machine, or SLURM jobs", choices=("local", "slurm"))
    slurm: list[tuple[str, object]] = flag(
        [],
        "of --launcher slurm, by submitit's names: partition=gpu gpus_per_node=4 timeout_min=240 ...; a task for each "
        "GPU (default: one task, 240 minutes)",
        type=keyword,
        nargs="+",
        metavar="NAME=VALUE",
    )
    retry: bool = flag(False, "run again what failed")
    output_dir: str = flag("./sweep", "where the runs and the report go")
    dry_run: bool = flag(False, "print the lines that would run, then stop")
