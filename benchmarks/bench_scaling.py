"""How does the cost grow with pixels, feature width, classes and groups?

    python benchmarks/bench_scaling.py            # writes benchmarks/results/ and a picture
    python benchmarks/bench_scaling.py --quick    # tiny: runs everything once, writes nothing

One quantity grows at a time from B=4, D=256, 128 x 128, C=171, G=4; forward and backward, float32,
contiguous. The slope is that of a straight line through the points in log-log.
"""

from functools import partial

import numpy as np
import torch
from torch import nn

from measure import RESULTS, command_line, medians, write
from mvsc import MVSCRegularizer, segment_mean

BASE = {"pixels": 128 * 128, "D": 256, "C": 171, "G": 4}
GROWTH = {
    "pixels": (32 * 32, 64 * 64, 128 * 128, 256 * 256),
    "D": (64, 128, 256, 512),
    "C": (19, 60, 171, 400, 1000),
    "G": (1, 2, 4, 8),
}


def main() -> None:
    device, quick = command_line(__doc__)
    rows, slopes = [], []
    for what, values in GROWTH.items():
        values = (
            tuple(value if what == "G" else value // 8 for value in values) if quick else values
        )
        base = {**BASE, "pixels": 64, "D": 8, "C": 10} if quick else BASE
        times = {v: cost({**base, what: v}, device, 1 if quick else 9) for v in values}
        for part in ("segment_mean", "whole regularizer"):
            curve = [times[value][part] for value in values]
            slope = float(np.polyfit(np.log(values), np.log(curve), 1)[0])
            slopes.append(
                {"grows": what, "part": part, "slope": slope, "last / first": curve[-1] / curve[0]}
            )
            rows += [
                {"grows": what, "value": value, "part": part, "ms": time}
                for value, time in zip(values, curve, strict=True)
            ]
    if not quick:
        write("bench_scaling", device, {"Slopes": slopes, "Times": rows})
        draw(rows, slopes, device)


def cost(shape: dict[str, int], device: torch.device, rounds: int) -> dict[str, float]:
    """Time the kernel and the whole regularizer for one shape, in milliseconds."""
    side = round(shape["pixels"] ** 0.5)
    dim, classes, groups = shape["D"], shape["C"], shape["G"]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, dim, side, side, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, classes, (4, side, side), generator=generator).to(device)
    cells = labels + classes * torch.randint(0, groups, labels.shape, generator=generator).to(
        device
    )
    reg = MVSCRegularizer(classes, dim, groups).to(device)
    head = nn.Conv2d(dim, classes, 1).to(device)

    def kernel() -> None:
        means, _ = segment_mean(features, cells, groups * classes)
        torch.autograd.grad(means, features, torch.ones_like(means))

    def regularizer() -> None:
        loss = reg(features, labels, head)
        torch.autograd.grad(loss, [features, reg.centroids, head.weight])

    return medians(
        {"segment_mean": partial(kernel), "whole regularizer": partial(regularizer)}, rounds
    )


def draw(
    rows: list[dict[str, object]], slopes: list[dict[str, object]], device: torch.device
) -> None:
    """Draw the curves, log-log, one panel for each quantity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(GROWTH), figsize=(12, 3), sharey=True, layout="constrained")
    for ax, what in zip(axes, GROWTH, strict=True):
        for entry, color in zip(
            (s for s in slopes if s["grows"] == what), ("C0", "C1"), strict=True
        ):
            points = [
                (r["value"], r["ms"])
                for r in rows
                if r["grows"] == what and r["part"] == entry["part"]
            ]
            ax.loglog(
                *zip(*points, strict=True),
                "o-",
                color=color,
                label=f"{entry['part']}: slope {entry['slope']:.2f}",
            )
        ax.set_xlabel({"pixels": "pixels of an image"}.get(what, what))
        ax.set_xticks(GROWTH[what], [str(v) for v in GROWTH[what]])
        ax.minorticks_off()
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("forward + backward, ms")
    figure.savefig(RESULTS / f"bench_scaling-{device.type}.png", dpi=150)


if __name__ == "__main__":
    main()
