"""What the first 100 steps of a training with MVSC log."""

import json

from matplotlib.figure import Figure

import mosaics

lines = mosaics.trained(regularized=True).metrics.read_text("utf-8").splitlines()
logged = [entry for entry in map(json.loads, lines) if entry["step"] <= 100 and "align" in entry]

figure = Figure((9, 2.9), layout="constrained")
panels = figure.subplots(1, 3)
shown = (
    ("Falling: align and classify, in nats", {"align": "#0072b2", "classify": "#009e73"}),
    ("Soon near 0: pull, in 1 - cosine", {"pull": "#d55e00"}),
    (
        "Rising, up to 1",
        {"alignment_accuracy": "#0072b2", "group_similarity": "#d55e00"},
    ),
)
for ax, (title, names) in zip(panels, shown, strict=True):
    for name, color in names.items():
        values = [entry[name] for entry in logged]
        steps = [entry["step"] for entry in logged]
        ax.plot(steps, values, color=color, label=name.replace("_", " "))
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step")
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
