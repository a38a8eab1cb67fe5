"""Stage two: a student from shards joined to a teacher's cached answers.

``train`` is the whole of it: open the data, check that cache, shards and student fit, then, update
by update: pixels, heads, loss, step. Everything random is a function of (seed, update), and the
order of samples of (seed, epoch), so a run that was killed goes on exactly where its last state
was written. No teacher is loaded here, and nothing of ``dump`` is imported.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from cskd_pipeline.config import TrainRecipe, to_toml
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.errors import CskdError, TrainingError, UsageError
from cskd_pipeline.models.checkpoint import save_student
from cskd_pipeline.models.train_state import find_nonfinite, load_state, save_state
from cskd_pipeline.pipeline.evaluate import measure
from cskd_pipeline.pipeline.finetune import check_resumed
from cskd_pipeline.pipeline.resuming import told, write_changes
from cskd_pipeline.pipeline.run_log import Row, RunLog
from cskd_pipeline.pipeline.scalars import open_board, require_board
from cskd_pipeline.pipeline.trainer import PARTS, Run
from cskd_pipeline.pipeline.training_data import open_training_data
from cskd_pipeline.runtime.atomic import NO_LOCKS, require_free, sole_writer, sweep, write_text
from cskd_pipeline.runtime.device import pick_device, use_threads
from cskd_pipeline.runtime.distributed import Ranks, joined
from cskd_pipeline.runtime.progress import Meter, limiting_side, progress
from cskd_pipeline.runtime.signals import Stop, stop_requests

log = logging.getLogger(__name__)

RECIPE, STATE = "recipe.toml", "state.pt"
STUDENTS = ("last.safetensors", "last_ema.safetensors", "best.safetensors")
WRITTEN = (
    *(RECIPE, STATE, *STUDENTS, "summary.csv", "changes.jsonl", "tensorboard"),
    *("left_out.csv", "left_out-validation.csv", "wandb", "wandb.json"),
    "zarr.json",  # a cache
)
"""In a folder that has none of these a run can begin; a job's log may be there, say."""
ASK_EVERY = 10  # updates between the ranks' questions whether one of them was told to stop


def train(recipe: TrainRecipe, *, resume: bool = False) -> dict[str, Any]:
    """``cskd-pipeline train``: run ``recipe`` to its end, or on from where it stopped.

    Under torchrun every process calls this; together they do what one would do, each with its part
    of every batch, and the first of them writes and speaks.

    Returns:
        The closing summary: epochs, updates, top-1 of the last and best students, seconds, files.

    Raises:
        CskdError: data, cache and student do not fit, or the output folder is not this run's.
        KeyboardInterrupt, Requeue: stopped by a signal, after the state was written.
    """
    if not recipe.run.out:
        raise UsageError("train needs an output folder", action="pass --out DIR")
    out = Path(recipe.run.out)
    with (
        joined(recipe.run.rank_timeout) as ranks,
        sole_writer(out) if ranks.first else nullcontext(True) as held,
    ):
        if not held:
            log.warning(NO_LOCKS.format(out))
        return _train(recipe, ranks, resume)


def _train(recipe: TrainRecipe, ranks: Ranks, resume: bool) -> dict[str, Any]:
    out = Path(recipe.run.out)
    require_board(recipe)
    if ranks.first:
        _claim(out, resume)
    ranks.wait()
    use_threads(recipe.run.threads)
    data = open_training_data(recipe, ranks)
    run = Run(recipe, data, ranks.device(pick_device(recipe.run.device)), ranks)
    if recipe.schedule.warmup_epochs >= recipe.schedule.epochs:
        log.warning(
            f"the warm-up ({recipe.schedule.warmup_epochs} epochs) outlasts the run: the learning "
            "rate never reaches optim.lr; set schedule.warmup_epochs"
        )
    _begin(run, resume)
    data.guard.report()
    if ranks.first:
        write_text(out / RECIPE, to_toml(recipe))
        for left_out in data.left_out:
            left_out.write()
    board = open_board(recipe) if ranks.first else None
    curves = RunLog(out, run.rows, run.update, writes=ranks.first, board=board)
    started = time.perf_counter()
    first = run.update
    try:
        with stop_requests() as stop:
            if run.pending is not None:
                _close_epoch(run, curves, stop)
            batches = data.batches(run.positions(), run.device)
            while run.update < run.updates:
                _epoch(run, batches, curves, stop)
    finally:
        curves.close(ended=run.update >= run.updates)
    seconds = time.perf_counter() - started
    images = (run.updates - first) * recipe.batch.batch_size
    return {
        "out": str(out),
        "student": recipe.student.name,
        "method": recipe.distill.method,
        "cache_digest": data.cache_digest,
        "init": run.init,
        "accepted_classes": list(data.guard.accepted),
        "epochs": recipe.schedule.epochs,
        "updates": run.updates,
        "recipe_changes": told(run.changes),
        "seconds": seconds,
        "images_per_second": images / seconds if images else None,
        "last": run.rows[-1] if run.rows else {},
        "best": run.best,
    }


