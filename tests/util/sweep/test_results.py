import json

from util.sweep.results import epoch_of, lines_of, points_of


def curve_of(folder, metric):
    return points_of(lines_of(folder), metric)


def test_a_k_fold_run_counts_by_the_mean_of_its_folds_where_all_have_an_epoch(tmp_path):
    """The second fold stopped after two epochs."""
    for fold, values in enumerate(([10.0, 20.0, 90.0], [30.0, None], [50.0, 70.0, 80.0])):
        folder = tmp_path / f"fold-{fold}"
        folder.mkdir()
        lines = [{"epoch": e, "val_acc1": v, "model": "x"} for e, v in enumerate(values)]
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve_of(str(tmp_path), "val_acc1") == [(0, 30.0)], "one of three values is missing in epoch 1"
    (tmp_path / "fold-1" / "log.txt").write_text('{"epoch": 0, "val_acc1": 30.0}\n{"epoch": 1, "val_acc1": 60.0}\n')
    assert curve_of(str(tmp_path), "val_acc1") == [(0, 30.0), (1, 50.0)]


def test_a_run_that_diverged_is_not_read_at_its_last_finite_epoch():
    lines = [{"epoch": 0, "val_loss": 2.0}, {"epoch": 1, "val_loss": 1.0}, {"epoch": 2, "val_loss": None}]
    assert epoch_of(lines, "val_loss", "last") == 2 and points_of(lines, "val_loss") == [(0, 2.0), (1, 1.0)]
    assert epoch_of(lines, "val_loss", "best") == 1
