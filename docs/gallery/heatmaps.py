"""Heat maps over an image, as in the paper's Figs. 4 and 5."""

import mosaics
from mvsc import plotting

model = mosaics.trained(regularized=True)
images, labels = mosaics.mosaics(1)
features = mosaics.features_of(model, images)
classes = labels[0].unique().tolist()[:3]

figure = plotting.heatmaps(
    images[0],
    features,
    model.centroids,
    classes,
    names=mosaics.NAMES,
    labels=labels[0],
    limits=(-0.6, 0.6),
)
