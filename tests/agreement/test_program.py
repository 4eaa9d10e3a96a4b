"""What ranks compare before they communicate, and how they come to agree or not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sptransform
from sptransform.agreement.agreement import Agreement
from sptransform.agreement.program import Line, Program, captured_lines, difference
from sptransform.compiler import backend
from sptransform.compiler.options import Options
from sptransform.diagnostics.errors import RankError, RankMissingError, ScheduleMismatchError
from sptransform.engine.strategy import Strategy
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.ring import Ring
from sptransform.strategies.ulysses import Ulysses
from sptransform.strategies.usp import USP
from tests.support.gloo_pool import get_pool
from tests.support.golden import Golden
from tests.support.graphs import while_captured
from tests.support.models import Inputs, build
from tests.support.tiers import tiered
from tests.support.tiny import AttentionWithLoss, attention_with_loss, token_inputs

pytestmark = pytest.mark.timeout(180)


# --- the text -------------------------------------------------------------------------------------------------


def program_of(model: nn.Module, inputs: Inputs, rank: int, world_size: int, **options: Any) -> Program:
    """What the backend fingerprints, for a rank that need not exist."""
    asked = Options(**{"backend": "eager"} | options)
    mesh = Mesh.pretended(world_size, rank)
    with mock.patch.object(backend, "package_version", lambda: "1"):
        _, program, *_ = while_captured(
            model, lambda gm, inputs: backend._compile(asked, gm, inputs, mesh, True), **inputs
        )
    return program


@pytest.mark.parametrize(
    ("name", "strategy"),
    tiered(
        [
            ("bert", Ulysses()),
            ("llama", Ulysses()),
            ("sdpa_transformer", Ulysses()),
            ("sdpa_transformer", Ring()),
            ("sdpa_transformer", USP(2, 2)),
        ],
        quick=[("sdpa_transformer", Ulysses()), ("sdpa_transformer", USP(2, 2))],
    ),
    ids=str,
)
def test_a_program_is_the_same_on_every_rank(name: str, strategy: Strategy) -> None:
    """Uneven partitions included, where the graphs of ranks differ in their sizes."""
    programs = [program_of(*build(name, layers=1), rank, 4, strategy=strategy, outputs="dtensor") for rank in (0, 1, 3)]
    assert len({program.digest for program in programs}) == 1, difference(dict(enumerate(programs)))


def test_a_program_has_settings_nodes_and_schedule(golden: Golden) -> None:
    program = program_of(attention_with_loss(), token_inputs(), 0, 2)
    lines = [x.text for x in program.lines]
    nodes = [text for text in lines if text.startswith("%")]
    golden.check(
        "program",
        settings="\n".join(text for text in lines if not text.startswith(("%", "return", "torch"))),
        inputs="\n".join(text for text in nodes if text.endswith("= input")),
        schedule="\n".join(text for text in nodes if " # " in text),
    )
    assert Program.loads(program.dumps()) == program
    assert program.digest == program_of(attention_with_loss(), token_inputs(), 1, 2).digest


DIFFERENT: dict[str, Callable[[], Program]] = {
    "dtype": lambda: program_of(attention_with_loss().float(), token_inputs(), 1, 2),
    "loss": lambda: program_of(attention_with_loss(reduction="sum"), token_inputs(), 1, 2),
    "option": lambda: program_of(attention_with_loss(), token_inputs(), 1, 2, grad_sync=False),
    "rule": lambda: program_of(
        attention_with_loss(), token_inputs(), 1, 2, rules={torch.ops.aten.neg.default: sptransform.rule("... -> ...")}
    ),
    "shape": lambda: program_of(attention_with_loss(), {k: x[:1] for k, x in token_inputs().items()}, 1, 2),
    "strategy": lambda: program_of(attention_with_loss(), token_inputs(), 1, 2, strategy=sptransform.Ulysses("batch")),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_difference_is_named(golden: Golden, what: str) -> None:
    mine = program_of(attention_with_loss(), token_inputs(), 0, 2)
    golden.check(f"mismatch_{what}", message=difference({0: mine, 1: DIFFERENT[what](), 2: mine}))


def test_a_program_that_ends_earlier_differs() -> None:
    long, short = Program((Line("%a"), Line("%b = f(%a)", "here"))), Program((Line("%a"),))
    assert "at: %b\n  in: here\n  found: ranks 0, 2: nothing more\n         rank 1: %b = f(%a)" in difference(
        {0: short, 1: long, 2: short}
    )


def test_what_a_process_has_of_its_own_is_left_out() -> None:
    graph = torch.fx.Graph()
    devices = [torch.device("cuda", index) for index in range(2)]
    graph.output([graph.call_function(torch.ops.aten.arange.default, (4,), {"device": each}) for each in devices])
    first, second, _ = (x.text.partition("=")[2] for x in captured_lines(graph))
    assert first == second and "cuda" in first


# --- the protocol ---------------------------------------------------------------------------------------------

ONE, TWO = Program((Line("%x = one"),)), Program((Line("%x = two"),))


def agreement() -> Agreement:
    found = Agreement.of(Ulysses().mesh_of(None))
    assert found is not None
    return found


def caught(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(RankError) as error:
        call()
    return type(error.value).__name__, str(error.value)


def goes_on_after_errors(rank: int, world_size: int) -> list[str]:
    """Ranks stay in step whatever a call ended with."""
    agree = agreement().agree
    found = []
    for _ in range(3):
        agree(ONE, "forward", 60)
        found.append(caught(lambda: agree(TWO if rank == 1 else ONE, "forward", 60))[0])
        agree(TWO, "backward", 60)
        if rank == 1:
            agreement().fail(ValueError("mine"))
        else:
            found.append(caught(lambda: agree(ONE, "forward", 60))[0])
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_go_on_after_errors(world_size: int) -> None:
    found = get_pool(world_size).run(goes_on_after_errors)
    assert found[1] == ["ScheduleMismatchError"] * 3
    assert found[0] == ["ScheduleMismatchError", "RankFailedError"] * 3
    assert found[2:] == found[:1] * (world_size - 2)


def comes_late(rank: int, world_size: int) -> tuple[str, str]:
    """Rank 1 comes once the others have given up; it would wait for longer than the test may take."""
    store = dist.group.WORLD.get_group_store()
    if rank == 1:
        store.wait(["gave up 0", "gave up 2"])
    found = caught(lambda: agreement().agree(ONE, "forward", 0.5 if rank != 1 else 600))
    store.set(f"gave up {rank}", "")
    return found


def test_a_rank_that_comes_late_is_told_what_the_others_were(golden: Golden) -> None:
    found = get_pool(3).run(comes_late)
    ((kind, message),) = set(found)
    assert kind == "RankMissingError"
    golden.check("agreement_missing", message=message)


def tells_an_error_once(rank: int, world_size: int) -> str:
    if rank == 0:
        error = ValueError("only once")
        agreement().fail(error)
        agreement().fail(error)
        message = ""
    else:
        message = caught(lambda: agreement().agree(ONE, "forward", 60))[1]
    agreement().agree(ONE, "forward", 60)
    return message


def test_an_error_is_told_once(golden: Golden) -> None:
    golden.check("agreement_failed", message=get_pool(2).run(tells_an_error_once)[1])


def out_of_step(rank: int, world_size: int) -> str:
    return caught(lambda: agreement().agree(ONE, "backward" if rank else "forward", 60))[1]


def test_forward_and_backward_are_told_apart(golden: Golden) -> None:
    (message,) = set(get_pool(3).run(out_of_step))
    golden.check("agreement_out_of_step", message=message)


def leaves_nothing(rank: int, world_size: int) -> int:
    store = dist.group.WORLD.get_group_store()
    for _ in range(3):
        agreement().agree(ONE, "forward", 60)
    before = store.num_keys()
    dist.barrier()
    for _ in range(20):
        agreement().agree(ONE, "forward", 60)
    dist.barrier()
    return store.num_keys() - before


def test_the_store_does_not_grow() -> None:
    assert max(get_pool(2).run(leaves_nothing)) <= 2


# --- models ---------------------------------------------------------------------------------------------------


def parallel(model: nn.Module, **options: Any) -> nn.Module:
    return sptransform.parallelize(model, "ulysses", **{"backend": "aot_eager", "check_timeout": 60} | options)


def num_calls(call: Callable[[], Any]) -> int:
    before = agreement()._calls
    call()
    return agreement()._calls - before


class Broken(AttentionWithLoss):
    """Two graphs, each with an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = AttentionWithLoss()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self.first(tokens, labels)
        torch._dynamo.graph_break()
        return loss + super().forward(tokens, labels)


