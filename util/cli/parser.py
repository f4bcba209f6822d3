"""Command-line options: the parser, checked value types, and the groups of flags that the mains share.

A flag keeps the name and default it has in MAE's scripts. Flags whose default is None take it from the checkpoint or
the data set; what was decided is printed and stored in args.json.
"""

import argparse
import difflib
import importlib.util
import math
import os
import re
import signal
import sys
from functools import partial

from util.choices import MAE_NAMES, is_mae_name, timm_names
from util.data.image_files import refuse_output_among_images
from util.data_specs import DATASETS, IN_MEMORY
from util.errors import UserError
from util.files import printable
from util.flags import Flag

# What the other mains' flags say of a network and its input.
OF_THE_NETWORK = (
    "--input_size",
    "--img_size",
    "--in_chans",
    "--mean",
    "--std",
    "--model",
    "--model_kwargs",
    "--nb_classes",
    "--cls_token",
    "--global_pool",
    "--crop_pct",
)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and recipes: @file holds flags, several a line, and comments.

    add_argument takes two words more (see util/flags.py): changes_results=False for a flag with which a run comes to the
    same numbers whatever its value, free_at_resume=True for one that a resume may set anew. `flags` has them by dest.

    network_from: the argument whose file says what its network is, for a main without flags of its own for that.
    """

    def __init__(self, *, network_from: str = "", **kwargs):
        self.flags: dict[str, Flag] = {}
        self.network_from = network_from
        super().__init__(
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **kwargs,
        )

    def add_argument(self, *names, **keywords):
        return self._declare(super().add_argument, *names, **keywords)

    def add_argument_group(self, *args, **keywords):
        group = super().add_argument_group(*args, **keywords)
        group.add_argument = partial(self._declare, group.add_argument)
        return group

    def _declare(self, add, *names, changes_results: bool = True, free_at_resume: bool = False, **keywords):
        action = add(*names, **keywords)
        self.flags.setdefault(
            action.dest, Flag((action.option_strings or [action.dest])[0], changes_results, free_at_resume)
        )
        return action

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return words_of(line)

    def error(self, message: str):
        raise UserError(re.sub(r"(\S{200})\S+", r"\1...", message))  # a value of 5000 digits is no line to read

    def parse_args(self, args=None, namespace=None):
        try:
            options, unknown = self.parse_known_args(args, namespace)
        except UserError:
            raise
        except RecursionError:
            raise UserError("@file: a recipe names itself") from None
        except (ValueError, OSError) as error:  # a quote without its end, bytes that are no text, a loop of files
            raise UserError(f"@file: cannot be read ({error})") from None
        if unknown:
            known = [o for action in self._actions for o in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]}?" if close else f"; {self.prog} --help lists the flags"
            if self.network_from and unknown[0].split("=")[0] in OF_THE_NETWORK:
                hint = f"; it is what {self.network_from} was trained with, and is in the file"
            raise UserError(f"{unknown[0]}: no such flag{hint}")
        return options


_WORD = re.compile(r"""(?:^\\#|\\[\s"']|"[^"]*"|'[^']*'|[^\s"'])+""")
_QUOTED = re.compile(r"""^\\(#)|\\([\s"'])|"([^"]*)"|'([^']*)'""")


def words_of(line: str) -> list[str]:
    """The words of a recipe's line. A `#` at a word's start begins a comment; in quotes everything is literal.

    A backslash takes the meaning of the space or quote after it, or of a word's first `#`; before anything else, as in a
    path of Windows, it is itself. ValueError for a quote without its end.
    """
    if "\0" in line:
        raise ValueError("not UTF-8 text; save it as UTF-8")
    words, rest = [], line.removeprefix("\ufeff").strip()  # editors on Windows begin a file with a byte-order mark
    while rest and not rest.startswith("#"):
        word = _WORD.match(rest)
        rest = rest[word.end() :] if word else rest
        if rest and not rest[0].isspace():
            raise ValueError(f"a quote without its end: {rest[:40]}")
        words.append(_QUOTED.sub(lambda m: "".join(g or "" for g in m.groups()), word[0]))
        rest = rest.lstrip()
    return words[:-1] if words[-1:] == ["\\"] else words  # the end of a shell's line that goes on


def check_command_line(get_args_parser, check=lambda args: None) -> None:
    """Answer --help and whatever the command line alone shows to be wrong. The mains call it before they import torch.

    main() parses again: between the two, nothing is kept. Until run_main begins, a package that is not installed and an
    interrupt end the script in one line as well.
    """
    try:
        args = get_args_parser().parse_args()
        check(args)
        if args.dataset == "folder" and args.data_path and not os.path.isdir(args.data_path):
            raise UserError(f"--data_path {args.data_path}: no such folder")
    except UserError as error:
        print_error(error)
        sys.exit(2)
    sys.excepthook = _failed_import


def _failed_import(kind, error, trace) -> None:
    if isinstance(error, KeyboardInterrupt):
        print_error(KeyboardInterrupt("interrupted while starting"))
        os._exit(130)
    if isinstance(error, ModuleNotFoundError) and (missing := missing_package(error)):
        print_error(missing)
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


# What `import` calls a package of requirements.txt where pip calls it otherwise.
PIP_NAMES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
}


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """One line that names the package of requirements.txt that is not installed; None for a module of our own."""
    name = (error.name or "").partition(".")[0]
    if name and importlib.util.find_spec(name) is not None:
        return None  # part of an installed package
    if not name:
        return UserError(str(error))  # torchmetrics tells in its own words what it lacks
    name = PIP_NAMES.get(name, name)
    return UserError(f"the package {name} is not installed; `pip install {name}`, or all of requirements.txt")


