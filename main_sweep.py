"""Run a script for every combination of some flags' values, compare the arms by paired statistics, write a report.

python main_sweep.py --grid alpha_blend=0,15,50 seed=0..4 --paired seed --jobs 2 --output_dir sweeps/noise \\
    -- main_finetune.py @recipes/digits_finetune.args --finetune pretrain/checkpoint-last.pth
python main_sweep.py --grid T=1,4 seed=0..2 --paired seed --metric knn_acc1 --output_dir sweeps/levels \\
    -- main_pretrain_noprop.py @recipes/digits_pretrain.args -- main_linprobe.py --checkpoint {pretrain}
python main_sweep.py --search optuna --trials 30 --grid lr=log(1e-4,1e-2) layer_decay=lin(0.5,1) aug=light,photo \\
    --output_dir sweeps/search -- main_finetune.py @recipes/photos_small.args --data_path photos

The same command continues a sweep: finished runs stay, interrupted ones resume; more values add arms.
"""

from util.cli.script import check_command_line, run_main, says_flags
from util.cli.sweep import get_args_parser, get_options  # noqa: F401 (a public name)

if __name__ == "__main__":  # report a mistyped flag before other imports
    check_command_line(get_options)

import os
import shlex

from util.cli.settings import Sweep
from util.report.sweep import write_sweep_report
from util.sweep import grid, jobs
from util.sweep.results import collect, group


@says_flags
def main(argv: list[str] | None = None) -> int:
    options, lines = get_options(argv)
    settings = options.sweep
    stages = grid.parse_stages(lines)
    launcher = choose_launcher(settings)
    if settings.search:
        return run_search(settings, stages, launcher)
    arms = grid.expand(settings.grid, stages)
    chains = jobs.plan(arms, stages, settings.output_dir)
    runs = list({id(job): job for chain in chains.values() for job in chain}.values())
    jobs.check(runs)
    results = group(arms, chains, settings)
    if settings.dry_run:
        print_lines(runs)
        return 0
    jobs.claim(settings.output_dir, search=False)
    jobs.read_records(runs, settings.retry)
    waiting = sum(job.state == "waiting" for job in runs)
    say(f"{len(arms)} arms and seeds, {len(runs)} runs, {waiting} to do, {settings.jobs} at a time")
    if jobs.run_all(runs, launcher, say):
        say("interrupted; the same command continues")
        return 130

    collect(results, settings)
    for metric, rows in write_sweep_report(settings.output_dir, results, settings).items():
        for row in rows:
            say(f"{metric}: " + "  ".join(f"{k} {v}" for k, v in row.items() if v))
    say(f"report: {os.path.join(settings.output_dir, 'report.html')}")
    return 1 if any(job.state != "finished" for job in runs) else 0


def choose_launcher(settings: Sweep) -> jobs.Launcher:
    if settings.launcher == "local":
        return jobs.Local(settings.jobs)
    from util.sweep.slurm import Slurm  # imports submitit

    return Slurm(settings.jobs, settings.output_dir, settings.slurm)


def run_search(settings: Sweep, stages: list[grid.Stage], launcher: jobs.Launcher) -> int:
    """--search: trials one after another, or --jobs at a time, until there are --trials."""
    from util.report.search import write_search_report
    from util.sweep.search import Search

    search = Search(settings, stages)
    if settings.dry_run:
        print_lines(search.ends)
        return 0
    jobs.claim(settings.output_dir, search=True)
    search.start()
    say(f"{len(search.trials())} of {settings.trials} trials begun, {settings.jobs} at a time")
    interrupted = jobs.run_all(search.jobs(), launcher, say, search)
    search.settle()
    if interrupted:
        say("interrupted; the same command continues")
        return 130
    for row in write_search_report(search)[:5]:
        say("  ".join(f"{k} {v}" for k, v in row.items() if v))
    say(f"report: {os.path.join(settings.output_dir, 'report.html')}")
    return 0 if search.best is not None else 1


def print_lines(runs: list[jobs.Job]) -> None:
    for job in runs:
        print(shlex.join(["python", job.stage.script, *job.words]))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_main(main)
