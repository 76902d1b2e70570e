"""Predictions beside labels and their difference, as in the paper's Fig. 6."""

import mosaics
from pictures import predictions

images, labels = mosaics.mosaics(3)
predicted = {
    "cross-entropy": mosaics.predict(mosaics.trained(regularized=False), images),
    "with MVSC": mosaics.predict(mosaics.trained(regularized=True), images),
}

figure = predictions(images, labels, predicted, names=mosaics.NAMES)