def require_package(name: str, flag: str) -> None:
    """UserError unless the package that one mode needs is there: before any work is done."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{flag}: needs the package {name}; `pip install {name}`, or all of requirements.txt")


def print_error(error: Exception) -> None:
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def run_main(main) -> None:
    """Call a script's main(); the user's mistakes end in one line and exit code 2, an interrupt in 130."""
    from util.dist import shutdown
    from util.files import Sturdy

    for stream in (sys.stdout, sys.stderr):  # a name that the terminal has no letters for must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Sturdy(sys.stdout), Sturdy(sys.stderr)
    sys.excepthook = sys.__excepthook__
    try:
        code = main()
    except (UserError, RuntimeError, ModuleNotFoundError) as error:
        mended = error if isinstance(error, UserError) else known_failure(error)
        if mended is None:
            raise
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again while all is torn down
        print_error(mended)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if code == 2 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(2)  # other ranks may wait in a collective that this one left: no orderly goodbye
    shutdown()
    sys.exit(code)


def known_failure(error: RuntimeError | ModuleNotFoundError) -> UserError | None:
    """What the user can do about a failure that torch reports where it happens to notice it; None for any other."""
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    from util.data.loader import file_of_process
    from util.dist import lost_rank

    if lost := lost_rank(error):
        return lost
    text = " ".join(str(error).split())
    if "does not have a deterministic implementation" in text:
        return UserError(f"--deterministic: {text[:120]}; leave the flag out, or use another device")
    if (
        "DataLoader worker (pid" in text
    ):  # one that died; what one raised is told as "Caught ... in DataLoader worker process"
        pid = re.search(r"DataLoader worker \(pid\D*(\d+)", text)
        path = file_of_process(int(pid.group(1))) if pid else None
        at = f" at {printable(path)}" if path else ""
        return UserError(
            f"--num_workers: a loader process died{at} ({text[:160]}); was it killed for want of memory? Run the line again "
            "(training goes on from its last checkpoint by --resume auto), with fewer --num_workers if it happens again"
        )
    return None


MAX_COUNT = 2**31 - 1  # of whole numbers without a bound of their own: beyond, arithmetic with floats overflows


def number(kind=float, low=-math.inf, high=math.inf, *, open_low=False, open_high=False):
    """A checked int or float: finite, within [low, high] (ends excluded where open)."""
    word = "whole number" if kind is int else "number"
    left, right = "(" if open_low else "[", ")" if open_high else "]"
    unbounded = high in (math.inf, MAX_COUNT)
    if low == 0 and unbounded:
        wanted = f"a {word} {'above 0' if open_low else 'of 0 or more'}"
    elif unbounded:
        wanted = f"a {word} of {low} or more" if low > -math.inf else f"a {word}"
    else:
        wanted = f"a {word} in {left}{low}, {high}{right}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if (
            value != value
            or abs(value) == math.inf
            or value < low
            or value > high
            or (open_low and value == low)
            or (open_high and value == high)
        ):
            most = f", at most {high}" if unbounded and value > high and value != math.inf else ""
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise argparse.ArgumentTypeError(f"{shown!r} should be {wanted}{most}")
        return value

    return parse


positive_int = number(int, 1, MAX_COUNT)
count = number(int, 0, MAX_COUNT)


def device_name(text: str) -> str:
    """--device, as far as it can be judged without torch."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use auto, cpu, cuda, cuda:N or mps")
    return text


