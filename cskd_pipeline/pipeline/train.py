"""Stage two: train a student on shards joined to a teacher's cached logits.

``train`` opens the data, checks that cache, shards and student fit, and runs the epochs:

- ``_epoch`` runs the updates of one, each a :meth:`Trainer.step
  <cskd_pipeline.pipeline.trainer.Trainer.step>` (pixels, heads, loss, optimizer);
- ``_close_epoch`` evaluates it and writes its row, its students and the state.

A :class:`TrainJob <cskd_pipeline.pipeline.train_job.TrainJob>` has the run's recipe, data, trainer
and history. All randomness is a function of (seed, update), the order of samples of (seed, epoch),
so a killed run resumes exactly from its last state. No teacher is loaded, nor ``dump`` imported.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from cskd_pipeline.config.sections import TrainRecipe
from cskd_pipeline.config.writing import to_toml
from cskd_pipeline.data.batches import Batch
from cskd_pipeline.data.evalset import EvalBatch, eval_loader, images_of_rank
from cskd_pipeline.errors import CskdError, TrainingError, UsageError, WeightsError
from cskd_pipeline.models.checkpoint import save_student
from cskd_pipeline.models.train_state import find_nonfinite, load_state, save_state
from cskd_pipeline.pipeline.evaluate import count_images, measure
from cskd_pipeline.pipeline.finetune import check_resumed
from cskd_pipeline.pipeline.run_log import Row, RunLog, epoch_line, open_wandb, require_wandb
from cskd_pipeline.pipeline.train_job import CHANGES, TrainJob, change_lines, write_changes
from cskd_pipeline.pipeline.trainer import PARTS, Trainer
from cskd_pipeline.pipeline.training_data import open_training_data
from cskd_pipeline.runtime.atomic import NO_LOCKS, require_free, sole_writer, sweep, write_text
from cskd_pipeline.runtime.device import pick_device, use_threads
from cskd_pipeline.runtime.distributed import Ranks, join_job, torchrun_job_id
from cskd_pipeline.runtime.progress import Meter, limiting_side, progress
from cskd_pipeline.runtime.signals import Stop, stop_requests

log = logging.getLogger(__name__)

RECIPE, STATE, KEPT_STATE = "recipe.toml", "state.pt", "state-{:05}.pt"
JOB = ".torchrun-job"
STUDENTS = ("last.safetensors", "last_ema.safetensors", "best.safetensors")
OCCUPIED_BY = (
    *(RECIPE, STATE, *STUDENTS, CHANGES, "summary.csv", "tensorboard", "wandb", "wandb.json"),
    *("left_out.csv", "left_out-validation.csv"),
    "zarr.json",  # a cache
)
"""A run may start in any folder that contains none of these (other files, such as a job's log, are
fine).
"""
EXCHANGE_EVERY = 10  # updates between the exchanges of stop signals among ranks


def train(recipe: TrainRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Train to the end of ``recipe``, from its start or the last state: ``cskd-pipeline train``.

    Under torchrun every process calls this. Together they compute what one process would, each on
    its part of every batch; only the first writes and logs. A job that torchrun restarts resumes.

    Returns:
        The summary: epochs, updates, seconds, metrics of the last and best students.

    Raises:
        CskdError: data, cache and student do not fit, or the output folder is not this run's.
        KeyboardInterrupt, Requeue: stopped by a signal, after the state was written.
    """
    if not recipe.run.out:
        raise UsageError("train needs an output folder", action="pass --out DIR")
    out = Path(recipe.run.out)
    with join_job(recipe.run.rank_timeout) as ranks, _locked_by_first_rank(out, ranks):
        job = _open(recipe, ranks, resume)
        job.data.guard.report_new()
        if ranks.first:
            if torchrun_job_id():
                write_text(out / JOB, torchrun_job_id())
            write_text(out / RECIPE, to_toml(recipe))
            for left_out in job.data.left_out:
                left_out.write()
        _record_changes(job)
        wandb_curves = open_wandb(recipe) if ranks.first else None
        curves = RunLog(out, job.trainer.update, writes=ranks.first, wandb_curves=wandb_curves)
        return _train(job, curves)


@contextmanager
def _locked_by_first_rank(out: Path, ranks: Ranks) -> Iterator[None]:
    """Lock the output folder on the first rank, the only one that writes to it."""
    if not ranks.first:
        yield
        return
    with sole_writer(out) as locked:
        if not locked:
            log.warning(NO_LOCKS.format(out))
        yield


