"""Ranks agree before they communicate: at every call of a compiled graph, and of its backward.

The calls of one process group are numbered, across all models and graphs. In each call, every rank has a write-once
slot in the group's store. The rank itself writes the digest of what it is about to run, or the error that keeps it from
running. If it is gone or late, another rank writes that into the slot instead. All ranks read all slots, so all come to
the same conclusion: run, or raise the same error. No collective is involved.

    call 7, rank 0: forward 9a0c..    call 7, rank 1: forward 9a0c..    -> run
    call 7, rank 0: forward 9a0c..    call 7, rank 1: forward 51b2..    -> ScheduleMismatchError
    call 7, rank 0: forward 9a0c.. 77 call 7, rank 1: forward 9a0c.. 3d -> ReplicaMismatchError
    call 7, rank 0: forward 9a0c..    call 7, rank 1: {"failed": ...}   -> RankFailedError, on rank 1 its own error
    call 7, rank 0: forward 9a0c..    call 7, rank 1: {"lost": ...}     -> RankLostError

The last word is the digest of what all ranks should hold the same, see :mod:`sptransform.agreement.replicas`.
Every outcome uses up the call's number on every rank, so ranks that continue after an error stay in step.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

# Private API: one restarts a compile in Dynamo, the other ends a recomputation in checkpoint; neither is a failure.
from torch._dynamo.exc import RestartAnalysis
from torch.utils.checkpoint import _StopRecomputationError

from sptransform.agreement.backward_guard import wrap_backward
from sptransform.agreement.peers import Peers
from sptransform.agreement.program import Program, difference, list_by_ranks
from sptransform.agreement.replicas import NOTHING, Facts, Replicas, mismatch
from sptransform.agreement.verdicts import error_text, failed_error, lost_error, missing_error
from sptransform.diagnostics.errors import (
    RankError,
    RankLostError,
    ReplicaMismatchError,
    ScheduleMismatchError,
    describe,
)
from sptransform.ops.groups import group_called
from sptransform.sharding.mesh import Mesh

_LOOK = 0.1  # seconds between checks which ranks are missing, and whether they are alive
_GRACE = 1.0  # seconds the other ranks have to arrive after one failed
_NEWS = 0.5  # seconds to wait, after a collective broke, for signs of an ended process
_TEXTS = 30.0  # seconds for the texts of differing programs to arrive
_CONTROL_FLOW = (RestartAnalysis, _StopRecomputationError)


class Agreement:
    """The numbered calls of one process group. Each process has one object per group."""

    @staticmethod
    def of(mesh: Mesh) -> Agreement | None:
        """The agreement of the mesh's group; None where there is no other process to agree with."""
        if mesh.device_mesh is None or mesh.size == 1:
            return None
        group = group_called(mesh.group)
        if dist.get_backend(group) == "fake":
            return None
        if group not in _agreements:
            _agreements[group] = Agreement(group)
        return _agreements[group]

    def __init__(self, group: dist.ProcessGroup) -> None:
        world = dist.group.WORLD
        if world not in _peers:
            _peers[world] = Peers(world.get_group_store(), dist.get_rank())
        self._peers = _peers[world]
        self._store = dist.PrefixStore("sptransform/calls", group.get_group_store())
        self._ranks = dist.get_process_group_ranks(group)
        self._me = dist.get_rank()
        self._others = [rank for rank in self._ranks if rank != self._me]
        self._calls = 0
        self._published: list[int] = []  # calls whose facts differed by rounding
        self._lock = threading.RLock()  # backward may run on another thread

    def checked(
        self,
        compiled: Callable[..., Any],
        program: Program,
        lengths_at: Sequence[tuple[int, int]],
        timeout: float,
        replicas: Replicas,
    ) -> Callable[..., Any]:
        """``compiled``, whose forward and backward run only when all ranks agree; errors name the rank at fault.

        ``lengths_at`` are the (argument, dim) pairs whose sizes the program leaves open; ``replicas`` reads what all
        ranks should hold the same.
        """
        has_backward = False

        def around(backward: Callable[..., Any]) -> Callable[..., Any]:
            def run_backward(*args: Any) -> Any:
                self.agree(program, "backward", timeout)
                with self.running():
                    return backward(*args)

            return run_backward

        def run(*args: Any) -> Any:
            nonlocal has_backward
            lengths = [args[i].shape[dim] for i, dim in lengths_at]
            self.agree(program, "forward", timeout, lengths, replicas.facts(args))
            with self.running():
                outputs = compiled(*args)
            if not has_backward:
                has_backward = wrap_backward(outputs, args, around)
            return outputs

        return run

    def agree(
        self,
        program: Program,
        direction: str,
        timeout: float,
        lengths: Sequence[int] = (),
        facts: Facts = NOTHING,
    ) -> None:
        """Return once every rank is about to run the same program in the same direction, for the same lengths.

        Raises:
            ReplicaMismatchError: ranks differ in ``facts``.
            RankFailedError: another rank failed before this call.
            RankLostError: the process of another rank has ended, or the store cannot be reached.
            RankMissingError: a rank did not reach this call within ``timeout`` seconds.
            ScheduleMismatchError: a rank is about to run something else.
        """
        mine = " ".join([direction, program.digest, *map(str, lengths), facts.digest])
        with self._lock, self._reaching_the_store():
            call = self._calls
            self._calls += 1
            slots = self._collect(call, mine, timeout)
            if any(slot != mine for slot in slots.values()):
                self._judge(call, slots, program, facts)
            if call == 0:
                self._peers.connect(self._others)
            if call >= 2:  # all ranks are in this call, so none still reads call - 2
                self._store.delete_key(f"{call - 2}/{self._me}")
                while self._published and self._published[0] <= call - 2:
                    self._store.delete_key(f"facts/{self._published.pop(0)}/{self._me}")

    def fail(self, error: Exception) -> None:
        """Tell ranks that wait in the next call that this rank will not come. Each error is told once."""
        error = getattr(error, "inner_exception", error)  # unwraps Dynamo's BackendCompilerFailed
        if isinstance(error, (RankError, *_CONTROL_FLOW)) or getattr(error, "_sptransform_told", False):
            return
        error._sptransform_told = True  # type: ignore[attr-defined]
        with self._lock, suppress(RuntimeError):  # if the store is gone, nobody can be told
            call = self._calls
            self._calls += 1
            self._store.compare_set(f"{call}/{self._me}", "", json.dumps({"failed": error_text(error)}))

    @contextmanager
    def telling_failure(self) -> Iterator[None]:
        """Tell the other ranks of an exception in the block."""
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise

    @contextmanager
    def running(self) -> Iterator[None]:
        """Tell other ranks of a failure in the communicating block; if one of them caused it, name it in the error."""
        call = self._calls
        try:
            yield
        except (RankError, *_CONTROL_FLOW):
            raise
        except Exception as error:
            cause = self._cause(error, call)
            self.fail(error)
            if cause is not None:
                raise cause from error
            raise

    def _collect(self, call: int, mine: str, timeout: float) -> dict[int, str]:
        """The slots of all ranks in this call; after a failure, only those written in time."""
        own = self._store.compare_set(f"{call}/{self._me}", "", mine).decode()
        if own != mine:
            return {self._me: own}  # too late: the other ranks have given up on this one
        slots = {self._me: mine}
        missing = list(self._others)
        start = looked = time.monotonic()
        deadline = None
        while missing:
            if self._store.check(keys := [f"{call}/{rank}" for rank in missing]):
                slots |= zip(missing, (value.decode() for value in self._store.multi_get(keys)), strict=True)
                break
            now = time.monotonic()
            if now - looked > _LOOK:
                looked = now
                for rank in [rank for rank in missing if self._store.check([f"{call}/{rank}"])]:
                    missing.remove(rank)
                    slots[rank] = self._store.get(f"{call}/{rank}").decode()
                    if slots[rank].startswith("{"):
                        deadline = min(deadline or now + _GRACE, now + _GRACE)
                if deadline is not None and now > deadline:
                    break
                if lost := self._peers.gone(missing):
                    self._write_off(call, lost, {"lost": lost})
                elif now - start > timeout:
                    self._write_off(call, missing, {"missing": list(missing), "waited": timeout})
            time.sleep(min(max(0.1 * (now - start), 2e-5), 0.02))
        return slots

    def _write_off(self, call: int, ranks: Sequence[int], verdict: dict[str, Any]) -> None:
        for rank in ranks:
            self._store.compare_set(f"{call}/{rank}", "", json.dumps(verdict))

    def _judge(self, call: int, slots: dict[int, str], program: Program, facts: Facts) -> None:
        """Raise the error that every rank concludes from these slots, if they are not equal but for rounding."""
        verdicts = {rank: json.loads(slot) for rank, slot in sorted(slots.items()) if slot.startswith("{")}
        for verdict in verdicts.values():
            if "lost" in verdict:
                raise lost_error(verdict["lost"])
            if "missing" in verdict:
                raise missing_error(verdict["missing"], verdict["waited"])
        if verdicts:
            raise failed_error({rank: verdict["failed"] for rank, verdict in verdicts.items()})
        directions: dict[str, list[int]] = {}
        for rank, slot in sorted(slots.items()):
            directions.setdefault(f"the {slot.split()[0]} of a graph", []).append(rank)
        if len(directions) > 1:
            message = describe(
                "ranks are not in the same step",
                found=list_by_ranks(directions),
                fix="on every rank call the model, and backward, equally often and in the same order",
            )
        elif len({slot.rsplit(" ", 1)[0] for slot in slots.values()}) > 1:
            texts = self._texts({rank: f"program/{slot.split()[1]}" for rank, slot in slots.items()}, program.dumps())
            programs = {rank: Program.loads(text) for rank, text in texts.items()}
            message = difference(programs, {rank: slot.split()[2:-1] for rank, slot in slots.items()})
        else:
            texts = self._texts({rank: f"facts/{call}/{rank}" for rank in slots}, facts.dumps())
            differing = mismatch({rank: Facts.loads(text) for rank, text in texts.items()})
            if differing is None:
                self._published.append(call)
                return
            raise ReplicaMismatchError(differing, self._ranks)
        raise ScheduleMismatchError(message, self._ranks)

    def _texts(self, keys: dict[int, str], own: str) -> dict[int, bytes]:
        """The texts of all ranks. Each rank publishes its own here, since texts matter only when they differ."""
        self._store.set(keys[self._me], own)
        deadline = time.monotonic() + _TEXTS
        while not self._store.check([*keys.values()]):
            if lost := self._peers.gone(self._others):
                raise lost_error(lost)
            if time.monotonic() > deadline:
                raise missing_error([rank for rank, key in keys.items() if not self._store.check([key])], _TEXTS)
            time.sleep(0.01)
        return {rank: self._store.get(key) for rank, key in keys.items()}

    def _cause(self, error: Exception, call: int) -> RankError | None:
        """The error of the other rank that caused ``error``; None if no other rank did."""
        # communication errors are RuntimeErrors; an error of any other type is this rank's own
        lost = self._peers.gone_within(self._others, _NEWS) if isinstance(error, RuntimeError) else []
        # the first report of a failure counts: later ones may see ranks that ended because of it
        word = {"lost": lost, "rank": self._me, "failed": error_text(error)}
        with suppress(RuntimeError):
            word = json.loads(self._store.compare_set(f"fault/{call}", "", json.dumps(word)))
        if not isinstance(error, RuntimeError):
            return None
        if word["lost"] or lost:
            return lost_error(word["lost"] or lost)
        if word["rank"] != self._me and word["failed"] != error_text(error):
            return failed_error({word["rank"]: word["failed"]})
        return None

    @contextmanager
    def _reaching_the_store(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:  # of the store: nothing else in the block raises one
            lost = self._peers.gone_within(self._others, _NEWS)
            if lost:
                raise lost_error(lost) from error
            raise RankLostError(
                describe(
                    "the store that ranks agree through cannot be reached",
                    found=str(error).split("\n")[0],
                    fix="see the log of its host: rank 0, or the launcher",
                ),
                [0],
            ) from error


_agreements: weakref.WeakKeyDictionary[dist.ProcessGroup, Agreement] = weakref.WeakKeyDictionary()
_peers: weakref.WeakKeyDictionary[dist.ProcessGroup, Peers] = weakref.WeakKeyDictionary()
