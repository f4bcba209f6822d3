"""Run in a copy of the product that has tiny_cells.py in models/families: nothing else was told of it."""

import timm
import torch
from timm.models import _registry

from augment.alpha_blend import AlphaBlend
from main_finetune import main
from models import create_model, list_models, load_pretrained
from models.loading import load_classifier
from models.vit import classifiers, enable_grad_checkpointing
from util.choices import timm_names
from util.log import read_log
from util.optim import param_groups


def build(**kwargs):
    torch.manual_seed(0)
    return create_model("tiny_cells", **{"num_classes": 5, "img_size": 8, **kwargs})


assert "tiny_cells" in list_models("tiny_*") and timm.is_model("tiny_cells")
assert timm_names() == set(_registry._model_entrypoints)

# Noise: at the input of the first cell, in no state_dict.
x = torch.randn(4, 3, 8, 8)
net = build(alpha_blend=AlphaBlend(999, noise_eval=True))
seen = []
net.cells[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
net.eval()(x)
clean = net.patch_embed(x) + net.pos_embed
assert list(net.state_dict()) == list(build().state_dict())
assert seen[0].shape == clean.shape and (seen[0] - clean).std() > 0.5 and net.alpha_blend.config.layer == 0

# Layers: stem 0, cells 1 to 3, head 4; what has one dimension, or is named by no_weight_decay, does not decay.
scales, decays = {}, {}
for group in param_groups(net, weight_decay=0.1, layer_decay=0.5):
    scales |= dict.fromkeys(group["names"], group["lr_scale"])
    decays |= dict.fromkeys(group["names"], group["weight_decay"])
layers = {"patch_embed.proj.weight": 0, "pos_embed": 0, "cells.0.mlp.weight": 1, "cells.2.norm.bias": 3, "head.bias": 4}
assert {name: scales[name] for name in layers} == {name: 0.5 ** (4 - layer) for name, layer in layers.items()}
assert decays["cells.1.mlp.weight"] == 0.1 and decays["cells.1.temperature"] == decays["pos_embed"] == 0
assert classifiers(net) == [net.head]

# Gradient checkpointing: the same gradients.
gradients = []
for checkpointing in (False, True):
    net = build().train()
    if checkpointing:
        enable_grad_checkpointing(net, "tiny_cells")
    net(x).square().sum().backward()
    assert net.grad_checkpointing is checkpointing
    gradients.append([p.grad for p in net.parameters()])
for plain, recomputed in zip(*gradients):
    torch.testing.assert_close(plain, recomputed)

# Weights: other names by its filter, positions on another grid, another number of classes.
state = {k.replace("cells.", "layers."): v for k, v in net.state_dict().items()}
torch.save(state, "weights.pth")
other = build(img_size=(8, 16), num_classes=3)
report = load_pretrained(other, "weights.pth")
assert report.resized == ["pos_embed"] and sorted(report.missing) == ["head.bias", "head.weight"]
assert torch.equal(other.cells[1].mlp.weight, net.cells[1].mlp.weight) and other.pos_embed.shape == (1, 32, 16)

# A run, and its checkpoint by itself.
line = "--dataset digits --model tiny_cells --epochs 1 --warmup_epochs 0 --batch_size 64 --lr 3e-3 --alpha_blend 15"
line += " --layer_decay 0.9 --grad_checkpointing --mixup 0.2 --device cpu --amp off --num_workers 0 --output_dir out"
assert main(line.split()) == 0
assert read_log("out/log.txt")[0]["val_acc1"] > 10
net, meta = load_classifier("out/checkpoint-last.pth")
assert meta["model"] == "tiny_cells" and net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
