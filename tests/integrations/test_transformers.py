"""Models of Transformers under `attn_implementation="sptransform"`: what `sdpa` gives, on one device and on ranks."""

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask

import sptransform.integrations.transformers  # noqa: F401 - registers it
from sptransform.diagnostics.errors import UsageError
from sptransform.integrations.documents import documents_of_positions
from sptransform.integrations.transformers import attention, position_mask
from sptransform.ops.communication.steps import COMMUNICATING, group_of, perform
from sptransform.ops.ring import blocks, plan
from sptransform.ops.ring.data_plan import DataPlan
from sptransform.ops.ring.kernels import reference
from tests.integrations import dense
from tests.integrations.cases import DOCUMENTS, ENDS, INPUTS, LENGTH, MODELS, WITHOUT_SDPA, build, positions
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device, worst_error
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT32_PARTS, FLOAT64, Inputs
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiers import tiered

OURS = "sptransform"
ATTENTION = torch.ops.sptransform.ring_attention.default


@cache
def expected(model: str, inputs: str, implementation: str = "dense") -> Result:
    return run_one_device(build(model, implementation), INPUTS[inputs]())


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("inputs", ["plain", "one_row", "left", "right", "both_sides", "packed", "packed_rows"])
@pytest.mark.parametrize("model", [model for model in MODELS if model not in WITHOUT_SDPA])
def test_one_device_is_sdpa(model: str, inputs: str) -> None:
    got = run_one_device(build(model, OURS), INPUTS[inputs]())
    assert_equal_to_one_device(expected(model, inputs, "sdpa"), got, FLOAT64)


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("model", MODELS)
def test_one_device(model: str, inputs: str) -> None:
    """Also what `sdpa` cannot do: soft caps, sinks, and documents it is not told of."""
    got = run_one_device(build(model, OURS), INPUTS[inputs]())
    assert_equal_to_one_device(expected(model, inputs), got, FLOAT64)


STRATEGIES = ["ulysses", "ring", "allgather", "megatron"]
PAIRS = [(model, "packed") for model in MODELS] + [("mistral", inputs) for inputs in INPUTS if inputs != "packed"]
CASES = [(model, inputs, strategy) for model, inputs in PAIRS for strategy in STRATEGIES]
QUICK = [
    ("gpt_oss", "packed", "ring"),
    ("gemma2", "packed", "ulysses"),
    ("mistral", "packed_and_padded", "allgather"),
    ("mistral", "lengths", "ring"),
]

# ops of a model that have nothing to do with attention
WITHOUT_RULE = {"aten.slice_scatter.default", "aten.scatter.value"}


@pytest.mark.parametrize(("model", "inputs", "strategy"), tiered(CASES, quick=QUICK))
def test_on_ranks(model: str, inputs: str, strategy: str) -> None:
    (ranks,) = on_pretended_ranks(build(model, OURS), INPUTS[inputs](), [Asked(4, strategy)]).values()
    calls = [node for node in ranks.graphs[0].graph_module.graph.nodes if node.target is ATTENTION]
    assert len(calls) == 2 and {str(x.op) for x in ranks.context.result.fallbacks} <= WITHOUT_RULE
    for result in ranks.results():
        assert_equal_to_one_device(expected(model, inputs), result, FLOAT32_PARTS)


def test_a_boundary_one_token_off_is_seen() -> None:
    sizes = [*DOCUMENTS[:3], DOCUMENTS[3] + 1, DOCUMENTS[4] - 1, *DOCUMENTS[5:]]
    moved = INPUTS["packed"]() | {"position_ids": positions(sizes)}
    got = run_one_device(build("llama", OURS), moved)
    assert worst_error(expected("llama", "packed"), got)[1] > 1e4 * FLOAT32_PARTS


def test_documents_are_what_they_are_alone() -> None:
    model, inputs = build("gpt_oss", OURS), INPUTS["packed"]()
    together = model(**inputs).logits
    for ids, logits in zip(inputs["input_ids"].split(DOCUMENTS, 1), together.split(DOCUMENTS, 1), strict=True):
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=1e-6)


def test_documents_count_with_a_cache_too() -> None:
    got = run_one_device(build("llama", OURS), INPUTS["packed"]() | {"use_cache": True})
    assert_equal_to_one_device(expected("llama", "packed"), got, FLOAT64)


