"""main_sweep.py: what runs, in which order, what is left, and the report; with a script that takes a moment."""

import csv
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from tests.harness.runs import NET
from tests.harness.sweeps import SCRIPT, interrupt_when, sweep
from util.cli.sweep import SweepOptions
from util.errors import UserError
from util.sweep import jobs

SECTIONS = ("Cost", "Settings that differ", "Versions of the runs")


def test_arms_are_compared_by_seed_and_the_report_says_how(scripts, capsys):
    out = scripts / "out"
    assert sweep(out, "lr=1e-3,2e-3,4e-3", "seed=0..2", paired="seed", jobs=3) == 0
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["arm"] for row in rows] == ["lr=1e-3", "lr=2e-3", "lr=4e-3"]
    assert [row["mean"] for row in rows] == ["54.00", "55.00", "57.00"]
    assert [row["difference"] for row in rows] == ["base", "1.00", "3.00"]
    assert rows[1]["its 95 % interval"] == "1.00 to 1.00" and rows[1]["p (sign)"] == "0.2500"
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "bootstrap" in page and "Holm" in page and page.count("main_finetune.py") >= 9
    assert not re.search(r'(src|href)="http', page), "nothing is fetched"
    assert "Every run finished." in (out / "report.md").read_text()
    capsys.readouterr()
    assert sweep(out, "lr=1e-3,2e-3,4e-3", "seed=0..2", paired="seed", jobs=3) == 0
    assert "9 runs, 0 to do" in capsys.readouterr().out
    assert sweep(out, "lr=1e-3,2e-3,4e-3,8e-3", "seed=0..2", paired="seed", base="lr=2e-3", pick="last") == 0
    assert "12 runs, 3 to do" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert rows[0]["arm"] == "lr=2e-3" and [row["difference"] for row in rows[1:]] == ["-1.00", "2.00", "6.00"]


def test_two_axes_have_a_map_and_less_is_better_for_a_loss(scripts):
    assert sweep(scripts / "out", "lr=1e-3,2e-3", "drop_path=0,0.1", metric="val_loss") == 0
    assert (scripts / "out" / "report.html").read_text().count("<svg") == 3
    rows = list(csv.DictReader((scripts / "out" / "table.csv").open()))
    assert len(rows) == 4 and rows[0]["mean"] == "0.9990"


def test_metrics_are_read_at_the_epoch_of_the_first_and_corrected_together(scripts):
    """val_acc1 is best in the last epoch, 2; val_gap = 9 - epoch is read there, and by itself at 0."""
    script = scripts / "scripts" / "main_finetune.py"
    script.write_text(SCRIPT.replace('"val_loss"', '"val_gap": 9.0 - epoch + seed % 2 * lr, "val_loss"'))
    grid = ("lr=1e-3,2e-3,4e-3", "seed=0..3")
    for name, metrics, gap in (("a", "val_acc1 val_gap", "7.00"), ("b", "val_gap val_acc1", "9.00")):
        assert sweep(scripts / name, *grid, "--metric", *metrics.split(), paired="seed", jobs=2) == 0
        rows = list(csv.DictReader((scripts / name / "table.csv").open()))
        assert [row["metric"] for row in rows] == [m for m in metrics.split() for _ in range(3)]
        assert next(row["mean"] for row in rows if row["metric"] == "val_gap") == gap
        # val_acc1's differences are equal for all seeds, so its t-test has no p; the two p of val_gap count
        p = [row["p"] and float(row["p"]) for row in rows if row["metric"] == "val_gap"][1:]
        assert [row["p (Holm)"] for row in rows if row["metric"] == "val_gap"][1:] == [f"{2 * x:.4f}" for x in p]
        page = (scripts / name / "report.html").read_text()
        assert page.count("<table") == 2 + 1 and page.count("<svg") == 4 and "4 comparisons" in page


def test_the_report_has_what_each_arm_cost_and_what_its_runs_recorded(scripts):
    script = SCRIPT.replace('"val_loss"', '"images_per_second": 100 + 50 * seed, "val_loss"')
    script += """
options = {"lr": lr, "seed": seed, "epochs": 3, "drop_path": [0.5, None][lr > 1.5e-3], "output_dir": out}
args = {"options": options, "versions": {"torch": "9.9"}, "git": ["abc", "def"][seed]}
json.dump(args, open(f"{out}/args.json", "w"))
"""
    (scripts / "scripts" / "main_finetune.py").write_text(script)
    assert sweep(scripts / "out", "lr=1e-3,2e-3", "seed=0..1") == 0
    text = (scripts / "out" / "report.md").read_text()
    cost, settings, versions = (text.split(f"## {name}\n\n")[1].split("\n\n")[0] for name in SECTIONS)
    assert re.sub(r"\d+ \| \d+ \| 125", "S | S | 125", cost).splitlines() == [
        "| arm | runs | seconds | seconds a run | images/s, finetune |",
        "|---|---|---|---|---|",
        "| lr=1e-3 | 2 | S | S | 125 |",
        "| lr=2e-3 | 2 | S | S | 125 |",
    ]
    assert settings.splitlines() == [
        "| arm | --lr | --drop_path |",
        "|---|---|---|",
        "| lr=1e-3 | 0.001 | 0.5 |",
        "| lr=2e-3 | 0.002 | (not given) |",
    ]
    assert versions.splitlines() == ["- 2 runs: torch 9.9; commit abc.", "- 2 runs: torch 9.9; commit def."]
    assert text.count("    python main_finetune.py") == 4


