"""A transformers model in a loop of one's own: its loss has the three terms in it."""

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import mvsc

CLASSES = 21


def main() -> mvsc.AttachedRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = SegformerConfig(
        num_labels=CLASSES, depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=32
    )
    model = SegformerForSemanticSegmentation(config).to(device).train()
    reg = mvsc.attach(model, add_to_loss=True)
    parameters = [{"params": model.parameters()}, reg.param_group(lr=6e-4)]
    optimizer = torch.optim.AdamW(parameters, lr=6e-5, weight_decay=0.01)
    for _ in range(2):
        images = torch.randn(2, 3, 64, 64, device=device)
        labels = torch.randint(0, CLASSES, (2, 64, 64), device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")
    return reg


if __name__ == "__main__":
    main()
