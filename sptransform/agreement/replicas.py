"""What every rank of a group should hold equal: parameters, buffers, inputs, and the generator that dropout draws from.

Each rank computes as if it were one of many copies of one device. If a rank starts with other weights, or is given
another batch, nothing breaks, and the loss means nothing. So what a rank holds goes along with what it is about to run:

- inputs that are integers, and numbers of those that are tensors, at every call. From a GPU they arrive a call later,
  so that no call waits for them;
- the state of the generator, at every call whose graph draws from it;
- checksums of parameters and buffers, at the first call of every graph ("first"), or at every call ("always").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor, Replicate

from sptransform.agreement.checksums import Reading, checksum, sample
from sptransform.agreement.program import list_by_ranks
from sptransform.diagnostics.errors import describe
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import arguments_of

CHECKS = ("first", "always", "never")
_TOLERANCE = 0.01  # of the largest sampled entry; another batch is far beyond

_FIXES = {
    "parameter": "torch.manual_seed(..) before the model is made, load the same weights on every rank, or "
    "sptransform.broadcast_parameters(model)",
    "buffer": "make it in the same way on every rank, or sptransform.broadcast_parameters(model)",
    "number": "give every rank of the group the same arguments",
    "input": "give every rank of the group the same batch, as a sampler does that has one replica for each group",
    "generator": "torch.manual_seed(..) with the same seed on every rank; then let no rank draw more than another",
}


@dataclass(frozen=True)
class Fact:
    """What this rank holds under a name: one exact number, or several that may differ by rounding."""

    kind: str
    name: str
    exact: int = 0
    sampled: tuple[float, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What goes along with one call."""

    all: tuple[Fact, ...] = ()

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.dumps().encode()).hexdigest()[:16] if self.all else "-"

    def dumps(self) -> str:
        return json.dumps([[fact.kind, fact.name, fact.exact, fact.sampled] for fact in self.all])

    @staticmethod
    def loads(text: str | bytes) -> Facts:
        return Facts(tuple(Fact(kind, name, exact, tuple(many)) for kind, name, exact, many in json.loads(text)))


NOTHING = Facts()


class Replicas:
    """What goes along with the calls of one graph.

    Args:
        graph: the captured graph; an argument of the call for each of its placeholders.
        check: one of ``CHECKS``.
    """

    def __init__(self, graph: fx.Graph, check: str) -> None:
        self._check = check
        self._held: list[tuple[int, str, str]] = []
        self._given: list[tuple[int, str]] = []
        self._numbers: list[tuple[int, str]] = []
        for index, node in enumerate(graph.find_nodes(op="placeholder")):
            note = notes.note(node)
            if dataflow.is_tensor(node):
                if note.is_parameter or note.is_buffer:
                    self._held.append((index, "parameter" if note.is_parameter else "buffer", str(note.input_name)))
                else:
                    self._given.append((index, str(note.input_name)))
            elif isinstance(dataflow.value(node), torch.SymInt):
                self._numbers.append((index, str(note.input_name)))
        self._draws_on = next((dataflow.values(node)[0].device for node in graph.nodes if _draws(node)), None)
        self._is_first = True
        self.whole: WholeParameters | None = None
        self._earlier: list[tuple[list[str], list[str], Reading]] = []

    def facts(self, args: Sequence[Any]) -> Facts:
        """Of this call; of inputs on a GPU, those of the call before."""
        if self._check == "never":
            return NOTHING
        found: list[Fact] = []
        if self._is_first or self._check == "always":
            self._is_first = False
            found += _held_facts([(kind, name, args[index]) for index, kind, name in self._held])
            found += [] if self.whole is None else self.whole.facts()
        found += [Fact("number", name, int(args[index])) for index, name in self._numbers]
        if self._draws_on is not None:
            found.append(Fact("generator", self._draws_on.type, _state(self._draws_on)))
        self._earlier.append(_reading([(name, args[index]) for index, name in self._given]))
        while self._earlier and (len(self._earlier) > 1 or self._earlier[0][2].ready is None):
            found += _given_facts(*self._earlier.pop(0))
        return Facts(tuple(found))


class WholeParameters:
    """Checksums of parameters as they were before ranks kept parts of them; they go along with the next call."""

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Tensor, Fact]] = []

    @contextmanager
    def cut(self, model: nn.Module) -> Iterator[None]:
        """The parameters of ``model`` are cut in the block."""
        whole = [("parameter", name, x) for name, x in model.named_parameters() if x.device.type != "meta"]
        facts = {fact.name: fact for fact in _held_facts(whole)}
        yield
        cut = {name: x for name, x in model.named_parameters() if name in facts}
        self._noted = [(x, _sum_of_part(x), facts[name]) for name, x in cut.items()]

    def facts(self) -> list[Fact]:
        """Of the parameters that are as they were cut, not loaded from a checkpoint since, say. Told once."""
        noted, self._noted = self._noted, []
        return [fact for x, before, fact in noted if _sum_of_part(x).equal(before)]


