"""The output of main_predict.py: predictions.csv, tables, pictures, the report."""

import json
import os

import numpy as np
from einops import rearrange
from PIL import Image

from augment.image import open_image
from util.choices import VIEW_NAMES
from util.cli.predict import PredictOptions
from util.data.datasets import ArrayDataset, Dataset
from util.data.labels import spreadsheet_safe
from util.files import survive, write_csv, write_text
from util.predict.calibration import accuracy_interval, confusion_counts, scores
from util.predict.ensemble import Combiners, Stacked
from util.predict.members import crop_pct_of, short_names
from util.predict.result import Prediction
from util.report.contact_sheet import Entry, draw_sheet
from util.report.page import Block, Code, Heading, Notes, Picture, Table, Text, markdown, write_report
from util.report.plots import plot_class_distribution, plot_confusion, plot_reliability
from util.train.folds import probability

PICTURES = (
    "class_distribution.png",
    "confusion.png",
    "reliability.png",
    "least_certain.png",
    "most_confidently_wrong.png",
)
SHEET = 24  # images on a contact sheet
LONGEST = 50  # rows of a table in report.md; results.json has all rows
COLUMNS = {
    "accuracy": "accuracy %",
    "balanced_accuracy": "balanced %",
    "macro_f1": "macro F1 %",
    "log_loss": "log loss",
    "ece": "ECE %",
    "confidence": "mean confidence %",
    "agreement": "same class as in bold %",
}
ENSEMBLES = {"equal": "equal weights", "val": "weights by validation", "stacked": "stacked"}


def write_predictions(
    path: str, ids: list[str], prediction: Prediction, final: np.ndarray, classes: list[str], *, safe: bool = False
) -> None:
    """ID, Predict and a probability per class, sorted by ID. Unreadable images have a row without a prediction.

    safe: put an apostrophe before names that a spreadsheet would read as formulas.
    """
    names, ids = ([spreadsheet_safe(t) if safe else t for t in texts] for texts in (classes, ids))
    rows = [[name, *[""] * (1 + len(classes))] for name in ids]
    for i, p in zip(prediction.index, final):
        rows[i][1:] = [names[p.argmax()], *map(probability, p)]
    write_csv(path, ["ID", "Predict", *names], rows, "--output_dir")


def compare(combiners: Combiners, prediction: Prediction) -> list[dict]:
    """Rows of the results table: name, views, probabilities [n, C], chosen.

    Every member and every ensemble, each with view 1 and with all views.
    """
    members, chosen, views = combiners.members, combiners.wanted, len(prediction.views)
    one, many = prediction.one_view, prediction.all_views
    rows: list[dict] = []
    sets = [(1, one)] + ([(views, many)] if views > 1 or not np.array_equal(one, many) else [])
    for name, m in zip(short_names(members), range(len(members))):
        rows += [{"name": name, "views": v, "probabilities": p[m]} for v, p in sets]
    for key, way in combiners.ways.items():
        if len(members) == 1 and not isinstance(way, Stacked):
            continue  # with one member, the weights do not matter
        if isinstance(way, Stacked):
            kept = [(views, prediction.geometric)]
        else:
            kept = sets if key == "equal" else sets[-1:]
        rows += [{"name": ENSEMBLES[key], "views": v, "probabilities": way(p), "way": key} for v, p in kept]
    wanted = None if len(members) == 1 and chosen != "stacked" else chosen
    last = max(i for i, row in enumerate(rows) if row.get("way") == wanted)
    for i, row in enumerate(rows):
        row["chosen"] = i == last
    return rows


def score_rows(rows: list[dict], targets: np.ndarray, final: np.ndarray) -> list[dict]:
    """Rows with numbers in place of probabilities: scores on labelled images, else confidence and agreement."""
    labelled = targets >= 0
    scored = []
    for row in rows:
        p = row["probabilities"]
        if labelled.any():
            numbers = scores(p[labelled], targets[labelled])
        else:
            same = (p.argmax(1) == final.argmax(1)).mean()
            numbers = {"confidence": 100.0 * float(p.max(1).mean()), "agreement": 100.0 * float(same)}
        scored.append({"name": row["name"], "views": row["views"], "chosen": row["chosen"], **numbers})
    return scored


def out_of_fold_rows(combiners: Combiners) -> list[dict]:
    """The same scores on the training images, each predicted by networks that have not seen it."""
    oof = combiners.oof
    if oof is None:
        return []
    named = list(zip(short_names(combiners.members), oof.probabilities))
    for key, way in combiners.ways.items():
        if isinstance(way, Stacked):
            p = combiners.cross_stacked
            named += [] if p is None else [(f"{ENSEMBLES[key]}, fitted on the other folds", p)]
        elif len(combiners.members) > 1:
            named.append((ENSEMBLES[key], way(oof.probabilities)))
    return [{"name": name, "views": 1, "chosen": False, **scores(p, oof.targets)} for name, p in named]


