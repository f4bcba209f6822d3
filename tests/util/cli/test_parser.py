"""What all parsers do: recipes, names of flags, packages that are not installed."""

import importlib

import pytest

from main_finetune import get_args_parser
from util.errors import UserError


def parse(*argv):
    return get_args_parser().parse_args(argv)


def test_recipes_hold_flags_and_comments_and_later_flags_win(tmp_path):
    recipe = tmp_path / "x.args"
    recipe.write_text("# a comment\n--epochs 7 --lr 1e-3   # two on a line\n--model_kwargs depth=2 act_layer=relu\n")
    args = parse(f"@{recipe}", "--epochs", "9")
    assert (args.epochs, args.lr, args.model_kwargs) == (9, 1e-3, [("depth", 2), ("act_layer", "relu")])


@pytest.mark.parametrize(
    "text,value",
    [
        ("--output_dir runs/exp#7  # a comment", "runs/exp#7"),
        ("--output_dir #comment\n runs", "runs"),
        ("\ufeff--output_dir runs", "runs"),
        ("\ufeff# saved by an editor on Windows\r\n--output_dir runs\r\n", "runs"),
        (r"--output_dir C:\photos\new\run #1", r"C:\photos\new\run"),
        (r"--output_dir \\server\share\#1", r"\\server\share\#1"),
        (r'--output_dir "C:\my photos\" --epochs 3', "C:\\my photos\\"),
        (r"--output_dir my\ photos#1", "my photos#1"),
        (r"--output_dir \#1", "#1"),
        ("--output_dir 'a # b'\"c d\"", "a # bc d"),
        ("--epochs 3 \\\n    --output_dir runs", "runs"),
        ("--output_dir=", ""),
    ],
)
def test_a_recipes_words_are_what_they_look_like(tmp_path, text, value):
    """As in a shell, but for a backslash before a letter, which a path of Windows has."""
    (tmp_path / "x.args").write_bytes(text.encode())
    assert parse(f"@{tmp_path / 'x.args'}").output_dir == value


@pytest.mark.parametrize("data,word", [(b'--output_dir "a b', "quote"), ("--epochs 3".encode("utf-16"), "(?i)utf-8")])
def test_a_broken_recipe_is_one_line(tmp_path, data, word):
    (tmp_path / "x.args").write_bytes(data)
    with pytest.raises(UserError, match=word) as caught:
        parse(f"@{tmp_path / 'x.args'}")
    assert "@file" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["finetune", "pretrain", "linprobe"])
def test_img_size_is_another_name_of_input_size(module):
    parser = importlib.import_module(f"util.cli.{module}").get_args_parser()
    assert parser.parse_args(["--img_size", "48", "32"]).input_size == [48, 32]


@pytest.mark.parametrize("module,line", [("main_predict", ["--checkpoints", "x"]), ("main_sample", ["x"])])
def test_network_flags_are_refused_where_the_checkpoint_defines_the_network(module, line):
    for flag in ("--img_size", "--input_size", "--in_chans", "--model", "--cls_token"):
        with pytest.raises(UserError, match=f"^{flag}: no such flag; .*checkpoint.* in the file$"):
            importlib.import_module(module).get_args_parser().parse_args([*line, flag, "32"])


@pytest.mark.parametrize("module", ["finetune", "pretrain", "linprobe"])
@pytest.mark.parametrize(
    "flag,instead",
    [
        ("--world_size=8", "--nproc_per_node"),
        ("--local_rank=0", "torchrun"),
        ("--dist_on_itp", "torchrun"),
        ("--resplit", "alike"),
        ("--norm_pix_loss", "--target norm_pixel"),
    ],
)
def test_removed_flags_of_mae_name_their_replacement(module, flag, instead):
    with pytest.raises(UserError) as caught:
        importlib.import_module(f"util.cli.{module}").get_args_parser().parse_args([flag])
    assert instead in str(caught.value) and "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "given,flag",
    [
        ("num_classes=3", "--nb_classes"),
        ("img_size=32", "--input_size"),
        ("in_chans=4", "--in_chans"),
        ("drop_path=0.1", "--drop_path"),
        ("drop_path_rate=0.1", "--drop_path"),
        ("pretrained=True", "--pretrained"),
        ("alpha_blend=3", "--alpha_blend"),
        ("name=x", "--model"),
        ("global_pool=False", "--cls_token"),
        ("features_only=True", "left out"),
        ("checkpoint_path=x.pth", "left out"),
        ("pretrained_cfg={}", "left out"),
        ("embed_dim=70000", "65536"),
        ("drop_rate={1: 2}", "should be"),
    ],
)
@pytest.mark.parametrize("module", ["finetune", "linprobe"])
def test_model_kwargs_with_their_own_flag_or_unsaveable_are_one_line(module, given, flag):
    get_options = importlib.import_module(f"util.cli.{module}").get_options
    line = ["--model", "vit_tiny_patch16_224", "--pretrained", "--model_kwargs", "depth=2", given]
    with pytest.raises(UserError) as caught:
        get_options(line)
    assert given in str(caught.value) and flag in str(caught.value)


WITHOUT = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == absent else find(name, package)
absent, sys.argv = sys.argv[1], sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "package,line,named",
    [
        (
            "sklearn",
            "main_finetune.py --dataset digits --epochs 1 --model vit_tiny_patch4 --output_dir {out}",
            "scikit-learn",
        ),
        ("timm", "main_pretrain_noprop.py --dataset digits --output_dir {out}", "timm"),
        ("torchmetrics", "main_sample.py nowhere.pth --mode frechet --output_dir {out}", "torchmetrics"),
    ],
)
def test_a_package_that_is_not_installed_is_named_in_one_line(run, tmp_path, package, line, named):
    out = tmp_path / "out"
    result = run("-c", WITHOUT, package, *line.format(out=out).split(), check=2)
    assert f"the package {named}" in result.stderr and f"pip install {named}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
