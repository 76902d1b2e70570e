"""COCO-Stuff-10k, DeepLabV3+ with ResNet-50, mmseg's SGD recipe of 80k iterations."""

_base_ = [
    "mmseg::_base_/models/deeplabv3plus_r50-d8.py",
    "mmseg::_base_/datasets/coco-stuff10k.py",
    "mmseg::_base_/schedules/schedule_80k.py",
    "mmseg::_base_/default_runtime.py",
]

custom_imports = dict(imports=["mvsc.integrations.mmseg"])
model = dict(
    type="MVSCEncoderDecoder",
    mvsc=dict(groups=4),
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=171),
    auxiliary_head=dict(num_classes=171),
)
# One learning rate for all here; the centroids do not decay.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(mvsc_head=dict(decay_mult=0.0))))

train_dataloader = dict(batch_size=16, num_workers=8)
