"""The choices of flags. Nothing here imports torch or timm, so a mistyped name is reported at once."""

import importlib.util
import re
from functools import cache
from pathlib import Path

# Noise of fine-tuning (augment/alpha_blend.py).
SCHEDULES = ("fixed", "uniform")
ANNEALS = ("none", "linear", "cosine")
TOKENS = ("all", "patches")
SPACES = ("embedding", "pixel")
UNITS = ("absolute", "relative")
COLOURS = ("red", "green", "blue")
# The kinds of noise and their classes in augment/noise.py.
NOISE_KINDS = {
    "alpha_blend": "AlphaBlended",
    "additive": "Additive",
    "multiplicative": "Multiplicative",
    "uniform": "Uniform",
    "neftune": "Neftune",
    "token_drop": "TokenDrop",
    "manifold_mixup": "ManifoldMixup",
    "colour": "Coloured",
}

# NoProp-MAE (models/noprop_mae.py).
TARGETS = ("pixel", "norm_pixel")
PROPAGATE = ("latent", "none")
LOSS_WEIGHTINGS = ("none", "edm")
SAMPLERS = ("stochastic", "heun", "euler")

# The 12 views of prediction (augment/views.py).
VIEW_NAMES = (
    "centre",
    "centre_mirror",
    "large",
    "large_mirror",
    "rotate_left",
    "rotate_right",
    "bright",
    "top_left",
    "top_right",
    "bottom_left",
    "bottom_right",
    "blur",
)

# Loggers and their classes in util/loggers.py.
LOGGERS = {"tensorboard": "TensorBoard", "wandb": "Wandb", "mlflow": "Mlflow", "trackio": "Trackio", "csv": "Csv"}

LEAST_CROP_PCT = 0.1  # an image is resized to cover (input size / crop_pct)

# Augmentation policies (augment/rand_augment.py).
_NUMBER = r"\d+(\.\d+)?"
_RAND = rf"-([mn]\d+|mmax\d+|inc[01]|p{_NUMBER}|mstd({_NUMBER}|inf))"
_POLICY = re.compile(
    rf"rand({_RAND}|-t(weights|3aw?))*|augmix(-([mwd]\d+|b[01]|(a|mstd){_NUMBER}))*"
    rf"|(original|v0)r?(-mstd{_NUMBER})*|3a(-mstd{_NUMBER})*"
)


def is_policy(text: str) -> bool:
    """Whether `text` is an augmentation policy (--aa) in timm's notation."""
    return _POLICY.fullmatch(text) is not None


def is_rand_augment(text: str) -> bool:
    """Whether `text` is RandAugment with the usual set of operations; `-t` names another set."""
    return re.fullmatch(rf"rand({_RAND})*", text) is not None


MAE_NAMES = tuple(f"vit_{size}_patch16" for size in ("tiny", "small", "base", "large")) + ("vit_huge_patch14",)
_MAE_NAME = re.compile(r"vit_(tiny|small|base|large|huge|custom)_patch(\d+)")


def parse_mae_name(name: str) -> tuple[str, int] | None:
    """(size, patch) of vit_{tiny,small,base,large,huge,custom}_patch{N}; None for any other name."""
    found = _MAE_NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def is_mae_name(name: str) -> bool:
    """vit_{tiny,small,base,large,huge}_patch{N}; vit_custom_patch{N} takes its sizes as keywords."""
    return parse_mae_name(name) is not None


@cache
def timm_names() -> frozenset[str]:
    """Names of timm's models and of models/families, without tags of weights, read from the source files.

    The same set as timm's registry, without importing timm, which takes seconds; empty if timm's source is not
    installed.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return frozenset()
    names = set()
    families = Path(__file__).parent.parent / "models" / "families"
    for path in [*(Path(spec.origin).parent / "models").glob("*.py"), *families.glob("*.py")]:
        source = path.read_text("utf-8")
        names.update(re.findall(r"^@register_model\n(?:@.*\n)*def (\w+)\(", source, re.MULTILINE))
        for renamed in re.findall(r"register_model_deprecations\(__name__, \{(.*?)\}\)", source, re.DOTALL):
            names.update(re.findall(r"['\"](\w+)['\"]\s*:", renamed))
    return frozenset(names)
