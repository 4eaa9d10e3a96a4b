"""Stock trainers on prepared models: losses, gradient norms, evaluations and files are those of one process."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import trainers
from tests.support.gloo_pool import get_pool
from tests.support.models import build

pytestmark = pytest.mark.timeout(280)

TOLERANCE = 2e-6  # float32
# what two groups of ranks read
BY_TWO = {"per_device_train_batch_size": 2 * trainers.BATCH, "per_device_eval_batch_size": 16}


def assert_same(found: dict[str, Any], alone: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert len(found["losses"]) == trainers.STEPS
    assert found["losses"] == pytest.approx(alone["losses"], rel=tolerance)
    assert found["norms"] == pytest.approx(alone["norms"], rel=tolerance)
    assert found["saved"].keys() == alone["saved"].keys()
    for name, tensor in alone["saved"].items():
        assert (found["saved"][name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name
    assert found["evaluated"] == pytest.approx(alone["evaluated"], rel=10 * tolerance)


def compare(
    run: Any, folder: Path, size: int = 2, *args: Any, of_one: dict[str, Any] | None = None, **changed: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same run on ranks and in one process, where ``of_one`` are other arguments."""
    tolerance = changed.pop("tolerance", TOLERANCE)
    shared = {name: value for name, value in changed.items() if name not in ("dims", "options")}
    (alone,) = get_pool(1).run(run, str(folder / "one"), **{**shared, **(of_one or {})}, timeout=200)
    found = get_pool(size).run(run, str(folder / "ranks"), *args, **changed, timeout=200)
    for each in found:
        assert_same(each, alone, tolerance)
    return found, alone


def test_it_trains_and_saves_as_one_process(tmp_path: Path) -> None:
    found, alone = compare(trainers.train, tmp_path, counts=True, include_num_input_tokens_seen="all")
    assert {each["counts"] for each in found} == {alone["counts"]}
    for each in found:
        assert "all_to_all_single" in each["collectives"]
        assert "all_gather_into_tensor" not in each["collectives"]  # of logits


@pytest.mark.slow
@pytest.mark.parametrize("dims", [None, {"dp_shard": 2, "sp": 2}])
def test_samples_are_counted_once_and_groups_start_alike(dims: dict[str, int] | None) -> None:
    (alone,) = get_pool(1).run(trainers.counted)
    for rank, found in enumerate(get_pool(2 if dims is None else 4).run(trainers.counted, dims)):
        assert found == {**alone, "seeds of": rank // 2}


@pytest.mark.slow
@pytest.mark.parametrize("strategy, options", [("ulysses", {}), ("megatron", {}), ("ring", {"shard_parameters": True})])
def test_it_evaluates_as_one_process(tmp_path: Path, strategy: str, options: dict[str, Any]) -> None:
    compare(trainers.train, tmp_path, 2, strategy, options=options, evaluated=11)


LOGITS = {"label_smoothing_factor": 0.1}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, changed, tolerance",
    [
        ("ulysses", {"bf16": True, "gradient_checkpointing": True}, 2e-2),
        ("ulysses", LOGITS, TOLERANCE),
        ("megatron", LOGITS, TOLERANCE),
        ("megatron", {"optim": "adamw_torch_fused"}, TOLERANCE),
        ("ulysses", {"auto_find_batch_size": True}, TOLERANCE),
        ("ulysses", {"average_tokens_across_devices": False}, TOLERANCE),
        ("ulysses", {"of_sequences": True, "evaluated": 11}, TOLERANCE),
        ("megatron", BEST | {"save_strategy": "steps", "save_steps": 1, "evaluated": 8}, TOLERANCE),
    ],
)
def test_settings(tmp_path: Path, strategy: str, changed: dict[str, Any], tolerance: float) -> None:
    compare(trainers.train, tmp_path, 2, strategy, tolerance=tolerance, **changed)


@pytest.mark.slow
def test_datasets_without_a_length(tmp_path: Path) -> None:
    compare(trainers.train, tmp_path, streams=True, evaluated=11)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["dp_replicate", "dp_shard"])
