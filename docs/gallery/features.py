"""Features coloured by their first three principal components."""

import torch
from matplotlib.figure import Figure

import mosaics
from pictures import draw_classes

images, labels = mosaics.mosaics(40)
shown = [1, 3, 6, 8]

figure = Figure((7, 6.7), layout="constrained")
axes = figure.subplots(4, len(shown))
for (top, below, *_), i in zip(axes.T, shown, strict=True):
    top.imshow(images[i].movedim(0, -1))
    draw_classes(below, labels[i])
for row, regularized in zip(axes[2:], (False, True), strict=True):
    features = mosaics.features_of(mosaics.trained(regularized=regularized), images)
    pixels = torch.nn.functional.normalize(features, dim=1).movedim(1, -1)
    rows = pixels.flatten(0, 2)
    scores = (rows - rows.mean(dim=0)) @ torch.pca_lowrank(rows, q=3, niter=4)[2]
    low, high = scores.quantile(0.02, dim=0), scores.quantile(0.98, dim=0)
    colors = ((scores - low) / (high - low)).clamp(0, 1).reshape(*pixels.shape[:3], 3)
    for ax, i in zip(row, shown, strict=True):
        ax.imshow(colors[i], interpolation="nearest")

titles = ("image", "label", "features,\ncross-entropy", "features,\nwith MVSC")
for ax, title in zip(axes[:, 0], titles, strict=True):
    ax.set_ylabel(title)
for ax in axes.flat:
    ax.set_xticks([])
    ax.set_yticks([])
