"""transformers' Trainer: one line after it is made. The script also runs under torchrun."""

import tempfile

import torch
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
)

import mvsc
from mvsc.integrations.transformers import attach_to_trainer

CLASSES = 21


def main() -> mvsc.AttachedRegularizer:
    config = SegformerConfig(
        num_labels=CLASSES, depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=32
    )
    dataset = [
        {"pixel_values": torch.randn(3, 64, 64), "labels": torch.randint(0, CLASSES, (64, 64))}
        for _ in range(4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            num_train_epochs=1,
            learning_rate=6e-5,
            bf16=True,
            logging_steps=1,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        model = SegformerForSemanticSegmentation(config)
        model.accepts_loss_kwargs = False  # Its loss is a mean, which the Trainer is to average.
        trainer = Trainer(model=model, args=args, train_dataset=dataset)
        reg = attach_to_trainer(trainer, groups=4)  # The one line.
        trainer.train()
    return reg


if __name__ == "__main__":
    main()