def _train(job: TrainJob, curves: RunLog) -> dict[str, Any]:
    """Train the remaining epochs; return the run's summary."""
    trainer = job.trainer
    started, first_update = time.perf_counter(), trainer.update
    try:
        with stop_requests() as stop:
            if job.pending is not None:  # stopped between an epoch's updates and its evaluation
                _close_epoch(job, curves, stop)
            batches = trainer.micro_batches()
            while trainer.update < trainer.total_updates:
                _epoch(job, batches, curves, stop)
                _close_epoch(job, curves, stop)
    finally:
        curves.close(ended=trainer.update >= trainer.total_updates)
    images = (trainer.total_updates - first_update) * job.recipe.batch.batch_size
    return job.summary(images, time.perf_counter() - started)


def _epoch(job: TrainJob, batches: Iterator[Batch], curves: RunLog, stop: Stop) -> None:
    """Run the remaining updates of the current epoch; leave its row in ``job.pending``."""
    trainer, options = job.trainer, job.recipe.run
    epoch, steps, drifted = trainer.epoch, trainer.steps_per_epoch, 0
    done_before = trainer.update % steps  # when the run was resumed
    with progress(steps, "updates", f"epoch {epoch + 1}", done=done_before) as meter:

        def count_drifted() -> Iterator[Batch]:
            nonlocal drifted
            for batch in meter.timed(batches):
                drifted += batch.drifted
                yield batch

        micro_batches = count_drifted()
        while trainer.epoch == epoch:
            ratio = trainer.ratio  # CKF ratio of this update
            losses = trainer.step(micro_batches)  # (4,): PARTS, over this rank's samples
            meter.advance()
            # The calls below are collective: every rank makes them at the same updates.
            if trainer.update % options.log_every == 0:
                curves.scalars(trainer.update, _point(trainer, losses, ratio))
            step_in_epoch, every = trainer.update % steps, options.checkpoint_every
            stopping = _time_to_stop(trainer, stop)
            if step_in_epoch and (stopping or (every and step_in_epoch % every == 0)):
                _save(job)
                if stopping:
                    _warn_of_drift(trainer, epoch, drifted)
                    raise KeyboardInterrupt
        # Waits for the device, so that the times below cover complete updates.
        means = _read_means(trainer, trainer.sums / steps)
        rate, data_wait = meter.rate * job.recipe.batch.batch_size, meter.data_wait
        seconds = meter.seconds * steps / (steps - done_before)  # extrapolated to the full epoch
    _warn_of_drift(trainer, epoch, drifted)
    trainer.sums.zero_()
    job.pending = {"epoch": epoch + 1, **means, "ckf_ratio": ratio, "lr": trainer.lr}
    job.pending |= {"seconds": seconds, "images_per_second": rate, "data_wait": data_wait}


def _warn_of_drift(trainer: Trainer, epoch: int, drifted: int) -> None:
    """Warn of the views, on all ranks, that ``data.drift = warn`` accepted."""
    if total := sum(trainer.ranks.gather(drifted)):
        log.warning(f"epoch {epoch + 1}: {total} views differ from those the teacher saw")


def _close_epoch(job: TrainJob, curves: RunLog, stop: Stop) -> None:
    """Evaluate the finished epoch if an evaluation is due, and write its row and students.

    The state is saved twice, first with ``job.pending`` and then without. A run that is killed, or
    whose evaluation fails, resumes accordingly:

    ====================  =======================================================================
    stopped               resuming
    ====================  =======================================================================
    before the first      repeats the updates since the last checkpoint
    between the two       repeats no update: evaluates and writes the row and the students (again)
    after the second      starts the next epoch
    ====================  =======================================================================
    """
    assert job.pending is not None
    trainer, row = job.trainer, job.pending
    last = trainer.update == trainer.total_updates
    _save(job)
    if job.data.validation is not None and (last or trainer.epoch % job.recipe.run.eval_every == 0):
        try:
            row = row | _evaluate(job, stop)
        except CskdError:
            log.warning(f"epoch {trainer.epoch} is saved; --resume evaluates it and continues")
            raise
    if trainer.ranks.first:
        _save_students(job, row)
    job.rows.append(row)
    job.pending = None
    curves.epoch(trainer.update, job.rows)
    if job.recipe.run.keep_every and trainer.epoch % job.recipe.run.keep_every == 0:
        _save(job, KEPT_STATE.format(trainer.epoch))
    _save(job)
    limit = limiting_side(row["data_wait"] or 0)
    log.info(f"{epoch_line(row, job.recipe.schedule.epochs)}  limit: {limit}")
    if _exchange_signals(trainer, stop) and not last:
        raise KeyboardInterrupt