fraction = number(float, 0.0, 1.0)
non_negative = number(float, 0.0)
positive = number(float, 0.0, open_low=True)
# Bounds beyond which float32 only overflows, far from any value of use.
rate = number(float, 0.0, 1e3)
pixel_mean, pixel_std = number(float, -1e6, 1e6), number(float, 1e-6, 1e6)


def keyword(text: str) -> tuple[str, object]:
    """NAME=VALUE for --model_kwargs; numbers, True/False/None and tuples are read as such."""
    import ast

    name, sep, value = text.partition("=")
    if not sep or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} should be NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return name, value


def model_name(text: str) -> str:
    """--model: one of MAE's names, or of timm's, with or without the tag of its weights."""
    known = timm_names()
    if is_mae_name(text) or text.partition(".")[0] in known or not known:
        return text
    near = difflib.get_close_matches(text.partition(".")[0], [*MAE_NAMES, *sorted(known)], n=3, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not one of MAE's names or timm's{hint}")


_NUMBER = r"\d+(\.\d+)?"
_POLICY = re.compile(
    rf"rand(-([mn]\d+|mmax\d+|inc[01]|p{_NUMBER}|mstd({_NUMBER}|inf)|t(weights|3aw?)))*"
    rf"|augmix(-([mwd]\d+|b[01]|(a|mstd){_NUMBER}))*|(original|v0)r?(-mstd{_NUMBER})*|3a(-mstd{_NUMBER})*"
)


def policy_or_none(text: str) -> str | None:
    """--aa: an augmentation policy as timm writes it, or `none` (None)."""
    if text.lower() in ("", "none", "off"):
        return None
    if _POLICY.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} should be none or timm's rand-m9-mstd0.5-inc1, original, originalr, v0, v0r, 3a, augmix-m3-w3"
        )
    return text


def add_data_options(parser: Parser, *, dataset: str) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default=dataset, choices=sorted(DATASETS), help="see README, section Data")
    group.add_argument("--data_path", default=None, help="the data set's folder (default: data, or ./ for digits)")
    group.add_argument(
        "--input_size",
        "--img_size",
        type=number(int, 1, 16384),
        nargs="+",
        default=None,
        metavar="N",
        help="image size in pixels, N or H W (default: the checkpoint's, or the data set's own, or 224)",
    )
    group.add_argument(
        "--in_chans",
        type=int,
        choices=(1, 3),
        default=None,
        help="channels: 1 grey, 3 colour (default: the checkpoint's or the data set's)",
    )
    group.add_argument("--mean", type=pixel_mean, nargs="+", default=None, help="normalisation, per channel")
    group.add_argument("--std", type=pixel_std, nargs="+", default=None, help="normalisation, per channel")
    group.add_argument(
        "--num_workers", changes_results=False, type=count, default=10, help="loader processes, at most one per core"
    )
    group.add_argument(
        "--pin_mem",
        changes_results=False,
        action="store_true",
        default=True,
        help="pin loader memory for faster copies to the GPU",
    )
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem")
    group.add_argument(
        "--on_bad_image",
        free_at_resume=True,
        choices=("error", "skip"),
        default="error",
        help="an unreadable image ends the run, or is reported and replaced (training) or left out",
    )
    add_max_pixels_option(group)