def calls_of_all_kinds(rank: int, world_size: int) -> dict[str, int]:
    """How many agreements each way of running a model takes; every rank must come to the same number."""
    inputs = token_inputs()
    model, other = parallel(attention_with_loss()), parallel(attention_with_loss(reduction="sum"))
    broken = parallel(Broken().double(), fullgraph=False)
    group = init_device_mesh("cpu", (world_size,), mesh_dim_names=("again",))
    replicas = DistributedDataParallel(parallel(attention_with_loss()))

    def evaluate() -> None:
        with torch.no_grad():
            model(**inputs)

    def both() -> None:
        (model(**inputs) + other(**inputs)).backward()

    def recomputed() -> None:
        checkpoint(lambda tokens: model(tokens, inputs["labels"]), inputs["tokens"], use_reentrant=False).backward()

    found = {
        "step": num_calls(lambda: model(**inputs).backward()),
        "again": num_calls(lambda: model(**inputs).backward()),
        "evaluation": num_calls(evaluate),
        "another shape": num_calls(lambda: model(**{name: x[:, :8] for name, x in inputs.items()}).backward()),
        "two models": num_calls(both),
        "two graphs": num_calls(lambda: broken(**inputs).backward()),
        "recomputed": num_calls(recomputed),
        "another mesh": num_calls(lambda: parallel(attention_with_loss(), mesh=group)(**inputs).backward()),
        "replicated": num_calls(lambda: replicas(**inputs).backward()),
    }
    torch._dynamo.reset()
    found["reset"] = num_calls(lambda: model(**inputs).backward())
    return found


