"""The exception tree, worded for the person who must act.

Every class is a :class:`CskdError`; :class:`ShardError`, :class:`ImageError`, :class:`ClassesError`
and :class:`JoinError` are also :class:`DataError`. Exit codes: 2 for :class:`UsageError`, 130 for
:class:`Interrupted`, 75 for :class:`Preempted`, 1 for all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

MAX_PROBLEMS = 20  # printed; the exception keeps all of them


def printable(text: object, limit: int = 300) -> str:
    """Return ``text`` on one line, with control characters (terminal escapes too) escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"


class CskdError(Exception):
    """An error that states its location, what was found, what was expected, and what to do next.

    Args:
        problem: one clause without a full stop.
        where: the file, array, sample or recipe key.
        found, expected: readable values.
        action: what the user can do, with the command if there is one.
        problems: one line per problem (path, found, expected) if there can be several.
        report: partial result of the command; ``--json`` prints it with the error.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        action: str | None = None,
        problems: Sequence[str] = (),
        report: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.found = found
        self.expected = expected
        self.action = action
        self.problems = list(problems)
        self.report = report

    def __str__(self) -> str:
        lines = [printable(self.problem, 2000)]
        for name in ("where", "found", "expected"):
            value = getattr(self, name)
            if value is not None:
                lines.append(f"  {name + ':':<10}{printable(value, 2000)}")
        if self.action is not None:
            lines.append(f"  {'to do:':<10}{printable(self.action, 2000)}")
        lines += [f"  - {printable(problem)}" for problem in self.problems[:MAX_PROBLEMS]]
        if len(self.problems) > MAX_PROBLEMS:
            lines.append(f"  - and {len(self.problems) - MAX_PROBLEMS} more")
        return "\n".join(lines)


class UsageError(CskdError):
    """Invalid or contradictory arguments."""

    exit_code = 2


class RecipeError(CskdError):
    """Invalid keys or values in a recipe."""


class ManifestError(CskdError):
    """A document that does not match its schema.

    Args:
        problems: one line per problem: JSON path, found, expected.
    """

    def __init__(self, where: object, problems: list[str], action: str | None = None) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in a manifest", where=where, action=action, problems=problems)
        self.args = (where, problems, action)  # pickle calls the class with these


class DataError(CskdError):
    """Unusable shards or samples."""


class ShardError(DataError):
    """A file that is not a tar or is truncated, or a sample without image or label."""


class ImageError(DataError):
    """Bytes that are not an image, or an implausibly large image."""


class ClassesError(DataError):
    """Two sides with different classes, or with a different numbering of the same classes."""


class JoinError(DataError):
    """Shards that differ from the cache's data set."""


class ViewDriftError(CskdError):
    """A replayed view that differs from the recorded one."""


class CacheError(CskdError):
    """A cache that is incomplete, damaged, or of the wrong kind."""


class RemoteError(CskdError):
    """A remote cache or shard that is unreachable, or that may not be read."""


class WeightsError(CskdError):
    """A checkpoint or teacher file that cannot be loaded safely."""


class TeacherError(CskdError):
    """A model that cannot produce spatial logits."""


class StudentError(CskdError):
    """A model that cannot be trained on spatial targets."""


class TrainingError(CskdError):
    """A run that cannot continue because its loss is not finite."""


class RunError(CskdError):
    """A folder that is not a training run, or whose log is damaged."""


class RankError(CskdError):
    """A rank of a job that failed or cannot be reached."""


class OutputError(CskdError):
    """An output folder that contains other files, or a full disk."""


class MissingPackageError(CskdError):
    """A command that needs an optional package."""


def require_packages(*names: str, extra: str, problem: str) -> None:
    """Raise a MissingPackageError unless the packages ``names`` of ``extra`` are installed."""
    missing = [f"no {name}" for name in names if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            problem, found=" and ".join(missing), action=f"pip install 'cskd-pipeline[{extra}]'"
        )


class Interrupted(CskdError):
    """A command stopped by Ctrl-C; ``action`` says how to continue."""

    exit_code = 130


class Preempted(CskdError):
    """A command stopped by SIGTERM, SIGHUP or SIGUSR1; ``action`` says how to continue.

    The exit code is ``EX_TEMPFAIL`` of sysexits(3): queue the same command again to continue.
    """

    exit_code = 75
