"""Stage two: a student from shards joined to a teacher's cached logits.

``train`` opens the data, checks that cache, shards and student fit, and runs the epochs: update by
update (:meth:`Run.step <cskd_pipeline.pipeline.trainer.Run.step>`: pixels, heads, loss, optimizer),
then the evaluation and the checkpoints. Everything random is a function of (seed, update), and the
order of samples of (seed, epoch), so a run that was killed goes on exactly where its last state was
written. No teacher is loaded here, and nothing of ``dump`` is imported.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from cskd_pipeline.config import TrainRecipe, to_toml
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.evalset import EvalBatch, eval_loader
from cskd_pipeline.errors import CskdError, TrainingError, UsageError
from cskd_pipeline.models.checkpoint import save_student
from cskd_pipeline.models.train_state import find_nonfinite, load_state, save_state
from cskd_pipeline.pipeline.evaluate import counted, measure
from cskd_pipeline.pipeline.finetune import check_resumed
from cskd_pipeline.pipeline.from_recipe import make_run
from cskd_pipeline.pipeline.resuming import change_lines, write_changes
from cskd_pipeline.pipeline.run_log import Row, RunLog
from cskd_pipeline.pipeline.scalars import open_board, require_board
from cskd_pipeline.pipeline.train_job import TrainJob
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
ASK_EVERY = 10  # updates between the ranks' exchanges of whether one of them got a signal


def train(recipe: TrainRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Run ``recipe`` to its end, or on from where it stopped: ``cskd-pipeline train``.

    Under torchrun every process calls this; together they do what one would do, each with its part
    of every batch, and the first of them writes and logs.

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
        job = _open(recipe, ranks, resume)
        job.data.guard.report()
        if ranks.first:
            write_text(out / RECIPE, to_toml(recipe))
            for left_out in job.data.left_out:
                left_out.write()
        board = open_board(recipe) if ranks.first else None
        curves = RunLog(out, job.rows, job.run.update, writes=ranks.first, board=board)
        return _train(job, curves)


def _train(job: TrainJob, curves: RunLog) -> dict[str, Any]:
    """The run's epochs, from wherever it is; its summary."""
    run, recipe = job.run, job.recipe
    started, first = time.perf_counter(), run.update
    try:
        with stop_requests() as stop:
            if job.pending is not None:
                _close_epoch(job, curves, stop)
            batches = run.batches()
            while run.update < run.updates:
                _epoch(job, batches, curves, stop)
                _close_epoch(job, curves, stop)
    finally:
        curves.close(ended=run.update >= run.updates)
    seconds = time.perf_counter() - started
    images = (run.updates - first) * recipe.batch.batch_size
    return {
        "out": recipe.run.out,
        "student": recipe.student.name,
        "method": recipe.distill.method,
        "cache_digest": job.data.cache_digest,
        "init": job.init,
        "accepted_classes": list(job.data.guard.accepted),
        "epochs": recipe.schedule.epochs,
        "updates": run.updates,
        "recipe_changes": change_lines(job.changes),
        "seconds": seconds,
        "images_per_second": images / seconds if images else None,
        "last": job.rows[-1] if job.rows else {},
        "best": job.best,
    }


def _epoch(job: TrainJob, batches: Iterator[Batch], curves: RunLog, stop: Stop) -> None:
    """The updates that are left of the current epoch; ``pending`` is its row then."""
    run, settings = job.run, job.recipe.run
    epoch, done, drifted = run.epoch, run.update % run.steps, 0

    def loaded() -> Iterator[Batch]:
        nonlocal drifted
        for batch in meter.timed(batches):
            drifted += batch.drifted
            yield batch

    with progress(run.steps, "updates", f"epoch {epoch + 1}", done=done) as meter:
        micro_batches = loaded()
        while run.epoch == epoch:
            ratio = run.ratio
            parts = run.step(micro_batches)
            meter.advance()
            if run.update % settings.log_every == 0:
                curves.scalars(run.update, _point(run, parts, ratio))
            within, every = run.update % run.steps, settings.checkpoint_every
            stopping = _stopping(run, stop)
            if within and (stopping or (every and within % every == 0)):
                _save(job)
                if stopping:
                    raise KeyboardInterrupt
        means = _finite(run, run.sums / run.steps)  # waits for the device: the time is complete
        rate, data_wait = meter.rate * job.recipe.batch.batch_size, meter.data_wait
    if drifted:
        log.warning(f"epoch {epoch + 1}: {drifted} views are not those the teacher saw")
    run.sums.zero_()
    job.pending = {"epoch": epoch + 1, **means, "ckf_ratio": ratio, "lr": run.lr}
    job.pending |= {"images_per_second": rate, "data_wait": data_wait}


