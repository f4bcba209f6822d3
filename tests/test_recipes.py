"""Every recipe that is shipped is read by the main that it is for; every one that is named exists."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.harness import ROOT
from tests.harness.runs import NET
from util.cli import finetune, pretrain

RECIPES = sorted((ROOT / "recipes").glob("*.args"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_pass_the_parser_and_the_checks_of_their_main(path):
    """A recipe for main_pretrain_noprop.py says pretrain or noprop in its name; the others are for main_finetune.py."""
    main = pretrain if re.search("pretrain|noprop", path.name) else finetune
    options = main.get_options([f"@{path}"]).flat()
    text = re.sub(r"(?m)^#.*", "", path.read_text("utf-8"))
    assert set(re.findall(r"--(\w+)", text)) <= set(options)
    numbers = re.findall(r"--(\w+) ([-.\de]+)(?=\s+--|\s*$)", text)
    assert len(numbers) > 4 and all(options[k] in (float(v), [float(v)]) for k, v in numbers)


def test_recipes_that_are_named_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")]
    texts = [*pages, ROOT / "Makefile", ROOT / "recipes/slurm.sbatch", *RECIPES]
    named = {name for text in texts for name in re.findall(r"@recipes/([\w.]+args)", text.read_text("utf-8"))}
    assert len(named - {"x.args"}) >= 6 and named - {"x.args"} <= {path.name for path in RECIPES}


# Stand-ins for what SLURM has, with two nodes of one task each. srun starts the tasks, hands a signal on to all of them
# and ends with the highest code.
SRUN = """#!{python}
import os, signal, subprocess, sys
tasks = [
    subprocess.Popen(sys.argv[1:], env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": "0"}})
    for i in range(2)
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
if [ "$*" = "show hostnames localhost,node-[7]" ]; then printf "localhost\\nnode-7\\n"; else echo scontrol $@; fi
"""


@pytest.mark.slow
def test_the_slurm_job_requeues_only_when_time_is_up(tmp_path):
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost,node-[7]"}
    slurm |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = ["main_finetune.py", *NET, "--batch_size", "32", "--output_dir", str(tmp_path / "out"), "--epochs"]

    def job(epochs: int, at: str | None) -> tuple[int, str]:
        """(its exit code, what it said) of one that gets the signal at a line that begins so."""
        command = ["bash", "recipes/slurm.sbatch", *line, str(epochs)]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process, said = subprocess.Popen(command, cwd=ROOT, env=environment, **out), ""
        for text in process.stdout:
            said += text
            if at and text.startswith(at):
                process.send_signal(signal.SIGUSR1)
        return process.wait(timeout=60), said

    code, said = job(500, at="epoch 0:")
    assert code == 75 and said.endswith(f"scontrol requeue {os.getpid()}\n"), said
    assert "2 x cpu" in said and "stopped by a signal at epoch " in said
    done = int(re.search(r"stopped by a signal at epoch (\d+)", said)[1])
    code, said = job(done + 1, at=None)
    assert code == 0 and "resume: " in said and "scontrol" not in said, said