def test_a_run_that_diverged_in_its_last_epoch_is_missing_not_read_earlier(scripts):
    script = scripts / "scripts" / "main_finetune.py"
    script.write_text(
        SCRIPT.replace('"val_loss": 1.0 - lr', '"val_loss": None if seed == 1 and epoch == 2 else 1.0 - lr')
    )
    flags = dict(paired="seed", pick="last", metric="val_loss", jobs=3)
    assert sweep(scripts / "out", "lr=1e-3,2e-3", "seed=0..2", **flags) == 0
    rows = list(csv.DictReader((scripts / "out" / "table.csv").open()))
    assert [(row["runs"], row["missing"], row["pairs"]) for row in rows] == [("2", "1", ""), ("2", "1", "2")]
    assert "lr=1e-3,seed=1: val_loss is not finite in epoch 2" in (scripts / "out" / "report.md").read_text()


def test_a_prediction_and_an_earlier_stage_give_metrics(scripts):
    """The chosen row of results.json counts."""
    row = '{"name": "x", "chosen": %s, "accuracy": %s, "log_loss": 0.5}'
    script = (
        SCRIPT
        + f"""
rows = [{row % ("False", "1.0")}, {row % ("True", "70.0 + seed")}]
json.dump({{"results": rows}}, open(f"{{out}}/results.json", "w"))
"""
    )
    (scripts / "scripts" / "main_predict.py").write_text(script)
    line = ["main_finetune.py", *NET, "--", "main_predict.py", "--checkpoints", "{finetune}"]
    metrics = ("--metric", "accuracy", "finetune.val_acc1")
    assert sweep(scripts / "out", "seed=0..1", *metrics, line=line) == 0
    rows = list(csv.DictReader((scripts / "out" / "table.csv").open()))
    assert [row["mean"] for row in rows] == ["70.00", "53.50"]


def test_arms_are_compared_within_each_value_of_an_axis(scripts):
    grid = ("lr=1e-3,2e-3,4e-3", "seed=0..2", "drop_path=0,0.1")
    assert sweep(scripts / "out", *grid, paired="seed", within="drop_path", base="lr=2e-3", jobs=3) == 0
    rows = [(row["arm"], row["difference"]) for row in csv.DictReader((scripts / "out" / "table.csv").open())]
    block = {"lr=2e-3": "base", "lr=1e-3": "-1.00", "lr=4e-3": "2.00"}
    assert rows == [(f"{lr} drop_path={d}", way) for d in ("0", "0.1") for lr, way in block.items()]
    with pytest.raises(UserError, match="--within seed: should be an axis of every --grid, and not that of --paired"):
        sweep(scripts / "out", *grid, paired="seed", within="seed")


def test_a_value_of_the_grid_can_be_put_into_a_line(scripts):
    line = ["main_finetune.py", *NET, "--split_seed", "{seed}", "--train_subset=10{lr}0"]
    assert sweep(scripts / "out", "seed=3..4", "lr=1,2", line=line) == 0
    words = [json.loads(p.read_text())["words"] for p in sorted((scripts / "out" / ".sweep").glob("*.json"))]
    assert [w[w.index("--split_seed") + 1] for w in words] == ["3", "3", "4", "4"]
    assert ["--train_subset=1010" in w for w in words] == [True, False, True, False]


def test_a_failed_run_shows_its_last_lines_and_can_be_retried(scripts, capsys):
    out = scripts / "out"
    for more, told in (({}, 2), ({}, 0), ({"retry": True}, 2)):
        assert sweep(out, "lr=1e-3,0.25", "seed=0..1", **more) == 1
        assert capsys.readouterr().out.count("main: error: the learning rate is too large") == told
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert rows[1]["runs"] == "0" and rows[1]["missing"] == "2"
    assert "lr=0.25,seed=1: failed" in (out / "report.md").read_text()


