"""What flags declare of themselves, and what a command line that differs from a saved run's is told."""

import pytest

from util.cli.finetune import FinetuneOptions
from util.cli.flags import differences, refusal
from util.cli.parser import Parser
from util.cli.pretrain import PretrainOptions

OPTIONS = {"finetune": FinetuneOptions, "pretrain": PretrainOptions}
# Where files go, how fast, how often something is told: with any of these a run comes to the same numbers.
HARMLESS = {
    "num_workers",
    "pin_mem",
    "output_dir",
    "log_dir",
    "logger",
    "device",
    "resume",
    "force_resume",
    "save_freq",
    "keep",
    "print_freq",
    "max_bad_steps",
    "compile",
    "profile",
    "save_every_minutes",
    "overwrite",
    "dry_run",
    "dist_url",
    "deterministic",
    "timeout_minutes",
}
# What a stopped run may be told anew: its schedule, and what --max_bad_steps advises to change.
SCHEDULE = {
    "epochs",
    "batch_size",
    "lr",
    "blr",
    "min_lr",
    "warmup_epochs",
    "weight_decay",
    "clip_grad",
    "amp",
    "on_bad_image",
    "max_pixels",
    "start_epoch",
}
OWN = {
    "finetune": (
        {"grad_checkpointing", "dist_eval", "eval", "fold", "noise_curve"},
        {"layer_decay", "head_lr", "patience"},
    ),
    "pretrain": ({"use_checkpoint", "vis_freq", "vis_type"}, set()),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_flag_of_training_declares_what_it_changes(kind):
    flags = OPTIONS[kind].flags()
    assert set(vars(Parser(OPTIONS[kind]).parse_args([]))) == set(flags)
    harmless, schedule = OWN[kind]
    assert {k for k, f in flags.items() if not f.changes_results} == HARMLESS | harmless
    assert {k for k, f in flags.items() if f.free_at_resume} == SCHEDULE | schedule


def changed(before: list[str], now: list[str], **edits) -> dict[str, tuple[str, str]]:
    """Both lines through argparse; the first as a checkpoint would give it back."""
    parser = Parser(FinetuneOptions)
    saved = {**parser.options(before).flat(), **edits}
    found = differences(FinetuneOptions.flags(), saved, parser.options(now).flat())
    return {d.flag.name: (d.before, d.now) for d in found}


def test_only_flags_that_change_results_differ_and_both_values_are_shown(tmp_path):
    assert changed(["--print_freq", "3"], ["--num_workers", "0", "--device", "cpu", "--timeout_minutes", "1"]) == {}
    assert changed(["--aa", "none"], []) == {"--aa": ("(not given)", "rand-m9-mstd0.5-inc1")}
    assert changed(["--freeze_bn"], ["--scale", "0.5", "1"]) == {
        "--freeze_bn": ("on", "off"),
        "--scale": ("(not given)", "0.5 1.0"),
    }
    wide = ["--model_kwargs", "embed_dim=24", "depth=2"]
    assert (
        changed(wide, ["--model_kwargs", "depth=2", "embed_dim=24"], model_kwargs=[["embed_dim", 24], ["depth", 2]])
        == {}
    )
    assert changed(wide, []) == {"--model_kwargs": ("embed_dim=24 depth=2", "(nothing)")}
    assert changed(["--data_path", str(tmp_path)], ["--data_path", f"{tmp_path}/x/.."]) == {}
    assert changed(["--data_path", str(tmp_path)], ["--data_path", "/"]) == {"--data_path": (str(tmp_path), "/")}


def test_what_an_earlier_version_did_not_save_is_not_compared():
    now = PretrainOptions.of(sigma_max=40.0).flat()
    before = {k: v for k, v in PretrainOptions.of().flat().items() if k != "sigma_max"}
    flags = PretrainOptions.flags()
    assert differences(flags, {**before, "gone": 1}, now) == []
    [only] = differences(flags, {**before, "sigma_max": 80.0, "lr": None}, now)
    assert (
        refusal([only], "x.pth was written with", "or else") == "--sigma_max 40.0: x.pth was written with 80.0; or else"
    )
