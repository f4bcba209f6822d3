"""A script that takes a moment in place of a training, and main_sweep.py's command over it."""

import signal
import threading
import time

from tests.harness.runs import NET

# In place of a training: accuracy 50 + lr * 1000 + seed, a point more in each of its three epochs.
SCRIPT = """
import json, os, signal, sys, time
def value(name, default):
    return next((b for a, b in reversed(list(zip(sys.argv, sys.argv[1:]))) if a == name), default)
out, lr, seed = value("--output_dir", ""), float(value("--lr", "0")), int(value("--seed", "0"))
os.makedirs(out, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if lr == 0.25:
    sys.exit("main: error: the learning rate is too large")
with open(f"{out}/called.txt", "w") as file:
    file.write(os.environ["NOISEVIT_GROUP"] + ": " + os.environ["NOISEVIT_NAME"])
with open(f"{out}/log.txt", "w") as file:
    for epoch in range(3):
        line = {"epoch": epoch, "val_acc1": 50 + 1000 * lr + seed + epoch, "val_loss": 1.0 - lr}
        file.write(json.dumps(line) + "\\n")
time.sleep(float(os.environ.get("TAKES", "0")))
"""


def interrupt_when(runs: int, folder) -> None:
    """Ctrl-C, once so many runs have written their log."""

    def wait() -> None:
        until = time.monotonic() + 60
        while len(list(folder.glob("*/log.txt"))) < runs and time.monotonic() < until:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def sweep(folder, *grid, line=("main_finetune.py", *NET), **flags) -> int:
    import main_sweep  # not before the tests that need it

    words = [w for name, value in flags.items() for w in (f"--{name}", *([] if value is True else [str(value)]))]
    return main_sweep.main(["--output_dir", str(folder), "--grid", *grid, *words, "--", *line])
