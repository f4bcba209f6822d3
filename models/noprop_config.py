"""NoPropMAE's choices, and what no network can be built of."""

from models.vit import check_patch
from util.choices import LOSS_WEIGHTINGS, PROPAGATE, TARGETS
from util.errors import UserError

SIZES = (
    "in_chans", "patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth",
    "decoder_num_heads", "T",
)  # fmt: skip


def check_config(config: dict) -> None:
    """UserError for what no network can be built of; the noise levels are checked by `karras_sigmas`."""
    for name in SIZES:
        if config[name] < 1:
            raise UserError(f"--{name} {config[name]}: should be 1 or more")
    check_patch(config["img_size"], config["patch_size"])
    for prefix in ("", "decoder_"):
        dim, heads = config[f"{prefix}embed_dim"], config[f"{prefix}num_heads"]
        if dim % heads:
            raise UserError(f"--{prefix}embed_dim {dim}: should be a multiple of --{prefix}num_heads {heads}")
        if dim % 4:
            raise UserError(f"--{prefix}embed_dim {dim}: should be a multiple of 4, for the position embeddings")
    if not 0.0 < config["sigma_data"] < float("inf"):
        raise UserError(f"--sigma_data {config['sigma_data']}: should be positive")
    for name, known in (("target", TARGETS), ("propagate", PROPAGATE), ("loss_weighting", LOSS_WEIGHTINGS)):
        if config[name] not in known:
            raise UserError(f"--{name} {config[name]}: should be one of {', '.join(known)}")
