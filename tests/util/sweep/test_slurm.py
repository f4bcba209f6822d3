"""Runs as SLURM jobs: with stand-ins for SLURM's commands, submitit's local executor, and SLURM itself where it is."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import main_sweep
from tests.harness.runs import NET
from tests.harness.slurm import calls, install
from util.cli import script
from util.errors import UserError
from util.sweep import jobs

submitit = pytest.importorskip("submitit")
from util.sweep import slurm  # noqa: E402

# In place of a training: 1000 * lr right. With 0.25 it fails; with 0.5 its time is nearly up in its first start; with
# 0.125 it takes a minute unless FAST is set, with 0.0625 it never gets anywhere.
SCRIPT = """
import json, os, signal, sys, time
out, lr = (sys.argv[len(sys.argv) - sys.argv[::-1].index(name)] for name in ("--output_dir", "--lr"))
os.makedirs(out, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with open(f"{out}/starts", "a") as file:
    file.write("x")
first = os.path.getsize(f"{out}/starts") == 1
if lr == "0.25":
    sys.exit("main: error: the learning rate is too large")
if lr == "0.5" and first or lr == "0.0625":
    os.kill(os.getppid(), signal.SIGUSR2)
    time.sleep(60)
if lr == "0.125" and "FAST" not in os.environ:
    time.sleep(60)
with open(f"{out}/log.txt", "w") as file:
    file.write(json.dumps({"epoch": 0, "val_acc1": 1000 * float(lr)}) + "\\n")
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study(grid, ...): the sweep's exit code."""
    (tmp_path / "main_finetune.py").write_text(SCRIPT)
    monkeypatch.setattr(jobs, "SCRIPTS_AT", str(tmp_path))
    monkeypatch.setattr(slurm.Slurm, "pause", 0.05)
    monkeypatch.setattr(slurm, "LOOK", 0.2)

    def run(*grid, flags="", line=("main_finetune.py", *NET)) -> int:
        out = ["--output_dir", str(tmp_path / "out"), "--launcher", "slurm", *flags.split()]
        return main_sweep.main([*out, "--grid", *grid, "--", *line])

    return run


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name, value in install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "slurm"


def record(tmp_path, name: str) -> dict:
    return json.loads((tmp_path / "out" / ".sweep" / f"finetune-{name}.json").read_text())


def submissions(tmp_path) -> list[str]:
    return [path.read_text() for path in sorted((tmp_path / "out/.sweep/slurm").glob("*_submission.sh"))]


@pytest.mark.slow
def test_ready_runs_are_an_array_and_a_run_whose_time_is_up_is_queued_again(study, cluster, tmp_path, capsys):
    assert study("lr=1e-3,0.25,0.5", flags="--jobs 2 --slurm partition=gpu timeout_min=30 constraint=a100") == 1
    said = capsys.readouterr().out
    assert "queued finetune/lr=1e-3 (SLURM job 1_0)" in said and "queued finetune/lr=0.5 (SLURM job 2)" in said, said
    assert "stopped and saved: finetune/lr=0.5" in said and "finished finetune/lr=0.5" in said
    assert "failed finetune/lr=0.25" in said and "\n    main: error: the learning rate is too large\n" in said
    first, second = submissions(tmp_path)
    for text in ("array=0-2%2", "partition=gpu", "time=30", "constraint=a100", "job-name=out", "no-requeue"):
        assert f"#SBATCH --{text}\n" in first
    assert "--array" not in second
    assert (tmp_path / "out" / "lr=0.5" / "starts").read_text() == "xx"
    assert [record(tmp_path, f"lr={lr}")["state"] for lr in ("1e-3", "0.25", "0.5")] == [
        "finished",
        "failed",
        "finished",
    ]
    assert "500.00" in (tmp_path / "out" / "table.csv").read_text()


@pytest.mark.slow
def test_a_run_that_never_saves_before_its_time_is_up_is_not_queued_for_ever(study, cluster, tmp_path, capsys):
    assert study("lr=0.0625") == 1
    assert "interrupted twice without a new checkpoint, it may need more time: finetune/lr" in capsys.readouterr().out
    assert (tmp_path / "out" / "lr=0.0625" / "starts").read_text() == "xx"
    assert record(tmp_path, "lr=0.0625")["state"] == "interrupted"


@pytest.mark.slow
def test_an_interrupt_lets_the_jobs_save_and_the_same_line_goes_on(study, cluster, tmp_path, capsys, monkeypatch):
    def interrupt():
        for _ in range(200):
            if (tmp_path / "out/lr=0.125/starts").exists():
                break
            time.sleep(0.1)
        time.sleep(0.3)  # until the script has its handler
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert study("lr=0.125") == 130
    assert "telling to save and stop: finetune/lr=0.125 (SLURM job 1)" in capsys.readouterr().out
    assert [call for call in calls(cluster) if "scancel" in call] == [
        "scancel --state=PENDING 1",
        "scancel --signal=TERM 1",
    ]
    assert record(tmp_path, "lr=0.125")["state"] == "interrupted" and record(tmp_path, "lr=0.125")["code"] == 75
    monkeypatch.setenv("FAST", "1")
    assert study("lr=0.125") == 0 and record(tmp_path, "lr=0.125")["state"] == "finished"


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_with_the_jobs_in_the_queue(study, cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "run_all", lambda runs, launcher, say: launcher.start(runs) and True)
    assert study("lr=1e-3,2e-3") == 130
    assert record(tmp_path, "lr=2e-3")["state"] == "running"
    monkeypatch.undo()
    for name, value in (("SLURM_STANDS_IN", str(cluster)), ("PATH", f"{cluster}:{os.environ['PATH']}")):
        monkeypatch.setenv(name, value)
    assert study("lr=1e-3,2e-3") == 0
    said = capsys.readouterr().out
    assert "goes on: finetune/lr=2e-3 (SLURM job 1_1)" in said and "queued" not in said
    assert (tmp_path / "out" / "lr=2e-3" / "starts").read_text() == "x"


@pytest.mark.slow
def test_a_search_submits_no_more_trials_than_jobs_at_a_time(study, cluster, tmp_path):
    pytest.importorskip("optuna")
    assert study("lr=1e-3,2e-3", flags="--search optuna --trials 2") == 0
    scripts = submissions(tmp_path)
    assert len(scripts) == 2 and not any("--array" in text for text in scripts)


@pytest.fixture
def held(cluster, tmp_path):
    """A run whose job never starts: (the run, what it says of itself when squeue says a state of its job)."""
    (tmp_path / "out").mkdir()
    launcher = slurm.Slurm(1, str(tmp_path / "out"), [("partition", "held")])
    stage = main_sweep.grid.parse_stages([["main_finetune.py", *NET]])[0]
    [run] = launcher.start([jobs.Job(stage, {}, str(tmp_path), [], str(tmp_path / "out" / ".sweep" / "a.json"))])

    def poll(state: str) -> tuple[int, float] | None:
        (cluster / "1.job").write_text(state) if state else (cluster / "1.job").unlink()
        run.submitted.watcher.update()
        return run.poll()

    return run, poll


@pytest.mark.slow
def test_what_a_job_without_a_result_means(held):
    run, poll = held
    for state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
        assert poll(state) is None, state
    assert poll("COMPLETED") is None, "its result may not be visible yet"
    for state, code in {"PREEMPTED": 75, "NODE_FAIL": 75, "CANCELLED": 130, "OUT_OF_MEMORY": 1, "TIMEOUT": 1}.items():
        assert poll(state) == (code, 0.0), state
    assert poll("") == (1, 0.0), "SLURM has forgotten it"
    with open(run.job.output) as file:
        said = file.read()
    assert [line for line in said.splitlines() if line.startswith("SLURM")] == [
        f"SLURM job 1: {state}" for state in ("OUT_OF_MEMORY", "TIMEOUT", "GONE")
    ]
    run.stopping = True
    assert poll("FAILED") == (130, 0.0), "told to stop before its script could save"


def test_a_saved_run_goes_on_unless_somebody_cancelled_its_job(held):
    run, poll = held
    submitit.core.utils.cloudpickle_dump(("success", (75, 2.5)), run.submitted.paths.result_pickle)
    assert poll("RUNNING") is None, "it is about to end"
    assert poll("CANCELLED") == (130, 2.5) and poll("COMPLETED") == (75, 2.5)
    submitit.core.utils.cloudpickle_dump(("error", "No such python"), run.submitted.paths.result_pickle)
    with open(run.job.output) as file:
        assert poll("FAILED") == (1, 0.0) and "No such python" in file.read()


@pytest.mark.slow
def test_each_task_has_torchruns_variables_and_hands_a_signal_on(tmp_path, monkeypatch):
    """By submitit's local executor. Task 1 fails; time is nearly up for 2, and for 3 before it has a handler."""
    monkeypatch.setenv("RANK", "7")  # of whatever started the sweep
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT NOISEVIT_NAME".split()
    code = f"""if True:
        import os, signal, sys, time
        if os.environ["RANK"] != "3":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print(*(os.environ[name] for name in {names}), flush=True)
        if os.environ["RANK"] in "23":
            os.kill(os.getppid(), signal.SIGUSR2)
            time.sleep(60)
        sys.exit(3 * int(os.environ["RANK"]))
    """
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(tasks_per_node=4, timeout_min=2)
    command, output = [sys.executable, "-c", code], str(tmp_path / "said")
    job = executor.submit(slurm.run_task, command, output, True, {"NOISEVIT_NAME": "T=1,seed=0"})
    assert [code for code, _ in job.results()] == [0, 3, 75, 75]
    said = sorted(line.split() for line in (tmp_path / "said").read_text().splitlines())
    assert [line[:3] for line in said] == [[str(i), str(i), "4"] for i in range(4)]
    assert len({tuple(line[3:]) for line in said}) == 1 and said[0][-1] == "T=1,seed=0"


@pytest.mark.parametrize(
    "flags,words",
    [
        ("--slurm partion=gpu", r"--slurm partion=gpu: .*; did you mean partition\?"),
        ("--slurm time=60", "--slurm time=60: use timeout_min"),
        ("--slurm gpu_per_node=1", r"did you mean gpus_per_node\?"),
        ("--slurm timeout_min=4h", "--slurm timeout_min=4h: should be of type int"),
        ("--slurm xyz=1", "--slurm xyz=1: .*; there are account, .*wckey"),
        ("--slurm partition=closed", "--launcher slurm: .*invalid partition specified: closed"),
        ("--launcher local --slurm nodes=2", "--slurm: only --launcher slurm takes it"),
    ],
)
def test_a_mistake_is_one_line(study, cluster, tmp_path, flags, words):
    with pytest.raises(UserError, match=words) as caught:
        study("lr=1e-3", flags=flags)
    assert "\n" not in str(caught.value) and (tmp_path / "out").exists() == ("closed" in flags)


def test_what_is_missing_is_said(study, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--launcher slurm: there is no srun here"):
        study("lr=1e-3")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--launcher slurm: needs the package submitit; `pip install submitit`"):
        study("lr=1e-3")


def test_parameters_are_submitits_and_a_gpu_has_a_task():
    given = [("gpus_per_node", 4), ("partition", "gpu"), ("mem_gb", 32), ("setup", "module load cuda")]
    given.append(("additional_parameters", {"gpu-bind": "none"}))
    assert slurm.parameters(given) == {
        "timeout_min": 240,
        "stderr_to_stdout": True,
        "gpus_per_node": 4,
        "tasks_per_node": 4,
        "mem_gb": 32,
        "slurm_partition": "gpu",
        "slurm_setup": ["module load cuda"],
        "slurm_additional_parameters": {"no-requeue": True, "gpu-bind": "none"},
    }
    assert slurm.parameters([])["tasks_per_node"] == 1


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("sinfo") or subprocess.run(["sinfo"], capture_output=True, timeout=10).returncode != 0,
    reason="needs SLURM",
)
def test_slurm_itself(study, tmp_path):
    assert study("lr=1e-3,0.5", flags="--jobs 2") == 0
    assert (tmp_path / "out" / "lr=0.5" / "starts").read_text() == "xx"