def _close_epoch(job: TrainJob, curves: RunLog, stop: Stop) -> None:
    """Evaluate the epoch whose updates are done where it is due, and write its row and students.

    The state comes first: an evaluation that fails loses nothing of the epoch, and is made up for
    when the run is resumed.
    """
    assert job.pending is not None
    run, row = job.run, job.pending
    last = run.update == run.updates
    _save(job)
    if job.data.validation is not None and (last or run.epoch % job.recipe.run.eval_every == 0):
        try:
            row = row | _evaluate(job, stop)
        except CskdError:
            log.warning(f"epoch {run.epoch} is saved; --resume evaluates it and goes on")
            raise
    if run.ranks.first:
        _save_students(job, row)
    curves.epoch(run.update, row)
    job.pending = None
    _save(job)
    limit = limiting_side(row["data_wait"] or 0)
    log.info(f"{_epoch_line(row, job.recipe.schedule.epochs)}  limit: {limit}")
    if _signalled(run, stop) and not last:
        raise KeyboardInterrupt


def _evaluate(job: TrainJob, stop: Stop) -> Row:
    """Top-1 and top-5 of the running weights and of their average; keeps the best student."""
    run, row = job.run, dict[str, float | int | None]()
    candidates = {"last": run.student.model}
    if run.ema is not None:
        candidates["ema"] = run.ema.module
    for name, model in candidates.items():
        student = run.student.with_model(model)
        with progress(_validation_share(job), "images", f"evaluating {name}") as meter:
            images = _validation(job, meter, stop)
            metrics = measure(student, images, job.heads, run.grid, amp=run.amp, ranks=run.ranks)
        prefix = "" if name == "last" else "ema_"
        row |= {f"{prefix}top1": metrics["mean"]["top1"], f"{prefix}top5": metrics["mean"]["top5"]}
        row |= {f"{prefix}top1_{head}": m["top1"] for head, m in metrics.items() if head != "mean"}
        top1 = metrics["mean"]["top1"]
        if top1 > job.best.get("top1", -1.0):
            if run.ranks.first:
                path = Path(job.recipe.run.out) / "best.safetensors"
                save_student(path, model.state_dict(), job.card(name, top1))
            job.best = {"top1": top1, "epoch": run.epoch, "weights": name}
    return row


def _validation(job: TrainJob, meter: Meter, stop: Stop) -> Iterator[EvalBatch]:
    """This rank's validation images; a signal ends them at once where no other rank waits."""
    assert job.data.validation is not None
    loader: Iterable[EvalBatch] = eval_loader(
        job.data.validation,
        job.run.student.preprocessing,
        batch_size=job.recipe.run.eval_batch_size,
        workers=job.run.loader.workers,
        ranks=job.run.ranks,
    )
    for batch in counted(meter.timed(loader), meter):
        yield batch
        if stop.requested and not job.run.ranks.many:
            raise KeyboardInterrupt


def _validation_share(job: TrainJob) -> int:
    """Count this rank's validation images: every ``world``-th batch."""
    assert job.data.validation is not None
    size, samples = job.recipe.run.eval_batch_size, job.data.validation.samples
    starts = range(0, samples, size)[job.run.ranks.rank :: job.run.ranks.world]
    return sum(min(size, samples - start) for start in starts)


def _save_students(job: TrainJob, row: Row) -> None:
    run, out = job.run, Path(job.recipe.run.out)
    card = job.card("last", row.get("top1"))
    save_student(out / "last.safetensors", run.student.model.state_dict(), card)
    if run.ema is not None:
        card = job.card("ema", row.get("ema_top1"))
        save_student(out / "last_ema.safetensors", run.ema.module.state_dict(), card)


