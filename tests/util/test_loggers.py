"""What arrives at each logger, read back by the tool's own reader; resumes; loggers that fail."""

import csv
import json
import os
import pty
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

import util.loggers
from tests.harness import ROOT
from tests.harness.checks import assert_same_state, comparable, log_without_times, one_line
from tests.harness.runs import NET, finetune
from util.cli.finetune import get_options
from util.errors import UserError
from util.log import RunLog, read_log
from util.loggers import Csv, InThread, Logger, Mlflow, Start, Tracker, name_and_group, record_of

OPTIONS = {"lr": 0.5, "aa": "none", "scale": [0.1, 1.0], "clip_grad": None, "compile": True}
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
SHORT = [*NET, "--epochs", "2", "--seed", "3"]


@pytest.fixture(scope="module", autouse=True)
def stores(tmp_path_factory):
    """Folders for the tools; wandb and trackio read their variables once in a process."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("stores")
    os.environ |= {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": f"file:{folder}/mlflow",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    yield
    os.environ.clear()
    os.environ.update(before)


def drive(folder, tool: str) -> None:
    """Two epochs, then a resume after the first one: the second is done again, and a third."""
    log = RunLog(str(folder), loggers=[tool])
    log.start(0, OPTIONS)
    for step in (500, 1000, 1500, 2000):
        log.scalars({"train_loss": step / 100}, step)
        if step % 1000 == 0:
            log.scalars({"val/acc1": step / 50}, step)
    log.image("reconstruction", PICTURE, 2000)
    log.flush()
    log.close({"best/acc1": 40.0}, "stopped")
    log = RunLog(str(folder), loggers=[tool])
    log.start(1.0, {**OPTIONS, "lr": 0.25})
    log.scalars({"train_loss": 20.0}, 2000)
    log.image("reconstruction", PICTURE, 2000)
    log.scalars({"train_loss": 30.0, "val/acc1": 60.0}, 3000)
    log.close({"best/acc1": 60.0})


LOSSES = [(500, 5.0), (1000, 10.0), (1500, 15.0), (2000, 20.0), (3000, 30.0)]
ACCURACIES = [(1000, 20.0), (2000, 40.0), (3000, 60.0)]


def read_wandb(path: Path) -> list:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, records, parts = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.slow
def test_wandb_gets_everything_in_one_run_over_a_resume(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("NOISEVIT_GROUP", "sweep")
    drive(tmp_path / "a", "wandb")
    wandb.teardown()  # its process may still be writing
    files = sorted((tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    records = [record for path in files for record in read_wandb(path)]
    runs = [r.run for r in records if r.HasField("run")]
    assert {(r.run_id, r.display_name, r.run_group, r.project) for r in runs} == {
        (json.loads(Path(record_of(str(tmp_path / "a"), "wandb")).read_text())["id"], "a", "sweep", "noisevit")
    }
    config = {u.key: json.loads(u.value_json) for r in runs for u in r.config.update}
    assert OPTIONS.keys() <= config.keys() and config["lr"] == 0.25 and config["scale"] == [0.1, 1.0]
    rows = []
    for record in records:
        if record.HasField("history"):
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    assert [(r["epoch_1000x"], r["train_loss"]) for r in rows if "train_loss" in r] == LOSSES
    assert [(r["epoch_1000x"], r["val/acc1"]) for r in rows if "val/acc1" in r] == ACCURACIES
    shown = [r for r in rows if "reconstruction/path" in r]
    assert [(r["epoch_1000x"], r["reconstruction/width"], r["reconstruction/height"]) for r in shown] == [(2000, 6, 4)]
    assert len(list((tmp_path / "a").glob("wandb/offline-run-*/files/media/images/reconstruction*.png"))) == 1
    summary = {u.key: u.value_json for r in records if r.HasField("summary") for u in r.summary.update}
    assert summary["best/acc1"] == "60.0"
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [75, 0]


@pytest.mark.slow
def test_mlflow_gets_everything_in_one_run_over_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("NOISEVIT_GROUP", "sweep")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "resumed")
    drive(tmp_path / "a", "mlflow")
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("resumed").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["group"]) == ("a", "FINISHED", "sweep")
    assert run.data.params == {name: str(value) for name, value in OPTIONS.items()}
    assert run.data.tags["resumed with lr"] == "0.25"
    assert run.data.metrics == {"train_loss": 30.0, "val/acc1": 60.0, "best/acc1": 60.0}
    for name, expected in (("train_loss", LOSSES), ("val/acc1", ACCURACIES)):
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == expected
    pictures = [f.path for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith(".png")]
    assert len(pictures) == 1 and "reconstruction" in pictures[0] and "2000" in pictures[0]


def test_runs_that_start_at_the_same_time_open_mlflows_store_one_after_the_other(monkeypatch):
    inside, most = [], []

    def opens(self, start):
        inside.append(start)
        most.append(len(inside))
        time.sleep(0.1)
        inside.remove(start)

    monkeypatch.setattr(Mlflow, "_open", opens)
    threads = [threading.Thread(target=Mlflow().open, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]


@pytest.mark.slow
def test_trackio_gets_everything_in_one_run_over_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("NOISEVIT_GROUP", "sweep")
    drive(tmp_path / "a", "trackio")
    drive(tmp_path / "b" / "a", "trackio")  # another run of that name
    runs = {run.name: run for run in trackio.Api().runs("noisevit")}
    assert set(runs) == {"a", "a-1"}
    assert {k: runs["a"].config[k] for k in OPTIONS} == {**OPTIONS, "lr": 0.25} and runs["a"].config[
        "_Group"
    ] == "sweep"
    for name in runs:
        rows = SQLiteStorage.get_logs("noisevit", name)
        assert [(r["step"], r["train_loss"]) for r in rows if "train_loss" in r] == LOSSES
        assert [(r["step"], r["val/acc1"]) for r in rows if "val/acc1" in r] == ACCURACIES
        assert [r["step"] for r in rows if "reconstruction" in r] == [2000]
        assert [(r["step"], r["best/acc1"]) for r in rows if "best/acc1" in r] == [(2000, 40.0), (3000, 60.0)]


def test_tensorboards_own_table_has_options_and_last_values_of_each_run(tmp_path):
    for name, lr in (("a", 0.5), ("b", 0.25)):
        log = RunLog(str(tmp_path / name))
        log.start(0, {**OPTIONS, "lr": lr})
        for step in (1000, 2000):
            log.scalars({"val/acc1": step * lr}, step)
        log.close()
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    context = backend_context.Context(SimpleNamespace(data_provider=MultiplexerDataProvider(events, str(tmp_path))))
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_SUCCESS], start_index=0, slice_size=9, include_metrics=True
    )
    asking = RequestContext()
    wanted = api_pb2.GetExperimentRequest(include_metrics=True)
    experiment = get_experiment.Handler(asking, context, "", wanted).run()
    request.col_params.extend(api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos)
    groups = list_session_groups.Handler(asking, context, "", request).run().session_groups
    table = {}
    for group in groups:
        options = {name: value.number_value or value.string_value for name, value in group.hparams.items()}
        table[group.sessions[0].name] = options, {m.name.tag: m.value for m in group.sessions[0].metric_values}
    shown = {"aa": "none", "scale": "[0.1, 1.0]", "compile": 1.0}
    assert table == {
        "a": ({**shown, "lr": 0.5}, {"val/acc1": 1000.0}),
        "b": ({**shown, "lr": 0.25}, {"val/acc1": 500.0}),
    }


def assert_csv_is_log(folder) -> None:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = read_log(str(folder / "log.txt"))
    assert next(iter(rows[0])) == "epoch"
    assert [{k: float(v) for k, v in row.items()} for row in rows] == lines


def test_csv_leaves_cells_empty_and_later_columns_are_added(tmp_path):
    log = RunLog(str(tmp_path), loggers=["csv"])
    log.start()
    log.epoch({"val_loss": float("nan"), "epoch": 0})
    log.epoch({"val_loss": 0.5, "epoch": 1, "snr": 20})
    log.close()
    assert (tmp_path / "metrics.csv").read_text() == "epoch,val_loss,snr\n0,,\n1,0.5,20\n"


class Notes(Tracker):
    """A tracker that writes down what it is told, in place of wandb."""

    name = "wandb"
    told: list

    def open(self, start: Start) -> None:
        self.told.append(("open", start.epoch, start.hyperparameters))
        self.id = self.id or f"run {len(self.told)}"

    def send(self, values: dict, step: int) -> None:
        self.told.extend((self.id, name, step) for name in values)

    def send_image(self, name: str, picture, step: int) -> None:
        self.send({name: picture}, step)

    def close(self, final: dict, state: str) -> None:
        self.told.append(("close", final, state))


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setattr(util.loggers, "Wandb", Notes)
    monkeypatch.setattr("util.cli.parser.require_package", lambda *args: None)
    monkeypatch.setattr(Notes, "told", [], raising=False)
    return Notes.told


@pytest.mark.slow
def test_after_a_resume_that_goes_back_the_csv_is_log_txt_and_trackers_begin_a_new_run(tmp_path, notes):
    line = [*SHORT, "--save_freq", 1, "--logger", "csv,wandb", "--output_dir", tmp_path]
    assert finetune(*line) == 0
    assert_csv_is_log(tmp_path)
    options = notes[0][2]
    assert options["lr"] == 1e-3 and options["model"] == "vit_custom_patch4" and options["crop_pct"] == 1.0
    lines = read_log(str(tmp_path / "log.txt"))
    best = max(lines, key=lambda one: one["val_acc1"])
    assert notes[-1] == ("close", {"best/acc1": best["val_acc1"], "best/epoch": best["epoch"]}, "finished")
    scores = [("run 1", "val/acc1", 1000), ("run 1", "val/acc1", 2000)]
    assert [one for one in notes if one[1] == "val/acc1"] == scores

    notes.clear()
    assert finetune(*line, "--resume", "auto") == 0  # it is finished
    assert [one[:2] for one in notes] == [
        ("open", 2.0),
        ("close", {"best/acc1": best["val_acc1"], "best/epoch": best["epoch"]}),
    ]
    assert finetune(*line, "--resume", tmp_path / "checkpoint-0.pth", "--overwrite") == 0
    assert [one["epoch"] for one in read_log(str(tmp_path / "log.txt"))] == [0, 1]
    assert_csv_is_log(tmp_path)
    assert [one for one in notes if one[1] == "val/acc1"] == [("run 3", "val/acc1", 2000)]
    assert not list(tmp_path.glob("events*"))


def test_a_run_that_fails_says_so(tmp_path, notes, monkeypatch):
    monkeypatch.setattr("main_finetune.train_one_epoch", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(*SHORT, "--logger", "wandb", "--output_dir", tmp_path)
    assert notes[-1] == ("close", {}, "failed")


class Broken(Logger):
    def __init__(self, name: str, at: str, reached):
        self.name = name
        setattr(self, at, reached)


def fails(*args):
    raise OSError("no network")


def hangs(*args):
    time.sleep(60)


@pytest.fixture(scope="module")
def unlogged(tmp_path_factory):
    out = tmp_path_factory.mktemp("unlogged")
    assert finetune(*SHORT, "--epochs", 1, "--logger", "none", "--output_dir", out) == 0
    assert not list(out.glob("events*"))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("reached", [fails, hangs])
def test_a_logger_that_fails_costs_one_warning_and_nothing_else(tmp_path, monkeypatch, capsys, unlogged, reached):
    """Three at once, each at another call; the table that is written beside them is whole."""
    at = {"wandb": "start", "mlflow": "scalars", "trackio": "close"}

    def build(name: str) -> Logger:
        if name == "csv":
            return Csv()
        broken = Broken(name, at[name], reached)
        return broken if reached is fails and name == "mlflow" else InThread(broken)  # what may hang is in a thread

    monkeypatch.setattr(util.log, "build", build)
    monkeypatch.setattr("util.cli.parser.require_package", lambda *args: None)
    for seconds in ("STARTING", "SAVING", "CLOSING"):
        monkeypatch.setattr(util.loggers, seconds, 0.2)
    capsys.readouterr()
    assert finetune(*SHORT, "--epochs", 1, "--logger", "wandb,mlflow,trackio,csv", "--output_dir", tmp_path) == 0
    reason = "no answer for 0.2 s" if reached is hangs else "no network"
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [f"warning: --logger {name}: off from here on ({reason})" for name in at]
    assert_same_state(comparable(tmp_path / "checkpoint-last.pth"), comparable(unlogged / "checkpoint-last.pth"))
    assert log_without_times(tmp_path) == log_without_times(unlogged)
    assert_csv_is_log(tmp_path)


def test_only_the_first_rank_has_loggers(tmp_path):
    log = RunLog(str(tmp_path / "a"), is_main=False, loggers=["tensorboard", "csv", "wandb", "mlflow", "trackio"])
    log.start(0, OPTIONS)
    log.scalars({"x": 1.0}, 1)
    log.close()
    assert not list(tmp_path.iterdir())


def test_names_and_groups():
    assert name_and_group("runs/a/", {}) == ("a", None)
    assert name_and_group("runs/a/fold-2", {}) == ("a-fold-2", None)
    sweep = {"NOISEVIT_NAME": "pretrain/T=1,seed=0", "NOISEVIT_GROUP": "levels"}
    assert name_and_group("sweeps/levels/pretrain/T=1,seed=0", sweep) == ("pretrain-T=1,seed=0", "levels")
    assert name_and_group("x/fold-0", sweep) == ("pretrain-T=1,seed=0-fold-0", "levels")


def test_a_wrong_name_a_missing_package_and_a_folder_for_nothing_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"--logger: 'tensorbord' is none of .*; did you mean tensorboard") as caught:
        get_options(["--logger", "csv,tensorbord"])
    one_line(caught)
    assert get_options(["--logger", "none"]).run.logger == []
    assert get_options(["--logger", "csv, wandb,csv"]).run.logger == ["csv", "wandb"]
    with pytest.raises(UserError, match=r"--log_dir x: .*add tensorboard to --logger"):
        get_options(["--log_dir", "x", "--logger", "csv"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("trackio", "trackio")):
        with pytest.raises(UserError, match=f"--logger {name}: needs the package {name}; `pip install {package}`"):
            get_options(["--logger", name])


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match="--logger trackio: needs the package trackio"):
        get_options(["--logger", "trackio"])


@pytest.mark.slow
def test_wandb_without_a_key_does_not_ask_at_a_terminal(tmp_path):
    pytest.importorskip("wandb")
    code = "from util.log import RunLog; log = RunLog(None, loggers=['wandb']); log.start(); log.close(); print('on')"
    hidden = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    main, terminal = pty.openpty()
    try:
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**hidden, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")},
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=terminal,
            text=True,
            timeout=60,
        )
        told = os.read(main, 10000).decode()
    finally:
        os.close(main)
        os.close(terminal)
    assert result.returncode == 0 and result.stdout.endswith("on\n")
    assert "Enter your choice" not in told + result.stdout
    assert told.count("warning: --logger wandb: off from here on (RuntimeError: no API key; run `wandb login`") == 1
