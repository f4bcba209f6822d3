"""Positions on another grid: of tokens, of relative position tables, and grids that cannot be told."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table

from models import create_model, load_pretrained
from models.positions import _published_grid, _uncounted
from tests.harness.checks import one_line
from tests.harness.weights import PATCH, REGISTERS, as_file, vit
from util.errors import UserError

TABLE = "relative_position_bias_table"


def ramp(grid) -> torch.Tensor:
    """[1, H W, 12]: the place of each patch's centre in the image, (row, column) in shares of it, six times."""
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in grid), indexing="ij")
    return torch.stack([y, x], -1).reshape(1, -1, 2).repeat(1, 1, 6)


def with_ramp(size, prefix=(), **extra):
    """State dict of a ViT: `prefix` holds the value of each position before the patches, which hold a ramp."""
    state = vit(size, **extra).state_dict()
    rows = torch.tensor(prefix).view(1, -1, 1).expand(1, -1, 12)
    state["pos_embed"] = torch.cat([rows, ramp([s // PATCH for s in size])], 1)
    return state


@pytest.mark.parametrize("old", [(32, 32), (16, 32), (16, 64), (48, 80), (8, 128)])
@pytest.mark.parametrize("new", [(32, 32), (32, 16), (16, 64), (96, 96), (64, 64)])
def test_positions_of_this_projects_files_come_from_their_place_in_the_image(tmp_path, old, new):
    state = with_ramp(old, (100.0,))
    model = vit(new)
    report = load_pretrained(model, as_file(tmp_path / "x.pth", state, old))
    grids = [tuple(s // PATCH for s in size) for size in (old, new)]
    image = state["pos_embed"][:, 1:].double().reshape(1, *grids[0], 12).permute(0, 3, 1, 2)
    oracle = F.interpolate(image, size=grids[1], mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.allclose(model.pos_embed[:, 1:].double(), oracle, atol=1e-5)
    # A cubic bends at the border, by less than 0.4 patches of the old grid.
    assert (model.pos_embed[:, 1:] - ramp(grids[1])).abs().max() < 0.4 / min(grids[0])
    assert (model.pos_embed[0, 0] == 100).all() and report.resized == ["pos_embed"] * (old != new)


def test_positions_of_tokens_go_to_the_same_tokens(tmp_path):
    """(file, model, its positions before the patches, what is added to its class token); a token of the model that the
    file lacks keeps the model's own position."""
    deit = {"name": "deit_tiny_distilled_patch16_224", "patch_size": PATCH}
    for number, (old, new, before, rows, added) in enumerate(
        [
            ({}, {}, (7.0,), [7.0], 0.0),
            (deit, {}, (7.0, 9.0), [7.0], 0.0),
            ({}, deit, (7.0,), [7.0, None], 0.0),
            (REGISTERS, {}, (), [0.0], 0.0),
            ({}, REGISTERS, (7.0,), [], 7.0),
            ({"reg_tokens": 3}, REGISTERS, (7.0, 1.0, 2.0, 3.0), [], 7.0),
            (REGISTERS, {"reg_tokens": 3}, (), [0.0] * 4, 0.0),
            ({"reg_tokens": 3}, {}, (7.0, 1.0, 2.0, 3.0), [7.0], 0.0),
            (
                {"reg_tokens": 3, "class_token": False},
                {"reg_tokens": 3, "class_token": False},
                (1.0, 2.0, 3.0),
                [1.0, 2.0, 3.0],
                0.0,
            ),
            ({"class_token": False}, {}, (), [None], 0.0),
            ({}, {"class_token": False}, (7.0,), [], 0.0),
        ]
    ):
        state = with_ramp((32, 32), before, **old)
        model = vit((48, 32), **new)
        own = model.state_dict()["pos_embed"].clone()
        load_pretrained(model, as_file(tmp_path / "x.pth", state))
        n = model.pos_embed.shape[1] - 12 * 8
        assert n == len(rows), number
        for i, value in enumerate(rows):
            expected = own[0, i] if value is None else torch.full((12,), value)
            assert torch.equal(model.pos_embed[0, i], expected), (number, i)
        assert (model.pos_embed[:, n:] - ramp((12, 8))).abs().max() < 0.06, number
        if model.cls_token is not None and "cls_token" in state:
            assert torch.allclose(model.cls_token, state["cls_token"] + added, atol=1e-6), number
        if new == REGISTERS and "reg_token" in state:
            assert torch.allclose(model.reg_token[0, :, 0], state["reg_token"][0, :, 0] + torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "old,new,could",
    [
        ((16, 32), (32, 16), "8 x 4"),
        ((16, 32), (16, 32), "4 x 8 after 1"),
        ((32, 32), (16, 64), "8 x 8"),
        ((48, 80), (96, 96), "not a square"),
    ],
)
def test_an_ambiguous_grid_is_refused_and_set_by_a_flag(tmp_path, old, new, could):
    path = as_file(tmp_path / "x.pth", with_ramp(old, (7.0,)))
    with pytest.raises(UserError) as caught:
        load_pretrained(vit(new), path)
    assert could in one_line(caught) and "pos_grid" in str(caught.value)
    model = vit(new)
    load_pretrained(model, path, pos_grid=(old[0] // PATCH, old[1] // PATCH))
    assert (model.pos_embed[:, 1:] - ramp((new[0] // PATCH, new[1] // PATCH))).abs().max() < 0.06
    with pytest.raises(UserError, match=r"pos_grid 5 9: .* which are not 45 patches with"):
        load_pretrained(vit(new), path, pos_grid=(5, 9))


def beit(size, **extra):
    keywords = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 16, **extra}
    return create_model("beit_base_patch16_224", num_classes=2, img_size=size, in_chans=1, **keywords)


def swin(size, window=7):
    return create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=2,
        img_size=size,
        in_chans=1,
        window_size=window,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
    )


def loud(model):
    for name, p in model.named_parameters():
        if name.endswith(TABLE):
            torch.nn.init.normal_(p)
    return model.state_dict()


@pytest.mark.parametrize("make,old,new", [(beit, (64, 64), (96, 64)), (swin, (56, 56), (40, 64))])
def test_relative_position_tables_are_interpolated_as_timm_does(tmp_path, make, old, new):
    state, model = loud(make(old)), make(new)
    torch.save(state, tmp_path / "x.pth")
    report = load_pretrained(model, tmp_path / "x.pth")
    tables = [k for k in state if k.endswith(TABLE) and state[k].shape != model.state_dict()[k].shape]
    assert tables and set(tables) == {k for k in report.resized if k.endswith(TABLE)} and not report.missing
    for key in tables:
        module = model.get_submodule(key.removesuffix(f".{TABLE}"))
        own = module.relative_position_bias_table
        expected = resize_rel_pos_bias_table(state[key], module.window_size, own.shape)
        assert torch.allclose(own, expected, atol=1e-6) and own.std() > 0.3


@pytest.mark.skipif(
    "old_window_size" not in inspect.signature(resize_rel_pos_bias_table).parameters, reason="no oracle"
)
def test_tables_of_rectangular_windows_take_their_shape_from_the_checkpoint(tmp_path):
    """4 x 8 patches to 8 x 4 has as many rows; foreign files of such a shape are refused, or told by --pos_grid."""
    state, model = loud(beit((64, 128))), beit((128, 64))
    meta = {
        "kind": "finetune",
        "model": "beit_base_patch16_224",
        "model_kwargs": {"embed_dim": 8, "depth": 2, "num_heads": 2},
        "img_size": [64, 128],
        "in_chans": 1,
        "num_classes": 2,
        "classes": ["a", "b"],
        "mean": [0.5],
        "std": [0.5],
    }
    for content, how in (({"format": 1, "meta": meta, "model": state}, {}), (state, {"pos_grid": (4, 8)})):
        torch.save(content, tmp_path / "x.pth")
        load_pretrained(model, tmp_path / "x.pth", **how)
        for i in range(2):
            own = model.blocks[i].attn.relative_position_bias_table
            old = state[f"blocks.{i}.attn.{TABLE}"]
            expected = resize_rel_pos_bias_table(old, (8, 4), tuple(own.shape), old_window_size=(4, 8))
            assert torch.allclose(own, expected, atol=1e-6) and not torch.allclose(own, old)
        torch.nn.init.zeros_(own)
    with pytest.raises(UserError, match="pos_grid"):
        load_pretrained(model, tmp_path / "x.pth")
    report = load_pretrained(model, tmp_path / "x.pth", partial=True)
    assert f"blocks.0.attn.{TABLE}" in report.missing


def test_a_file_of_the_models_own_grid_has_its_rectangular_windows(tmp_path):
    """21 rows could be of windows of 2 x 4 or 4 x 2; --pos_grid with the model's own grid says which."""
    model, again = (swin((40, 64), window=(2, 4)) for _ in range(2))
    torch.save(loud(model), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"rows, which do not determine the attention window.* pos_grid"):
        load_pretrained(again, tmp_path / "x.pth")
    load_pretrained(again, tmp_path / "x.pth", pos_grid=(10, 16))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_file_of_a_family_published_on_a_rectangle_is_read_so(tmp_path):
    """Sapiens' weights are of 1,024 x 768 pixels: 64 x 48 of its patches of 16."""
    state, model = with_ramp((32, 24)), vit((40, 40))
    torch.save(state, tmp_path / "x.pth")
    model.pretrained_cfg = {"input_size": (3, 80, 60)}  # for 40 x 40 of these pixels, 10 x 10 patches: 20 x 15
    assert _published_grid(model) == (20, 15)
    model.pretrained_cfg = {"input_size": (3, 32, 24)}
    load_pretrained(model, tmp_path / "x.pth")
    assert (model.pos_embed[:, 1:] - ramp((10, 10))).abs().max() < 0.06


def test_beits_shared_table_is_given_to_every_block_at_another_size(tmp_path):
    shared = beit((64, 64), use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    state = loud(shared)
    torch.save({"model": state}, tmp_path / "x.pth")
    same, larger = beit((64, 64)), beit((96, 96))
    shared_larger = beit((96, 96), use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    for model in (same, larger, shared_larger):
        assert not load_pretrained(model, tmp_path / "x.pth").missing
    for block in same.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, state[f"rel_pos_bias.{TABLE}"])
    expected = resize_rel_pos_bias_table(state[f"rel_pos_bias.{TABLE}"], (6, 6), (11 * 11 + 3, 2))
    assert torch.allclose(larger.blocks[1].attn.relative_position_bias_table, expected, atol=1e-6)
    assert torch.allclose(shared_larger.rel_pos_bias.relative_position_bias_table, expected, atol=1e-6)


@pytest.mark.parametrize(
    "name,sizes",
    [
        ("levit_128s", {"embed_dim": [8] * 3, "num_heads": [2] * 3, "key_dim": 4, "depth": [1] * 3}),
        ("hiera_tiny_224", {"stages": [1] * 4, "embed_dim": 8, "num_heads": 1}),
    ],
)
def test_positions_that_cannot_be_turned_are_refused_at_the_turned_size(tmp_path, name, sizes):
    """Their tensors have equal shapes at 64 x 128 and 128 x 64."""
    wide, high = (create_model(name, num_classes=2, img_size=s, in_chans=1, **sizes) for s in ((64, 128), (128, 64)))
    assert all(v.shape == high.state_dict()[k].shape for k, v in wide.named_parameters())
    path = as_file(tmp_path / "x.pth", wide.state_dict(), (64, 128))
    content = torch.load(path, weights_only=True)
    content["meta"].update(model=name, model_kwargs=sizes)
    torch.save(content, path)
    with pytest.raises(UserError, match=r"64 x 128 pixels.*img_size 64 128"):
        load_pretrained(high, path)
    assert not load_pretrained(wide, path).missing


def test_a_grid_other_than_the_one_that_the_file_states_is_refused(tmp_path):
    path = as_file(tmp_path / "x.pth", with_ramp((32, 64), (0.0,)), (32, 64))
    with pytest.raises(UserError, match=r"pos_grid 16 8: .* 8 x 16 patches"):
        load_pretrained(vit((32, 64)), path, pos_grid=(16, 8))
    model = vit((32, 64))
    load_pretrained(model, path, pos_grid=(8, 16))
    assert torch.equal(model.pos_embed[:, 1:], ramp((8, 16)))


def test_positions_without_the_batchs_dimension_are_read_on_the_models_grid(tmp_path):
    state = {k: torch.rand_like(v) for k, v in vit().state_dict().items()}
    torch.save({**state, "pos_embed": state["pos_embed"][0]}, tmp_path / "x.pth")
    model, larger, oracle = vit(), vit((64, 32)), vit((64, 32))
    load_pretrained(model, tmp_path / "x.pth")
    assert torch.equal(model.pos_embed, state["pos_embed"])
    load_pretrained(larger, tmp_path / "x.pth")
    torch.save(state, tmp_path / "y.pth")
    load_pretrained(oracle, tmp_path / "y.pth")
    assert torch.equal(larger.pos_embed, oracle.pos_embed)


@pytest.mark.parametrize(
    "number,registers,kinds",
    [
        (0, 4, []),
        (1, 0, ["cls"]),
        (2, 0, ["cls", "dist"]),
        (3, 0, None),
        (4, 4, ["reg0", "reg1", "reg2", "reg3"]),
        (5, 4, ["cls", "reg0", "reg1", "reg2", "reg3"]),
        (3, 4, None),
    ],
)
def test_prefix_positions_of_tokens_that_the_file_lacks_are_known_by_their_number(number, registers, kinds):
    raw = {"register_tokens": torch.zeros(1, registers, 8)} if registers else {}
    assert _uncounted(number, raw) == kinds
