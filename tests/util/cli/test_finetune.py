"""main_finetune.py's flags: MAE's and their defaults, and what is wrong with a value."""

from types import SimpleNamespace

import pytest

from util.cli.finetune import get_options
from util.errors import UserError


def parse(*argv):
    return SimpleNamespace(**get_options(list(argv)).flat())


# MAE's main_finetune.py as published, without flags that do nothing here: dist_on_itp, local_rank, world_size, resplit.
MAE_DEFAULTS = dict(
    batch_size=64,
    epochs=50,
    accum_iter=1,
    drop_path=0.1,
    clip_grad=None,
    weight_decay=0.05,
    lr=None,
    blr=1e-3,
    layer_decay=0.75,
    min_lr=1e-6,
    warmup_epochs=5,
    color_jitter=None,
    aa="rand-m9-mstd0.5-inc1",
    smoothing=0.1,
    reprob=0.25,
    remode="pixel",
    recount=1,
    mixup=0.0,
    cutmix=0.0,
    cutmix_minmax=None,
    mixup_prob=1.0,
    mixup_switch_prob=0.5,
    mixup_mode="batch",
    finetune="",
    global_pool=True,
    output_dir="./output_dir",
    seed=0,
    resume="",
    start_epoch=0,
    eval=False,
    num_workers=10,
    pin_mem=True,
    dist_url="env://",
)


def test_flags_of_mae_keep_their_defaults():
    args = vars(parse("--dataset", "digits"))
    assert {k: args[k] for k in MAE_DEFAULTS} == MAE_DEFAULTS


def test_the_contract_lines_parse():
    parse(
        *"""
            --model vit_large_patch16 --batch_size 128 --data_path ImageNet --output_dir out --accum_iter 2
            --epochs 50 --blr 1e-3 --layer_decay 0.75 --drop_path 0.2 --reprob 0.25 --mixup 0.8 --cutmix 1.0
            --alpha_blend 15 --dist_eval
        """.split()
    )
    assert parse("--cls_token", "--no_pin_mem").global_pool is False


@pytest.mark.parametrize(
    "argv,words",
    [
        ("--batchsize 4", ["--batchsize", "--batch_size"]),
        ("--batch_size 0", ["--batch_size", "'0'", "1 or more"]),
        ("--batch_size nan", ["--batch_size", "'nan'"]),
        ("--lr -1", ["--lr", "'-1'"]),
        ("--lr inf", ["--lr", "'inf'"]),
        ("--alpha_blend 1000", ["--alpha_blend", "'1000'", "[0, 999]"]),
        ("--noise_prob 1.5", ["--noise_prob", "[0.0, 1.0]"]),
        ("--mixup_mode x", ["--mixup_mode", "'x'", "batch"]),
        ("--resume nowhere.pth", ["--resume nowhere.pth", "no such file"]),
        ("--finetune nowhere.pth", ["--finetune nowhere.pth", "no such file"]),
        ("--kfold 5 --fold 5", ["--fold 5", "0 to 4"]),
        ("--kfold 5 --val_split 0.2", ["--val_split"]),
        ("--eval", ["--eval", "--resume"]),
        ("--cutmix_minmax 0.8 0.2", ["--cutmix_minmax", "MIN MAX"]),
        ("--model_kwargs depth", ["--model_kwargs", "NAME=VALUE"]),
        ("@nowhere.args", ["nowhere.args"]),
    ],
)
def test_wrong_values_name_flag_value_and_what_would_be_right(argv, words):
    with pytest.raises(UserError) as caught:
        parse(*argv.split())
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
