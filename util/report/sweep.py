"""A sweep's report: report.html (one file, with pictures), report.md, table.csv."""

import io
import math
import os
import shlex
import sys

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from util.files import must_write, write_atomic, write_csv
from util.log import git_commit, versions
from util.report.markdown import cell, write_report
from util.sweep.results import ArmResult, less_is_better

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe and Ito


def number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def interval(low: float, high: float, digits: int) -> str:
    return "" if math.isnan(low) else f"{low:.{digits}f} to {high:.{digits}f}"


def digits_of(results: list[ArmResult], metric: str) -> int:
    """Decimals of a metric: 2 for percentages, 4 for losses and shares."""
    means = [abs(result.scores[metric].summary[0]) for result in results if result.scores[metric].runs]
    return 2 if max(means, default=0.0) >= 5 else 4


def table(results: list[ArmResult], metric: str) -> list[dict[str, str]]:
    """A row of text per arm, the base first."""
    rows, lacking, digits = [], any(result.missing for result in results), digits_of(results, metric)
    for result in results:
        score = result.scores[metric]
        mean, low, high = score.summary
        c = score.comparison
        rows.append(
            {
                "arm": result.name,
                "runs": str(len(score.runs)),
                **({"missing": str(len(result.missing))} if lacking else {}),
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
    """A figure as SVG without the XML header, to embed in a page."""
    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
    return out.getvalue()[out.getvalue().index("<svg") :]


def draw_means(results: list[ArmResult], metric: str) -> str:
    """Plot each arm's mean and interval, with its runs as dots."""
    figure = Figure(figsize=(7, 1.0 + 0.38 * len(results)))
    axes = figure.add_subplot()
    for i, result in enumerate(results):
        score = result.scores[metric]
        mean, low, high = score.summary
        axes.plot(list(score.runs.values()), [i] * len(score.runs), "o", color=COLOURS[0], alpha=0.35, markersize=4)
        if not math.isnan(low):
            axes.plot([low, high], [i, i], color=COLOURS[0], linewidth=2)
        if score.runs:
            axes.plot([mean], [i], "o", color=COLOURS[0], markersize=7)
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlabel(metric)
    axes.grid(axis="x", alpha=0.3)
    return draw(figure)


def draw_curves(results: list[ArmResult], metric: str) -> str:
    """Plot the mean over an arm's runs by epoch, with a band from lowest to highest."""
    figure = Figure(figsize=(7, 3.6))
    axes = figure.add_subplot()
    for i, result in enumerate(results[: len(COLOURS)]):
        curves = result.scores[metric].curves
        epochs = sorted({epoch for curve in curves for epoch, _ in curve})
        at = [[value for curve in curves for e, value in curve if e == epoch] for epoch in epochs]
        if not epochs:
            continue
        axes.plot(epochs, [sum(v) / len(v) for v in at], color=COLOURS[i], label=result.name)
        axes.fill_between(epochs, [min(v) for v in at], [max(v) for v in at], color=COLOURS[i], alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return draw(figure)


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
            axes.text(j, i, text, ha="center", va="center", fontsize=8, bbox=dict(fc="white", ec="none", pad=1))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(second)
    axes.set_ylabel(first)
    figure.colorbar(image, label=metric)
    return draw(figure)


def write_sweep_report(output_dir: str, results: list[ArmResult], settings) -> dict[str, list[dict[str, str]]]:
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
    lines = {
        job.name: shlex.join([job.stage.script, *job.words])
        for r in results
        for chain in r.chains.values()
        for job in chain
    }
    drawn = {m: [draw_means(results, m), draw_curves(results, m), draw_map(results, m)] for m in settings.metric}
    page = (
        Environment(loader=PackageLoader("util.report", "."), autoescape=True)
        .get_template("sweep.html")
        .render(
            title=f"Sweep: {', '.join(settings.metric)}",
            command=shlex.join(["python", *sys.argv]),
            words=words,
            tables=tables,
            pictures={metric: [p for p in pictures if p] for metric, pictures in drawn.items()},
            missing=missing,
            lines=lines,
            versions={**versions(), "commit": git_commit() or "unknown"},
        )
    )
    path = os.path.join(output_dir, "report.html")
    with must_write("--output_dir", path):
        write_atomic(path, lambda file: file.write(page.encode()))
    with must_write("--output_dir", output_dir):
        flat = [{"metric": metric, **row} for metric, rows in tables.items() for row in rows]
        write_csv(os.path.join(output_dir, "table.csv"), list(flat[0]), [list(row.values()) for row in flat])
    text = [words, ""]
    for metric, rows in tables.items():
        text += [f"## {metric}", "", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
        text += [*(f"| {' | '.join(cell(v) for v in row.values())} |" for row in rows), ""]
    text += [*(f"- {cell(line)}" for line in missing), "" if missing else "Every run finished.", ""]
    write_report(output_dir, f"Sweep: {', '.join(settings.metric)}", text)
    return tables