def _save(job: TrainJob) -> None:
    """Write the state, whose numbers are all finite: a run can always go on from its last."""
    state = job.state()
    found = find_nonfinite(state)
    if job.run.ranks.any(found is not None):
        raise _diverged(job.run, "the weights are not finite", f"NaN or infinity in {found}")
    if job.run.ranks.first:
        save_state(Path(job.recipe.run.out) / STATE, state)


def _stopping(run: Run, stop: Stop) -> bool:
    """Say that it is time to stop; ranks exchange it at times, so that all stop at one update."""
    if run.ranks.many and run.update % ASK_EVERY:
        return False
    return _signalled(run, stop)


def _signalled(run: Run, stop: Stop) -> bool:
    """Say that some rank got a signal; then all know which."""
    if not run.ranks.any(stop.requested):
        return False
    for signals in run.ranks.gather(sorted(stop.signals)):
        stop.add(signals)
    return True


def _point(run: Run, parts: Tensor, ratio: float) -> dict[str, float]:
    """The scalars of one update. Reading them is where the host waits for the device."""
    values = _finite(run, parts)
    losses = {f"train/{name}": value for name, value in values.items()}
    return {**losses, "train/lr": run.lr, "train/ckf_ratio": ratio}


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
        action=f"lower the learning rate optim.lr (here it was {run.lr:g}), clip gradients or "
        "leave float16, and go on from the last checkpoint, which is from before (or begin anew, "
        "if there is none): the same command with, say, --set optim.clip_grad=1 --resume",
    )


def _epoch_line(row: Row, epochs: int) -> str:
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}"]
    parts += [f"r {row['ckf_ratio']:.3f}"] if row["spatial"] else []
    if row.get("top1") is not None:
        parts.append(f"top-1 {row['top1']:.2f}")
    if row.get("ema_top1") is not None:
        parts.append(f"EMA {row['ema_top1']:.2f}")
    parts.append(f"{row['images_per_second']:.0f} images/s")
    parts.append(f"data wait {100 * (row['data_wait'] or 0):.0f} %")
    return "  ".join(parts)


# -- how a run begins --------------------------------------------------------------------------


def _open(recipe: TrainRecipe, ranks: Ranks, resume: bool) -> TrainJob:
    """The run at its first update, or where its last state was written."""
    require_board(recipe.run.wandb)
    if ranks.first:
        _claim(Path(recipe.run.out), resume)
    ranks.wait()
    use_threads(recipe.run.threads)
    data = open_training_data(recipe, ranks)
    device = ranks.device(pick_device(recipe.run.device))
    job = TrainJob(recipe, data, make_run(recipe, data.views, device, ranks))
    if recipe.schedule.warmup_epochs >= recipe.schedule.epochs:
        log.warning(
            f"the warm-up ({recipe.schedule.warmup_epochs} epochs) outlasts the run: the learning "
            "rate never reaches optim.lr; set schedule.warmup_epochs"
        )
    if resume and (Path(recipe.run.out) / STATE).exists():
        _resume(job, Path(recipe.run.out) / STATE)
    elif recipe.student.init_from:
        log.info(str(job.start_from(recipe.student.init_from)))
    return job


def _claim(out: Path, resume: bool) -> None:
    """Refuse a folder in which the run would write over something, but for a run to resume."""
    known = (out / RECIPE).exists()
    if resume:
        sweep(out)
    if not (resume and known):
        goes_on = ", or go on with the run there by --resume" if known else ""
        require_free(out, WRITTEN, action=f"choose another --out{goes_on}")


def _resume(job: TrainJob, state_file: Path) -> None:
    """Go on from the run's last state."""
    run, init_from = job.run, job.recipe.student.init_from
    state = load_state(state_file)
    job.restore(state, state_file)
    if not check_resumed(init_from, job.init, state_file):
        log.info(f"{init_from} is gone; the run goes on without it")
    log.info(f"resuming at epoch {run.epoch}, update {run.update} of {run.updates}")
    if len(job.changes) > len(state["changes"]):
        for line in change_lines(job.changes[-1:]):
            log.warning(f"the recipe is changed from {line}")
        _save(job)
        if run.ranks.first:
            write_changes(state_file.parent, job.changes)
    ended = run.update == run.updates and job.pending is None
    if ended and job.data.validation is not None and "top1" not in job.rows[-1]:
        job.pending = job.rows.pop()  # of an epoch that was not the last when it ended
