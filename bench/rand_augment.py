"""CPU milliseconds per batch, on one thread, of the three implementations of RandAugment in augment/.

python -m bench.rand_augment
"""

import time
from statistics import median

POLICY = "rand-m9-mstd0.5-inc1"


def ways(x) -> dict:
    """{name: function(epoch) that augments the batch x, uint8 [B, 3, H, W]}."""
    import torch

    from augment.fast_image import to_array, to_tensor
    from augment.image import timm_policy
    from augment.opencv_ops import on_arrays
    from augment.rand_augment import PillowPolicy, rand_augment
    from util.seed import sample_rng

    index, mean = torch.arange(len(x)), (0.5, 0.5, 0.5)
    one_by_one, pillow = on_arrays(timm_policy(POLICY, tuple(x.shape[-2:]), mean)), PillowPolicy(POLICY, mean)

    def opencv(epoch: int):
        out = []
        for number, image in enumerate(x):
            with sample_rng(0, epoch, number):
                out.append(to_tensor(one_by_one(to_array(image))))
        return torch.stack(out)

    return {
        "the batch (augment/rand_augment.py)": lambda epoch: rand_augment(
            x, POLICY, seed=0, epoch=epoch, index=index, fill=[128] * 3
        ),
        "one by one through OpenCV (augment/opencv_ops.py)": opencv,
        "one by one through timm and Pillow": lambda epoch: pillow(x, seed=0, epoch=epoch, index=index),
    }


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for batch, size in ((128, 32), (64, 64), (32, 224)):
        functions = ways(torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8))
        times: dict[str, list[float]] = {name: [] for name in functions}
        for epoch in range(15):
            for name, function in functions.items():
                tic = time.process_time()
                function(epoch)
                times[name].append(time.process_time() - tic)
        for name, seconds in times.items():
            print(f"{batch} images of {size} px, {name}: {1e3 * median(seconds[1:]):.1f} ms")


if __name__ == "__main__":
    main()
