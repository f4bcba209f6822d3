"""The settings of all mains, by group. Each field is a flag, declared here and nowhere else (see flags.py).

A flag keeps the name and default that it has in MAE's scripts. Where the default is None, the checkpoint or the data
set decides; what was decided is printed and stored in args.json.
"""

from dataclasses import dataclass
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
)
from util.cli.flags import by_main, flag
from util.cli.values import (
    count,
    device_name,
    fraction,
    keyword,
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
keeps_results = partial(flag, mains=TRAINING, changes_results=False)  # a run comes to the same numbers
scheduled = partial(flag, free_at_resume=True)


@dataclass(frozen=True)
class Run:
    """run: where it is saved, how it goes on"""

    output_dir: str = flag(
        by_main(finetune="./output_dir", pretrain="./output_dir", linprobe="", predict="./predictions", sample=None),
        "where to save; '' saves nothing (main_sample: the folder `samples` beside the checkpoint, if not given)",
        changes_results=False,
    )
    log_dir: str | None = keeps_results(
        None,
        "where to put TensorBoard's files, those of each fold in a folder of its own (default: --output_dir); on its x "
        "axis an epoch is 1000 steps, as in MAE",
    )
    resume: str = keeps_results(
        "", "checkpoint to go on from, or `auto`: the newest in --output_dir; with --eval the checkpoint to evaluate"
    )
    force_resume: bool = keeps_results(
        False, "go on although flags that change the results, or the images per step, are others than in the checkpoint"
    )
    start_epoch: int = of_training(
        0, "first epoch, for weights without a position of their own", free_at_resume=True, type=count
    )
    save_freq: int = keeps_results(20, "epochs between kept checkpoint-{epoch}.pth (0: none)", type=count)
    keep: int = keeps_results(0, "kept checkpoint-{epoch}.pth files; older ones go (0: all)", type=count)
    save_every_minutes: float = keeps_results(0.0, "also save in mid-epoch (0: never)", type=non_negative)
    print_freq: int = keeps_results(20, "steps between lines of progress", type=positive_int)
    max_bad_steps: int = keeps_results(
        10,
        "non-finite steps in a row (each is skipped) that end the run; fp16's first search for a loss scale that fits "
        "does not count",
        type=positive_int,
    )
    profile: int = keeps_results(
        0,
        "time N micro-steps, then trace N: trace.json, profile.txt and the rates in --output_dir (0: no)",
        type=count,
        metavar="N",
    )
    overwrite: bool = keeps_results(False, "start anew in an --output_dir that holds a run, whose files go")
    dry_run: bool = keeps_results(False, "print what would run, and its memory, then stop")


@dataclass(frozen=True)
class Machine:
    """machine: device, precision, processes"""

    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps", changes_results=False, type=device_name)
    amp: str | None = scheduled(
        None,
        "mixed, or the flag alone: bf16, on GPUs without it fp16 (default: the faster one for this device and kind of "
        "network)",
        mains="finetune pretrain linprobe predict",
        names=("--amp", "--use_amp"),
        nargs="?",
        choices=("off", "mixed", "bf16", "fp16"),
        const="mixed",
    )
    seed: int = flag(
        0, "of weights, order and augmentation", mains="finetune pretrain linprobe sample", type=number(int, 0, 2**62)
    )
    deterministic: bool = flag(
        False,
        "on CUDA the same bits each time, more slowly; on CPU they are so anyway",
        mains="finetune pretrain linprobe",
        changes_results=False,
    )
    compile: bool = keeps_results(False, "torch.compile the net: needs a C++ compiler, and minutes to start")
    dist_url: str = flag(
        "env://", "where torchrun's processes meet", mains="finetune pretrain linprobe predict", changes_results=False
    )
    timeout_minutes: float = keeps_results(
        10.0,
        "end the job when a process has waited that long for another one",
        type=number(float, 0, 1e6, open_low=True),
    )


@dataclass(frozen=True)
class Optimizer:
    """optimizer (AdamW, warm-up, half a cosine)"""

    batch_size: int = scheduled(by_main(finetune=64, pretrain=128), "per process and micro-step", type=positive_int)
    epochs: int = scheduled(by_main(finetune=50, pretrain=1600), "passes over the training set", type=count)
    accum_iter: int = flag(1, "micro-steps per optimizer step, at most an epoch's", type=positive_int)
    lr: float | None = scheduled(None, "absolute learning rate; overrides --blr", type=rate)
    blr: float = scheduled(
        by_main(finetune=1e-3, pretrain=3e-4),  # 3e-4 is the method's lr of 1.5e-4 at batch 128
        "lr = blr * batch_size * accum_iter * processes / 256",
        type=rate,
    )
    min_lr: float = scheduled(1e-6, "where the cosine ends", type=rate)
    warmup_epochs: float = scheduled(
        by_main(finetune=5, pretrain=10), "epochs in which the rate rises from 0", type=non_negative
    )
    weight_decay: float = scheduled(0.05, "AdamW's, of matrices and convolutions", type=rate)
    layer_decay: float = of_finetune(
        0.75,
        "factor on the learning rate from each layer to the one below it",
        free_at_resume=True,
        type=number(float, 0, 1, open_low=True),
    )
    clip_grad: float | None = scheduled(None, "largest gradient norm", type=positive)

    def lr_for(self, global_batch: int) -> float:
        """The absolute learning rate for `global_batch` images per update over all processes."""
        return self.blr * global_batch / 256 if self.lr is None else self.lr


@dataclass(frozen=True)
class Data:
    """data"""

    dataset: str = flag(
        by_main(finetune=None, pretrain="cifar10", linprobe=None, predict=None, sample=None),
        "see README, section Data (main_linprobe, main_sample: the checkpoint's, if not given)",
        choices=sorted(DATASETS),
    )
    data_path: str | None = flag(
        None, "the data set's folder; to predict, one of images (default: the checkpoint's, or data, or ./ for digits)"
    )
    val_split: float = flag(
        0.0,
        "hold out this share of train/ (stratified) where there is no val/",
        mains="finetune linprobe",
        type=number(float, 0, 1, open_high=True),
    )
    train_subset: int | None = flag(
        None, "train on so many of the images, each class by its share", mains="finetune linprobe", type=positive_int
    )
    kfold: int = of_finetune(0, "stratified folds of train/ (0: none)", type=number(int, 0, 1000))
    fold: str = of_finetune("all", "0 .. kfold - 1, or `all`", changes_results=False)
    split_seed: int = flag(
        0, "of --val_split, --kfold and --train_subset", mains="finetune linprobe", type=number(int, 0, 2**32 - 1)
    )


@dataclass(frozen=True)
class Input:
    """input of the network"""

    input_size: list[int] | None = flag(
        None,
        "image size in pixels, N or H W (default: the checkpoint's, or the data set's own, or 224)",
        names=("--input_size", "--img_size"),
        type=number(int, 1, 16384),
        nargs="+",
        metavar="N",
    )
    in_chans: int | None = flag(
        None, "channels: 1 grey, 3 colour (default: the checkpoint's or the data set's)", type=int, choices=(1, 3)
    )
    mean: list[float] | None = flag(
        None,
        "of the pixels in [0, 1], a value per channel (default: the checkpoint's or the data set's)",
        type=pixel_mean,
        nargs="+",
    )
    std: list[float] | None = flag(
        None,
        "their standard deviation, a value per channel (default: the checkpoint's or the data set's)",
        type=pixel_std,
        nargs="+",
    )
    crop_pct: float | None = of_finetune(
        None,
        "share of the resized image that evaluation and view 1 of main_predict see (default: the checkpoint's, or "
        "0.875 up to 224 pixels, else 1)",
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
        """(mean, std), a value per channel: --mean and --std over the default's."""
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
        "pin the loader's memory for faster copies to the GPU (the default)",
        mains="finetune pretrain linprobe",
        changes_results=False,
        also={"--no_pin_mem": dict(action="store_false", help="do not pin it")},
    )
    loader: str | None = of_training(
        None,
        "training's JPEG files: `fast` decodes and resizes them with OpenCV at the scale their crop needs (the same "
        "crops, pixels within a few levels); evaluation is always `pil` (default: fast where OpenCV can be imported, "
        "else pil)",
        choices=("pil", "fast"),
    )
    on_bad_image: str = scheduled(
        "error",
        "an unreadable image ends the run, or is skipped: replaced (training) or left out; predictions.csv has an "
        "empty row for it",
        choices=("error", "skip"),
    )
    max_pixels: int = scheduled(
        178956970,
        "image files of more pixels are refused before they are decoded: 3 bytes each, and they may be bombs",
        type=positive_int,
        metavar="N",
    )


@dataclass(frozen=True)
class Model:
    """model"""

    model: str | None = flag(
        None,
        "MAE's name or any timm model (default: the checkpoint's; to fine-tune without one, vit_large_patch16)",
        type=model_name,
        metavar="NAME",
    )
    model_kwargs: list[tuple[str, object]] = flag(
        [],
        "passed to the model, e.g. embed_dim=96 depth=6 num_heads=3, drop_rate=0.2",
        type=keyword,
        nargs="*",
        metavar="NAME=VALUE",
    )
    finetune: str = flag(
        "",
        "start from the weights in this file (.pth or .safetensors): a checkpoint of this project, or weights of "
        "another origin with their --model",
        names=by_main(linprobe=("--checkpoint", "--finetune")),
        metavar="FILE",
    )
    pretrained: bool = flag(False, "start from timm's own weights (a download)")
    random_init: bool = flag(False, "the same architecture untrained, to compare with", mains="linprobe")
    partial_load: bool = of_finetune(False, "take what fits of --finetune's file, and start the rest of the trunk anew")
    pos_grid: list[int] | None = flag(
        None,
        "patches that --finetune's file was trained on, where it does not tell (not this project's, no square)",
        type=number(int, 1, 65536),
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
    )
    # True where neither flag is given: then a checkpoint's own pooling goes before it.
    global_pool: bool | str = of_finetune(
        True,
        "average pooling, of MAE's names (default: the checkpoint's, or this)",
        action="store_const",
        const="avg",
        also={"--cls_token": dict(action="store_false", help="class token instead")},
    )
    pool: str | None = flag(
        None,
        "features are the mean of the patch tokens (default for encoders without a classifier)",
        mains="linprobe",
        names=("--global_pool",),
        action="store_const",
        const="mean",
        also={"--cls_token": dict(action="store_const", const="cls", help="the class token instead")},
    )
    nb_classes: int | None = of_finetune(
        None,
        "classes of the head (default: the checkpoint's for the same classes, or from the data)",
        type=positive_int,
    )
    drop_path: float = of_finetune(0.1, "stochastic depth rate", type=number(float, 0, 1, open_high=True))
    grad_checkpointing: bool = of_finetune(False, "recompute activations: less memory, slower", changes_results=False)


@dataclass(frozen=True)
class Noise:
    """DiffNoise: noise in training, alpha-blended or of another kind"""

    alpha_blend: int | None = flag(
        None,
        "timestep t of abar: the ratio of signal to noise is abar / (1 - abar); 0 switches the noise off (default: 15, "
        "without --noise_snr and --noise_strength)",
        type=number(int, 0, 999),
    )
    noise_kind: str = flag("alpha_blend", "what noise; see README, section Noise", choices=tuple(NOISE_KINDS))
    noise_units: str | None = flag(
        None,
        "absolute: as the released code, another ratio for every network; relative: the noise is scaled by the root "
        "mean square of what it is added to, and t is the same ratio everywhere (default: absolute for MAE's ViTs, "
        "else relative)",
        choices=UNITS,
    )
    noise_snr: float | None = flag(
        None,
        "the ratio of signal to noise itself, in place of --alpha_blend (15 is 31.1 dB)",
        type=number(float, -100, 100),
        metavar="DB",
    )
    noise_strength: float | None = flag(
        None,
        "neftune and manifold_mixup: alpha; token_drop: the share of patches left out",
        type=number(float, 0, 1e6, open_low=True),
    )
    noise_colour: str = flag("red", "of --noise_kind colour: low, middle or high frequencies", choices=COLOURS)
    noise_timestep: str = flag("fixed", "t for all, or t ~ U{1..t} per sample", choices=SCHEDULES)
    noise_prob: float = flag(1.0, "fraction of samples that get noise", type=fraction)
    noise_anneal: str = flag("none", "scale t towards 0 over the epochs", choices=ANNEALS)
    noise_tokens: str = flag("all", "with or without class and register tokens", choices=TOKENS)
    noise_space: str = flag("embedding", "noise the embedding, or the normalised pixels", choices=SPACES)
    noise_layer: list[int] = flag([0], "noise the input of this block, or of several", nargs="+", type=count)
    noise_beta_power: float = flag(1.2, "exponent on DDPM's linear betas", type=number(float, 0, 100, open_low=True))
    noise_eval: bool = flag(False, "keep the noise in evaluation (the released code did)")

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
            raise UserError(f"--noise_kind {self.noise_kind}: give its --noise_strength; it has no ratio in dB")
        if self.noise_strength is not None and not (own or self.noise_kind == "neftune"):
            raise UserError(
                f"--noise_strength {self.noise_strength:g}: --noise_kind {self.noise_kind} takes --noise_snr or "
                "--alpha_blend"
            )
        if self.noise_kind == "token_drop" and self.noise_strength is not None and self.noise_strength >= 1:
            raise UserError(f"--noise_strength {self.noise_strength:g}: of token_drop, should be below 1")

    @property
    def words(self) -> str:
        """Kind and strength, for a run's first line and its report."""
        if self.alpha_blend == 0:
            return "no noise"
        how = f"t = {self.alpha_blend} in {self.noise_units} units"
        if self.noise_snr is not None:
            how = f"{self.noise_snr:g} dB"
        elif self.noise_strength is not None:
            how = f"strength {self.noise_strength:g}"
        return f"noise {self.noise_kind} {how}"


@dataclass(frozen=True)
class Augmentation:
    """augmentation of an image"""

    aug: str = of_finetune(
        "mae",
        "mae: crop, flip, RandAugment; photo: for a folder of photos; light: crop and flip; none",
        choices=("mae", "photo", "light", "none"),
    )
    aa: str | None = of_finetune(
        "rand-m9-mstd0.5-inc1",
        "timm's policy for --aug mae: rand, original, originalr, v0, v0r, 3a or augmix with its numbers; `none`",
        type=policy_or_none,
    )
    color_jitter: float | None = of_finetune(
        None, "strength (default: photo: 0.3; mae: none, and used without --aa only)", type=number(float, 0, 10)
    )
    hflip: float | None = flag(None, "mirror probability (default: 0.5; digits: 0)", type=fraction)
    vflip: float = of_finetune(0.0, "upside-down probability: for views from above", type=fraction)
    scale: list[float] | None = of_finetune(
        None,
        "area share of the random crop (default: 0.08 1; photo: 0.7 1)",
        type=fraction,
        nargs=2,
        metavar=("MIN", "MAX"),
    )
    reprob: float | None = of_finetune(
        None, "random erasing (default: 0.25; photo: 0.2; light, none: 0)", type=fraction
    )
    remode: str = of_finetune("pixel", "what fills an erased box", choices=("const", "rand", "pixel"))
    recount: int = of_finetune(1, "most boxes erased in an image", type=positive_int)

    def __post_init__(self):
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"--scale {self.scale[0]} {self.scale[1]}: should be MIN MAX above 0")
        if self.aug == "none" and (self.scale or self.vflip):
            raise UserError("--aug none: neither crops nor flips; leave --scale and --vflip away")
        if self.color_jitter is not None and self.aug in ("light", "none"):
            raise UserError(
                f"--color_jitter {self.color_jitter}: --aug {self.aug} leaves colours alone; use --aug photo, or mae "
                "with --aa none"
            )