def add_max_pixels_option(group) -> None:
    group.add_argument(
        "--max_pixels",
        free_at_resume=True,
        type=positive_int,
        default=178956970,
        metavar="N",
        help="image files of more pixels are refused before they are decoded: 3 bytes each, and they may be bombs",
    )


def add_pos_grid_option(group) -> None:
    group.add_argument(
        "--pos_grid",
        type=number(int, 1, 65536),
        nargs=2,
        default=None,
        metavar=("ROWS", "COLUMNS"),
        help="patches that --finetune's file was trained on, where it does not tell (not this project's, no square)",
    )


def add_run_options(
    parser: Parser, *, batch_size: int, epochs: int, default_output: str | None = "./output_dir"
) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", free_at_resume=True, type=positive_int, default=batch_size, help="per process and micro-step"
    )
    group.add_argument("--epochs", free_at_resume=True, type=count, default=epochs)
    group.add_argument(
        "--accum_iter", type=positive_int, default=1, help="micro-steps per optimizer step, at most an epoch's"
    )
    group.add_argument(
        "--output_dir", changes_results=False, default=default_output, help="where to save; '' saves nothing"
    )
    group.add_argument(
        "--log_dir",
        changes_results=False,
        default=None,
        help="where to put TensorBoard's files, of each fold in a folder of its own (default: --output_dir)",
    )
    group.add_argument(
        "--device", changes_results=False, type=device_name, default="auto", help="auto, cpu, cuda, cuda:N or mps"
    )
    group.add_argument(
        "--amp",
        "--use_amp",
        free_at_resume=True,
        nargs="?",
        choices=("off", "mixed", "bf16", "fp16"),
        const="mixed",
        default=None,
        help="mixed, or the flag alone: bf16, on GPUs without it fp16 (default: the faster one for this device and kind of network)",
    )
    group.add_argument("--seed", type=number(int, 0, 2**62), default=0)
    group.add_argument(
        "--resume",
        changes_results=False,
        default="",
        help="checkpoint to go on from, or `auto`: the newest in --output_dir",
    )
    group.add_argument(
        "--force_resume",
        changes_results=False,
        action="store_true",
        help="go on although flags that change the results, or the images per step, are others than in the checkpoint",
    )
    group.add_argument(
        "--start_epoch",
        free_at_resume=True,
        type=count,
        default=0,
        help="first epoch, for weights without a position of their own",
    )
    group.add_argument(
        "--save_freq",
        changes_results=False,
        type=count,
        default=20,
        help="epochs between kept checkpoint-{epoch}.pth (0: none)",
    )
    group.add_argument(
        "--keep",
        changes_results=False,
        type=count,
        default=0,
        help="kept checkpoint-{epoch}.pth files; older ones go (0: all)",
    )
    group.add_argument(
        "--loader",
        choices=("pil", "fast"),
        default=None,
        help="training's JPEG files: `fast` decodes and resizes them with OpenCV at the scale their crop needs "
        "(the same crops, pixels within a few levels); evaluation is always `pil` (default: fast where OpenCV "
        "can be imported, else pil)",
    )
    group.add_argument(
        "--print_freq", changes_results=False, type=positive_int, default=20, help="steps between lines of progress"
    )
    group.add_argument(
        "--max_bad_steps",
        changes_results=False,
        type=positive_int,
        default=10,
        help="non-finite steps in a row (each is skipped) that end the run; fp16's first search for a loss "
        "scale that fits does not count",
    )
    group.add_argument(
        "--compile",
        changes_results=False,
        action="store_true",
        help="torch.compile the net: needs a C++ compiler, and minutes to start",
    )
    group.add_argument(
        "--profile",
        changes_results=False,
        type=count,
        default=0,
        metavar="N",
        help="time N micro-steps, then trace N: trace.json, profile.txt and the rates in --output_dir (0: no)",
    )
    group.add_argument(
        "--save_every_minutes",
        changes_results=False,
        type=non_negative,
        default=0.0,
        help="also save in mid-epoch (0: never)",
    )
    group.add_argument(
        "--overwrite",
        changes_results=False,
        action="store_true",
        help="start anew in an --output_dir that holds a run, whose files go",
    )
    group.add_argument(
        "--dry_run", changes_results=False, action="store_true", help="print what would run, and its memory, then stop"
    )
    group.add_argument("--dist_url", changes_results=False, default="env://", help="where torchrun's processes meet")
    add_deterministic_option(group)
    group.add_argument(
        "--timeout_minutes",
        changes_results=False,
        type=number(float, 0, 1e6, open_low=True),
        default=10.0,
        help="end the job when a process has waited that long for another one",
    )


