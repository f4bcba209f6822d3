"""The folds of a k-fold run put together."""

import json
import math

import pytest

from util.errors import UserError
from util.train.folds import refuse_other_folds, summarise


def write_fold(output_dir, fold: int, best: dict, row: str) -> None:
    where = output_dir / f"fold-{fold}"
    where.mkdir()
    (where / "oof.csv").write_text(f"ID,fold,True,hen,owl\n{row}\n")
    (where / "result.json").write_text(json.dumps({"best": best, "notes": ["grey images"]}))


def test_the_summary_has_each_scores_mean_and_sample_deviation_and_all_rows(tmp_path):
    for fold, acc in enumerate((90.0, 91.0, 95.0)):
        write_fold(
            tmp_path, fold, {"epoch": fold, "val_acc1": acc, "val_loss": 0.5}, f"{fold}.png,{fold},owl,0.25,0.75"
        )
    told = summarise(str(tmp_path), 3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"val_acc1", "val_loss"} and summary["val_acc1"]["folds"] == [90.0, 91.0, 95.0]
    assert summary["val_acc1"]["mean"] == 92.0 and summary["val_loss"]["std"] == 0.0
    assert summary["val_acc1"]["std"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert (tmp_path / "oof.csv").read_text().splitlines() == [
        "ID,fold,True,hen,owl",
        *(f"{fold}.png,{fold},owl,0.25,0.75" for fold in range(3)),
    ]
    assert (told.scores, told.images, told.notes) == (summary, 3, ["grey images"])


def test_what_is_no_fold_of_this_run_is_one_line(tmp_path):
    write_fold(tmp_path, 1, {"val_acc1": 90.0}, "1.png,1,owl,0.25,0.75")
    with pytest.raises(UserError, match=r"fold-0/oof\.csv: .*run that fold again with --overwrite$"):
        summarise(str(tmp_path), 2)
    refuse_other_folds(str(tmp_path), 2)
    with pytest.raises(UserError, match=r"--kfold 1: .*fold-1 of another run"):
        refuse_other_folds(str(tmp_path), 1)
