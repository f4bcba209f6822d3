"""--search: what Optuna chooses runs, stops early, is told, and goes on; with a script that takes a moment."""

import csv
import json

import pytest

from tests.harness.sweeps import SCRIPT, interrupt_when, sweep
from util.errors import UserError
from util.log import read_log
from util.sweep.grid import parse_axis, parse_stages
from util.sweep.search import parse_space

optuna = pytest.importorskip("optuna")

# Accuracy falls with the distance of log10(lr) from -3, and with cosine annealing; it rises by a point an epoch.
PEAK = "import math\n" + SCRIPT.replace(
    "1000 * lr + seed", "(-5 if '--noise_anneal cosine' in ' '.join(sys.argv) else 0) - 10 * abs(math.log10(lr) + 3)"
)
SLOW = PEAK.replace('+ "\\n")', '+ "\\n")\n        file.flush()\n        time.sleep(0.3 if epoch < 2 else 0)')
GRID = ("lr=log(1e-5,1e-1)", "noise_anneal=none,cosine")


@pytest.fixture
def peaked(scripts):
    for name in ("main_finetune.py", "main_pretrain_noprop.py"):
        (scripts / "scripts" / name).write_text(PEAK)
    return scripts


def rows_of(out):
    return list(csv.DictReader((out / "table.csv").open()))


def study_of(out):
    return optuna.load_study(study_name="val_acc1", storage=f"sqlite:///{out}/.sweep/optuna.db")


def test_trials_are_told_their_best_value_and_the_same_line_adds_more(peaked, capsys):
    out = peaked / "out"
    assert sweep(out, *GRID, search="optuna", trials=6, jobs=3) == 0
    assert sweep(out, *GRID, search="optuna", trials=6, jobs=3) == 0
    assert "6 of 6 trials begun" in capsys.readouterr().out
    assert sweep(out, *GRID, search="optuna", trials=14, jobs=3) == 0
    found = [t for t in study_of(out).trials if t.state.name == "COMPLETE"]
    lrs = {round(t.params["lr"], 9) for t in found}
    assert len(study_of(out).trials) == 14 and 5 <= len(lrs) == len(found), "no trial repeats another one"
    for trial in found:
        words = json.loads((out / ".sweep" / f"{_record(trial)}.json").read_text())["words"]
        assert float(words[-words[::-1].index("--lr")]) == pytest.approx(trial.params["lr"], rel=1e-5)
        lines = read_log(f"{trial.user_attrs['folder']}/log.txt")
        assert trial.value == lines[-1]["val_acc1"] == max(trial.intermediate_values.values())
    rows = rows_of(out)
    assert len(rows) == 14 and float(rows[0]["val_acc1"]) == pytest.approx(max(t.value for t in found), rel=1e-5)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "TPE" in page and f"Best: trial {rows[0]['trial']}" in page


def _record(trial):
    return "finetune-" + ",".join(trial.user_attrs["folder"].rpartition("/")[2:])


@pytest.mark.slow
def test_a_poor_trial_is_stopped_and_stays_stopped(peaked):
    """From the sixth trial on, one that is below the median at its first epoch ends there."""
    out = peaked / "out"
    (peaked / "scripts" / "main_finetune.py").write_text(SLOW)
    assert sweep(out, "lr=log(1e-5,1e-1)", search="optuna", trials=16) == 0
    states = [row["state"] for row in rows_of(out)]
    assert "pruned" in states and states.count("finished") >= 5
    for row in rows_of(out):
        if row["state"] == "pruned":
            assert row["epochs run"] in ("1", "2") and row["val_acc1"] == ""
    assert sweep(out, "lr=log(1e-5,1e-1)", search="optuna", trials=16) == 0
    assert [row["state"] for row in rows_of(out)] == states


