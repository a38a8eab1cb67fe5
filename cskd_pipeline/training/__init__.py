"""What stage two is made of.

1. ``data`` -- the cache, the shards and the student's needs brought together, every misfit refused.
2. ``run`` -- model, optimizer, schedule, average, and one update.
3. ``initial`` -- weights to start from: what is kept, new and resized.
4. ``log`` -- ``summary.csv`` and TensorBoard; ``board`` -- the same on Weights & Biases.
"""
