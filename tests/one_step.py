"""Train one step, every warning an error, with an installed mvsc or that in a given folder."""

import sys
import warnings

import torch
from torch import nn

sys.path[:0] = sys.argv[1:]

# Not `python -W error`: torch 2.6 itself warns, at its import and at the end.
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import mvsc

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1))
    reg = mvsc.attach(model)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.add_param_group(reg.param_group())
    before = reg.regularizer.centroids.detach().clone()
    images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 5, (2, 6, 6))
    loss = nn.functional.cross_entropy(model(images), labels) + reg(labels)
    loss.backward()
    optimizer.step()
    if not loss.isfinite() or torch.equal(reg.regularizer.centroids, before):
        sys.exit("The step did not train.")
print("trained with", mvsc.__file__)
