"""COCO-Stuff-10k, SegFormer MiT-B4, 80k iterations of 16 crops: Table 1 of the paper."""

_base_ = "mmseg::segformer/segformer_mit-b4_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["mvsc.integrations.mmseg"])
model = dict(type="MVSCEncoderDecoder", mvsc=dict(groups=4), decode_head=dict(num_classes=171))
# The centroids learn like the head, whose rate the base multiplies by 10, and do not decay.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(mvsc_head=dict(lr_mult=10.0, decay_mult=0.0)))
)

# mmseg's pipelines for the two data sets are the same.
coco = dict(type="COCOStuffDataset", data_root="data/coco_stuff10k", reduce_zero_label=True)
train2014 = dict(img_path="images/train2014", seg_map_path="annotations/train2014")
test2014 = dict(img_path="images/test2014", seg_map_path="annotations/test2014")
train_dataloader = dict(batch_size=16, num_workers=8, dataset=dict(**coco, data_prefix=train2014))
val_dataloader = dict(dataset=dict(**coco, data_prefix=test2014))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=80000),
]