def table(rows: list[dict]) -> Table:
    """The chosen row is in bold."""
    keys = [k for k in COLUMNS if k in rows[0]]
    cells = [
        [row["name"], str(row["views"]), *(f"{row[k]:.4f}" if k == "log_loss" else f"{row[k]:.2f}" for k in keys)]
        for row in rows
    ]
    bold = [i for i, row in enumerate(rows) if row["chosen"]]
    return Table(["prediction", "views", *(COLUMNS[k] for k in keys)], cells, bold, sortable=True)


def class_rows(classes: list[str], final: np.ndarray, targets: np.ndarray) -> list[dict]:
    """Per class: number of predictions and, if there are labels, number of images and recall."""
    predicted = np.bincount(final.argmax(1), minlength=len(classes))
    rows = [{"class": c, "predicted": int(n)} for c, n in zip(classes, predicted)]
    labelled = targets >= 0
    if labelled.any():
        confusion = confusion_counts(final[labelled], targets[labelled])
        for row, counts, right in zip(rows, confusion, np.diag(confusion)):
            row |= {"true": int(counts.sum()), "recall": 100.0 * right / counts.sum() if counts.sum() else None}
    return rows


def class_table(rows: list[dict]) -> list[Block]:
    shown = rows if len(rows) <= LONGEST else sorted(rows, key=lambda r: -r["predicted"])[:LONGEST]
    total = max(1, sum(r["predicted"] for r in rows))
    labelled = "true" in rows[0]
    cells = []
    for r in shown:
        line = [r["class"], str(r["predicted"]), f"{100 * r['predicted'] / total:.1f}"]
        if labelled:
            line += [str(r["true"]), "" if r["recall"] is None else f"{r['recall']:.1f}"]
        cells.append(line)
    columns = ["class", "predicted", "share %", *(["true", "recall %"] if labelled else [])]
    blocks: list[Block] = [Table(columns, cells, sortable=True)]
    if len(rows) > LONGEST:
        blocks.append(Text(f"The {LONGEST} most frequent of {len(rows)} classes."))
    return blocks


def draw_pictures(
    output_dir: str,
    data: Dataset,
    ids: list[str],
    classes: list[str],
    prediction: Prediction,
    final: np.ndarray,
    targets: np.ndarray,
) -> list[str]:
    """Draw the PICTURES that apply and return their names; delete earlier ones."""
    path = {name: os.path.join(output_dir, name) for name in PICTURES}
    for stale in filter(os.path.exists, path.values()):
        with survive(stale, "not removed"):
            os.unlink(stale)
    labelled = targets >= 0
    true = np.bincount(targets[labelled], minlength=len(classes)) if labelled.all() else None
    predicted = np.bincount(final.argmax(1), minlength=len(classes))
    plot_class_distribution(classes, predicted, true, path["class_distribution.png"])
    if labelled.any():
        plot_confusion(confusion_counts(final[labelled], targets[labelled]), classes, path["confusion.png"])
        plot_reliability(final[labelled], targets[labelled], path["reliability.png"])

    def open_rgb(i: int) -> Image.Image:
        if isinstance(data, ArrayDataset):
            return Image.fromarray(rearrange(data.images[i], "c h w -> h w c").numpy().squeeze()).convert("RGB")
        return open_image(data.paths[i], 3)

    def entry(row: int) -> Entry:
        i = int(prediction.index[row])
        ranking = [(classes[c], float(final[row, c])) for c in np.argsort(-final[row], kind="stable")[:2]]
        return Entry(i, ids[i], ranking, classes[targets[row]] if labelled[row] else None)

    confidence = final.max(1)
    unsure = np.argsort(confidence, kind="stable")[:SHEET]
    draw_sheet(
        [entry(r) for r in unsure],
        open_rgb,
        f"Least certain: {len(unsure)} of {len(final)} images",
        path["least_certain.png"],
    )
    wrong = np.flatnonzero(labelled & (final.argmax(1) != targets))
    if len(wrong):
        worst = wrong[np.argsort(-confidence[wrong], kind="stable")[:SHEET]]
        title = f"Most confidently wrong: {len(worst)} of {len(wrong)} wrong images"
        draw_sheet([entry(r) for r in worst], open_rgb, title, path["most_confidently_wrong.png"])
    return [name for name in PICTURES if os.path.exists(path[name])]


