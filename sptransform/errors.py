"""The error family, and the one form every message has: what, where, what was found, what would fix it."""

from __future__ import annotations

from torch import fx

from sptransform import annotations


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


def describe(what: str, *, node: fx.Node | None = None, found: str | None = None, fix: str | None = None) -> str:
    """Return an error message in the one form; ``node`` adds its name, op and the user's source line."""
    lines = [what]
    if node is not None:
        lines.append(f"  at: %{node.name} = {node.target}")
        source = annotations.source_line(node)
        if source is not None:
            lines.append(f"  in: {source}")
    if found is not None:
        lines.append(f"  found: {found}")
    if fix is not None:
        lines.append(f"  fix: {fix}")
    return "\n".join(lines)