def add_deterministic_option(group) -> None:
    group.add_argument(
        "--deterministic",
        changes_results=False,
        action="store_true",
        help="on CUDA the same bits each time, more slowly; on CPU they are so anyway",
    )


def add_optimizer_options(
    parser: Parser, *, blr: float, min_lr: float, warmup_epochs: int, weight_decay: float
) -> None:
    group = parser.add_argument_group("optimizer (AdamW, warm-up, half a cosine)")
    group.add_argument(
        "--lr", free_at_resume=True, type=rate, default=None, help="absolute learning rate; overrides --blr"
    )
    group.add_argument(
        "--blr",
        free_at_resume=True,
        type=rate,
        default=blr,
        help="lr = blr * batch_size * accum_iter * processes / 256",
    )
    group.add_argument("--min_lr", free_at_resume=True, type=rate, default=min_lr)
    group.add_argument("--warmup_epochs", free_at_resume=True, type=non_negative, default=warmup_epochs)
    group.add_argument("--weight_decay", free_at_resume=True, type=rate, default=weight_decay)
    group.add_argument("--clip_grad", free_at_resume=True, type=positive, default=None, help="largest gradient norm")


def image_size(values: list[int] | None) -> tuple[int, int] | None:
    """--input_size as (H, W)."""
    if values is None:
        return None
    if len(values) > 2:
        raise UserError(f"--input_size {' '.join(map(str, values))}: give N or H W")
    return (values[0], values[-1])


def parse_and_check_paths(args) -> None:
    """The checks that need no data: paths a flag names must be there."""
    if args.data_path is None:
        args.data_path = "." if args.dataset == "digits" else "data"
    image_size(args.input_size)
    if args.resume and args.resume != "auto" and not os.path.isfile(args.resume):
        raise UserError(f"--resume {args.resume}: no such file; give a checkpoint or `auto`")
    if args.profile and not args.output_dir:
        raise UserError(f"--profile {args.profile}: needs an --output_dir for trace.json and profile.txt")
    if args.output_dir == "" and args.resume == "auto":
        raise UserError("--resume auto: needs an --output_dir to look in")
    if args.dataset not in IN_MEMORY:
        refuse_output_among_images("--output_dir", args.output_dir, args.data_path)
        refuse_output_among_images("--log_dir", args.log_dir, args.data_path)


def choose_normalisation(args, in_chans: int, default: tuple) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """--mean and --std over the default, a value per channel."""
    result = []
    for flag, own, values in (("--mean", args.mean, default[0]), ("--std", args.std, default[1])):
        values = tuple(own) if own is not None else tuple(values)
        if len(values) == 1:
            values = values * in_chans
        if len(values) != in_chans:
            if own is None and in_chans == 1:
                values = (sum(values) / len(values),)
            else:
                raise UserError(f"{flag} {' '.join(map(str, values))}: give 1 or {in_chans} values")
        result.append(values)
    return result[0], result[1]
