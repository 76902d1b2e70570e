"""The centroids against each other, before and after training."""

import mosaics
from matplotlib.figure import Figure

import mvsc
from mvsc import plotting

trained = mosaics.trained(regularized=True).reg
fresh = mvsc.MVSCRegularizer(trained.num_classes, trained.dim, trained.groups)

figure = Figure((9, 4.2), layout="constrained")
before, after = figure.subplots(1, 2)
plotting.draw_similarity(before, fresh.centroids, mosaics.NAMES)
matrix = plotting.draw_similarity(after, trained.centroids, mosaics.NAMES)
before.set_title("before training")
after.set_title("after training")
figure.colorbar(matrix, ax=figure.axes, label="cosine")
