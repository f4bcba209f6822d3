"""A search's report: report.html, report.md, table.csv."""

import os
from typing import Any

import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from util.files import write_csv
from util.report.page import Block, Heading, Notes, Picture, Table, Text, write_report
from util.report.plots import COLORS
from util.report.sweep import draw, literal
from util.sweep.results import less_is_better
from util.sweep.search import Search


def rows_of(search: Search) -> list[dict[str, str]]:
    """A row of text per trial, the best first."""
    order = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1}
    sign = 1 if less_is_better(search.metric) else -1
    rows = []
    for t in sorted(search.trials(), key=lambda t: (order.get(t.state, 2), sign * (t.value or 0.0), t.number)):
        epochs = len(t.intermediate_values)
        rows.append(
            {
                "trial": str(t.number),
                search.metric: f"{t.value:.6g}" if t.state == TrialState.COMPLETE else "",
                **{key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in t.params.items()},
                "state": {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed"}.get(
                    t.state, t.state.name.lower()
                ),
                "epochs run": str(epochs) if epochs else "",
            }
        )
    return rows


@literal
def draw_history(search: Search) -> str:
    """Each finished trial's value, and the best so far."""
    finished = search.study.get_trials(states=(TrialState.COMPLETE,))
    done = [(t.number, t.value) for t in finished if t.value is not None]
    figure = Figure(figsize=(7, 3.2))
    axes = figure.add_subplot()
    axes.plot(*zip(*done), "o", color=COLORS[0], markersize=4, label="trial")
    better = min if less_is_better(search.metric) else max
    best = [better(value for _, value in done[: i + 1]) for i in range(len(done))]
    axes.step([number for number, _ in done], best, where="post", color=COLORS[1], label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(search.metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return draw(figure)


@literal
def draw_slices(search: Search) -> str:
    """The value of each finished trial against each of its parameters."""
    done = search.study.get_trials(states=(TrialState.COMPLETE,))
    columns = min(3, len(search.space))
    lines = -(-len(search.space) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, (key, distribution) in zip(panels, search.space.items()):
        values: list[Any] = [t.params[key] for t in done if t.params]
        axes.plot(values, [t.value for t in done if t.params], "o", color=COLORS[0], alpha=0.6, markersize=4)
        if isinstance(distribution, FloatDistribution) and distribution.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif isinstance(distribution, CategoricalDistribution):
            axes.margins(x=0.2)
        axes.set_xlabel(key)
        axes.grid(alpha=0.3)
    for axes in panels:
        axes.set_axis_off()
    figure.supylabel(search.metric, fontsize=10)
    return draw(figure)


def importances(search: Search) -> list[Block]:
    """How much of the values' variance each parameter explains (fANOVA, Hutter et al., ICML 2014)."""
    done = search.study.get_trials(states=(TrialState.COMPLETE,))
    if len(search.space) < 2 or len({t.value for t in done}) < 4:
        return []
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(search.study, evaluator=evaluator)
    table = Table(["parameter", "share of the variance"], [[k, f"{v:.2f}"] for k, v in found.items()])
    return [
        Heading("What mattered"),
        table,
        Text("By fANOVA, over the finished trials; rough for fewer than some fifty."),
    ]


def write_search_report(search: Search) -> list[dict[str, str]]:
    """report.html, report.md and table.csv; returns the table's rows."""
    rows, best, out = rows_of(search), search.best, search.settings.output_dir
    write_csv(os.path.join(out, "table.csv"), list(rows[0]), [list(row.values()) for row in rows], "--output_dir")
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    blocks: list[Block] = [Text(f"{len(rows)} trials of Optuna's TPE: {counts}.")]
    if best is not None:
        words = " ".join(f"--{key.rpartition('.')[2]} {value}" for key, value in search.arm_of(best).items())
        folder = os.path.relpath(best.user_attrs["folder"], out)
        blocks.append(Text(f"Best: trial {best.number}, {search.metric} {best.value:.6g}, {words}, in {folder}."))
        chosen = "The best of several trials on one validation set is too good: measure it on other images or seeds."
        blocks.append(Text(chosen))
    blocks.append(Table(list(rows[0]), [list(row.values()) for row in rows], sortable=True))
    if best is not None:
        history = Picture(f"By trial: {search.metric}", svg=draw_history(search))
        blocks += [history, Picture(f"By parameter: {search.metric}", svg=draw_slices(search)), *importances(search)]
    reasons = [f"trial {t.number}: {t.user_attrs['reason']}" for t in search.trials() if "reason" in t.user_attrs]
    blocks += [Heading("Refused"), Notes(reasons)] if reasons else []
    write_report(out, f"Search: {search.metric}", blocks, flag="--output_dir")
    return rows
