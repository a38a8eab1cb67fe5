"""A Lightning module fed by the cached loader, on any number of devices.

Lightning saves the loader's state in its checkpoints: a run resumed in the middle of an epoch
continues with exactly the remaining batches.

    python lightning_module.py 'shards/train-*.tar' CACHE
"""

import sys

import lightning
import timm
import torch

from cskd_pipeline import CachedLoader, DistillationLoss, ckf_ratio, dense_logits, open_views


class Distillation(lightning.LightningModule):
    """A ViT trained with CSKD; ``student`` are its constructor's arguments."""

    def __init__(self, shards, cache, batch_size=256, lr=1e-3, **student):
        super().__init__()
        self.loss = DistillationLoss("cskd")
        self.views = open_views(shards, cache, self.loss)
        size, classes = self.views.policy.size, self.views.num_classes
        student = {"num_classes": classes, "img_size": size, **student}
        self.model = timm.create_model("deit_tiny_distilled_patch16_224", **student)
        self.batch_size, self.lr = batch_size, lr

    def train_dataloader(self):
        return CachedLoader(
            self.views,
            self.batch_size,
            repeats=2,
            workers=2,
            rank=self.global_rank,
            world=self.trainer.world_size,
            device=self.device,
        )

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch  # already moved by the loader: as uint8, a quarter of the bytes

    def training_step(self, batch, batch_idx):
        t = self.current_epoch / self.trainer.max_epochs
        heads = dense_logits(self.model, batch.images, self.views.grid)
        parts = self.loss(heads, batch.labels, batch.targets, ckf_ratio("cos", t), t)
        self.log("loss", parts.total, batch_size=len(batch.images))
        return parts.total

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr)


def train(shards, cache, epochs=30, **options):
    """Train a :class:`Distillation` on all available devices."""
    module = Distillation(shards, cache, **options)
    # The loader already splits batches between ranks.
    trainer = lightning.Trainer(max_epochs=epochs, use_distributed_sampler=False)
    trainer.fit(module)
    return module, trainer


if __name__ == "__main__":
    train(*sys.argv[1:3])
