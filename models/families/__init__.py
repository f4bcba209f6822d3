"""Model families that timm lacks, each in a file of its own in this folder: being here is all that registers it.

Such a file is written as timm's are: a function per model name under `@register_model` that ends in
`build_model_with_cfg`, `default_cfgs` for the names, and a net with timm's methods. What reads them here:

    default_cfgs' "classifier"     the head: what the head phase trains, and what starts anew for other classes
    get_classifier()               the same
    group_matcher(coarse)          "stem": noise goes to the input of the first child behind it (--alpha_blend);
                                   the numbers in the names of the blocks are the layers of --layer_decay
    no_weight_decay()              parameters without weight decay, beside vectors and biases
    set_grad_checkpointing(on)     --grad_checkpointing
    patch_embed.grid_size          rows and columns of pos_embed's patches: it is resized to other grids
    num_prefix_tokens              class and register tokens in front, that --noise_tokens patches leaves clean
    checkpoint_filter_fn(state, model), a function of the file: other publishers' names and shapes

Keywords img_size and drop_path_rate are given to the families that take them. CONTRIBUTING.md has an example.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