@pytest.mark.parametrize("count", ["visible", "clipped", "filled", "all"])
def test_positions_beside_padding_are_those_of_one_document(count: str) -> None:
    """However they count, and also where the padding is among the tokens, as between a prompt and what is generated."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 20:31], mask[1, :9], mask[1, 50:] = 0, 0, 0
    counted = mask.cumsum(-1) - 1
    position_ids = {
        "visible": counted,
        "clipped": counted.clamp(min=0),
        "filled": counted.masked_fill(mask == 0, 1),
        "all": torch.arange(LENGTH).expand(2, -1),
    }[count]
    inputs = INPUTS["plain"]() | {"attention_mask": mask, "position_ids": position_ids}
    inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
    reference = run_one_device(build("llama", "sdpa", layers=1), inputs)
    assert_equal_to_one_device(reference, run_one_device(build("llama", OURS, layers=1), inputs), FLOAT64)


def test_documents_beside_tokens_of_other_calls_are_refused() -> None:
    query, keys = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 12, 8)
    mask = position_mask(1, 4, 12, q_offset=4, mask_function=lambda b, h, q, k: k <= q)
    attention(nn.Module(), query, keys, keys, mask, position_ids=torch.tensor([[4, 5, 6, 7]]))
    for position_ids in ([4, 5, 0, 1], [0, 1, 2, 3]):
        with refused("several documents beside a cache"):
            attention(nn.Module(), query, keys, keys, mask, position_ids=torch.tensor([position_ids]))


@pytest.mark.parametrize(
    ("position_ids", "visible", "documents"),
    [
        ([0, 1, 2, -1, 0, 1], [1, 1, 1, 0, 1, 1], 2),
        ([0, 1, 2, 3, 4, 3, 4], [1, 1, 1, 0, 0, 1, 1], 1),
        ([0, 1, 2, 3, 4, 2, 3], [1, 1, 1, 0, 0, 1, 1], 2),
        ([1, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1], 1),
        ([0, 1, 1, 1, 2, 3], [1, 1, 0, 0, 1, 1], 1),
        ([0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0], 2),
    ],
)
def test_documents_beside_padding(position_ids: list[int], visible: list[int], documents: int) -> None:
    found = documents_of_positions(torch.tensor([position_ids]), torch.tensor([visible]).bool())
    seen = torch.tensor(visible).bool()
    assert (1 if found is None else len(found[0][seen].unique())) == documents


def test_a_prompt_in_pieces_beside_padding_and_a_window() -> None:
    model = build("mistral", "sdpa", layers=1)
    model.config.sliding_window = 8
    ids, mask = INPUTS["plain"]()["input_ids"][:, :24], torch.ones(2, 24, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "use_cache": True}
    expected_ids = model.generate(ids, **options)
    model.set_attn_implementation(OURS)
    assert torch.equal(model.generate(ids, **options, prefill_chunk_size=6), expected_ids)


def test_an_encoder_under_padding_alone() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    config = hf.BertConfig(**sizes, num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = hf.BertForTokenClassification(config).double()
    inputs = INPUTS["left"]()
    inputs["labels"] = inputs["labels"].clamp(max=1)
    model.set_attn_implementation("sdpa")
    reference = run_one_device(model, inputs)
    model.zero_grad()
    model.set_attn_implementation(OURS)
    for ranks in on_pretended_ranks(model, inputs, [Asked(2, "ulysses"), Asked(3, "ring")]).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT64)


# ---- what is captured ----


class Graphs:
    """A backend of torch.compile that keeps what it is given."""

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.found.append(gm)
        return gm


@pytest.mark.parametrize("by", tiered(["position_ids", "cu_seq_lens"], quick=["cu_seq_lens"]))
def test_other_documents_are_not_another_graph(by: str) -> None:
    model, backend, inputs = build("llama", OURS), Graphs(), INPUTS["one_row"]()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    losses = set()
    for size in (1, 31, 32, 33, 63):
        ends = torch.tensor([0, size, LENGTH], dtype=torch.int32)
        own = {"position_ids": positions([size, LENGTH - size])}
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": size, "max_length_k": size}
        loss = compiled(**inputs, **own if by == "position_ids" else lengths).loss
        with torch.no_grad():
            assert torch.equal(loss, model(**inputs, **own if by == "position_ids" else lengths).loss)
        losses.add(loss.item())
    assert len(backend.found) == 1 and len(losses) == 5


@pytest.mark.parametrize("inputs", ["plain", "right"])
def test_one_document_needs_no_program_for_it(inputs: str) -> None:
    """While capturing nobody knows that default positions are one document; the pipeline finds out."""
    (ranks,) = on_pretended_ranks(build("mistral", OURS), INPUTS[inputs](), [Asked(2, "ring")]).values()
    calls = [node for node in ranks.graphs[0].graph_module.graph.nodes if node.target is ATTENTION]
    for call in calls:
        assert call.kwargs["mask"] == ("" if inputs == "plain" else "%0") and not call.args[3]
        assert (call.kwargs["nearest"], call.kwargs["farthest"]) == (0, 15)
        assert "z" in call.kwargs["queries"]  # causal, so zigzag


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**inputs)


def test_autocast() -> None:
    """Rotary embeddings make queries and keys float32, values are bfloat16."""
    inputs = INPUTS["packed"]()
    reference = run_one_device(Autocast(build("llama", "sdpa").float()), inputs)
    model = Autocast(build("llama", OURS).float())
    assert_equal_to_one_device(reference, run_one_device(model, inputs), 0.05)
    model.zero_grad()
    (ranks,) = on_pretended_ranks(model, inputs, [Asked(2, "ulysses")]).values()
    (call, *_) = [node for node in ranks.graphs[0].graph_module.graph.nodes if node.target is ATTENTION]
    assert {node.meta["val"].dtype for node in call.args[:3]} == {torch.bfloat16}
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, 0.05)


@pytest.mark.parametrize("strategy", tiered(STRATEGIES, quick=["ring"]))
def test_gradient_checkpointing(strategy: str) -> None:
    model, inputs = build("mistral", OURS), INPUTS["packed_rows"]()
    model.activation_checkpointing_enable()
    assert_equal_to_one_device(expected("mistral", "packed_rows"), run_one_device(model, inputs), FLOAT64)
    model.zero_grad()
    (ranks,) = on_pretended_ranks(model, inputs, [Asked(2, strategy)]).values()
    for result in ranks.results():
        assert_equal_to_one_device(expected("mistral", "packed_rows"), result, FLOAT32_PARTS)


# ---- no tensor of queries x keys ----

TOKENS = 256
SQUARE = TOKENS * (TOKENS - 1)  # of a causal tile, whose first key all rows see


class Sizes(TorchDispatchMode):
    """The largest result of any op, those inside of our own ops included."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split("::")[1] if func.namespace == OURS else ""
        if name in COMMUNICATING and not group_of(name, args, kwargs):
            with self:
                result = perform(COMMUNICATING[name](0, *args, **kwargs), "")
        elif name and hasattr(blocks, name):
            with self:
                result = getattr(blocks, name)(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size(), 0)
        return result


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Masks and scores are computed for tiles of rows, which are longer than these sequences."""
    plan.plan_calls.cache_clear()
    monkeypatch.setattr(plan, "TILE", 16)
    monkeypatch.setattr(plan, "SPAN", 16)
    monkeypatch.setattr(reference, "TILE", 16)
    yield
    plan.plan_calls.cache_clear()


def packed_tokens() -> Inputs:
    ids = torch.arange(TOKENS)[None] % 89
    return {"input_ids": ids, "labels": ids, "position_ids": positions([100, 1, 155])}


def largest_of(model: nn.Module) -> int:
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # others have weights for each token
    with Sizes() as sizes:
        model(**packed_tokens()).loss.backward()
    return sizes.largest


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("model", tiered(MODELS, quick=["mistral", "deepseek_v3", "gemma2", "gpt_oss"]))
def test_no_square_on_one_device(model: str) -> None:
    assert largest_of(build(model, OURS, layers=1)) < SQUARE
    assert largest_of(build(model, "dense", layers=1)) >= SQUARE


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("strategy", tiered(STRATEGIES, quick=["ulysses", "ring"]))
def test_no_square_on_ranks(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def watched(steps: Any) -> Any:
        """The steps of an op that communicates, each watched; between them another rank has its turn."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started, answer = steps(*args, **kwargs), None
            while True:
                with Sizes() as sizes:
                    try:
                        asked = started.send(answer)
                    except StopIteration as end:
                        return end.value
                    finally:
                        found.append(sizes.largest)
                answer = yield asked

        return run

    for name, steps in COMMUNICATING.items():
        monkeypatch.setitem(COMMUNICATING, name, watched(steps))
    found += sizes_on_ranks("mistral", strategy)
    assert len(found) > 2 or strategy in ("ulysses", "megatron")  # whose ranks need nothing from others in attention
    assert 0 < max(found) < SQUARE


