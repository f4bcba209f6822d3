"""--help and docs/flags.md: every flag with a text and one default that is right; MAE's flags first."""

import re

import pytest

from tests.util.cli.test_finetune import MAE_DEFAULTS
from util.cli.parser import Parser
from util.cli.reference import MAINS, PATH, reference

MAE = {*MAE_DEFAULTS, "model", "input_size", "data_path", "nb_classes", "log_dir", "device", "dist_eval", "mask_ratio"}
MAE |= {"pool"}  # main_linprobe.py's --global_pool
OF_MAE = ("main_pretrain_noprop.py", "main_finetune.py", "main_linprobe.py")


def table(main: str) -> dict[str, tuple[str, str]]:
    """name -> (default, text) of a main's flags in docs/flags.md."""
    section = PATH.read_text("utf-8").partition(f"\n## {main}\n")[2].partition("\n## ")[0].replace("\\|", "/")
    rows = [re.fullmatch(r"\| `([-\w]+)[^`]*` \| (.*) \| (.+) \|", line) for line in section.splitlines()]
    return {row.group(1): (row.group(2), row.group(3)) for row in rows if row}


@pytest.mark.parametrize("main", MAINS)
def test_every_flag_has_a_text_and_one_right_default(main):
    options, rows = MAINS[main], table(main)
    also = {name for flag in options.flags().values() for name in flag.also}
    assert set(rows) == {flag.name for flag in options.flags().values()} | also
    for name, (default, text) in rows.items():
        assert len(text) > 10 and "default" not in text and (default != "") == (name not in also), name
    for flag in options.flags().values():
        default, value = rows[flag.name][0], flag.default
        if flag.argparse.get("required") or not flag.name.startswith("-"):
            assert default == "required"
        elif isinstance(value, bool) and flag.dest != "global_pool":  # a checkpoint's pooling goes before
            assert default == ("on" if value else "off")
        elif value not in ("", [], None) and flag.dest not in ("global_pool", "views"):
            values = value if isinstance(value, list) else [value]
            assert [type(v)(word) for v, word in zip(values, default.split(), strict=True)] == values


@pytest.mark.parametrize("main", MAINS)
def test_help_says_what_the_table_says(main):
    shown = " ".join(Parser(MAINS[main]).format_help().split())
    for default, text in table(main).values():
        said = text.replace("&lt;", "<")
        assert (f"{said} (default: {default})" if default not in ("", "off", "required") else said) in shown
    assert shown.count("(default:") == sum(d not in ("", "off", "required") for d, _ in table(main).values())


def test_a_default_that_depends_is_that_of_the_main():
    rows = {main: table(main) for main in MAINS}
    assert rows["main_pretrain_noprop.py"]["--dataset"][0] == "cifar10"
    assert rows["main_finetune.py"]["--dataset"][0] == "folder; with --eval the checkpoint's"
    assert rows["main_pretrain_noprop.py"]["--input_size"][0] == "the data set's"
    assert "the checkpoint's" in rows["main_linprobe.py"]["--input_size"][0]
    assert rows["main_sample.py"]["--output_dir"][0] == "the folder `samples` beside the checkpoint"


@pytest.mark.parametrize("main", OF_MAE)
def test_maes_flags_and_groups_come_first(main):
    groups = [
        [action.dest in MAE for action in group._group_actions] for group in Parser(MAINS[main])._action_groups[2:]
    ]
    assert groups == [sorted(group, reverse=True) for group in groups]
    assert [any(group) for group in groups] == sorted((any(group) for group in groups), reverse=True)


def test_docs_flags_is_what_the_generator_prints():
    assert PATH.read_text("utf-8") == reference(), "run `make docs`"
