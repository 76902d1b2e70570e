"""MMSegmentation: segmentors that train with the regularizer, named in a config.

Two lines in any config of mmseg 1.x::

    custom_imports = dict(imports=["mvsc.integrations.mmseg"])
    model = dict(type="MVSCEncoderDecoder", mvsc=dict(groups=4))

and a third for the optimizer, see :class:`MVSCEncoderDecoder`.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mvsc.equations import MVSCTerms
from mvsc.regularizer import MVSCRegularizer

if importlib.util.find_spec("mmcv._ext") is None:
    # mmseg needs mmcv.ops.point_sample only, which is pure torch; but the import of mmcv.ops asks
    # for all compiled operators too, and mmcv-lite has none. (mmcv itself has to be compiled for
    # each version of torch.) So stand in for its binary, and raise when an operator is called.
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    def _missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*args: object, **kwargs: object) -> None:
            raise ImportError(
                f"{name} is a compiled operator of mmcv, which mmcv-lite does not have. "
                "Install mmcv==2.1.0 in its place."
            )

        return operator

    sys.modules["mmcv._ext"] = ModuleType("mmcv._ext")
    sys.modules["mmcv._ext"].__getattr__ = _missing  # type: ignore[method-assign]
    # Without a loader: that is how mmengine knows that there are no compiled operators. Without
    # a spec it would stop.
    sys.modules["mmcv._ext"].__spec__ = ModuleSpec("mmcv._ext", loader=None)

from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from mmseg.registry import MODELS


@MODELS.register_module()
class MVSCEncoderDecoder(EncoderDecoder):  # type: ignore[misc]
    """An ``EncoderDecoder`` whose training loss has the three terms of MVSC.

    The regularizer reads what enters the last decode head's ``cls_seg``, so before its dropout
    (R14), and classifies with its ``conv_seg``. Classes, width and ``ignore_index`` come from
    that head. The terms are logged one by one, weighted, as ``mvsc.loss_align``,
    ``mvsc.loss_pull`` and ``mvsc.loss_classify``, and mmengine adds them to the loss.

    Prediction is that of ``EncoderDecoder``. A checkpoint has two more entries,
    ``mvsc_head.centroids`` and ``mvsc_head.step``; a plain ``EncoderDecoder`` skips them.

    mmengine finds learning rates by parts of names: a ``head=dict(lr_mult=10.0)`` reaches
    ``mvsc_head.centroids`` too. That they do not decay (R17) has to be said, and since the
    longest name wins alone, together with the rate::

        optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(
            mvsc_head=dict(lr_mult=10.0, decay_mult=0.0))))

    Args:
        *args: those of ``EncoderDecoder``.
        mvsc: the options of :class:`mvsc.MVSCRegularizer`, none of them needed.
        **kwargs: those of ``EncoderDecoder``.

    Raises:
        ValueError: if the last decode head has no ``conv_seg`` with one output for each class:
            K-Net, Segmenter's mask head, PointRend and those that classify masks have none.
    """

    def __init__(self, *args: Any, mvsc: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        head = self._last_head()
        classifier: Any = getattr(head, "conv_seg", None)
        if getattr(classifier, "out_channels", None) != head.num_classes:
            raise ValueError(
                "decode_head must have a convolution conv_seg with one output for each of its "
                f"{head.num_classes} classes, got {type(head).__name__} with {classifier}. "
                "Use a head that classifies pixels, and softmax for two classes too "
                "(out_channels=2)."
            )
        options = {"ignore_index": head.ignore_index, **(mvsc or {})}
        # The name has a part "head", for the learning rate: see above.
        self.mvsc_head = MVSCRegularizer(head.num_classes, classifier.in_channels, **options)

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Any]:
        """Compute the losses of the heads, and with them the weighted terms of MVSC."""
        head = self._last_head()
        with _what_enters_cls_seg(head) as seen:
            losses: dict[str, Any] = super().loss(inputs, data_samples)
        if len(seen) != 1:
            raise ValueError(
                "decode_head must call its cls_seg once in a forward, got "
                f"{len(seen)} calls in {type(head).__name__}. "
                "Let its forward end in self.cls_seg(features)."
            )
        features = seen[0]
        if torch.is_grad_enabled() and not features.requires_grad:
            raise ValueError(
                f"what enters cls_seg of {type(head).__name__} must carry a gradient, got none. "
                "Leave decode_head out of activation_checkpointing, and train more than conv_seg."
            )
        labels = torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in data_samples])
        terms = self.mvsc_head.terms(features, labels, head.conv_seg)
        weighed = {
            name: weight * term
            for name, term in terms._asdict().items()
            if (weight := getattr(self.mvsc_head, f"{name}_weight")) > 0
        }
        for name in [*weighed][:1]:
            # An optimizer of their own learns in total() what the loss is multiplied by: once.
            alone = MVSCTerms(*map(torch.zeros_like, terms))
            weighed[name] = self.mvsc_head.total(alone._replace(**{name: getattr(terms, name)}))
        # mmengine adds up every entry that has "loss" in its name.
        losses |= {f"mvsc.loss_{name}": loss for name, loss in weighed.items()}
        return losses

    def _last_head(self) -> Any:
        heads = self.decode_head
        return heads[-1] if isinstance(heads, nn.ModuleList) else heads


@MODELS.register_module()
class MVSCCascadeEncoderDecoder(MVSCEncoderDecoder, CascadeEncoderDecoder):  # type: ignore[misc]
    """The same for a ``CascadeEncoderDecoder``, that is OCRNet."""


@contextmanager
def _what_enters_cls_seg(head: Any) -> Iterator[list[Tensor]]:
    """Collect the features that ``head`` classifies while the context lasts.

    Not a hook: DANet calls its dropout three times and only ``cls_seg`` tells which is meant;
    and what is gone after the loss is not copied with the model, nor called by a replay of the
    forward in backward.
    """
    seen: list[Tensor] = []
    cls_seg = head.cls_seg

    def tapped(features: Tensor) -> Any:
        seen.append(features)
        return cls_seg(features)

    head.cls_seg = tapped
    try:
        yield seen
    finally:
        del head.cls_seg