def _evaluate(job: TrainJob, stop: Stop) -> Row:
    """Measure the current weights and their average; save the best student so far."""
    trainer, row = job.trainer, dict[str, float | int | None]()
    candidates = {"last": trainer.student.model}
    if trainer.ema is not None:
        candidates["ema"] = trainer.ema.module  # the moving average of the weights
    assert job.data.validation is not None
    size = job.recipe.run.eval_batch_size
    share = images_of_rank(job.data.validation, batch_size=size, ranks=trainer.ranks)
    for name, model in candidates.items():
        student = trainer.student.with_model(model)
        with progress(share, "images", f"evaluating {name}") as meter:
            images = _validation(job, meter, stop)
            metrics = measure(
                student, images, job.heads, trainer.grid, amp=trainer.amp, ranks=trainer.ranks
            )
        prefix = "" if name == "last" else "ema_"
        row |= {f"{prefix}top1": metrics["mean"]["top1"], f"{prefix}top5": metrics["mean"]["top5"]}
        row |= {f"{prefix}top1_{head}": m["top1"] for head, m in metrics.items() if head != "mean"}
        top1 = metrics["mean"]["top1"]  # of the mean of the heads' logits
        if top1 > job.best.get("top1", -1.0):
            if trainer.ranks.first:
                path = Path(job.recipe.run.out) / "best.safetensors"
                save_student(path, model.state_dict(), job.header(name, top1))
            job.best = {"top1": top1, "epoch": trainer.epoch, "weights": name}
    return row


def _validation(job: TrainJob, meter: Meter, stop: Stop) -> Iterator[EvalBatch]:
    """Yield this rank's validation batches; a signal stops at once unless other ranks wait."""
    assert job.data.validation is not None
    loader: Iterable[EvalBatch] = eval_loader(
        job.data.validation,
        job.trainer.student.preprocessing,
        batch_size=job.recipe.run.eval_batch_size,
        workers=job.trainer.loader.workers,
        ranks=job.trainer.ranks,
    )
    for batch in count_images(meter.timed(loader), meter):
        yield batch
        if stop.requested and not job.trainer.ranks.many:
            raise KeyboardInterrupt


def _save_students(job: TrainJob, row: Row) -> None:
    trainer, out = job.trainer, Path(job.recipe.run.out)
    header = job.header("last", row.get("top1"))
    save_student(out / "last.safetensors", trainer.student.model.state_dict(), header)
    if trainer.ema is not None:
        header = job.header("ema", row.get("ema_top1"))
        save_student(out / "last_ema.safetensors", trainer.ema.module.state_dict(), header)


def _save(job: TrainJob, name: str = STATE) -> None:
    """Save the state if all its numbers are finite, so that a saved state can always be resumed.

    All ranks call this: it averages their sums of losses, and stops all of them if one diverged.
    """
    state = job.state()
    found = find_nonfinite(state)
    if job.trainer.ranks.any(found is not None):
        raise _diverged(job.trainer, "the weights are not finite", f"NaN or infinity in {found}")
    if job.trainer.ranks.first:
        save_state(Path(job.recipe.run.out) / name, state)


def _time_to_stop(trainer: Trainer, stop: Stop) -> bool:
    """Return whether to stop now; ranks exchange signals every few updates, so all agree."""
    if trainer.ranks.many and trainer.update % EXCHANGE_EVERY:
        return False
    return _exchange_signals(trainer, stop)


def _exchange_signals(trainer: Trainer, stop: Stop) -> bool:
    """Return whether any rank got a signal, and share the signals; all ranks call this."""
    if not trainer.ranks.any(stop.requested):
        return False
    for signals in trainer.ranks.gather(sorted(stop.signals)):
        stop.add(signals)
    return True


def _point(trainer: Trainer, losses: Tensor, ratio: float) -> dict[str, float]:
    """Return the scalars of one update; this waits for the device and the other ranks."""
    means = {f"train/{name}": value for name, value in _read_means(trainer, losses).items()}
    return {**means, "train/lr": trainer.lr, "train/ckf_ratio": ratio}