@pytest.mark.slow
def test_an_interrupted_trial_goes_on(peaked, monkeypatch):
    out = peaked / "out"
    monkeypatch.setenv("TAKES", "60")
    interrupt_when(2, out)
    assert sweep(out, *GRID, search="optuna", trials=3, jobs=2) == 130
    running = [t.params for t in study_of(out).trials]
    assert [t.state.name for t in study_of(out).trials] == ["RUNNING"] * 2
    monkeypatch.setenv("TAKES", "0")
    assert sweep(out, *GRID, search="optuna", trials=3, jobs=2) == 0
    assert [t.params for t in study_of(out).trials][:2] == running
    assert [t.state.name for t in study_of(out).trials] == ["COMPLETE"] * 3


def test_a_small_space_ends_when_each_of_its_values_has_run(peaked):
    out = peaked / "out"
    assert sweep(out, "lr=1e-3,1e-2", "epochs=2..3", search="optuna", trials=50) == 0
    assert len(rows_of(out)) == 4 == len({(r["lr"], r["epochs"]) for r in rows_of(out)})


def test_a_failed_trial_is_told_and_tried_again_on_demand(peaked):
    out = peaked / "out"
    (peaked / "scripts" / "main_finetune.py").write_text("raise SystemExit('broken')")
    assert sweep(out, "lr=1e-3,1e-2", search="optuna", trials=2) == 1
    assert [row["state"] for row in rows_of(out)] == ["failed", "failed"]
    (peaked / "scripts" / "main_finetune.py").write_text(PEAK)
    assert sweep(out, "lr=1e-3,1e-2", search="optuna", trials=2) == 1
    assert sweep(out, "lr=1e-3,1e-2", search="optuna", trials=2, retry=True) == 0
    assert [row["state"] for row in rows_of(out)].count("finished") == 2


@pytest.mark.parametrize(
    "grid,flags,words",
    [
        (["lr=log(1e-5,0)"], {}, r"should be log\(LOW,HIGH\), LOW below HIGH, log above 0"),
        (["lr=log(1e-5,1e-1)"], {"paired": "seed"}, "--paired: not together with --search"),
        (["lr=lin(0,abc)"], {}, "should be"),
        (["lrr=lin(0,1)"], {}, "did you mean lr"),
        (["drop_path=lin(0,2)"], {}, "argument --drop_path: "),
        (["lr=1e-3,1e-2"], {"metric": "pretrain.x"}, "no stage is named pretrain"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_trial(peaked, grid, flags, words):
    with pytest.raises(UserError, match=words) as caught:
        sweep(peaked / "out", *grid, search="optuna", **flags)
    assert "\n" not in str(caught.value) and not (peaked / "out").exists()


def test_other_ranges_need_another_folder(peaked):
    assert sweep(peaked / "out", "lr=1e-3,1e-2", search="optuna", trials=1) == 0
    with pytest.raises(UserError, match="holds a search, which would be lost"):
        sweep(peaked / "out", "lr=1e-3,1e-2")
    assert sweep(peaked / "grid", "lr=1e-3") == 0
    with pytest.raises(UserError, match="holds a sweep over a grid, which would be lost"):
        sweep(peaked / "grid", "lr=1e-3,1e-2", search="optuna", trials=1)
    with pytest.raises(UserError, match="a search over lr with other ranges is there; choose another one"):
        sweep(peaked / "out", "lr=1e-3,1e-2,1e-1", search="optuna", trials=2)


def test_ranges_become_distributions():
    stages = parse_stages([["main_finetune.py"]])
    key, found, ends = parse_space("lr=log(1e-4,1e-2)", stages)
    assert (key, found.low, found.high, found.log, ends) == ("lr", 1e-4, 1e-2, True, ["1e-4", "1e-2"])
    assert parse_space("epochs=3..9", stages)[1:] == (optuna.distributions.IntDistribution(3, 9), ["3", "9"])
    assert parse_space("drop_path=0,0.2", stages)[1].choices == ("0", "0.2")
    with pytest.raises(UserError, match=r"should be lin\(LOW,HIGH,N\)"):
        parse_axis("lr=lin(0,1)")