def _claim(out: Path, resume: bool) -> None:
    """Refuse a folder in which the run would write over something, but for a run to resume."""
    known = (out / RECIPE).exists()
    if resume:
        sweep(out)
    if not (resume and known):
        goes_on = ", or go on with the run there by --resume" if known else ""
        require_free(out, WRITTEN, action=f"choose another --out{goes_on}")


def _begin(run: Run, resume: bool) -> None:
    """Take up the run's last state, or begin."""
    recipe = run.recipe
    state_file = Path(recipe.run.out) / STATE
    if not (resume and state_file.exists()):
        if recipe.student.init_from:
            log.info(str(run.start_from(recipe.student.init_from)))
        return
    state = load_state(state_file)
    run.restore(state, state_file)
    if not check_resumed(recipe.student.init_from, run.init, state_file):
        log.info(f"{recipe.student.init_from} is gone; the run goes on without it")
    log.info(f"resuming at epoch {run.epoch}, update {run.update} of {run.updates}")
    if len(run.changes) > len(state["changes"]):
        for line in told(run.changes[-1:]):
            log.warning(f"the recipe is changed from {line}")
        _save(run, state_file)
        if run.ranks.first:
            write_changes(state_file.parent, run.changes)
    ended = run.update == run.updates and run.pending is None
    if ended and run.data.validation_set is not None and "top1" not in run.rows[-1]:
        run.pending = run.rows.pop()  # of an epoch that was not the last when it ended


class Drifted:
    """Counts views unlike those the teacher saw, where the recipe lets them pass."""

    def __init__(self) -> None:
        self.views = 0

    def counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.views += batch.drifted
            yield batch


def _epoch(run: Run, batches: Iterator[Batch], curves: RunLog, stop: Stop) -> None:
    """The updates that are left of the current epoch, then its evaluation and checkpoints."""
    epoch, settings = run.epoch, run.recipe.run
    state_file = curves.folder / STATE
    drifted = Drifted()
    done = run.update % run.steps
    with progress(run.steps, "updates", f"epoch {epoch + 1}", done=done) as meter:
        timed = meter.timed(drifted.counted(batches))
        while run.epoch == epoch:
            ratio = run.ratio()
            parts = run.step(timed)
            meter.advance()
            within = run.update % run.steps
            if run.update % settings.log_every == 0:
                curves.scalars(run.update, _point(run, parts, ratio))
            stopping = _stopping(run, stop)
            if within and (stopping or _due(within, settings.checkpoint_every)):
                _save(run, state_file)
                if stopping:
                    raise KeyboardInterrupt
        means = _finite(run, run.sums / run.steps)  # waits for the device: the time is complete
        speed = {
            "images_per_second": meter.rate * run.recipe.batch.batch_size,
            "data_wait": meter.data_wait,
        }
    if drifted.views:
        log.warning(f"epoch {epoch + 1}: {drifted.views} views are not those the teacher saw")
    run.sums.zero_()
    lr = run.optimizer.param_groups[0]["lr"]
    run.pending = {"epoch": epoch + 1, **means, "ckf_ratio": ratio, "lr": lr, **speed}
    _close_epoch(run, curves, stop)


def _stopping(run: Run, stop: Stop) -> bool:
    """Whether to stop here; ranks ask each other now and then, so that all stop at one update."""
    if run.ranks.many and run.update % ASK_EVERY:
        return False
    return _asked(run, stop)


def _asked(run: Run, stop: Stop) -> bool:
    """Whether some rank got a signal; then all know which."""
    if not run.ranks.any(stop.requested):
        return False
    for signals in run.ranks.gather(sorted(stop.signals)):
        stop.add(signals)
    return True


def _save(run: Run, path: Path) -> None:
    """Write the state, whose numbers are all finite: a run can always go on from its last."""
    state = run.state()
    found = find_nonfinite(state)
    if run.ranks.any(found is not None):
        raise _diverged(run, "the weights are not finite", f"NaN or infinity in {found}")
    if run.ranks.first:
        save_state(path, state)


def _due(within: int, every: int) -> bool:
    return every > 0 and within % every == 0


