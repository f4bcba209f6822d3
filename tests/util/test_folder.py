"""Whose an output folder is: every script claims it through one door, and none writes over what another left."""

import json
from contextlib import suppress

import pytest

import main_linprobe
from bench.chaos import tensorboard_scalars
from tests.harness.checks import one_line
from tests.harness.runs import NET, finetune
from util.checkpoint import BEST, LAST, find_resume, read_checkpoint
from util.dist import World
from util.errors import UserError
from util.folder import KINDS, OUTPUT_MARK, clear_run, make_folder, remove_empty_folders
from util.log import RunLog, claim, read_log

MEASURE = ("linprobe", "sample", "predict")


def fill(folder, held: str) -> None:
    """A folder as the kind of run leaves it; `old` ones are without the kind in args.json."""
    folder.mkdir()
    kind, _, old = held.partition(" ")
    if kind in ("finetune", "pretrain", "bare"):
        (folder / LAST).write_bytes(b"")
    if old:
        headings = {"finetune": "# Fine-tuning: x", "linprobe": "# Frozen features of x", "kfold": "# 5-fold run"}
        (folder / "report.md").write_text(f"{headings.get(kind, '# My notes')}\n")
        (folder / "args.json").write_text("{}")
    elif kind == "folds":
        (folder / "fold-1").mkdir()
    elif kind not in ("bare", "empty", "stopped"):
        (folder / "args.json").write_text(json.dumps({"kind": kind}))
    if kind == "stopped":  # before its first checkpoint, and before args.json named the kind
        (folder / "log.txt").write_text('{"epoch": 0}\n')
        (folder / "args.json").write_text("{}")
    (folder / ".lock").write_text("")


@pytest.mark.parametrize(
    "held,may",
    [
        ("empty", {"finetune", "pretrain", "kfold", *MEASURE}),
        ("stopped", {"finetune", "pretrain"}),
        ("bare", {"finetune --resume", "pretrain --resume"}),  # the kind is looked at when the checkpoint is read
        ("finetune", {"finetune --resume"}),
        ("finetune old", {"finetune --resume"}),
        ("pretrain", {"pretrain --resume"}),
        ("kfold", {"kfold"}),
        ("kfold old", {"kfold"}),
        ("folds", {"kfold"}),
        ("linprobe", {"linprobe"}),
        ("linprobe old", {"linprobe"}),
        ("sample", {"sample"}),
        ("predict", {"predict"}),
        ("notes old", set()),
    ],
)
def test_a_folder_is_claimed_by_its_own_kind_of_run_only(tmp_path, held, may):
    out = tmp_path / "out"
    fill(out, held)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    for kind in ("finetune", "pretrain", "kfold", *MEASURE):
        for resume in ("", "auto", str(out / LAST), str(tmp_path / "other" / LAST)):
            inside = resume in ("auto", str(out / LAST))
            if kind in may or (inside and f"{kind} --resume" in may):
                assert claim(str(out), kind, World(), resume=resume).kind == kind
            else:
                with pytest.raises(UserError, match="--output_dir") as caught:
                    claim(str(out), kind, World(), resume=resume)
                assert ("--overwrite" in one_line(caught)) == (kind not in MEASURE)
        if kind not in MEASURE:
            claim(str(out), kind, World(), overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != OUTPUT_MARK} == before


def test_only_a_writable_output_folder_is_marked(tmp_path):
    for held, marked in (("notes old", False), ("linprobe", True)):
        fill(tmp_path / held, held)
        with suppress(UserError):
            claim(str(tmp_path / held), "linprobe", World())
        assert (tmp_path / held / OUTPUT_MARK).exists() == marked


