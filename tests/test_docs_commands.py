"""Every command that the documents print, and that reports of runs print, runs as printed, on small data.

A command is taken as it stands; what it names is made small beforehand (STAND_INS), and what would take long is cut by
flags at its end (SMALL). One of a new kind, or a file that is not known here, fails the test: then it is added below.
"""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser as torchrun_parser

from models import create_model
from tests.harness import ROOT
from tests.harness.runs import finetune, pretrain
from util.checkpoint import peek
from util.data.datasets import READERS, ArrayDataset
from util.data_specs import DATASETS, IN_MEMORY

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ +)*(?:\S*/)?(?:python3?|pip|torchrun|make|git|cd) +[^ ]")
INSTALLS = re.compile(r"python3? -m venv|\S*pip install|git clone|cd ")  # not run: they change the machine

HERE = "--num_workers 0 --device cpu".split()
NET = "--model vit_custom_patch8 --model_kwargs embed_dim=12 depth=1 num_heads=2 --input_size 16".split()
TINY = "--epochs 1 --warmup_epochs 0 --lr 1e-3 --batch_size 8 --accum_iter 1 --amp off".split()
ENCODER = """
    --embed_dim 12 --depth 1 --num_heads 3 --decoder_embed_dim 12 --decoder_depth 1 --decoder_num_heads 3
""".split()
SMALL = {
    "main_pretrain_noprop": [*TINY, *ENCODER, *HERE],
    "main_finetune": HERE,
    "main_linprobe": HERE,
    "main_sample": ["--num", "2", "--num_samples", "4", *HERE],
    "main_predict": HERE,
}


def commands(text: str) -> list[str]:
    """The commands in a document's code blocks, and those in its sentences that are whole."""
    text = re.sub(r" *\\\n *", " ", text)  # lines that go on
    blocks = "".join(re.findall(r"(?ms)^```(?:bash|sh|console)?\n(.*?)^```$", text))
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    lines = [*blocks.splitlines(), *re.findall(r"(?m)^    (\S.*)$", text)]
    lines += [code for code in re.findall(r"`([^`\n]+)`", text) if "..." not in code]
    lines = [" ".join(line.split()) for line in lines]
    return list(dict.fromkeys(line for line in lines if PROGRAM.match(line)))


def made_photos(path: Path, photos: Path) -> None:
    path.symlink_to(photos)


def made_mae_file(path: Path, num_classes: int) -> None:
    net = create_model("vit_custom_patch8", num_classes=num_classes, img_size=16, embed_dim=12, depth=1, num_heads=2)
    torch.save({"model": {k: v for k, v in net.state_dict().items() if num_classes or "fc_norm" not in k}}, path)


def made_weights(path: Path) -> None:
    net = create_model("vit_custom_patch8", num_classes=2, img_size=16, embed_dim=12, depth=1, num_heads=2)
    save_file(net.state_dict(), path)


def made_run(path: Path, photos: Path, *flags) -> None:
    assert finetune("--data_path", photos, *TINY, *NET, *HERE, *flags, "--output_dir", path) == 0


def made_pretraining(path: Path) -> None:
    assert pretrain("--dataset", "cifar10", *TINY, *ENCODER, "--T", 2, *HERE, "--output_dir", path) == 0


STAND_INS = {
    "ImageNet": lambda path, photos: made_photos(path, photos),
    "food": lambda path, photos: made_photos(path, photos),
    "photos": lambda path, photos: made_photos(path, photos / "train"),
    "test": lambda path, photos: made_photos(path, photos / "val"),
    "data": lambda path, photos: path.mkdir(),
    "checkpoint-400.pth": lambda path, photos: made_mae_file(path, 0),
    "mae_finetuned_vit_base.pth": lambda path, photos: made_mae_file(path, 2),
    "tf_efficientnet_lite0.safetensors": lambda path, photos: made_weights(path),
    "vit_small_patch14_dinov2.safetensors": lambda path, photos: made_weights(path),
    "out": lambda path, photos: made_run(path, photos),
    "out_swin": lambda path, photos: made_run(path, photos, "--kfold", 2),
    "out_convnext": lambda path, photos: made_run(path, photos, "--kfold", 2, "--seed", 1),
    "output/mae_cifar10_noprop": lambda path, photos: made_pretraining(path),
}


def read_small(name: str, split: str) -> ArrayDataset:
    spec, n = DATASETS[name], 60 if split == "train" else 20
    images = torch.randint(0, 256, (n, spec.in_chans, spec.img_size, spec.img_size), dtype=torch.uint8)
    return ArrayDataset(images, torch.arange(n) % 10, [str(i) for i in range(10)])


@pytest.fixture(scope="module")
def made(tmp_path_factory, photo_folder):
    """made(name): the stand-in of that name, made once."""
    root = tmp_path_factory.mktemp("made")

    def make(name: str) -> Path:
        path = root / name
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            STAND_INS[name](path, photo_folder)
        return path

    return make


