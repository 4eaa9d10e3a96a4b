"""Rules that users bring: how they are passed, that they shard the op exactly, and what is said of wrong ones."""

from __future__ import annotations

import dataclasses
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


def test_rules_are_part_of_cache_keys() -> None:
    tags = [custom_code(Options(rules=each).rules, ()) for each in ({}, {rms_norm: NORM}, {rms_norm: factor_of("h")})]
    assert tags[0] == "" and len(set(tags)) == 3
