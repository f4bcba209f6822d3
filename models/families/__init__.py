"""Model families that timm lacks: each file in this folder is one family and is imported automatically.

Files are written like timm's: a function per model name with `@register_model` that returns
`build_model_with_cfg(...)`, `default_cfgs` for the names, and a net with timm's methods. They are used for:

    default_cfgs' "classifier"     the head, which the head phase trains and other classes reinitialise
    get_classifier()               the same
    group_matcher(coarse)          "stem": the first child after it gets the noise (--alpha_blend);
                                   the numbers in the names of the blocks are the layers of --layer_decay
    no_weight_decay()              parameters without weight decay, besides vectors and biases
    set_grad_checkpointing(on)     --grad_checkpointing
    patch_embed.grid_size          rows and columns of pos_embed's patches: it is resized to other grids
    num_prefix_tokens              class and register tokens, which --noise_tokens patches leaves clean
    checkpoint_filter_fn(state, model), a function of the file: other publishers' names and shapes

Families that take img_size and drop_path_rate get them. CONTRIBUTING.md has an example.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
