"""One class per cause. Each says what happened, where, and what to do about it.

``exit_code`` is what the command line returns: 1 refused or failed verification, 2 bad usage, 3 unreadable input.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoeifyError(Exception):
    """Base of every error a user can cause. ``str()`` gives the text that the terminal shows."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(cls: type[MoeifyError], what: str, where: str | None, hint: str | None) -> MoeifyError:
    error = cls.__new__(cls)
    MoeifyError.__init__(error, what, where=where, hint=hint)
    return error


# --- usage: exit code 2 -------------------------------------------------------------------------------------------


class UsageError(MoeifyError):
    """The command line, the recipe or the arguments of a call do not make sense."""

    exit_code = 2


class UnknownName(UsageError):
    """A method, router, pass or backend that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
        super().__init__(f"there is no {kind} named {name!r}", hint=hint)


class BadOption(UsageError):
    """An option of a method, router or pass that does not exist or does not parse."""


class BadRecipe(UsageError):
    """A recipe whose numbers contradict each other (top_k larger than experts, ...)."""


class BadInputSpec(UsageError):
    """An ``--input`` specification that does not parse or does not fit the model."""


# --- unreadable input: exit code 3 --------------------------------------------------------------------------------


class InputError(MoeifyError):
    """A model or data file that cannot be read."""

    exit_code = 3


class UnreadableFile(InputError):
    """Missing, empty, truncated or of an unknown kind."""


class UnsafePickle(InputError):
    """A pickle that names something outside the allowlist. It has not been executed."""


class TorchScriptFile(InputError):
    """A TorchScript archive: it holds no module that torch.export can read."""


class StateDictMismatch(InputError):
    """A state_dict that does not fit the module its factory builds."""


class NonFiniteWeights(InputError):
    """Parameters that hold NaN or infinity."""


# --- refused: exit code 1 -----------------------------------------------------------------------------------------


class NotExportable(MoeifyError):
    """torch.export cannot capture the model."""


class NoBlocks(MoeifyError):
    """No feed-forward block was found or selected."""


class NotDivisible(MoeifyError):
    """A hidden width that does not split into equal experts."""


class Refused(MoeifyError):
    """A conversion that cannot work for this block or this model."""


class BrokenProgram(MoeifyError):
    """A pass left a program that breaks one of the rules: a bug of the pass, not of the user."""


class VerificationFailed(MoeifyError):
    """The rewritten program does not compute what the method promises. Nothing was written."""


class OutputNotWritten(MoeifyError):
    """The result could not be written. What was there before is untouched."""


class RuntimeUnavailable(MoeifyError):
    """A runtime, a provider of it, or a version of it that this needs is not here."""


# --- expert parallelism: exit code 1 ------------------------------------------------------------------------------


class DistributedError(MoeifyError):
    """Something between ranks. Base of the classes below."""


class UnboundRole(DistributedError):
    """A sharded graph that runs before its role was bound to a group of ranks."""


class GroupMismatch(DistributedError):
    """A group of ranks that is not the one a graph was made for."""


class RanksDiffer(DistributedError):
    """Ranks that do not run one and the same program."""


class RankLost(DistributedError):
    """A rank that ended, or that did not come to an exchange in time."""


class NonFiniteValues(DistributedError):
    """NaN or infinity in a rank's inputs or gradients."""
