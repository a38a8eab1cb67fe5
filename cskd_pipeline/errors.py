"""The exception tree, worded for the person who must act.

Every class is a :class:`CskdError`; :class:`ShardError`, :class:`ImageError`, :class:`ClassesError`
and :class:`JoinError` are :class:`DataError` as well. Exit codes: 2 of :class:`UsageError`, 130 of
:class:`Interrupted`, 75 of :class:`Preempted`, 1 of all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

MAX_PROBLEMS = 20  # shown at once; the exception holds them all


def printable(text: object, limit: int = 300) -> str:
    """Return ``text`` on one line, with control characters (terminal escapes too) spelled out."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"


class CskdError(Exception):
    """One problem: where it is, what was found, what was expected, and what to do next.

    Args:
        problem: one sentence without a full stop.
        where: the file, array, sample or recipe key.
        found, expected: values, already readable.
        action: what the user can do; a command where there is one.
        problems: one line each where there may be several: path, found, expected.
        report: what the command found all the same; with ``--json`` it is printed beside the error.
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
    """The call contradicts itself."""

    exit_code = 2


class RecipeError(CskdError):
    """A recipe's keys or values."""


class ManifestError(CskdError):
    """A document that does not fit its schema.

    Args:
        problems: one line each: JSON path, found, expected.
    """

    def __init__(self, where: object, problems: list[str], action: str | None = None) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in a manifest", where=where, action=action, problems=problems)
        self.args = (where, problems, action)  # pickle calls the class with these


class DataError(CskdError):
    """Shards and what is in them."""


class ShardError(DataError):
    """A tar that is not one, is cut short, or holds a sample without image or label."""


class ImageError(DataError):
    """Bytes that are no image, or one too large to be honest."""


class ClassesError(DataError):
    """Two sides number different classes, or number them differently."""


class JoinError(DataError):
    """The shards at hand and the cache's data set differ."""


class ViewDriftError(CskdError):
    """A replayed view is not the recorded one."""


class CacheError(CskdError):
    """A cache that is incomplete, damaged, or of another kind than is needed."""


class RemoteError(CskdError):
    """A cache elsewhere that cannot be reached, or may not be read."""


class WeightsError(CskdError):
    """A checkpoint or teacher file that cannot be loaded safely."""


class TeacherError(CskdError):
    """A model that cannot give spatial logits."""


class StudentError(CskdError):
    """A model that cannot take spatial targets."""


class TrainingError(CskdError):
    """A run that cannot continue: a loss that is not finite."""


class RunError(CskdError):
    """A folder that is no training run's, or whose log is damaged."""


class RankError(CskdError):
    """The processes of a job have lost each other."""


class OutputError(CskdError):
    """A folder that holds something else, or a full disk."""


class MissingPackageError(CskdError):
    """An optional package that this command needs."""


def require_packages(*names: str, extra: str, problem: str) -> None:
    """Raise a MissingPackageError unless these are installed, as the package's ``extra`` does."""
    missing = [f"no {name}" for name in names if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            problem, found=" and ".join(missing), action=f"pip install 'cskd-pipeline[{extra}]'"
        )


class Interrupted(CskdError):
    """Ctrl-C; ``action`` says how to continue."""

    exit_code = 130


class Preempted(CskdError):
    """SIGTERM, SIGHUP or SIGUSR1, as schedulers send them; ``action`` says how to continue.

    The exit code is ``EX_TEMPFAIL`` of sysexits(3): the same command, queued again, continues.
    """

    exit_code = 75