@torch.no_grad()
def _sum_of_part(x: Tensor) -> Tensor:
    return checksum(x.to_local() if isinstance(x, DTensor) else x)


def _held_facts(held: Sequence[tuple[str, str, Any]]) -> list[Fact]:
    whole = [(kind, name, local) for kind, name, x in held if (local := _whole(x)) is not None]
    exact, _ = Reading.of([checksum(x) for _, _, x in whole], []).wait() if whole else ([], [])
    return [Fact(kind, name, number) for (kind, name, _), number in zip(whole, exact, strict=True)]


def _reading(given: Sequence[tuple[str, Any]]) -> tuple[list[str], list[str], Reading]:
    exact, sampled = {}, {}
    for name, x in given:
        if (local := _whole(x)) is not None:
            if local.is_floating_point() or local.is_complex():
                sampled[name] = sample(local)
            else:
                exact[name] = checksum(local, whole=False)
    return list(exact), list(sampled), Reading.of([*exact.values()], [*sampled.values()])


def _given_facts(exact: list[str], sampled: list[str], reading: Reading) -> list[Fact]:
    ones, many = reading.wait()
    found = [Fact("input", name, one) for name, one in zip(exact, ones, strict=True)]
    return found + [Fact("input", name, 0, tuple(row)) for name, row in zip(sampled, many, strict=True)]


def _whole(x: Any) -> Tensor | None:
    """What this rank has of ``x``; None where ranks have parts, and of types that we do not know."""
    if isinstance(x, DTensor):
        return x.to_local() if all(isinstance(p, Replicate) for p in x.placements) else None
    return x if type(x) in (Tensor, nn.Parameter, nn.Buffer) and x.layout == torch.strided else None


def _draws(node: fx.Node) -> bool:
    """Whether the node draws from a default generator: not with a probability of zero."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given, _ = arguments_of(node)
    return all(given.get(name) != 0 for name in ("p", "dropout_p")) and given.get("train") is not False


def _state(device: torch.device) -> int:
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    return int.from_bytes(hashlib.sha256(module.get_rng_state().numpy().tobytes()).digest()[:7], "big")


def mismatch(facts: Mapping[int, Facts]) -> str | None:
    """The message that says what the ranks have different, the same on every rank; None if that is rounding alone.

    A rank may have compiled anew what others had compiled, so that only its facts are those of a first call.
    """
    told: dict[tuple[str, str], dict[int, Fact]] = {}
    for rank, own in sorted(facts.items()):
        for fact in own.all:
            told.setdefault((fact.kind, fact.name), {})[rank] = fact
    wrong = {key: own for key, own in told.items() if not _are_equal([*own.values()])}
    if not wrong:
        return None
    (kind, name), own = next(iter(wrong.items()))
    values: dict[str, list[int]] = {}
    for rank, fact in own.items():
        values.setdefault(_shown(fact), []).append(rank)
    more = len(wrong) - 1
    what = {"generator": "the state of the random number generator of", "number": "input"}.get(kind, kind)
    return describe(
        f"{what} {name!r} is not the same on all ranks",
        found=list_by_ranks(values) + (f"\n         and {more} more of {len(told)} differ" if more else ""),
        fix=_FIXES[kind],
    )


def _shown(fact: Fact) -> str:
    if fact.kind == "number":
        return str(fact.exact)
    if not fact.sampled:
        return f"checksum {fact.exact % 2**64:016x}"
    return f"entries {', '.join(f'{x:.4g}' for x in fact.sampled[:: len(fact.sampled) // 4])}, .."


def _are_equal(facts: Sequence[Fact]) -> bool:
    if len({(fact.exact, len(fact.sampled)) for fact in facts}) > 1:
        return False
    largest = max((abs(x) for fact in facts for x in fact.sampled if isfinite(x)), default=0.0)
    return all(_are_close(row, largest) for row in zip(*(fact.sampled for fact in facts), strict=True))


def _are_close(numbers: Sequence[float], largest: float) -> bool:
    if all(map(isfinite, numbers)):
        return max(numbers) - min(numbers) <= _TOLERANCE * largest
    return len(set(map(str, numbers))) == 1
