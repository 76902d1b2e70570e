"""Predictions beside labels and their difference, as in the paper's Fig. 6."""

import mosaics

from mvsc import plotting

images, labels = mosaics.mosaics(3)
predicted = {
    "cross-entropy": mosaics.predict(mosaics.trained(regularized=False).model, images),
    "with MVSC": mosaics.predict(mosaics.trained(regularized=True).model, images),
}

figure = plotting.predictions(images, labels, predicted, names=mosaics.NAMES)
