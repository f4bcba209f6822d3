"""Growth of the NoProp step's time and memory with batch, T, image size and gloo ranks: a table and a plot.

    python -m bench.scaling
    python -m bench.scaling --batch 32 64 128 256 --T 1 2 4 10 --img_size 32 64 96 --ranks 1 2 4

One quantity changes at a time; the others stay at --base. A point is one process (or one per rank) without its first
call. The batch per rank is constant: with more ranks than cores, the time is limited by the cores, not communication.
Writes bench/scaling.png and bench/scaling.md, which `python -m bench.run_all` includes in BENCH.md.
"""

import argparse
import json
import math
import shlex
import socket
import sys
import time

from bench.common import ROOT, Worker, machine, medians

FOLDER = ROOT / "bench"


def measure(point: dict, ranks: int, repeats: int) -> dict:
    """Medians for one setting: the slowest rank's time, CPU seconds and peak memory of one rank."""
    argv = [word for flag, value in point.items() for word in (f"--{flag}", str(value))] + ["--threads", "1"]
    with socket.socket() as s:  # a free port
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    workers = []
    for rank in range(ranks):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {k: str(v) for k, v in env.items()} if ranks > 1 else None
        workers.append(Worker("bench.noprop_step", argv, "product", env))
    starts = [w.read()["rss_gb"] for w in workers]
    rows = []
    for repeat in range(-1, repeats):
        for w in workers:
            w.start()
        answers = [w.read() for w in workers]
        if repeat >= 0:
            rows.append(max(answers, key=lambda a: a["s"]))
    for w in workers:
        w.close()
    return {**medians(rows), "start_gb": max(starts)}


def slope(x: list[float], y: list[float]) -> float:
    """Exponent k of the least-squares fit y ~ x^k."""
    x, y = [math.log(v) for v in x], [math.log(max(v, 1e-9)) for v in y]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def plot(series: dict, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(series), figsize=(3.2 * len(series), 5.4), squeeze=False)
    for column, (name, points) in enumerate(series.items()):
        x = [p["x"] for p in points]
        for row, (key, label) in enumerate((("cpu_s", "CPU s per step and rank"), ("grown_gb", "GiB above start"))):
            ax = axes[row][column]
            ax.plot(x, [p[key] for p in points], "o-")
            ax.set_ylim(bottom=0)
            ax.set_xticks(x)
            ax.set_xlabel(name)
            ax.set_ylabel(label if column == 0 else "")
            ax.grid(alpha=0.3)
    figure.suptitle(f"NoProp step, {machine()}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(series: dict, base: dict, command: str) -> str:
    lines = [
        "## Growth, measured",
        "",
        f"NoProp step of the product, one thread per process, at {json.dumps(base)} but for the column's quantity; "
        f"`{command}`, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {machine()}. Exponents are the slopes k "
        "of a fit ~ x^k. Ranks are on the same cores, with the batch per rank kept.",
        "",
        "| quantity | value | CPU s per step and rank | wall s | GiB above start |",
        "|---|---|---|---|---|",
    ]
    for name, points in series.items():
        for p in points:
            lines.append(f"| {name} | {p['x']} | {p['cpu_s']:.2f} | {p['s']:.2f} | {p['grown_gb']:.2f} |")
    lines += ["", "| quantity | exponent of CPU time | of memory above start |", "|---|---|---|"]
    for name, points in series.items():
        if len(points) > 1:
            x = [p["x"] for p in points]
            k = [slope(x, [p[key] for p in points]) for key in ("cpu_s", "grown_gb")]
            lines.append(f"| {name} | {k[0]:.2f} | {k[1]:.2f} |")
    return "\n".join([*lines, "", "![growth](scaling.png)"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="*", default=[32, 64, 128], help="batch sizes")
    parser.add_argument("--T", type=int, nargs="*", default=[1, 2, 4, 10], help="numbers of levels")
    parser.add_argument("--img_size", type=int, nargs="*", default=[32, 48, 64], help="pixels; patches stay 4 x 4")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2], help="gloo processes on this machine")
    parser.add_argument("--base", type=int, nargs=3, default=[32, 4, 32], metavar=("BATCH", "T", "IMG_SIZE"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    base = dict(zip(("batch_size", "T", "img_size"), args.base))
    settings = [
        ("batch", [({**base, "batch_size": v}, 1, v) for v in args.batch]),
        ("T", [({**base, "T": v}, 1, v) for v in args.T]),
        ("image size", [({**base, "img_size": v}, 1, v) for v in args.img_size]),
        ("ranks", [(base, v, v) for v in args.ranks]),
    ]
    series, known = {}, {}
    for name, points in settings:
        for point, ranks, x in points:
            key = (*point.values(), ranks)
            if key not in known:  # the base setting is part of every series
                known[key] = measure(point, ranks, args.repeats)
            row = {"x": x, **known[key]}
            row["grown_gb"] = row["peak_gb"] - row["start_gb"]
            print(f"{name} {x}: {row['cpu_s']:.2f} CPU s, {row['s']:.2f} s, {row['grown_gb']:.2f} GiB", flush=True)
            series.setdefault(name, []).append(row)
    text = table(series, base, shlex.join(["python", "-m", "bench.scaling", *sys.argv[1:]]))
    (FOLDER / "scaling.md").write_text(text + "\n", "utf-8")
    plot(series, FOLDER / "scaling.png")
    print(text)
    print(json.dumps({"name": "scaling", "series": series, "machine": machine()}))


if __name__ == "__main__":
    main()
