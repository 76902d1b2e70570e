"""ADE20K, SegFormer MiT-B0, 20k iterations of 16 crops: Tables 2 and 3 of the paper."""

_base_ = "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["mvsc.integrations.mmseg"])
model = dict(type="MVSCEncoderDecoder", mvsc=dict(groups=4))
# The centroids learn like the head, whose rate the base multiplies by 10, and do not decay.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(mvsc_head=dict(lr_mult=10.0, decay_mult=0.0)))
)

train_dataloader = dict(batch_size=16, num_workers=8)
train_cfg = dict(max_iters=20000, val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=20000),
]
