"""What checkpoints say of themselves, in this version's words and in earlier ones'."""

from tests.harness.prediction import save_head
from util.meta import check_meta
from util.predict.members import find_members


def test_fine_tuned_checkpoints_are_read_under_both_kinds(tmp_path):
    for kind in ("finetune", "classifier"):
        save_head(tmp_path / kind / "checkpoint-best.pth", kind=kind)
    members, _ = find_members([str(tmp_path / kind) for kind in ("finetune", "classifier")])
    assert [member.metas[0]["kind"] for member in members] == ["finetune"] * 2
    for kind in ("pretrain", "noprop_mae", None):
        meta = {"kind": kind}
        check_meta(meta, "x.pth")
        assert meta == {"kind": kind}
