"""Multi-group Visual Semantic Centroids: a training-only regularizer for segmentation."""

from mvsc import diagnostics, equations
from mvsc.attach import AttachedRegularizer, ClassifierNotFoundError, attach
from mvsc.distributed import assert_in_sync
from mvsc.equations import MVSCTerms
from mvsc.regularizer import MVSCRegularizer
from mvsc.segment import segment_mean

__version__ = "0.1.0"

__all__ = [
    "AttachedRegularizer",
    "ClassifierNotFoundError",
    "MVSCRegularizer",
    "MVSCTerms",
    "assert_in_sync",
    "attach",
    "diagnostics",
    "equations",
    "segment_mean",
]
