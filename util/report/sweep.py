"""A sweep's report: report.html (one file, with pictures), report.md, table.csv."""

import io
import json
import math
import os
import shlex
from collections import Counter
from contextlib import suppress
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from util.cli.flags import shown
from util.cli.settings import Sweep
from util.files import write_csv
from util.log import read_log
from util.report.page import Block, Folded, Heading, Lines, Notes, Picture, Table, Text, write_report
from util.report.plots import COLORS, curve_styles
from util.sweep.jobs import Job
from util.sweep.results import ArmResult, less_is_better

MOST = 12  # arms in a plot of curves
# An arm named $a$ is no formula; letters stay text, not outlines of twice the size; equal pages are equal files.
literal = rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "noisevit"})
SILENT = ("Creator", "Date", "Format", "Type")  # what an SVG says of itself


def number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.00


def interval(low: float, high: float, digits: int) -> str:
    return "" if math.isnan(low) else f"{number(low, digits)} to {number(high, digits)}"


def digits_of(results: list[ArmResult], metric: str) -> int:
    """Decimals of a metric: 2 for percentages, 4 for losses and shares."""
    means = [abs(result.scores[metric].summary[0]) for result in results if result.scores[metric].runs]
    return 2 if max(means, default=0.0) >= 5 else 4


def table(results: list[ArmResult], metric: str) -> list[dict[str, str]]:
    """A row of text per arm, the base first."""
    rows, lacking, digits = [], any(r.missing or r.scores[metric].lost for r in results), digits_of(results, metric)
    for result in results:
        score = result.scores[metric]
        mean, low, high = score.summary
        c = score.comparison
        rows.append(
            {
                "arm": result.name,
                "runs": str(len(score.runs)),
                **({"missing": str(len(result.missing) + len(score.lost))} if lacking else {}),
                "mean": number(mean, digits),
                "95 % interval": interval(low, high, digits),
                "difference": "base" if c is None else number(c.difference, digits),
                "its 95 % interval": "" if c is None else interval(c.low, c.high, digits),
                **({"pairs": "" if c is None else str(c.n)} if lacking else {}),
                "p": "" if c is None else number(c.p, 4),
                "p (Holm)": "" if c is None else number(c.p_holm, 4),
                "p (sign)": "" if c is None else number(c.p_sign, 4),
                "seconds": f"{result.seconds:.0f}",
            }
        )
    return rows


def draw(figure: Figure) -> str:
    """A figure as SVG to embed in a page: what is black has the colour of the page's text."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", metadata=dict.fromkeys(SILENT))
    return out.getvalue()[out.getvalue().index("<svg") :].replace("#000000", "currentColor")


@literal
def draw_means(results: list[ArmResult], metric: str) -> str:
    """Plot each arm's mean and interval, with its runs as dots."""
    figure = Figure(figsize=(7, 1.0 + 0.38 * len(results)))
    axes = figure.add_subplot()
    for i, result in enumerate(results):
        score = result.scores[metric]
        mean, low, high = score.summary
        axes.plot(
            list(score.runs.values()), [i + 0.22] * len(score.runs), "o", color=COLORS[0], alpha=0.6, markersize=3
        )
        if not math.isnan(low):
            axes.plot([low, high], [i, i], color=COLORS[0], linewidth=2)
        if score.runs:
            axes.plot([mean], [i], "o", color=COLORS[0], markersize=7)
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlabel(metric)
    axes.grid(axis="x", alpha=0.3)
    return draw(figure)


