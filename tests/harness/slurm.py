"""Stands for sbatch, srun, squeue, scancel and scontrol, with one machine that runs every job at once.

install(folder) puts them into a folder for PATH. A job is a file there, ID.job, with its state, the group of processes
of each of its tasks behind it. In the partition `held`, jobs stay as they are; `closed` takes none.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("SLURM_STANDS_IN", "."))


def install(folder: Path) -> dict[str, str]:
    """The environment for which SLURM is there."""
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -SE {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)
    return {"SLURM_STANDS_IN": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def sbatch(*words: str) -> None:
    text = Path(words[-1]).read_text()
    if "--partition=closed" in text:
        sys.exit("sbatch: error: invalid partition specified: closed")
    number = 1 + len({file.stem.partition("_")[0] for file in FOLDER.glob("*.job")})
    many, tasks = re.search(r"--array=0-(\d+)%", text), re.search(r"--ntasks-per-node=(\d+)", text)
    for i in range(int(many[1]) + 1 if many else 1):
        own = {"SLURM_JOB_ID": f"{number}", "SLURM_NTASKS": tasks[1] if tasks else "1"}
        if many:
            own |= {"SLURM_ARRAY_JOB_ID": f"{number}", "SLURM_ARRAY_TASK_ID": f"{i}"}
        file = FOLDER / (f"{number}_{i}.job" if many else f"{number}.job")
        file.write_text("RUNNING\n")
        if "--partition=held" not in text:
            line = 'bash "$0" && end=COMPLETED || end=FAILED; grep -q CANCELLED "$1" || echo $end >"$1"'
            own["JOB_FILE"] = str(file)
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            command = ["bash", "-c", line, words[-1], str(file)]
            subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True, **quiet)
    print(f"Submitted batch job {number}")


def srun(*words: str) -> None:
    command = list(words[next(i for i, word in enumerate(words) if os.access(word, os.X_OK)) :])
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        tasks.append(subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True))
        with open(os.environ["JOB_FILE"], "a") as file:
            file.write(f"{tasks[-1].pid}\n")
    sys.exit(max(abs(task.wait()) for task in tasks))


def squeue(*words: str) -> None:
    for file in FOLDER.glob("*.job"):
        print(f"{file.stem}|{file.read_text().split()[0]}")


def scancel(*words: str) -> None:
    for file in FOLDER.glob("*.job"):
        state, *tasks = file.read_text().split()
        if file.stem not in words or state != "RUNNING" or "--state=PENDING" in words:
            continue
        for task in tasks:
            os.killpg(int(task), signal.SIGTERM)
        if "--signal=TERM" not in words:
            file.write_text("\n".join(["CANCELLED", *tasks]))


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    with open(FOLDER / "calls", "a") as file:
        file.write(" ".join([name, *words]) + "\n")
    {"sbatch": sbatch, "srun": srun, "squeue": squeue, "scancel": scancel}[name](*words)
