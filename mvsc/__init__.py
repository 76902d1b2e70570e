"""Multi-group Visual Semantic Centroids: a training-only regularizer for segmentation."""

from mvsc import diagnostics, equations
from mvsc.attach import AttachedRegularizer, ClassifierNotFoundError, attach, detach
from mvsc.distributed import assert_in_sync
from mvsc.equations import MVSCTerms
from mvsc.kernel import segment_mean
from mvsc.regularizer import MVSCRegularizer

__version__ = "0.1.0"

__all__ = [
    "AttachedRegularizer",
    "ClassifierNotFoundError",
    "MVSCRegularizer",
    "MVSCTerms",
    "assert_in_sync",
    "attach",
    "detach",
    "diagnostics",
    "equations",
    "segment_mean",
]