def _point(run: Run, parts: Tensor, ratio: float) -> dict[str, float]:
    """The scalars of one update. Reading them is where the host waits for the device."""
    values = _finite(run, parts)
    return {
        **{f"train/{name}": value for name, value in values.items()},
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/ckf_ratio": ratio,
    }


def _finite(run: Run, parts: Tensor) -> dict[str, float]:
    values = dict(zip(PARTS, run.ranks.mean(parts).tolist(), strict=True))
    if not math.isfinite(values["loss"]):
        found = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        raise _diverged(run, "the loss is not finite", found)
    return values


def _diverged(run: Run, problem: str, found: str) -> TrainingError:
    return TrainingError(
        problem,
        where=f"update {run.update}",
        found=found,
        action=f"lower the learning rate (optim.lr is {run.recipe.optim.lr:g}), clip gradients or "
        "leave float16, and go on from the last checkpoint, which is from before (or begin anew, "
        "if there is none): the same command with, say, --set optim.clip_grad=1 --resume",
    )


def _close_epoch(run: Run, curves: RunLog, stop: Stop) -> None:
    """Evaluate the epoch whose updates are done where it is due, and write its row and students.

    The state comes first: an evaluation that fails loses nothing of the epoch, and is made up for
    when the run is resumed.
    """
    assert run.pending is not None
    row, settings, state_file = run.pending, run.recipe.run, curves.folder / STATE
    last = run.update == run.updates
    _save(run, state_file)
    if run.data.validation_set is not None and (last or run.epoch % settings.eval_every == 0):
        try:
            row = row | _evaluate(run, curves.folder, stop)
        except CskdError:
            log.warning(f"epoch {run.epoch} is saved; --resume evaluates it and goes on")
            raise
    if run.ranks.first:
        _save_students(run, row, curves.folder)
    curves.epoch(run.update, row)
    run.pending = None
    _save(run, state_file)
    limit = limiting_side(row["data_wait"] or 0)
    log.info(f"{_epoch_line(row, run.recipe.schedule.epochs)}  limit: {limit}")
    if _asked(run, stop) and not last:
        raise KeyboardInterrupt


def _save_students(run: Run, row: Row, out: Path) -> None:
    card = run.card("last", row.get("top1"))
    save_student(out / "last.safetensors", run.student.model.state_dict(), card)
    if run.ema is not None:
        card = run.card("ema", row.get("ema_top1"))
        save_student(out / "last_ema.safetensors", run.ema.module.state_dict(), card)


def _evaluate(run: Run, out: Path, stop: Stop) -> dict[str, float | int | None]:
    """Top-1 and top-5 of the running weights and of their average; keeps the best student.

    A signal ends it at once where no other rank waits: the state is saved.
    """
    row: dict[str, float | int | None] = {}
    candidates = {"last": run.student.model}
    if run.ema is not None:
        candidates["ema"] = run.ema.module
    for name, model in candidates.items():
        student = run.student.with_model(model)
        with progress(run.data.validation_samples, "images", f"evaluating {name}") as meter:

            def advance(count: int, meter: Meter = meter) -> None:
                meter.advance(count)
                if stop.requested and not run.ranks.many:
                    raise KeyboardInterrupt

            metrics = measure(
                student,
                meter.timed(run.data.validation(student.preprocessing)),
                heads=run.heads,
                grid=run.grid,
                device=run.device,
                amp=run.amp,
                on_batch=advance,
                ranks=run.ranks,
            )
        prefix = "" if name == "last" else "ema_"
        row |= {f"{prefix}top1": metrics["mean"]["top1"], f"{prefix}top5": metrics["mean"]["top5"]}
        row |= {f"{prefix}top1_{head}": m["top1"] for head, m in metrics.items() if head != "mean"}
        top1 = metrics["mean"]["top1"]
        if top1 > run.best.get("top1", -1.0):
            if run.ranks.first:
                card = run.card(name, top1)
                save_student(out / "best.safetensors", model.state_dict(), card)
            run.best = {"top1": top1, "epoch": run.epoch, "weights": name}
    return row


def _epoch_line(row: dict[str, float | int | None], epochs: int) -> str:
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}"]
    parts += [f"r {row['ckf_ratio']:.3f}"] if row["spatial"] else []
    if row.get("top1") is not None:
        parts.append(f"top-1 {row['top1']:.2f}")
    if row.get("ema_top1") is not None:
        parts.append(f"EMA {row['ema_top1']:.2f}")
    parts.append(f"{row['images_per_second']:.0f} images/s")
    parts.append(f"data wait {100 * (row['data_wait'] or 0):.0f} %")
    return "  ".join(parts)