@pytest.mark.slow
def test_each_graph_is_agreed_on_at_each_call() -> None:
    first, second = get_pool(2).run(calls_of_all_kinds)
    assert first == second
    assert first == {
        "step": 2,
        "again": 2,
        "evaluation": 1,
        "another shape": 2,
        "two models": 4,
        "two graphs": 4,
        "recomputed": 3,  # forward, backward, and in it forward again
        "another mesh": 2,
        "replicated": 2,
        "reset": 2,
    }


def differs_on_a_cache_hit(rank: int, world_size: int) -> list[tuple[str, str]]:
    """Both graphs are compiled on both ranks; then the ranks run one each, and neither waits for its time-out."""
    model = parallel(attention_with_loss(), check_timeout=600)
    short = {name: x[:, :8] for name, x in token_inputs().items()}
    for inputs in (token_inputs(), short):
        model(**inputs).backward()
    found = [caught(lambda: model(**(short if rank == 1 else token_inputs())))]
    model(**short).backward()
    return found


def test_a_difference_between_compiled_graphs_is_seen() -> None:
    found = get_pool(2).run(differs_on_a_cache_hit)
    assert found[0] == found[1]
    ((kind, message),) = found[0]
    assert kind == "ScheduleMismatchError"
    assert "%tokens" in message and "i64[2,16]" in message and "now for 8" in message


def differs_in_length(rank: int, world_size: int) -> list[tuple[str, str]]:
    """One graph serves both lengths."""
    model = parallel(attention_with_loss())
    for length in (16, 8, 12):
        model(**{name: x[:, :length] for name, x in token_inputs().items()}).backward()
    # a stride may differ, it concerns nobody else
    model(**{name: x[:, :8].clone() if rank == 1 else x[:, :8] for name, x in token_inputs().items()}).backward()
    length = 12 if rank == 1 else 8
    return [caught(lambda: model(**{name: x[:, :length] for name, x in token_inputs().items()}))]


def test_a_difference_in_length_is_seen(golden: Golden) -> None:
    (first,), (second,) = get_pool(2).run(differs_in_length)
    assert first == second
    golden.check("mismatch_length", message=first[1])


def subgroups(rank: int, world_size: int) -> list[float]:
    """Two groups of two ranks, at different numbers of calls, one of them with a rank at fault."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model = parallel(attention_with_loss(), mesh=mesh["sp"])
    losses = []
    for _ in range(1 + rank // 2):
        loss = model(**token_inputs())
        loss.backward()
        losses.append(float(loss.detach()))
    if rank >= 2:
        short = {name: x[:, :8] for name, x in token_inputs().items()}
        with pytest.raises(ScheduleMismatchError, match=r"rank 2: .*\n *rank 3: ") as error:
            model(**(short if rank == 3 else token_inputs()))
        assert error.value.ranks == (2, 3)
    dist.barrier()
    return losses


def test_groups_agree_on_their_own() -> None:
    found = get_pool(4).run(subgroups)
    assert [len(losses) for losses in found] == [1, 1, 2, 2]
    assert len({loss for losses in found for loss in losses}) == 1


def is_interruptible(rank: int, world_size: int) -> None:
    """A rank that waits is in Python, so that Ctrl-C ends it; else it would wait for longer than the test may take."""
    if rank == 1:
        return
    import _thread

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process was used for before
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.3, _thread.interrupt_main).start()
        agreement().agree(ONE, "forward", 600)


def test_waiting_can_be_interrupted() -> None:
    get_pool(2).stop()  # of a process with a long past, Python may be collecting garbage when the interrupt comes
    get_pool(2).run(is_interruptible)
    get_pool(2).stop()  # the ranks are out of step now


def test_missing_is_a_rank_error() -> None:
    assert issubclass(RankMissingError, RankError) and issubclass(RankError, sptransform.SPTransformError)
    assert RankMissingError("x", [1, 2]).ranks == (1, 2)
