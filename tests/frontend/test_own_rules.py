"""Rules that users bring: how they are passed, that they shard the op exactly, and what is said of wrong ones."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sptransform
from sptransform import OpEntry, RuleError, UnsupportedOpError, VerificationError, rule
from sptransform.compiler.caches import custom_code
from sptransform.compiler.custom import identified
from sptransform.compiler.options import Options
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.golden import Golden
from tests.support.own_ops import Doubled, Normed, doubled, made, own, rms_norm
from tests.support.rewritten import Asked, on_pretended_ranks, rewritten_model
from tests.support.tiny import attention_with_loss, token_inputs

NORM = rule("... h, h -> ... h", replicated="h")


def local_length(call: Any, local: Any) -> Any:
    return local.run(call, length=local.result_shapes[0][1])


DOUBLED = OpEntry(rule("b s h -> b s h"), local_length)
ASKED = [Asked(2, "ulysses"), Asked(3, "ring"), Asked(2, "allgather"), Asked((2, 2), ("ring", "megatron"))]


def rewritten(model: torch.nn.Module, **options: Any) -> sptransform.Rewritten:
    return sptransform.rewrite(model, "ulysses", token_inputs(), world_size=2, **options)


@pytest.mark.parametrize(("kind", "rules"), [(Normed, {rms_norm: NORM}), (Doubled, {doubled: DOUBLED})])
def test_an_op_with_a_rule_is_sharded_and_exact(kind: Any, rules: dict[Any, Any]) -> None:
    reference = run_one_device(made(kind), token_inputs())
    found = on_pretended_ranks(made(kind), token_inputs(), ASKED, rules=rules, strict=True)
    for ranks in found.values():
        assert ranks.context.result.fallbacks == []
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, 1e-12)


def test_without_the_rule_the_sequence_is_gathered() -> None:
    (fallback,) = rewritten(made(Normed)).context.result.fallbacks
    assert fallback.op == "sptests.rms_norm.default" and fallback.gathered_bytes > 0


@pytest.mark.parametrize("op", [rms_norm, own.rms_norm, own.rms_norm.default], ids=str)
def test_an_op_is_named_in_every_way_that_torch_has(op: Any) -> None:
    assert rewritten(made(Normed), rules={op: NORM}).context.result.fallbacks == []


def test_explain_and_the_plain_backend_take_rules() -> None:
    page = sptransform.explain(made(Normed), "ulysses", token_inputs(), world_size=2, rules={rms_norm: NORM})
    assert page.fallbacks == ()
    assert Options.of({"rules": {own.rms_norm: NORM}}).rules == {own.rms_norm.default: NORM}


def test_a_users_rule_comes_before_ours() -> None:
    linear = torch.ops.aten.linear.default
    uncut = rule("b s k, o k, o -> b s o", replicated="b s k o")
    text = rewritten(attention_with_loss(), rules={linear: uncut}).text()
    assert "all_gather" in text and "all_gather" not in rewritten(attention_with_loss()).text()


def test_strict_names_this_door(golden: Golden) -> None:
    with pytest.raises(UnsupportedOpError) as error:
        rewritten(made(Normed), strict=True)
    golden.check("own_rules_strict", message=str(error.value))


def test_a_rule_that_does_not_fit_names_the_node_and_the_users_line(golden: Golden) -> None:
    with pytest.raises(RuleError) as error:
        rewritten(made(Normed), rules={rms_norm: rule("b s -> b s")})
    golden.check("own_rules_misfit", message=str(error.value))


def test_a_local_form_of_another_shape_is_noticed() -> None:
    def half(call: Any, local: Any) -> Any:
        return local.emit(torch.ops.aten.slice.Tensor, (local.operands[0], 1, 0, 1), {})

    with pytest.raises(VerificationError, match=r"Localize:\na shard is not what its placement says(.|\n)*in: "):
        rewritten(made(Doubled), rules={doubled: OpEntry(rule("b s h -> b s h"), half)})


def run_as_it_is(call: Any, local: Any) -> Any:
    return local.run(call)


@pytest.mark.parametrize(("form", "message"), [(None, "needs a form for shards"), (run_as_it_is, "says what it sends")])
def test_an_op_that_communicates_says_how(form: Any, message: str) -> None:
    """Under Megatron the logits are cut along the vocabulary, over which a softmax has to communicate."""

    def joined(call: Any) -> Any:
        return dataclasses.replace(rule("t v -> t v", replicated="v")(call), self_reduced=frozenset("v"))

    rules = {torch.ops.aten.log_softmax.int: OpEntry(joined, form)}
    with pytest.raises(RuleError, match=rf"{message}(.|\n)*in: (.|\n)*OpEntry"):
        rewritten_model("llama", "megatron", 2, layers=1, rules=rules)


def test_an_op_that_does_not_run_on_shards_is_named() -> None:
    rules = {torch.ops.aten.view.default: rule("b s (three heads d) -> b s three heads d")}
    with pytest.raises(RuleError, match=r"does not run on shards: (.|\n)*at: %view(.|\n)*fix: OpEntry"):
        rewritten(attention_with_loss(), rules=rules)


def test_a_local_form_returns_a_node() -> None:
    for form in (lambda call, local: None, lambda call, local: [local.run(call, length=8)]):
        with pytest.raises(RuleError, match=r"no result on a shard(.|\n)*return local\.run"):
            rewritten(made(Doubled), rules={doubled: OpEntry(DOUBLED.rule, form)})


def test_a_local_form_may_return_what_it_was_given() -> None:
    """The operand keeps its own note."""
    once = {doubled: OpEntry(DOUBLED.rule, lambda call, local: local.operands[0])}
    text = rewritten(made(Doubled), rules=once).text()
    assert "aten.alias" in text and "doubled" not in text.split("return")[0].replace("%doubled", "")


# --- what ranks compare, and caches are keyed by ----------------------------------------------------------------


def factor_of(name: str) -> Any:
    def made_rule(call: Any) -> Any:
        return rule(f"... {name}, {name} -> ... {name}", replicated=name)(call)

    return made_rule


def test_another_version_of_a_rule_is_another_text() -> None:
    rules = [NORM, rule("... h, h -> ... h"), factor_of("h"), factor_of("k"), OpEntry(NORM, local_length)]
    rules.append(OpEntry(NORM, lambda call, local: local.run(call)))
    texts = [identified(each) for each in rules]
    assert len(set(texts)) == len(texts)
    assert identified(factor_of("h")) == identified(factor_of("h"))
    assert " at 0x" not in "".join(texts)


def test_helpers_and_constants_of_the_same_file_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(call: Any) -> Any:
        return NORM(call) if local_length else None

    before = identified(calls)
    monkeypatch.setitem(globals(), "NORM", rule("... h, h -> ... h"))
    with_another_constant = identified(calls)
    monkeypatch.setitem(globals(), "local_length", factor_of)
    assert len({before, with_another_constant, identified(calls)}) == 3


def test_a_use_does_not_change_the_text() -> None:
    one = rule("... h, h -> ... h", replicated="h")
    before = identified(one)
    rewritten(made(Normed), rules={rms_norm: one})
    assert identified(one) == before


@dataclasses.dataclass(frozen=True)
class Named(sptransform.Pass):
    names: frozenset[str] = frozenset({"alpha", "beta", "gamma", "delta"})
    ops: tuple[Any, ...] = (torch.ops.aten.linear.default,)

    def run(self, graph: Any, context: Any) -> None:
        log.info("ran on %s", self.names)


log = logging.getLogger(__name__)


def in_another_process() -> str:
    """What `Named` is called under another seed of hashes, where nothing has run and the log is set up otherwise."""
    script = (
        "import logging; logging.basicConfig(level=logging.DEBUG); from tests.frontend.test_own_rules import *; "
        "print(identified(Named()), identified(DOUBLED), identified(factor_of('h')))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=100)
    return run.stdout.strip()


def test_a_text_is_the_same_in_every_process() -> None:
    rewritten(attention_with_loss(), passes=[Named()])
    assert f"{identified(Named())} {identified(DOUBLED)} {identified(factor_of('h'))}" == in_another_process()


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: str) -> None:
        self.factor = factor

    def __call__(self, call: Any) -> Any:
        return factor_of(self.factor)(call)


def test_unlike_objects_have_unlike_texts() -> None:
    def over(value: Any) -> Any:
        return lambda call: value

    one, other = factor_of("h"), factor_of("k")
    for left, right in (
        (Slotted("h"), Slotted("k")),
        (over((one, other, one)), over((one, other, other))),
        (over(torch.zeros(2)), over(torch.ones(2))),
        (functools.wraps(torch.sin)(one), functools.wraps(torch.sin)(other)),
    ):
        assert identified(left) != identified(right)


def test_what_contains_itself_has_a_text() -> None:
    around: list[Any] = []
    around.append(around)
    assert identified(lambda call, kept=around: kept)


def test_rules_are_part_of_cache_keys() -> None:
    tags = [custom_code(Options(rules=each)) for each in ({}, {rms_norm: NORM}, {rms_norm: factor_of("h")})]
    assert tags[0] == "" and len(set(tags)) == 3