@pytest.fixture
def world(tmp_path, monkeypatch, made):
    """world(command line): its words, after what they name has been put into an empty folder, where it is run."""
    for name in set(IN_MEMORY) - {"digits"}:
        monkeypatch.setitem(READERS, name, lambda root, split, *_, name=name: read_small(name, split))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")

    def place(words: list[str]) -> None:
        written = words[words.index("--output_dir") + 1] if "--output_dir" in words else None
        for name in STAND_INS:
            named = any(word == name or word.startswith(f"{name}/") for word in words)
            if named and name != written and not Path(name).exists():
                path = made(name)
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                if path.is_symlink():
                    Path(name).symlink_to(path.resolve())
                else:
                    (shutil.copytree if path.is_dir() else shutil.copy)(path, name)

    return place


def reports() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path().rglob("report.md")}


def run_main(words: list[str], monkeypatch) -> list[Path]:
    """A main in this process, made small. Returns the reports that it wrote."""
    script, *words = words
    assert (ROOT / script).is_file()
    name = Path(script).stem
    main = importlib.import_module(name)
    main.get_options(words)  # as printed
    if name == "main_sweep":  # each line of it through its script's own parser
        assert main.main(["--dry_run", *words]) == 0
        return []
    small = [word for word in words if word != "--pretrained"] + SMALL[name]  # no download
    if name == "main_finetune":
        options = main.get_args_parser().options(words)
        small += [] if options.selection.eval else TINY
        small += [] if peek(options.weights) else NET
    monkeypatch.setattr(sys, "argv", [script, *small])
    before = reports()
    assert main.main(small) == 0
    return [path for path, written in reports().items() if before.get(path) != written]


def run_command(line: str, world, monkeypatch) -> list[Path]:
    """Returns the reports of a main that was run."""
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *words = words
    if program == "make":
        assert re.search(rf"(?m)^{words[0]}:", (ROOT / "Makefile").read_text()), line
    elif program.endswith("torchrun"):
        launched = torchrun_parser().parse_args(words)  # its own flags
        words = [launched.training_script, *launched.training_script_args]
        world(words)
        return run_main(words, monkeypatch)
    elif words[0] == "-m":
        spec = importlib.util.find_spec(words[1])
        source = Path(spec.origin).read_text("utf-8")
        assert all(word in source for word in words[2:] if word.startswith("--")), line
    elif "--help" in words:
        parser = importlib.import_module(Path(words[0]).stem).get_args_parser()
        assert parser.format_help()
    else:
        assert program.endswith("python") and words[0].startswith("main_"), f"{line}: of a kind that is not known here"
        world(words)
        return run_main(words, monkeypatch)
    return []


ALL = [(document, line) for document in DOCUMENTS for line in commands(document.read_text("utf-8"))]
RUN = [pytest.param(line, id=f"{path.name}: {line[:70]}") for path, line in ALL if not INSTALLS.match(line)]


def test_the_parser_of_documents_finds_commands():
    text = (
        "Run `make demo`, or\n\n    A=1 torchrun --nproc_per_node=2 \\\n        main_x.py --lr 1  # fast\n\n"
        "    args.json  log.txt\n    make quick      some tests\n\n```python\npython = 1\n```\n```bash\n"
        "python main_y.py\n```\n"
        "and `python main_x.py ... --resume auto`, `--lr`.\n"
    )
    assert commands(text) == [
        "python main_y.py",
        "A=1 torchrun --nproc_per_node=2 main_x.py --lr 1 # fast",
        "make quick some tests",
        "make demo",
    ]
    assert {Path(word).name for _, line in ALL for word in line.split() if word.startswith("main_")} == {
        path.name for path in ROOT.glob("main_*.py")
    }


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("main_*.py"), *ROOT.glob("recipes/*.args"), *ROOT.glob("results/**/*.md"), *ROOT.glob("bench/*.md")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_commands_elsewhere_have_flags_that_exist(path, monkeypatch):
    """In docstrings, in comments of recipes, beside results. What they name need not be there."""
    monkeypatch.chdir(ROOT)
    text = re.sub(r" *\\+\n *", " ", path.read_text("utf-8"))
    for script, words in re.findall(r"(?m)^[ #]*(?:\S*python|torchrun) .*?\b(main_\w+)\.py (.*)$", text):
        main, words = importlib.import_module(script), shlex.split(words, comments=True)
        main.get_options(words) if script == "main_sweep" else main.get_args_parser().options(words)


@pytest.mark.slow
@pytest.mark.parametrize("line", RUN)
def test_a_documents_command_runs_and_so_do_those_of_its_report(line, world, monkeypatch):
    reports, argv = run_command(line, world, monkeypatch), list(sys.argv)
    for report in reports:
        printed = commands(report.read_text("utf-8"))
        assert not printed or shlex.split(printed[0]) == ["python", *argv]  # what ran; of k folds in all, nothing
        for other in printed[1:]:
            run_command(other, world, monkeypatch)