def test_a_later_stage_starts_from_each_result_of_the_one_before(scripts, monkeypatch):
    monkeypatch.setitem(jobs.CHECKPOINT, "pretrain", "log.txt")  # the script writes no checkpoint
    line = [
        "main_pretrain_noprop.py",
        "--dataset",
        "digits",
        "--",
        "main_finetune.py",
        *NET,
        "--finetune",
        "{pretrain}",
    ]
    assert sweep(scripts / "out", "pretrain.T=1,2", "seed=0..1", "finetune.lr=1e-3,2e-3", line=line, paired="seed") == 0
    records = {p.stem: json.loads(p.read_text())["words"] for p in (scripts / "out" / ".sweep").glob("*.json")}
    assert len(records) == 4 + 8
    words = records["finetune-T=2,seed=1,lr=2e-3"]
    assert words[words.index("--finetune") + 1] == str(scripts / "out" / "pretrain" / "T=2,seed=1" / "log.txt")
    assert words[words.index("--seed") + 1] == "1" and "--T" not in words
    told = (scripts / "out" / "finetune" / "T=2,seed=1,lr=2e-3" / "called.txt").read_text()
    assert told == "out: finetune/T=2,seed=1,lr=2e-3", "group and name for the loggers"


def test_an_interrupt_stops_the_runs_and_the_same_line_goes_on(scripts, monkeypatch, capsys):
    monkeypatch.setenv("TAKES", "60")
    interrupt_when(2, scripts / "out")
    began = time.monotonic()
    assert sweep(scripts / "out", "seed=0..3", jobs=2) == 130
    assert time.monotonic() - began < 50 and "the same command continues" in capsys.readouterr().out
    monkeypatch.setenv("TAKES", "0")
    assert sweep(scripts / "out", "seed=0..3", jobs=2) == 0
    assert "4 runs, 4 to do" in capsys.readouterr().out


def test_another_line_in_the_same_folder_is_refused_and_names_the_difference(scripts):
    assert sweep(scripts / "out", "seed=0..1") == 0
    with pytest.raises(UserError, match=r"ran there with other flags \(--seed 0 then, --epochs 9 now\)"):
        sweep(scripts / "out", "seed=0..1", line=["main_finetune.py", *NET, "--epochs", "9"])


@pytest.mark.parametrize(
    "grid,flags,words",
    [
        (["lr=abc"], {}, "finetune/lr=abc: argument --lr: 'abc' should be a number"),
        (["seed=0..1"], {"paired": "lr"}, "--paired lr: should be an axis"),
        (["lr=1e-3,2e-3"], {"base": "lr=3"}, "--base lr=3: fits 0 arms"),
        (["lr=1e-3"], {"metric": "pretrain.knn_acc1"}, "--metric .*: no stage is named pretrain; there are finetune"),
        (["lr=1e-3"], {"metric": "val_f1"}, "--metric val_f1: .* has none; there are val_acc1, val_loss"),
    ],
)
def test_a_mistake_is_one_line(scripts, grid, flags, words):
    with pytest.raises(UserError, match=words) as caught:
        sweep(scripts / "out", *grid, **flags)
    assert "\n" not in str(caught.value)
    assert (scripts / "out").exists() == ("val_f1" in flags.values()), "only the metric's name needs a run's log.txt"


def test_a_run_that_is_killed_alone_is_not_a_success(scripts, capsys):
    script = scripts / "scripts" / "main_finetune.py"
    script.write_text(SCRIPT + "if seed == 1: os.kill(os.getpid(), signal.SIGKILL)\n")
    assert sweep(scripts / "out", "seed=0..1") == 1
    assert "finetune/seed=1: interrupted" in (scripts / "out" / "report.md").read_text()
    script.write_text(SCRIPT)
    assert sweep(scripts / "out", "seed=0..1") == 0 and "2 runs, 1 to do" in capsys.readouterr().out


def test_a_checkpoint_inside_a_word_and_of_an_earlier_stage_is_taken_to_exist(scripts, capsys):
    line = ["main_pretrain_noprop.py", "--dataset", "digits", "--", "main_finetune.py", *NET, "--finetune={pretrain}"]
    line += ["--", "main_linprobe.py", "--checkpoint", "{pretrain}"]
    assert sweep(scripts / "out", "seed=0..1", line=line, dry_run=True) == 0
    out = capsys.readouterr().out
    folder = scripts / "out" / "pretrain" / "seed=1"
    assert out.count(f"--finetune={folder}/checkpoint-last.pth") == out.count(f"--checkpoint {folder}") == 1