@dataclass(frozen=True)
class Loss:
    """loss: mixup, cutmix, smoothing, class weights"""

    mixup: float = flag(0.0, "mixup's alpha: lambda ~ Beta(alpha, alpha) (0: off)", type=number(float, 0, 1e6))
    cutmix: float = flag(0.0, "cutmix's alpha (0: off)", type=number(float, 0, 1e6))
    cutmix_minmax: list[float] | None = flag(
        None, "box size range; overrides --cutmix's", type=fraction, nargs=2, metavar=("MIN", "MAX")
    )
    mixup_prob: float = flag(1.0, "probability of mixing a batch", type=fraction)
    mixup_switch_prob: float = flag(0.5, "probability of cutmix where both are on", type=fraction)
    mixup_mode: str = flag("batch", "one lambda for a batch, a pair or an image", choices=("batch", "pair", "elem"))
    smoothing: float = flag(
        0.1,
        "label smoothing, in training: the validation loss is plain cross entropy",
        type=number(float, 0, 1, open_high=True),
    )
    class_weights: str = flag(
        "none", "balanced: a sample weighs images / (classes x images of its class)", choices=("none", "balanced")
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
    """phases: the head first, layers that stay as they are"""

    head_epochs: int = flag(0, "first train the head alone, on a frozen backbone", type=count)
    head_lr: float = scheduled(1e-3, "constant learning rate of the head's own epochs", type=rate)
    freeze_layers: int = flag(
        0, "keep the first N layers as they are (1: the embedding): cheaper, for small data", type=count
    )
    freeze_bn: bool = flag(False, "keep the pretrained BatchNorm statistics: for small data")


@dataclass(frozen=True)
class Selection:
    """evaluation and selection"""

    eval: bool = flag(False, "evaluate the weights of --resume or --finetune, and stop", changes_results=False)
    dist_eval: bool = flag(
        True,
        "share the evaluation among the ranks, each image once: the accuracy is the same number (the default)",
        changes_results=False,
        also={"--no_dist_eval": dict(action="store_false", help="every rank evaluates all of it")},
    )
    eval_metric: str = flag(
        "acc1",
        "what checkpoint-best.pth and --patience go by; loss: plain cross entropy",
        choices=("acc1", "balanced_acc", "macro_f1", "loss"),
    )
    patience: int = scheduled(0, "stop after this many epochs without gain (0: never)", type=count)
    ema_decay: float = flag(
        0.0,
        "average the weights; the average is validated, selected and used",
        type=number(float, 0, 1, open_high=True),
    )


@dataclass(frozen=True)
class NoProp:
    """NoProp-MAE"""

    patch_size: int | None = flag(None, "pixels (default: 2 below 16 px, 4 up to 64, else 16)", type=positive_int)
    embed_dim: int = flag(192, "encoder width", type=positive_int)
    depth: int = flag(12, "encoder blocks", type=positive_int)
    num_heads: int = flag(3, "encoder heads", type=positive_int)
    decoder_embed_dim: int = flag(96, "decoder width", type=positive_int)
    decoder_depth: int = flag(4, "blocks of each decoder", type=positive_int)
    decoder_num_heads: int = flag(3, "heads of each decoder", type=positive_int)
    mlp_ratio: float = flag(4.0, "hidden width of a block's MLP over its own", type=number(float, 0, 64, open_low=True))
    T: int = flag(4, "noise levels, a decoder each", type=positive_int)
    sigma_min: float = flag(0.002, "lowest noise level", type=sigma)
    sigma_max: float = flag(80.0, "highest noise level", type=sigma)
    rho: float = flag(7.0, "spacing of the levels (EDM, eq. 5)", type=number(float, 0.1, 1e3))
    sigma_data: float | None = flag(
        None,
        "standard deviation of the normalised data; auto (the default) measures it",
        type=sigma_data,
        metavar="auto|FLOAT",
    )
    target: str = flag("pixel", "norm_pixel: patches normalised one by one", choices=TARGETS)
    propagate: str = flag(
        "latent", "latent: all losses reach the encoder; none: it learns from a head of its own", choices=PROPAGATE
    )
    loss_weighting: str = flag("none", "edm: every level counts alike", choices=LOSS_WEIGHTINGS)
    use_checkpoint: bool = flag(False, "gradient checkpointing: less memory, slower", changes_results=False)

    def __post_init__(self):
        if self.sigma_min >= self.sigma_max:
            raise UserError(f"--sigma_min {self.sigma_min}: should be below --sigma_max {self.sigma_max}")


@dataclass(frozen=True)
class Masking:
    """masking and pictures"""

    mask_ratio: float = flag(0.75, "share of hidden patches", type=number(float, 0, 1, open_low=True))
    mask_ratio_max: float | None = flag(
        None,
        "draw the ratio per batch from [mask_ratio, this]; 1 trains generation from nothing",
        type=number(float, 0, 1, open_low=True),
    )
    vis_freq: int = flag(50, "epochs between pictures (0: never)", changes_results=False, type=count)
    vis_type: str = flag("stochastic", "sampler of the pictures", changes_results=False, choices=SAMPLERS)

    def __post_init__(self):
        if self.mask_ratio_max is not None and self.mask_ratio_max < self.mask_ratio:
            raise UserError(
                f"--mask_ratio_max {self.mask_ratio_max}: should not be below --mask_ratio {self.mask_ratio}"
            )


@dataclass(frozen=True)
class Probe:
    """probe"""

    batch_size: int = flag(256, "images per process", type=positive_int)
    knn_k: int = flag(20, "neighbours", type=positive_int)
    knn_t: float = flag(0.07, "temperature of their votes", type=number(float, 1e-4, 1e4))


@dataclass(frozen=True)
class Sampling:
    """samples"""

    checkpoint: str = flag("", "of main_pretrain_noprop.py", names=("checkpoint",))
    mode: list[str] = flag(
        ["reconstruct"], "one or several", nargs="+", choices=("reconstruct", "generate", "attention", "frechet")
    )
    sampler: list[str] = flag(list(SAMPLERS), "one or several", nargs="+", choices=SAMPLERS)
    mask_ratio: float | None = flag(
        None, "share of hidden patches (default: the one of training)", type=number(float, 0, 1, open_low=True)
    )
    images: list[str] | None = flag(None, "image files and folders of them", nargs="+", metavar="PATH")
    num: int = flag(8, "rows of a picture", type=positive_int)
    num_samples: int = flag(1000, "held-out images that are measured: PSNR, Frechet distance", type=positive_int)
    inception_weights: str | None = flag(
        None,
        "torch-fidelity's file for the Frechet distance (default: its earlier download, else the encoder's own "
        "features serve)",
        metavar="FILE|download",
    )
    batch_size: int = flag(100, "images per batch", type=positive_int)


@dataclass(frozen=True)
class Prediction:
    """prediction"""

    checkpoints: list[str] = flag(
        [],
        "the members: .pth files, folders of runs, folders of k-fold runs (their folds are one member)",
        nargs="+",
        required=True,
        metavar="PATH",
    )
    weights: str = flag(
        "equal",
        "of the members: equal, by their validation accuracy, or a logistic regression on their out-of-fold "
        "predictions",
        choices=("equal", "val", "stacked"),
    )
    views: list[int] = flag(
        list(range(12)),
        "1: centre crop; 12: all; or a list of numbers 1 to 12 or names: 1,2,5 or centre,blur (default: 12)",
        type=view_list,
        metavar="1|12|LIST",
    )
    margin: int | None = flag(
        None,
        "pixels that the centre views cut off in all, of the image resized to cover input + margin; 0: whole images "
        "(default: what each checkpoint's evaluation saw, its --crop_pct)",
        type=count,
    )
    batch_size: int = flag(64, "images x views per process", type=positive_int)
    labels: str | None = flag(None, "labels of some or all images: ID (path or file name),label", metavar="CSV")
    out_of_fold: bool = flag(
        False, "--data_path is what k-fold members were trained on: each image by the networks that had not seen it"
    )
    spreadsheet_safe: bool = flag(
        False,
        "an apostrophe in predictions.csv before names that begin with = + - @, which a spreadsheet would run as "
        "formulas; a join on the ID then misses these rows",
    )
