"""Tables of op knowledge: overload -> its rule, and how to run the op on a shard if its arguments hold sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sptransform.diagnostics.errors import RuleError
from sptransform.rules.decision import Cut
from sptransform.rules.rule import OpCall, Operand, OpRule, RuleFn, Shape, map_nodes

Sends = Callable[[OpCall, Sequence[torch.Tensor], int], "tuple[Sent, Sent]"]


@dataclass(frozen=True)
class OpEntry:
    """A rule and, for ops whose arguments or meaning hold global sizes, how to run the op on a shard.

    Attributes:
        rule: what :func:`rule` returns, or a function of an :class:`OpCall` that returns its :class:`OpRule`; None if
            the op has no rule for this call.
        localize: ``localize(call, local)`` returns the result of the op on this rank's shard, see :class:`Local`, or a
            list of its results. None: the same call on the shards of its operands.
        sends: for an op that communicates itself: ``sends(call, operands, rank)`` returns what the rank sends, forward
            and backward. ``call`` and ``operands`` (may be fake) are those of the rank's shards.
    """

    rule: RuleFn
    localize: Callable[[OpCall, Local], Any] | None = None
    sends: Sends | None = None


@dataclass(frozen=True)
class Sent:
    """What one rank sends in one direction: ``count`` messages of one ``kind``, and their total bytes."""

    kind: str
    count: int
    bytes_sent: int


@dataclass(frozen=True)
class Local:
    """What a ``localize`` function may use.

    ``emit(target, args, kwargs)`` adds a node that runs an op on ``operands``, the shards, or on such nodes. Nodes are
    no tensors: ``operand_shapes``, ``result_shapes`` and ``result_dtypes`` say what they are. Read ``rank`` for uneven
    partitions only, so that even ones give every rank the same graph. ``group`` is the process group's name.
    """

    emit: Callable[..., Any]
    operands: tuple[Any, ...]
    operand_shapes: tuple[Shape, ...]
    result_shapes: tuple[Shape, ...]
    result_dtypes: tuple[torch.dtype, ...]
    rule: OpRule
    decision: Cut
    rank: int
    group: str

    def arguments(self, call: OpCall, /, **changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with operands put back and those named in ``changed`` replaced."""
        args, kwargs = map_nodes(
            (call.args, dict(call.kwargs)), lambda x: self.operands[x.index] if isinstance(x, Operand) else x
        )
        args = list(args)
        names = [argument.name for argument in call.target._schema.arguments]
        if unknown := sorted(set(changed) - set(names)):
            raise RuleError(f"{call.target} has no argument {', '.join(unknown)}; it has {', '.join(names)}")
        for position, argument in enumerate(call.target._schema.arguments):
            if argument.name in changed:
                if position < len(args) and not argument.kwarg_only:
                    args[position] = changed[argument.name]
                else:
                    kwargs[argument.name] = changed[argument.name]
        return tuple(args), kwargs

    def run(self, call: OpCall, /, **changed: Any) -> Any:
        """Run the call's own op on the local operands, with the arguments named in ``changed`` replaced."""
        args, kwargs = self.arguments(call, **changed)
        return self.emit(call.target, args, kwargs)


def overload_of(op: Any) -> Any:
    """The overload that graphs hold: of an overload, an op with one overload, or what ``torch.library.custom_op`` made.

    Raises:
        RuleError: ``op`` is something else, or has several overloads.
    """
    if isinstance(op, torch.library.CustomOpDef):
        return op._opoverload  # Private: the object keeps its name and its overload to itself
    if hasattr(op, "overloads"):
        if len(op.overloads()) == 1:
            return getattr(op, op.overloads()[0])
        raise RuleError(f"{op} has several overloads, each with a rule of its own: {', '.join(op.overloads())}")
    if hasattr(op, "_schema"):
        return op
    raise RuleError(f"not an op: {op!r}. Rules are for ops of torch.ops, as torch.ops.aten.mm.default")


class RuleTable(Mapping[Any, OpEntry]):
    """Overload -> entry, from alphabetical lists of pairs; ``default`` gives the entry of overloads in none of them.

    Raises:
        RuleError: an overload is in two lists.
    """

    def __init__(
        self,
        *tables: list[tuple[Any, OpEntry | RuleFn]],
        default: Callable[[Any], OpEntry | None] = lambda target: None,
    ) -> None:
        self._default = default
        self._entries: dict[Any, OpEntry] = {}
        for table in tables:
            for target, entry in table:
                if target in self._entries:
                    raise RuleError(f"two rules for {target}")
                self._entries[target] = entry if isinstance(entry, OpEntry) else OpEntry(entry)

    def __getitem__(self, target: Any) -> OpEntry:
        entry = self._entries.get(target) or self._default(target)
        if entry is None:
            raise KeyError(target)
        return entry

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def with_rules(self, rules: Mapping[Any, OpEntry | RuleFn]) -> RuleTable:
        """This table with ``rules``, overload -> rule; they come before its own."""
        return RuleTable(list(rules.items()), default=self.get)

    def rule_of(self, call: OpCall) -> OpRule | None:
        """The rule applied to a call, checked against its shapes; None if the op has no rule for it."""
        entry = self.get(call.target)
        applied = None if entry is None else entry.rule(call)
        if not isinstance(applied, OpRule | None):
            raise RuleError(f"{call.target}: a rule returns an OpRule or None, not {type(applied).__name__}")
        return None if applied is None else applied.check(call)
