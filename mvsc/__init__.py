"""Multi-group Visual Semantic Centroids: a training-only regularizer for segmentation."""

from mvsc import equations
from mvsc.distributed import assert_in_sync
from mvsc.equations import MVSCTerms
from mvsc.regularizer import MVSCRegularizer
from mvsc.segment import segment_mean

__version__ = "0.1.0"

__all__ = ["MVSCRegularizer", "MVSCTerms", "assert_in_sync", "equations", "segment_mean"]
