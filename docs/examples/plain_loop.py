"""A plain PyTorch loop over cached views, with a custom CKF schedule and loss weight.

python plain_loop.py 'shards/train-*.tar' CACHE
"""

import sys

import timm
import torch

from cskd_pipeline import CachedLoader, DistillationLoss, ckf_ratio, dense_logits, open_views


def train(shards, cache, epochs=30, batch_size=256, lr=1e-3, device="cpu", **student):
    """Train a ViT; ``student`` are its constructor's arguments."""
    # Both are functions of progress t in [0, 1]; the paper's schedules also go by name.
    loss = DistillationLoss("cskd", spatial_weight=lambda t: 1.0 + t)
    schedule = lambda t: (1.0 - t) ** 3  # noqa: E731

    views = open_views(shards, cache, loss)
    # Two views share one decoded image; the cache needs at least as many (--views 2).
    # Images are normalised with the policy's mean and std: pass mean= and std= for others.
    loader = CachedLoader(views, batch_size, repeats=2, workers=2, device=device)
    student = {"num_classes": views.num_classes, "img_size": views.policy.size, **student}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **student).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    curve = []
    for epoch in range(epochs):
        t = epoch / epochs
        r = ckf_ratio(schedule, t)
        for batch in loader:
            heads = dense_logits(model, batch.images, views.grid)
            parts = loss(heads, batch.labels, batch.targets, r, t)
            optimizer.zero_grad()
            parts.total.backward()
            optimizer.step()
            curve.append(parts.detached())
        # Save model, optimizer and loader.state_dict() here, or after any step: resume is exact.
        # To resume, load them and loop over range(loader.epoch, epochs).
        print(f"epoch {epoch + 1}: r {r:.3f}, loss {parts.total.item():.4f}")
    return model, torch.stack(curve)


if __name__ == "__main__":
    train(*sys.argv[1:3])