def write_all(
    options: PredictOptions,
    *,
    data: Dataset,
    ids: list[str],
    combiners: Combiners,
    prediction: Prediction,
    notes: list[str],
    seconds: float,
) -> str:
    """Write all files into --output_dir; returns the results table as text."""
    members, classes, output_dir = combiners.members, combiners.classes, options.run.output_dir
    rows = compare(combiners, prediction)
    final = next(row["probabilities"] for row in rows if row["chosen"])
    targets = data.targets.numpy()[prediction.index]  # for the readable images
    n_labelled = int((targets >= 0).sum())
    path = os.path.join(output_dir, "predictions.csv")
    write_predictions(path, ids, prediction, final, classes, safe=options.prediction.spreadsheet_safe)
    scored, oof = score_rows(rows, targets, final), out_of_fold_rows(combiners)
    per_class = class_rows(classes, final, targets)
    unreadable = {ids[i]: reason for i, reason in prediction.bad.items()}

    results: list[Block] = [table(scored)]
    interval = None
    if n_labelled:
        right = int((final.argmax(1) == targets)[targets >= 0].sum())
        low, high = interval = accuracy_interval(right, n_labelled)
        said = (
            f"In bold: predictions.csv. Its accuracy is {right} of {n_labelled} labelled images, 95 % interval "
            f"{low:.1f} to {high:.1f} % (Wilson)."
        )
    else:
        said = "No scores without labels; give --labels FILE.csv (ID,label) or class folders. In bold: predictions.csv."
    results.append(Text(said))
    if oof and combiners.oof is not None:
        n = len(combiners.oof.ids)
        about = f"Out of fold, on {n} training images (one view; what to expect on new images):"
        results += [Text(about), table(oof)]
    write_text(os.path.join(output_dir, "results.md"), markdown(results))
    views = [VIEW_NAMES[v] for v in prediction.views]
    content = {
        "images": len(ids),
        "labelled": n_labelled,
        "accuracy_interval": interval,
        "unreadable": unreadable,
        "views": views,
        "results": scored,
        "out_of_fold": oof,
        "classes": per_class,
        "members": member_facts(combiners),
    }
    write_text(os.path.join(output_dir, "results.json"), json.dumps(content, indent=2) + "\n")
    pictures = draw_pictures(output_dir, data, ids, classes, prediction, final, targets)

    blocks = [
        Text(f"{len(members)} member{'s' if len(members) > 1 else ''}, views: {', '.join(views)}; {seconds:.0f} s."),
        Notes(notes),
        *(Heading("Results"), *results),
        *(Heading("Members"), *member_table(combiners)),
        *(Heading("Classes"), *class_table(per_class)),
    ]
    if unreadable:
        lines = [(Code(name), f": {reason}") for name, reason in unreadable.items()]
        blocks += [Heading(f"Not readable: {len(unreadable)}"), Notes(lines)]
    blocks += [Heading("Pictures"), *(Picture(name[:-4].replace("_", " "), name) for name in pictures)]
    write_report(output_dir, f"Predictions for {len(ids)} images", blocks, options)
    return markdown(results).rstrip()


def member_facts(combiners: Combiners) -> list[dict]:
    facts = []
    for i, (name, m) in enumerate(zip(short_names(combiners.members), combiners.members)):
        meta = m.metas[0]
        fact: dict = {"name": name, "model": m.model, "checkpoints": m.paths}
        fact |= {"img_size": meta["img_size"], "in_chans": meta["in_chans"], "crop_pct": crop_pct_of(meta)}
        if combiners.val_scores:
            fact |= {combiners.val_score: combiners.val_scores[i], "weight": float(combiners.ways["val"].weights[i])}
        facts.append(fact)
    return facts


def member_table(combiners: Combiners) -> list[Block]:
    score = combiners.val_score
    rows = []
    for f in member_facts(combiners):
        size = f"{f['in_chans']} x {f['img_size'][0]} x {f['img_size'][1]}, crop {f['crop_pct']:g}"
        more = [f"{f[score]:.2f}", f"{f['weight']:.4f}"] if score else []
        rows.append([f["name"], f["model"], str(len(f["checkpoints"])), size, *more])
    more = [f"best val {score} %", "weight by it"] if score else []
    blocks: list[Block] = [Table(["member", "model", "networks", "input", *more], rows, sortable=True)]
    if "stacked" in combiners.ways:
        how = "equally, as in the members' training" if combiners.balanced else "by frequency"
        words = (
            f"Stacked: logistic regression on log-probabilities, {combiners.ways['stacked']}, classes weighted {how}."
        )
        blocks.append(Text(words))
    return blocks