def _read_means(trainer: Trainer, losses: Tensor) -> dict[str, float]:
    """Return the loss parts averaged over all ranks, which all call this; refuse NaN or inf."""
    values = dict(zip(PARTS, trainer.ranks.mean(losses).tolist(), strict=True))
    if not math.isfinite(values["loss"]):
        found = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        raise _diverged(trainer, "the loss is not finite", found)
    return values


def _diverged(trainer: Trainer, problem: str, found: str) -> TrainingError:
    return TrainingError(
        problem,
        where=f"update {trainer.update}",
        found=found,
        action=f"lower optim.lr (now {trainer.lr:g}), clip gradients (optim.clip_grad) or turn off "
        "float16 (run.amp), then resume from the last checkpoint, which predates the divergence: "
        "the same command with, for example, --set optim.clip_grad=1 --resume; without a "
        "checkpoint, start over",
    )


# -- how a run starts --------------------------------------------------------------------------


def _open(recipe: TrainRecipe, ranks: Ranks, resume: bool) -> TrainJob:
    """Open a new run, resume one from its last state, or fork another run's state."""
    require_wandb(recipe.run.wandb)
    if ranks.first:
        resume = _claim(Path(recipe.run.out), resume)
    resume = ranks.gather(resume)[0]
    use_threads(recipe.run.threads)
    data = open_training_data(recipe, ranks)
    device = ranks.device(pick_device(recipe.run.device))
    job = TrainJob(recipe, data, Trainer(recipe, data.views, device, ranks))
    if recipe.schedule.warmup_epochs >= recipe.schedule.epochs:
        log.warning(
            f"the warm-up ({recipe.schedule.warmup_epochs} epochs) outlasts the run: the learning "
            "rate never reaches optim.lr; lower schedule.warmup_epochs"
        )
    if resume and (Path(recipe.run.out) / STATE).exists():
        _resume(job, Path(recipe.run.out) / STATE)
    elif recipe.run.fork_from:
        _fork(job, Path(recipe.run.fork_from))
    elif recipe.student.init_from:
        log.info(str(job.start_from(recipe.student.init_from)))
    return job


def _claim(out: Path, resume: bool) -> bool:
    """Refuse to overwrite existing files unless resuming the run that wrote them.

    Returns:
        Whether to resume: on request, or if torchrun restarts the job that started the run.
    """
    has_run, job_file = (out / RECIPE).exists(), out / JOB
    if torchrun_job_id() and job_file.is_file():
        resume = resume or job_file.read_text(errors="replace") == torchrun_job_id()
    if resume:
        sweep(out)
    if not (resume and has_run):
        or_resume = ", or resume the existing run with --resume" if has_run else ""
        require_free(out, OCCUPIED_BY, action=f"choose another --out{or_resume}")
    return resume


def _fork(job: TrainJob, state_file: Path) -> None:
    """Start from another run's state; the recipes' differences become this run's first change."""
    if not state_file.is_file():
        raise WeightsError(
            "the state to fork from does not exist",
            where=state_file,
            action="pass a state that run.keep_every kept",
        )
    job.fork(load_state(state_file), state_file)
    _compare_init(job, state_file)
    log.info(f"forking {state_file} after epoch {job.trainer.epoch}")


def _resume(job: TrainJob, state_file: Path) -> None:
    """Resume from the run's last state."""
    trainer = job.trainer
    job.restore(load_state(state_file), state_file)
    _compare_init(job, state_file)
    update, total = trainer.update, trainer.total_updates
    log.info(f"resuming after {update} of {total} updates, {trainer.epoch} epochs")
    ended = update == total and job.pending is None
    if ended and job.data.validation is not None and "top1" not in job.rows[-1]:
        # The last epoch was closed without an evaluation, when the recipe had more epochs or no
        # validation shards. Close it again, this time with one.
        job.pending = job.rows.pop()


def _compare_init(job: TrainJob, state_file: Path) -> None:
    init_from = job.recipe.student.init_from
    if not check_resumed(init_from, job.init, state_file):
        log.info(f"{init_from} no longer exists; the run continues without it")


def _record_changes(job: TrainJob) -> None:
    """Log and save a change of the recipe; write the list of all changes to the run's folder."""
    if job.just_changed:
        for line in change_lines(job.changes[-1:]):
            log.warning(f"the recipe changes at {line}")
        _save(job)
    if job.changes and job.trainer.ranks.first:
        write_changes(Path(job.recipe.run.out), job.changes)