@pytest.mark.parametrize("streams", [False, True])
def test_two_groups_of_two(tmp_path: Path, data: str, streams: bool) -> None:
    dims = {data: 2, "sp": 2}
    # a last batch that two groups do not share evenly is filled up with rows of the first, as Trainer always does
    evaluated = 0 if streams else 32
    starts = {} if streams else {"eval_on_start": True}  # without a backward FSDP2 would keep whole weights
    compare(trainers.train, tmp_path, 4, dims=dims, streams=streams, evaluated=evaluated, of_one=BY_TWO, **starts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, dims",
    [
        ("ulysses", None),
        ("megatron", None),
        ("ring", {"dp_replicate": 1, "dp_shard": 2, "sp": 2}),
        ("megatron", {"dp_shard": 2, "sp": 2}),
        (("ring", "megatron"), {"cp": 2, "tp": 2}),
    ],
)
def test_it_resumes(tmp_path: Path, strategy: Any, dims: dict[str, int] | None) -> None:
    size, of_one = 2 if dims is None else 4, BY_TWO if "dp_shard" in (dims or {}) else {}
    saves = {"save_strategy": "steps", "save_steps": 2}
    # FSDP2 goes around what is cut already
    options = {"inputs": build("llama")[1]} if strategy == "megatron" and dims is not None else {}
    ways = {"dims": dims, "options": options}
    _, alone = compare(trainers.train, tmp_path, size, strategy, **ways, of_one=of_one, **saves)
    checkpoint = str(tmp_path / "ranks" / "checkpoint-2")
    resumed = [get_pool(size).run(trainers.train, str(tmp_path / "again"), strategy, **ways, resume=checkpoint)[0]]
    resumed += get_pool(1).run(trainers.train, str(tmp_path / "in_one"), **of_one, resume=checkpoint)
    of_one_process = str(tmp_path / "one" / "checkpoint-2")
    resumed += get_pool(size).run(trainers.train, str(tmp_path / "on"), strategy, **ways, resume=of_one_process)
    for each in resumed:
        assert_same(each, alone)
    states = [torch.load(tmp_path / run / "checkpoint-2" / "optimizer.pt") for run in ("one", "ranks")]
    for index, values in states[0]["state"].items():
        for name, tensor in values.items():
            assert type(states[1]["state"][index][name]) is torch.Tensor
            torch.testing.assert_close(states[1]["state"][index][name], tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("size, strategy, dims", [(2, "ulysses", None), (4, "ring", {"dp_replicate": 2, "sp": 2})])
def test_sft(tmp_path: Path, size: int, strategy: str, dims: dict[str, int] | None) -> None:
    pytest.importorskip("trl")
    of_one: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    if dims is not None:  # TRL takes the mean of what groups evaluate
        of_one = BY_TWO | {"per_device_eval_batch_size": 8}
        changed = {"num_held_out": 32, "judged": ("loss",)}
    found, alone = compare(trainers.fine_tune, tmp_path, size, strategy, dims=dims, of_one=of_one, **changed)
    for name in ("mean_token_accuracy", "entropy", "num_tokens"):
        of_ranks, of_one = ([entry[name] for entry in run["history"]] for run in (found[0], alone))
        assert of_ranks == pytest.approx(of_one, rel=1e-5), name


@pytest.mark.slow
def test_sft_of_packed_documents(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    compare(trainers.fine_tune, tmp_path, attention="sptransform", packing=True, per_device_train_batch_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "megatron"])
def test_dpo(tmp_path: Path, strategy: str) -> None:
    pytest.importorskip("trl")
    compare(trainers.prefer, tmp_path, 2, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [None, {"dp_replicate": 2, "sp": 2}])
def test_a_loop_with_accelerate(tmp_path: Path, dims: dict[str, int] | None) -> None:
    (alone,) = get_pool(1).run(trainers.accelerated, str(tmp_path))
    for found in get_pool(2 if dims is None else 4).run(trainers.accelerated, str(tmp_path), dims):
        if dims is None:
            assert found["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
            assert found["norms"] == pytest.approx(alone["norms"], rel=TOLERANCE)
            assert torch.equal(found["predicted"], alone["predicted"])
            assert found["rates"] == alone["rates"]
        assert torch.equal(found["labels"], alone["labels"])
        assert found["objects"] == alone["objects"]


REFUSED = {
    "after the trainer": "accelerate gives ranks of one sequence different batches",
    "in model_init": "accelerate gives ranks of one sequence different batches",
    "replicated parts": "DDP reduces plain parameters",
    "cut later": "FSDP2 shards what the strategy has cut already",
    "fsdp": "a prepared model is sharded",
    "rebalanced": "this sampler gives every rank batches of its own",
    "dispatched": "with dispatch_batches",
    "beside": "parameter 'head.weight' of Sequential",
    "local": "trainers compute losses and metrics of whole sequences",
    "torch_compile": "a prepared model is compiled already",
    "other seed": "'model.embed_tokens.weight' is not the same on all ranks",
    "dims": "consecutive ranks",
    "no dim": "no dim is left for the sequence",
    "not prepared": "this model was not prepared",
    "adapters": "adapters were put around a prepared model",
    "not launched": "ranks share a sequence, and there are none",
}


def test_what_users_get_wrong(tmp_path: Path) -> None:
    for messages in get_pool(2).run(trainers.refused, str(tmp_path)):
        for name, text in REFUSED.items():
            if name == "adapters" and find_spec("peft") is None:
                continue
            assert text in messages.get(name, "no error"), name