def test_an_evaluation_that_leaves_no_file_is_no_stage(scripts):
    with pytest.raises(UserError, match="--eval: leaves no file; evaluate by"):
        sweep(scripts / "out", "seed=0", line=["main_finetune.py", "--eval", "--resume", "x.pth"])


def test_dry_run_prints_the_lines_and_makes_nothing(scripts, capsys):
    assert sweep(scripts / "out", "seed=0..1", dry_run=True) == 0
    assert (
        capsys.readouterr().out.count("python main_finetune.py --dataset digits") == 2
        and not (scripts / "out").exists()
    )


@pytest.mark.parametrize("name", ["table.csv", "log.txt", "report.md"])
def test_a_folder_that_holds_something_else_is_refused_and_stays(scripts, name):
    (scripts / "out").mkdir()
    (scripts / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, which would be lost; choose another folder"):
        sweep(scripts / "out", "seed=0..1")
    assert [p.name for p in (scripts / "out").iterdir()] == [name] and (scripts / "out" / name).read_text() == "mine"


@dataclass
class Row:
    """line: a flag and its value; holds: of the sweep with it, and not of the one without it."""

    line: str
    holds: Callable[[SimpleNamespace], object]
    grid: str = "lr=1e-3,2e-3 seed=0..1"
    given: str = ""


WIRED = {
    "grid": Row("--grid lr=4e-3 seed=0", lambda s: "lr=4e-3" in s.arms),
    "paired": Row("--paired seed", lambda s: s.rows[1]["p (sign)"] != ""),
    "base": Row("--base lr=2e-3", lambda s: s.arms[0] == "lr=2e-3"),
    "within": Row(
        "--within drop_path",
        lambda s: [row["difference"] for row in s.rows].count("base") == 2,
        grid="lr=1e-3,2e-3 drop_path=0,0.1",
    ),
    "metric": Row("--metric val_gap", lambda s: s.rows[0]["mean"] == "9.00"),
    "pick": Row("--pick last", lambda s: s.rows[0]["mean"] == "7.00", given="--metric val_gap"),
    "search": Row("--search optuna", lambda s: (s.out / ".sweep" / "optuna.db").exists(), given="--trials 2"),
    "trials": Row("--trials 2", lambda s: len(s.rows) == 2, given="--search optuna"),
    "jobs": Row("--jobs 2", lambda s: s.together > 1, grid="seed=0..1"),
    "retry": Row("--retry", lambda s: s.said.count("the learning rate is too large") == 2, grid="lr=0.25"),
    "output_dir": Row("--output_dir other", lambda s: (s.out / "other" / "table.csv").exists()),
    "dry_run": Row("--dry_run", lambda s: not s.out.exists()),
    "launcher": None,  # tests/util/sweep/test_slurm.py
    "slurm": None,
}
TIMED = SCRIPT.replace('"val_loss"', '"val_gap": 9.0 - epoch, "val_loss"')
TIMED = f"import time; began = time.time(){TIMED}print('ran', began, time.time())\n"


def test_every_flag_has_a_row():
    assert set(WIRED) == set(SweepOptions.flags())


@pytest.mark.parametrize("flag", [name for name, row in WIRED.items() if row])
def test_every_flag_reaches_what_it_names(scripts, flag, capsys, monkeypatch):
    pytest.importorskip("optuna") if flag in ("search", "trials") else None
    monkeypatch.setenv("TAKES", "1" if flag == "jobs" else "0")
    for name in ("main_finetune.py", "main_pretrain_noprop.py"):
        (scripts / "scripts" / name).write_text(TIMED)
    row = WIRED[flag]
    assert not row.holds(after(scripts, row, "", capsys)) and row.holds(after(scripts, row, row.line, capsys))


def after(scripts, row: Row, line: str, capsys) -> SimpleNamespace:
    """The sweep of the row, with `line` or without it."""
    import main_sweep

    out = scripts / ("with" if line else "without")
    words = f"--output_dir {out} --grid {row.grid} {row.given}".split()
    if row.line == "--retry":
        main_sweep.main([*words, "--", "main_finetune.py", *NET])
    main_sweep.main([*words, *line.replace("other", f"{out}/other").split(), "--", "main_finetune.py", *NET])
    table = next(iter(out.glob("**/table.csv")), None)
    rows = list(csv.DictReader(table.open())) if table else []
    output = [path.read_text() for path in out.glob(".sweep/*.txt")]
    spans = [
        tuple(map(float, found.groups())) for text in output if (found := re.search(r"^ran (\S+) (\S+)", text, re.M))
    ]
    together = max((sum(a <= began < b for a, b in spans) for began, _ in spans), default=0)
    arms = [line.get("arm", "") for line in rows]
    return SimpleNamespace(out=out, rows=rows, arms=arms, together=together, said=capsys.readouterr().out)
