"""The centroids against each other, before and after training."""

from matplotlib.figure import Figure

import mosaics
import mvsc
from mvsc import plotting

centroids = mosaics.trained(regularized=True).centroids
groups, classes, dim = centroids.shape
fresh = mvsc.MVSCRegularizer(classes, dim, groups)

figure = Figure((9, 4.2), layout="constrained")
before, after = figure.subplots(1, 2)
plotting.draw_similarity(before, fresh.centroids, mosaics.NAMES)
matrix = plotting.draw_similarity(after, centroids, mosaics.NAMES)
before.set_title("before training")
after.set_title("after training")
figure.colorbar(matrix, ax=figure.axes, label="cosine")
