"""Rules of users for custom autograd.Functions: one entry for the op that runs them, which reads their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sptransform.rules.factors import dims_and_sizes
from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry


@dataclass(frozen=True)
class FunctionRules:
    """Name of a function -> its rule, of an :class:`OpCall` whose operands are the tensors it is called with."""

    rules: Mapping[str, OpEntry | RuleFn]

    @property
    def entry(self) -> OpEntry:
        return OpEntry(self.rule, self.localize)

    def rule(self, call: OpCall) -> OpRule | None:
        """The rule of the function that is called; None if the user gave none."""
        name, operands, constants, *_ = call.args
        given = self.rules.get(name)
        if given is None:
            return None
        apply = given.rule if isinstance(given, OpEntry) else given
        found = apply(replace(call, operand_shapes=call.operand_shapes[: len(operands)]))
        if not constants or not isinstance(found, OpRule):
            return found
        for index, shape in enumerate(call.operand_shapes[len(operands) :]):
            dims, sizes = dims_and_sizes(shape, [f"constant{index}.{dim}" for dim in range(len(shape))])
            found = replace(
                found,
                operands=(*found.operands, dims),
                sizes={**found.sizes, **sizes},
                replicated=found.replicated | set(sizes),
            )
        return found

    def localize(self, call: OpCall, local: Local) -> Any:
        """The function on a shard: as the user says, or its body as it was made local."""
        given = self.rules.get(call.args[0])
        if isinstance(given, OpEntry) and given.localize is not None:
            return given.localize(call, local)
        return local.run(call)
