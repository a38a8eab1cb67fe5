"""timm's own training loop, fed by the cached loader.

The loop is that of timm's ``train.py``: its model, optimizer, scheduler, scaler and EMA,
``output = model(input)`` and ``loss = loss_fn(output, target)``. Three things differ:

1. ``Batches`` replaces ``create_loader``: it yields (input, target), and the target is the whole
   batch, with labels and the teacher's response.
2. ``Distilled`` wraps the model to return all of its logits in training.
3. ``Loss`` replaces ``SoftTargetCrossEntropy``. The views already include mixup, cutmix, smoothing,
   random erasing and RandAugment: leave timm's off.

    python timm_train.py 'shards/train-*.tar' CACHE
"""

import sys

import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler
from torch import nn

from cskd_pipeline import CachedLoader, DistillationLoss, ckf_ratio, dense_logits, open_views


class Batches:
    """A loader as timm's loops expect it."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ((batch.images, batch) for batch in self.loader)


class Distilled(nn.Module):
    """A timm ViT that returns class, distillation and dense logits in training."""

    def __init__(self, model, grid):
        super().__init__()
        self.model, self.grid = model, grid

    def forward(self, images):
        return dense_logits(self.model, images, self.grid) if self.training else self.model(images)


class Loss(nn.Module):
    """The CSKD loss as ``loss_fn(output, target)``; set ``progress`` once per epoch."""

    def __init__(self, loss, schedule="linear"):
        super().__init__()
        self.loss, self.schedule, self.progress = loss, schedule, 0.0

    def forward(self, output, target):
        r = ckf_ratio(self.schedule, self.progress)
        return self.loss(output, target.labels, target.targets, r, self.progress).total


def train_one_epoch(epoch, model, loader, optimizer, loss_fn, lr_scheduler, loss_scaler, model_ema):
    """Train as timm does, without logging, accumulation and channels_last."""
    model.train()
    losses, updates = AverageMeter(), epoch * len(loader)
    for input, target in loader:
        with torch.autocast(input.device.type, enabled=input.device.type == "cuda"):
            output = model(input)
        loss = loss_fn(output, target)
        optimizer.zero_grad()
        loss_scaler(loss, optimizer, parameters=model.parameters())
        updates += 1
        model_ema.update(model, step=updates)
        losses.update(loss.item(), input.size(0))
        lr_scheduler.step_update(num_updates=updates, metric=losses.avg)
    return losses.avg


def train(shards, cache, epochs=30, batch_size=256, lr=1e-3, device="cpu", **student):
    """Train a ViT; ``student`` are its constructor's arguments."""
    loss = DistillationLoss("cskd")
    views = open_views(shards, cache, loss)
    loader = Batches(CachedLoader(views, batch_size, repeats=2, workers=2, device=device))
    student = {"num_classes": views.num_classes, "img_size": views.policy.size, **student}
    model = Distilled(create_model("deit_tiny_distilled_patch16_224", **student), views.grid)
    model.to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=0.05)
    lr_scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-5,
        step_on_epochs=False, updates_per_epoch=len(loader),
    )  # fmt: skip
    loss_fn, loss_scaler = Loss(loss), NativeScaler(device=torch.device(device).type)
    model_ema = ModelEmaV3(model, decay=0.99)
    curve = []
    for epoch in range(epochs):
        loss_fn.progress = epoch / epochs
        curve.append(
            train_one_epoch(
                epoch, model, loader, optimizer, loss_fn, lr_scheduler, loss_scaler, model_ema
            )
        )
        lr_scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {curve[-1]:.4f}")
    return model_ema.module.model, curve


if __name__ == "__main__":
    train(*sys.argv[1:3])