@literal
def draw_curves(results: list[ArmResult], metric: str) -> str | None:
    """Plot the mean over an arm's runs by epoch, with a band from lowest to highest; None without epochs."""
    if not any(len(curve) > 1 for result in results for curve in result.scores[metric].curves):
        return None
    figure = Figure(figsize=(7, 3.6))
    axes = figure.add_subplot()
    for how, result in zip(curve_styles(min(MOST, len(results))), results):
        curves = result.scores[metric].curves
        epochs = sorted({epoch for curve in curves for epoch, _ in curve})
        at = [[value for curve in curves for e, value in curve if e == epoch] for epoch in epochs]
        if not epochs:
            continue
        axes.plot(epochs, [sum(v) / len(v) for v in at], label=result.name, **how)
        lowest, highest = ([f(v) for v in at] for f in (min, max))
        axes.fill_between(epochs, lowest, highest, color=how["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return draw(figure)


@literal
def draw_map(results: list[ArmResult], metric: str) -> str | None:
    """A heat map of the means over two axes; None if the arms do not have two axes."""
    axes_of = [tuple(result.values) for result in results]
    if len(set(axes_of)) != 1 or len(axes_of[0]) != 2:
        return None
    first, second = axes_of[0]
    rows, columns = (list(dict.fromkeys(r.values[name] for r in results)) for name in (first, second))
    if len(rows) < 2 or len(columns) < 2 or len(rows) * len(columns) != len(results):
        return None
    means = {(r.values[first], r.values[second]): r.scores[metric].summary[0] for r in results}
    figure = Figure(figsize=(1.6 + 0.9 * len(columns), 1.2 + 0.5 * len(rows)))
    axes = figure.add_subplot()
    grid = [[means[row, column] for column in columns] for row in rows]
    image = axes.imshow(grid, aspect="auto", cmap="viridis_r" if less_is_better(metric) else "viridis")
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            text = number(value, digits_of(results, metric))
            box = dict(fc="white", ec="none", pad=1)
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="#111111", bbox=box)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(second)
    axes.set_ylabel(first)
    figure.colorbar(image, label=metric)
    return draw(figure)


def draw_all(results: list[ArmResult], metric: str) -> list[Block]:
    some = f"; the first {MOST} of {len(results)} arms" if len(results) > MOST else ""
    drawn = [
        Picture(f"each arm's mean of {metric}, its 95 % interval and runs", svg=draw_means(results, metric)),
        Picture(f"mean of {metric} by epoch, lowest to highest run{some}", svg=draw_curves(results, metric) or ""),
        Picture(f"mean of {metric} by both axes", svg=draw_map(results, metric) or ""),
    ]
    return [picture for picture in drawn if picture.svg]


def cost(results: list[ArmResult]) -> Table:
    """Time and speed of each arm; images/s of each stage that logs them."""
    speeds: list[dict[str, str]] = []
    for result in results:
        logged: dict[str, list[float]] = {}
        for job in jobs_of(result):
            lines = read_log(os.path.join(job.folder, "log.txt"))
            logged.setdefault(job.stage.key, []).extend(v for one in lines if (v := one.get("images_per_second")))
        speeds.append({stage: f"{sum(v) / len(v):.4g}" for stage, v in logged.items() if v})
    stages = list(dict.fromkeys(stage for speed in speeds for stage in speed))
    rows = []
    for result, speed in zip(results, speeds):
        runs = len(result.chains) - len(result.missing)
        each = f"{result.seconds / runs:.0f}" if runs else ""
        rows.append([result.name, str(runs), f"{result.seconds:.0f}", each, *(speed.get(s, "") for s in stages)])
    return Table(["arm", "runs", "seconds", "seconds a run", *(f"images/s, {s}" for s in stages)], rows, sortable=True)


def jobs_of(result: ArmResult) -> list[Job]:
    return list({id(job): job for chain in result.chains.values() for job in chain}.values())


def args_of(job: Job) -> dict:
    with suppress(OSError, ValueError):
        return json.loads(Path(job.folder, "args.json").read_text("utf-8"))
    return {}


def differing(results: list[ArmResult], output_dir: str) -> list[Block]:
    """The settings that are not the same in all arms, as the runs recorded them, and the versions of the runs."""
    found: list[dict[str, set[str]]] = []  # per arm, the values of each flag
    versions: Counter[str] = Counter()
    for result in results:
        values: dict[str, set[str]] = {}
        for job in jobs_of(result):
            args, flags = args_of(job), job.stage.options.flags()
            for k, value in args.get("options", {}).items():
                if k in flags and not str(value).startswith(output_dir):
                    values.setdefault(f"{job.stage.key} {flags[k].name}", set()).add(shown(value))
            if args:
                said = [f"{k} {v}" for k, v in args.get("versions", {}).items()]
                versions["; ".join([*said, f"commit {args.get('git') or 'unknown'}"])] += 1
        found.append(values)
    names = list(dict.fromkeys(name for values in found for name in values))
    names = [n for n in names if len({frozenset(values.get(n, ())) for values in found}) > 1]
    rows = [
        [result.name, *(", ".join(sorted(values.get(n, ()))) for n in names)] for result, values in zip(results, found)
    ]
    stages = {name.split()[0] for name in names}
    columns = [name if len(stages) > 1 else name.split()[1] for name in names]
    counted = [f"{n} run{'s' if n > 1 else ''}: {said}." for said, n in versions.items()]
    blocks: list[Block] = []
    if names:
        blocks += [Heading("Settings that differ"), Table(["arm", *columns], rows, sortable=True)]
    if counted:
        blocks += [Heading("Versions of the runs"), Notes(counted)]
    return blocks


def write_sweep_report(output_dir: str, results: list[ArmResult], settings: Sweep) -> dict[str, list[dict[str, str]]]:
    """report.html, report.md and table.csv; returns the table's rows by metric."""
    tables = {metric: table(results, metric) for metric in settings.metric}
    first = settings.metric[0]
    how = f"{', '.join(settings.metric)} of the {'last epoch' if settings.pick == 'last' else f'best epoch by {first}'}"
    pairs = (
        f"paired by {settings.paired}: mean difference, bootstrap interval (BCa), t-test and sign test"
        if settings.paired
        else "independent runs: Welch's test and interval"
    )
    compared = sum(s.comparison is not None for r in results for s in r.scores.values())
    base = "the base arm" + (f" of each {settings.within}" if settings.within else "")
    words = f"{how}; differences from {base}, {pairs}; Holm's correction for {compared} comparisons."
    failed = [job for result in results for job in result.missing]
    missing = [f"{job.name}: {job.state}, see {os.path.relpath(job.output, output_dir)}" for job in failed]
    missing += [text for result in results for score in result.scores.values() for text in score.lost]
    ran = {job.name: job for result in results for job in jobs_of(result)}
    lines = [shlex.join(["python", job.stage.script, *job.words]) for job in ran.values()]
    flat = [{"metric": metric, **row} for metric, rows in tables.items() for row in rows]
    write_csv(
        os.path.join(output_dir, "table.csv"), list(flat[0]), [list(row.values()) for row in flat], "--output_dir"
    )
    blocks: list[Block] = [Text(words)]
    for metric, rows in tables.items():
        cells = [list(row.values()) for row in rows]
        blocks += [Heading(metric), Table(list(rows[0]), cells, sortable=True), *draw_all(results, metric)]
    if missing:
        blocks += [Heading("Runs without a result"), Notes(missing)]
    blocks += [Heading("Cost"), cost(results), *differing(results, output_dir)]
    blocks.append(Heading("What ran"))
    if not missing:
        blocks.append(Text("Every run finished."))
    blocks.append(Folded(f"{len(lines)} lines", [Lines(lines)]))
    write_report(output_dir, f"Sweep: {', '.join(settings.metric)}", blocks, flag="--output_dir")
    return tables
