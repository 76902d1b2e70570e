"""What a training logged, step by step."""

import mosaics

from mvsc import plotting

figure = plotting.training_report(
    {
        "cross-entropy": mosaics.trained(regularized=False).metrics,
        "with MVSC": mosaics.trained(regularized=True).metrics,
    }
)
