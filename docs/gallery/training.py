"""What a training logged, step by step."""

import mosaics
from pictures import training_report

figure = training_report(
    {
        "cross-entropy": mosaics.trained(regularized=False).metrics,
        "with MVSC": mosaics.trained(regularized=True).metrics,
    }
)