def sizes_on_ranks(name: str, strategy: str) -> list[int]:
    model = build(name, OURS, layers=1)
    (ranks,) = on_pretended_ranks(model, packed_tokens(), [Asked(2, strategy)]).values()

    def run(graph: Any) -> int:
        with Sizes() as sizes:
            (loss,) = [x for x in graph.call(*graph.inputs) if isinstance(x, torch.Tensor) and x.ndim == 0]
            loss.backward()
        return sizes.largest

    return ranks.run(run)


def test_a_square_on_ranks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no plan is made of the documents, masks are computed in tiles, which are longer than this sequence."""
    monkeypatch.setattr(DataPlan, "of", lambda *arguments: None)
    assert max(sizes_on_ranks("llama", "ulysses")) >= SQUARE


# ---- generation ----


GENERATION = [("llama", None), ("llama", "static"), ("mistral", None), ("mistral", "static")]


@pytest.mark.parametrize(("model", "cache_kind"), tiered(GENERATION, quick=GENERATION[3:]))
def test_generation(model: str, cache_kind: str | None) -> None:
    """Prompts longer than the window, one of them padded at its left."""
    ids = INPUTS["plain"]()["input_ids"][:, : 2 * 16]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    answers = []
    for implementation in ("sdpa", OURS):
        own = build(model, implementation).eval()
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
        answers.append(own.generate(input_ids=ids, attention_mask=mask, cache_implementation=cache_kind, **options))
    assert torch.equal(*answers)


def test_a_prompt_in_pieces() -> None:
    ids = INPUTS["plain"]()["input_ids"]
    model = build("mistral", OURS).eval()
    cache_of_model = hf.DynamicCache(config=model.config)
    pieces = [model(input_ids=x, cache=cache_of_model, use_cache=True).logits for x in ids.split(30, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(input_ids=ids).logits, rtol=0, atol=1e-6)


# ---- other masks ----


def test_chunks_and_encoders() -> None:
    common = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 8}
    common |= {"num_hidden_layers": 2}
    chunked = {"num_key_value_heads": 4, "head_dim": 8, "attention_chunk_size": 16, "intermediate_size_mlp": 48}
    chunked |= {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "use_cache": False}
    windows = {"local_attention": 16, "global_attn_every_n_layers": 2, "pad_token_id": 0}
    windows |= {"bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None}
    for kind, config, own in (
        (hf.Llama4ForCausalLM, hf.Llama4TextConfig, chunked),
        (hf.ModernBertForMaskedLM, hf.ModernBertConfig, windows),
    ):
        for inputs in ("plain", "left"):
            results = []
            for implementation in ("sdpa", OURS):
                torch.manual_seed(0)
                model = kind(config(**common, **own)).double()
                model.set_attn_implementation(implementation)
                results.append(run_one_device(model, INPUTS[inputs]()))
            assert_equal_to_one_device(*results, FLOAT64)


def test_blocks_that_see_themselves_whole() -> None:
    """`block_sequence_ids`: causal, or both in one block."""
    blocks = torch.full((1, 64), -1)
    blocks[0, 10:20], blocks[0, 40:48] = 0, 1
    query, key, value = (torch.randn(1, 8, 64, 8, dtype=torch.float64) for _ in range(3))

    configs = {name: hf.LlamaConfig(attn_implementation=name) for name in ("dense", OURS)}

    def attend(query: torch.Tensor, implementation: str, position_ids: torch.Tensor | None) -> torch.Tensor:
        embeddings, config = query[:, 0], configs[implementation]
        mask = create_causal_mask(config, embeddings, None, None, position_ids, block_sequence_ids=blocks)
        function = attention if implementation == OURS else dense.dense_attention
        return function(nn.Module(), query, key, value, mask)[0]

    for position_ids in (None, positions([15, 49])):
        wanted = attend(query, "dense", position_ids)
        compiled = torch.compile(attend, backend="eager", fullgraph=True)
        for call in (attend, compiled):
            torch.testing.assert_close(call(query, OURS, position_ids), wanted, rtol=0, atol=FLOAT64)
        assert not torch.allclose(wanted, attention(nn.Module(), query, key, value, None)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_of_four_dimensions_is_taken_as_it_is(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 8, 16, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 16, 16) < 0.7
    given = mask if dtype == torch.bool else torch.where(mask, 0.5, -torch.inf).double()
    got, _ = attention(nn.Module(), query, key, value, given)
    wanted = nn.functional.scaled_dot_product_attention(query, key, value, given).transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("num_queries", [1, 5, 8])
@pytest.mark.parametrize("of_module", [True, False, None])
@pytest.mark.parametrize("argument", [True, False, None])
def test_without_a_mask(argument: bool | None, of_module: bool | None, num_queries: int) -> None:
    """The argument counts, then the module, else it is causal; one query sees all. Keys may be more than queries."""
    module = nn.Module()
    if of_module is not None:
        module.is_causal = of_module
    query = torch.randn(2, 4, num_queries, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 8, 8, dtype=torch.float64)
    module.num_key_value_groups = 2
    wanted, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=argument, scaling=0.3)
    got, _ = attention(module, query, key, value, None, is_causal=argument, scaling=0.3)
    torch.testing.assert_close(got, wanted, rtol=0, atol=FLOAT64)


def test_a_window_without_a_mask() -> None:
    query, key, value = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    mask = position_mask(2, 8, 8, mask_function=lambda b, h, q, k: (k <= q) & (k > q - 3))
    by_mask, _ = attention(nn.Module(), query, key, value, mask)
    by_argument, _ = attention(nn.Module(), query, key, value, None, sliding_window=3)
    torch.testing.assert_close(by_argument, by_mask, rtol=0, atol=0)
    assert not torch.allclose(by_argument, attention(nn.Module(), query, key, value, None, sliding_window=4)[0])


def test_lengths_of_queries_and_keys() -> None:
    """Cross attention of documents: each pair of lengths is a document."""
    query, key, value = torch.randn(3, 1, 4, 12, 8, dtype=torch.float64)
    ends = torch.tensor([0, 4, 8]), torch.tensor([0, 3, 12])
    options = {"is_causal": False, "cu_seq_lens_q": ends[0], "cu_seq_lens_k": ends[1]}
    got, _ = attention(nn.Module(), query[:, :, :8], key, value, None, **options)
    for queries, keys in ((slice(0, 4), slice(0, 3)), (slice(4, 8), slice(3, 12))):
        parts = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        wanted = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)
        torch.testing.assert_close(got[:, queries], wanted, rtol=0, atol=FLOAT64)
    with refused("causal attention of queries to another number of keys"):
        attention(nn.Module(), query[:, :, :8], key, value, None, **options | {"is_causal": True})


def test_dropout_is_passed_on() -> None:
    query, key = torch.randn(2, 2, 4, 64, 8)
    ones = torch.ones_like(query)  # so that what comes out is the sum of the weights
    assert attention(nn.Module(), query, key, ones, None, dropout=1.0)[0].abs().max() == 0
    sums, _ = attention(nn.Module(), query, key, ones, None, dropout=0.2)
    assert sums.std() > 0.05 and abs(sums.mean() - 1) < 0.1


# ---- what is refused ----


def refused(match: str) -> Any:
    return pytest.raises(UsageError, match=rf"attn_implementation='sptransform'(.|\n)*{match}(.|\n)*fix: ")


def test_functions_of_the_model_are_refused() -> None:
    config = hf.LlamaConfig(attn_implementation=OURS)
    embeddings = torch.randn(1, 8, 16)
    for own in ("or_mask_function", "and_mask_function"):
        with refused("a mask function of the model's own"):
            create_causal_mask(config, embeddings, None, None, **{own: lambda batch, head, query, key: query >= 4})


def test_what_cannot_be_read_is_refused() -> None:
    with refused("not one of Transformers' own"):
        position_mask(1, 8, 8, mask_function=lambda batch, head, query, key: (query - key) // 2 == 0)
    times = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with refused("not one of Transformers' own"):  # not positions in documents, whose differences are distances
        position_mask(1, 8, 8, mask_function=lambda batch, head, query, key: times[batch, key] <= times[batch, query])


def test_attention_refuses() -> None:
    query = torch.randn(2, 4, 8, 8)
    for match, arguments in {
        "position_bias": {"position_bias": torch.zeros(1, 4, 8, 8)},
        "output_attentions": {"output_attentions": True},
        "cu_seq_lens and 2 rows": {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS},
        "one of cu_seq_lens": {"cu_seq_lens_q": ENDS},
        "a window of attention that is not causal": {"is_causal": False, "sliding_window": 4},
    }.items():
        with refused(match):
            attention(nn.Module(), query, query, query, None, **arguments)
    for match, mask in {
        "a mask of 2 dimensions": torch.ones(2, 8, dtype=torch.bool),
        "requires a gradient": torch.zeros(1, 1, 8, 8, requires_grad=True),
        "a mask of 4 x 4 for 8 queries": position_mask(2, 4, 4, mask_function=lambda b, h, q, k: k <= q),
    }.items():
        with refused(match):
            attention(nn.Module(), query, query, query, mask)
    ends = {"cu_seq_lens_q": torch.tensor([0, 3, 8]), "cu_seq_lens_k": torch.tensor([0, 5, 8])}
    with refused("cu_seq_lens_q that are not cu_seq_lens_k"):
        attention(nn.Module(), *[query[:1]] * 3, None, **ends)
    with refused("float32, torch.float32 and torch.float64"):
        attention(nn.Module(), query, query, query.double(), None)


def test_a_model_that_computes_with_its_mask_is_told() -> None:
    mask = position_mask(1, 8, 8, mask_function=lambda b, h, q, k: k <= q)
    for use in (lambda: torch.randn(1, 1, 8, 8) + mask, lambda: mask[:, :, :, :4]):
        with pytest.raises(TypeError, match="fix: attn_implementation='sdpa'"):
            use()


@pytest.mark.slow
def test_without_transformers_nothing_happens() -> None:
    """Nor does the library import it, which is slow, by itself."""
    code = (
        "import sys, sptransform; assert 'transformers' not in sys.modules; sys.modules['transformers'] = None; "
        "import sptransform.integrations.transformers as ours; assert ours.AttentionInterface is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- real processes ----


def run_lengths(rank: int, world_size: int, strategy: str, kind: str, lengths: list[int]) -> tuple[list[Result], int]:
    """A parallelized model called with every length; its results, and how often it was compiled."""
    from torch._dynamo.utils import counters

    import sptransform

    counters.clear()
    model = sptransform.parallelize(build("llama", OURS, layers=1), strategy, backend="aot_eager")
    results = []
    for length in lengths:
        model.zero_grad()
        results.append(run_one_device(model, inputs_of_length(kind, length)))
    return results, counters["stats"]["unique_graphs"]


def inputs_of_length(kind: str, length: int) -> Inputs:
    ids = torch.arange(2 * length).view(2, length) % 89
    inputs = {"input_ids": ids, "labels": ids}
    if kind == "packed":
        return inputs | {"position_ids": positions([length // 3, length - length // 3])}
    mask = (torch.arange(length) >= torch.tensor([[0], [length // 2]])).long()
    return inputs | {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)} if kind == "padded" else inputs


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ulysses", "ring"])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_lengths_on_real_ranks(kind: str, strategy: str) -> None:
    lengths = [32, 64, 48, 96]
    for results, num_compiles in get_pool(2).run(run_lengths, strategy, kind, lengths, timeout=200):
        assert num_compiles <= 2  # torch makes the length symbolic at its second value
        for length, result in zip(lengths, results, strict=True):
            model = build("llama", "dense", layers=1)
            reference = run_one_device(model, inputs_of_length(kind, length))
            assert_equal_to_one_device(reference, result, FLOAT32_PARTS)


def run_documents(rank: int, world_size: int, strategy: str, counts: list[int]) -> tuple[list[Result], int]:
    """A parallelized model called with that many documents each; its results, and how often it was compiled."""
    from torch._dynamo.utils import counters

    import sptransform

    counters.clear()
    model = sptransform.parallelize(build("llama", OURS, layers=1), strategy, backend="aot_eager")
    results = []
    for count in counts:
        model.zero_grad()
        results.append(run_one_device(model, inputs_of_documents(count)))
    return results, counters["stats"]["unique_graphs"]


def inputs_of_documents(count: int) -> Inputs:
    ids = torch.arange(64)[None] % 89
    ends = torch.tensor([*range(0, 5 * count, 5), 64], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 64, "max_length_k": 64}
    return {"input_ids": ids, "labels": ids, **lengths}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "megatron"])
def test_the_number_of_documents_is_open(strategy: str) -> None:
    """One graph for numbers that the ranks divide, one for those that they do not, and that of the first call."""
    counts = [2, 3, 4, 5, 6, 7, 8]
    for results, num_compiles in get_pool(2).run(run_documents, strategy, counts, timeout=200):
        assert num_compiles <= 3
        for count, result in zip(counts, results, strict=True):
            reference = run_one_device(build("llama", OURS, layers=1), inputs_of_documents(count))
            assert_equal_to_one_device(reference, result, FLOAT32_PARTS)
