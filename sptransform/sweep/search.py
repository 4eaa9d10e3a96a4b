"""Search for inputs that a model runs on, among what may be given for each of them.

Where an attempt fails, how much ran before says how good it was, and the error may say what size is wanted. In turn:

1. What is likeliest for each input; then what an error asked for, and what differs in one input.
2. The same from the attempt that came furthest, as long as one comes further.
3. All others, those first that differ from the likeliest in few inputs.
"""

from __future__ import annotations

import itertools
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# of one search: attempts, seconds of processor time; and entries of a tensor
MOST, SECONDS, MOST_ENTRIES = 300, 10.0, 1 << 20
LONGEST = 60.0  # seconds of one attempt
# what an error says of the size that there is, and of the one that is wanted; and of the numbers of dimensions
_SIZES = [
    re.compile(pattern)
    for pattern in (
        r"mat1 and mat2 shapes cannot be multiplied \(\d+x(?P<got>\d+) and (?P<want>\d+)x\d+\)",
        r"normalized_shape=\[(?P<want>\d+)\], expected .* got input of size\[(?:\d+, )*(?P<got>\d+)\]",
        r"to have (?P<want>\d+) channels, but got (?P<got>\d+) channels",
        r"length (?P<got>\d+) has to be .* to a length of (?P<want>\d+)",
    )
]
_DIMS = re.compile(r"not enough values to unpack \(expected (?P<want>\d+), got (?P<got>\d+)\)")

Inputs = dict[str, Any]
Place = tuple[int, ...]  # which of its choices each input is
Reach = tuple[int, tuple[int, ...]]  # how many calls returned before the error; and the lines that it passed through
Found = TypeVar("Found")


class NothingRuns(Exception):
    """No inputs do; its cause is the error of the attempt that came furthest, if there was one."""


@contextmanager
def _not_too_long() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"one step on one device takes longer than {LONGEST:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Search(Generic[Found]):
    """One search for inputs that ``run`` takes."""

    def __init__(self, choices: Mapping[str, Sequence[Any]], run: Callable[[Inputs], Found]) -> None:
        self._choices = {name: list(values) for name, values in choices.items()}
        self._run = run
        self._tried: set[Place] = set()
        self._asked_for: list[Place] = []
        self._best: Place = (0,) * len(choices)
        self._reach: Reach = -1, ()
        self._error: Exception | None = None

    def found(self) -> Found:
        """What ``run`` makes of the first inputs that it takes.

        Raises:
            NothingRuns: there are none.
            TimeoutError: an attempt took longer than ``LONGEST`` seconds of processor time.
        """
        start = time.process_time()
        for place in itertools.islice(self._places(), MOST):
            if time.process_time() - start > SECONDS:
                break
            self._tried.add(place)
            try:
                with _not_too_long():
                    return self._run(self._inputs(place))
            except TimeoutError:
                raise
            except Exception as error:
                self._learn(place, error)
        raise NothingRuns from self._error

    def _places(self) -> Iterator[Place]:
        if not all(self._choices.values()):
            return
        yield self._best
        before: Reach = -2, ()
        while self._reach > before:
            before = self._reach
            # grows while it is read
            yield from self._new(itertools.chain(self._asked_for, self._beside(self._best)))
        yield from self._new(self._others())

    def _new(self, places: Iterable[Place]) -> Iterator[Place]:
        return (place for place in places if place not in self._tried)

    def _beside(self, place: Place) -> Iterator[Place]:
        """Those that differ in one input, the last input first: some models keep what their main one first was."""
        for at, values in reversed(list(enumerate(self._choices.values()))):
            yield from ((*place[:at], index, *place[at + 1 :]) for index in range(len(values)))

    def _others(self) -> Iterator[Place]:
        """Those that differ from the likeliest in two inputs, then in three, and so on."""
        likeliest = dict.fromkeys(range(len(self._choices)), 0)
        unlikely = [range(1, len(values)) for values in self._choices.values()]
        for number in range(2, len(unlikely) + 1):
            for some in itertools.combinations(reversed(likeliest), number):
                for indices in itertools.product(*(unlikely[at] for at in some)):
                    yield tuple({**likeliest, **dict(zip(some, indices, strict=True))}.values())

    def _inputs(self, place: Place) -> Inputs:
        values = {name: each[at] for (name, each), at in zip(self._choices.items(), place, strict=True)}
        return {name: value for name, value in values.items() if value is not None}

    def _learn(self, place: Place, error: Exception) -> None:
        lines = (line for _, line in traceback.walk_tb(error.__traceback__))
        reach = _number_of_calls(lambda: self._run(self._inputs(place))), tuple(lines)
        if reach > self._reach:
            self._reach, self._best, self._error = reach, place, error
        for pattern in _SIZES:
            if (said := pattern.search(str(error))) is not None:
                self._ask_for(place, partial(_resized, got=int(said["got"]), want=int(said["want"])))
        said = _DIMS.search(str(error))
        if said is not None and int(said["want"]) == int(said["got"]) + 1:
            for dim in range(1, int(said["want"])):
                self._ask_for(place, partial(_with_dim, ndim=int(said["got"]), dim=dim))

    def _ask_for(self, place: Place, mend: Callable[[Any], Any]) -> None:
        """Try ``place`` with all inputs mended that can be, and with each of them alone."""
        changed = {}
        for at, (index, values) in enumerate(zip(place, self._choices.values(), strict=True)):
            if (value := mend(values[index])) is not None:
                values.append(value)
                changed[at] = len(values) - 1
        for some in (changed, *({at: index} for at, index in changed.items())):
            self._asked_for.append(tuple(some.get(at, index) for at, index in enumerate(place)))


class _Counting(TorchFunctionMode):
    """Counts the functions of torch that return."""

    number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.number += 1
        return result


def _number_of_calls(run: Callable[[], object]) -> int:
    """How many functions of torch return before it fails."""
    with _Counting() as counting:
        try:
            run()
        except Exception:
            return counting.number
    return counting.number


def _resized(value: Any, got: int, want: int) -> Any:
    """With the last dimension of the one size repeated, or cut, to the other; None without such a dimension."""
    if isinstance(value, list):
        parts = [_resized(each, got, want) for each in value]
        return parts if parts and all(part is not None for part in parts) else None
    if not isinstance(value, Tensor) or got not in value.shape or value.numel() // got * want > MOST_ENTRIES:
        return None
    dim = max(at for at, size in enumerate(value.shape) if size == got)
    return value.index_select(dim, torch.arange(want) % got)


def _with_dim(value: Any, ndim: int, dim: int) -> Any:
    """A tensor of so many dimensions with one more, in which it is there twice; None for anything else."""
    if not isinstance(value, Tensor) or value.ndim != ndim:
        return None
    return torch.stack([value, value], dim)
