"""torchvision's LRASPP adds two 1x1 classifiers up: one classifier on the concatenated features.

``low(a) + high(b)`` is one 1x1 convolution of ``cat([a, b])`` with the weights side by side and the
biases added. So the features are both inputs, and the classifier a function of both layers.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import mvsc

CLASSES = 21


def main() -> mvsc.MVSCRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    ).to(device)
    low, high = model.classifier.low_classifier, model.classifier.high_classifier
    entered: dict[str, Tensor] = {}
    low.register_forward_hook(lambda _, args, __: entered.update(low=args[0]))
    high.register_forward_hook(lambda _, args, __: entered.update(high=args[0]))

    def classifier(vectors: Tensor) -> Tensor:
        weight = torch.cat([low.weight, high.weight], dim=1)
        return F.conv2d(vectors, weight, low.bias + high.bias)

    reg = mvsc.MVSCRegularizer(CLASSES, low.in_channels + high.in_channels).to(device)
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, reg.param_group()], lr=1e-4)
    for _ in range(2):
        images = torch.randn(2, 3, 64, 64, device=device)
        labels = torch.randint(0, CLASSES, (2, 64, 64), device=device)
        logits = model(images)["out"]
        features = torch.cat([entered.pop("low"), entered.pop("high")], dim=1)
        # The same logits, before the model upsamples them: this is what is asked for.
        resized = F.interpolate(classifier(features), logits.shape[2:], mode="bilinear")
        torch.testing.assert_close(resized, logits, rtol=1e-3, atol=1e-4)
        loss = F.cross_entropy(logits, labels) + reg(features, labels, classifier)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")
    return reg


if __name__ == "__main__":
    main()
