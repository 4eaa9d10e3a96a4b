"""The error classes, and the form of every message: what is wrong, where, what was found, how to fix it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from sptransform.diagnostics import provenance


class SPTransformError(RuntimeError):
    """Root of every error this library raises on purpose."""


class UsageError(SPTransformError, ValueError):
    """An argument of the public interface is wrong."""


class CaptureError(SPTransformError):
    """The model's graph cannot be captured faithfully."""


class RuleError(SPTransformError, ValueError):
    """A sharding rule is ill-formed, or does not fit the op it is applied to."""


class UnsupportedOpError(SPTransformError):
    """An op has no sharding rule and ``strict=True`` forbids running it replicated."""


class VerificationError(SPTransformError):
    """A rewritten graph breaks an invariant; always a bug in a pass, never in the user's model."""


class RankError(SPTransformError):
    """The ranks cannot run a call together; each rank still able to raises this. ``ranks``: global ranks it names."""

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class RankFailedError(RankError):
    """Another rank raised an error of its own in this call."""


class RankLostError(RankError):
    """The process of another rank has ended."""


class RankMissingError(RankError):
    """A rank did not reach a call in time."""


class ScheduleMismatchError(RankError):
    """Ranks were about to run different programs."""


class ReplicaMismatchError(RankError):
    """Ranks hold different values of what all of them should have the same: weights, inputs, states of generators."""


def shown(x: object) -> str:
    """``x`` as its class and attributes: ``Halves(at=3)``."""
    return f"{type(x).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(x).items())})"


def describe(
    what: str,
    *,
    node: fx.Node | None = None,
    at: str | None = None,
    source: str | None = None,
    found: str | None = None,
    fix: str | None = None,
) -> str:
    """Return an error message; ``node`` adds its name, its op and the user's source line.

    ``at`` and ``source`` give the same for a node that exists on another rank only.
    """
    lines = [what]
    if at is not None:
        lines.append(f"  at: {at}")
    if node is not None:
        # an op prints as its name, a Python function as its address
        target = node.target if hasattr(node.target, "_schema") else getattr(node.target, "__name__", node.target)
        lines.append(f"  at: %{node.name} = {target}")
        source = provenance.source_line(node)
    if source is not None:
        lines.append(f"  in: {source}")
    if found is not None:
        lines.append(f"  found: {found}")
    if fix is not None:
        lines.append(f"  fix: {fix}")
    return "\n".join(lines)