def test_other_scripts_leave_a_training_run_as_it_is(whole_run):
    files = [p for p in whole_run.iterdir() if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    line = [
        "--checkpoint",
        str(whole_run / BEST),
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--output_dir",
        str(whole_run),
    ]
    with pytest.raises(UserError, match=r"holds a training run of main_finetune\.py"):
        main_linprobe.main(line)
    assert {p: p.read_bytes() for p in files} == before


def test_checkpoint_of_elsewhere_does_not_start_over_another_run(whole_run, tmp_path):
    """Neither does --overwrite leave anything of it that --resume auto would go on with."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("checkpoint-9.pth", "checkpoint-previous.pth", LAST):
        (out / name).write_bytes((whole_run / LAST).read_bytes())
    (out / "reconstruction_epoch_9.png").write_bytes(b"")
    line = [*NET, "--output_dir", out]
    with pytest.raises(UserError, match="holds checkpoints of a run"):
        finetune(*line, "--resume", whole_run / LAST)
    assert read_checkpoint(str(out / LAST))["epoch"] == 3
    assert finetune(*line, "--overwrite", "--epochs", 1, "--seed", 3) == 0
    assert find_resume(str(out)) == str(out / LAST) and read_checkpoint(str(out / LAST))["epoch"] == 1
    assert sorted(p.name for p in out.glob("*.pth")) == [BEST, LAST] and not list(out.glob("reconstruction*"))


@pytest.mark.slow
def test_folds_are_finished_by_results_overwritten_on_demand_and_apart_in_tensorboard(tmp_path, capsys):
    line = [*NET, "--epochs", 1, "--kfold", 3, "--output_dir", tmp_path / "out", "--log_dir", tmp_path / "tb"]
    assert finetune(*line) == 0
    for fold in range(3):
        scores = tensorboard_scalars(tmp_path / "tb" / f"fold-{fold}")
        assert [step for step, _ in scores["val/acc1"]] == [1000]
    assert not list((tmp_path / "tb").glob("events*"))
    capsys.readouterr()
    assert (
        finetune(*line, "--timeout_minutes", 3, "--save_freq", 5, "--max_bad_steps", 3, "--log_dir", tmp_path / "x")
        == 0
    )
    assert capsys.readouterr().out.count("finished before") == 3 and not (tmp_path / "x").exists()
    with pytest.raises(UserError, match=r"--smoothing 0\.2: .*fold-0 was finished with 0\.1; .*--overwrite"):
        finetune(*line, "--smoothing", 0.2)
    with pytest.raises(UserError, match=r"--kfold 2: .*fold-2"):
        finetune(*line, "--kfold", 2)
    again = [*line, "--kfold", 2, "--smoothing", 0.2]
    assert finetune(*again, "--overwrite") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("fold-*")) == ["fold-0", "fold-1"]
    for fold in range(2):
        options = json.loads((tmp_path / "out" / f"fold-{fold}" / "result.json").read_text())["options"]
        assert (options["smoothing"], options["kfold"]) == (0.2, 2)
    with pytest.raises(UserError, match=r"--epochs 2: .*fold-0 was finished with 1; --resume auto continues"):
        finetune(*again, "--epochs", 2)
    with pytest.raises(UserError, match=r"--seed 9: .*fold-0 was finished with 0"):
        finetune(*again, "--epochs", 2, "--seed", 9, "--resume", "auto")
    assert finetune(*again, "--epochs", 2, "--resume", "auto") == 0
    for fold in range(2):
        assert [x["epoch"] for x in read_log(str(tmp_path / "out" / f"fold-{fold}" / "log.txt"))] == [0, 1]
    single = [*NET, "--epochs", 1, "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match=r"holds a k-fold run of main_finetune\.py"):
        finetune(*single)
    assert finetune(*single, "--overwrite") == 0
    assert not list((tmp_path / "out").glob("fold-*")) and not (tmp_path / "out" / "oof.csv").exists()


@pytest.mark.parametrize("held", [*KINDS, "folds"])
def test_tensorboards_files_do_not_go_among_those_of_another_run(tmp_path, held):
    fill(tmp_path / "other", held)
    for out in (str(tmp_path / "out"), None):
        with pytest.raises(UserError, match=r"--log_dir .*other: holds .*choose another folder"):
            claim(out, "pretrain", World(), log_dir=str(tmp_path / "other"), overwrite=True)
    assert not (tmp_path / "out").exists()
    claim(str(tmp_path / "other"), "pretrain", World(), log_dir=f"{tmp_path}/x/../other/", overwrite=True)


def test_folders_of_a_start_that_fails_are_removed_whatever_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr("util.folder._made", [])  # what other tests made stays
    (tmp_path / "kept").mkdir()
    make_folder(str(tmp_path / "kept" / "a" / "b"), "--output_dir")
    with pytest.raises(UserError, match="--output_dir"):
        make_folder(str(tmp_path / "c" / "zero\0byte"), "--output_dir")
    remove_empty_folders()
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_another_command_lines_report_does_not_stay(tmp_path):
    ways = (lambda: clear_run(str(tmp_path)), lambda: RunLog(str(tmp_path), kind="finetune").write_args({}))
    for way in ways:
        for name in ("report.md", "report.html", "result.json", "mine.html"):
            (tmp_path / name).touch()
        way()
        assert {path.name for path in tmp_path.iterdir()} - {"args.json", OUTPUT_MARK} == {"mine.html"}
