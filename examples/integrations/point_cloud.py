"""Point clouds of unequal length: padded to a batch, with ignore_index where it is padded."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import mvsc

CLASSES, IGNORE = 6, 255


class PointNet(nn.Module):
    """A small PointNet: each point sees itself and the maximum over its cloud."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv1d(3, dim, 1), nn.ReLU(), nn.Conv1d(dim, dim, 1))
        self.mixed = nn.Sequential(nn.ReLU(), nn.Conv1d(2 * dim, dim, 1), nn.ReLU())
        self.classifier = nn.Conv1d(dim, CLASSES, 1)

    def forward(self, points: Tensor, padded: Tensor) -> Tensor:
        """Classify each point; padded ones do not count in the maximum."""
        x = self.local(points)
        cloud = x.masked_fill(padded.unsqueeze(1), -torch.inf).amax(2, keepdim=True)
        return self.classifier(self.mixed(torch.cat([x, cloud.expand_as(x)], dim=1)))


def batch_of_clouds(device: str) -> tuple[Tensor, Tensor]:
    clouds = [torch.randn(n, 3, device=device) for n in (64, 40, 51)]
    labels = [torch.randint(0, CLASSES, (len(cloud),), device=device) for cloud in clouds]
    points = pad_sequence(clouds, batch_first=True).mT
    return points, pad_sequence(labels, batch_first=True, padding_value=IGNORE)


def main() -> mvsc.AttachedRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PointNet().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    reg = mvsc.attach(model, classifier="classifier", groups=4, ignore_index=IGNORE)
    optimizer.add_param_group(reg.param_group())

    for _ in range(2):
        points, labels = batch_of_clouds(device)
        logits = model(points, labels == IGNORE)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE) + reg(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")
    return reg


if __name__ == "__main__":
    main()
