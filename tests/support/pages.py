"""The pages that users read: README.md and docs/, their links, headings, tables and blocks of code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import sptransform

ROOT = Path(sptransform.__file__).parents[1]
PAGES = {page.name: page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
# a line before a block says on how many ranks it runs, `<!-- ranks: 2 -->`, or why it does not, `<!-- not run: .. -->`;
# without, it is for one process
_BLOCK = re.compile(r"(?:^<!-- (?:ranks: (\d+)|(not run): [^>]+) -->\n)?^```python\n(.*?)^```", re.M | re.S)


_SMALLER = {
    r'init_device_mesh\("cuda", \(\d, \d\)': 'init_device_mesh("cpu", (2, 2)',
    '"cuda"': '"cpu"',
    r"USP\(ulysses=8, ring=4\)": "USP(ulysses=2, ring=2)",
    "num_hidden_layers=32": "num_hidden_layers=2",
    "hidden_size=4096": "hidden_size=64",
    "num_attention_heads=32": "num_attention_heads=8",
    "num_key_value_heads=8": "num_key_value_heads=4",
    "intermediate_size=14336": "intermediate_size=96",
    "vocab_size=128256": "vocab_size=128",
    r'options=\{"strategy": "ulysses"\}': 'options={"strategy": "ulysses", "backend": "aot_eager"}',
    # as the page says of gloo
    r"(model\.set_gradient_divide_factor\(.*)": r"\1\nmodel.set_force_sum_reduction_for_comms(True)",
}


@dataclass(frozen=True)
class Block:
    """Python code of a page; ``ranks``: 0 for one process without a group, None where it is not run."""

    page: str
    line: int
    ranks: int | None
    code: str

    def __str__(self) -> str:
        return f"{self.page}-{self.line}"


@cache
def blocks() -> tuple[Block, ...]:
    found = []
    for name, page in PAGES.items():
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            ranks = None if match[2] else int(match[1] or 0)
            found.append(Block(name, text.count("\n", 0, match.start()) + 1, ranks, match[3]))
    return tuple(found)


def prose(text: str) -> str:
    """``text`` without blocks of code, in which nothing is a heading or a link."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Where links into a page may lead, built by mkdocs and on code hosts, which differ in spaces at punctuation."""
    headings = re.findall(r"^#+ (.*)", prose(text), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {x.replace(" ", "-") for x in kept} & {re.sub(r"[- ]+", "-", x) for x in kept}


def run_alone(code: str, found: dict[str, Any]) -> None:
    """Run blocks of a page in one process, one after the other."""
    with _as_on_a_small_machine(sptransform.parallelize):
        exec(_made_small(code), found)


def run_on_one_device(block: Block) -> float:
    """The loss of the model that a block parallelizes."""
    found = known_before()
    if "LlamaConfig(" in block.code and "mesh" not in block.code:  # a script, which makes a model of its own
        with _as_on_a_small_machine(lambda model, *_, **__: model):
            exec(_made_small(block.code), found)
    return float((found["loss"] if "loss" in found else found["model"](**found["inputs"]).loss).detach())


def run_on_a_rank(rank: int, world_size: int, block: Block) -> float | None:
    """Run a block, and a training step of what it made; returns the loss."""
    with _as_on_a_small_machine(sptransform.parallelize):
        found = known_before()
        exec(_made_small(block.code), found)
        if "schedule" in found:  # a stage of a pipeline has no loss here
            return None
        if "loss" not in found:
            found["loss"] = found["model"](**found["inputs"]).loss
            found["loss"].backward()
        return float(found["loss"].detach())


def known_before() -> dict[str, Any]:
    """What the pages have set up before a block: a model of one row of 512 tokens, its inputs, and imports."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=128,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(config.vocab_size, (1, 512))
    inputs = {"input_ids": ids, "labels": ids}
    return {
        "DistributedDataParallel": DistributedDataParallel,
        "LlamaConfig": LlamaConfig,
        "LlamaForCausalLM": LlamaForCausalLM,
        "LlamaRotaryEmbedding": LlamaRotaryEmbedding,
        "PipelineStage": PipelineStage,
        "Schedule1F1B": Schedule1F1B,
        "StateDictOptions": StateDictOptions,
        "batches": [inputs],
        "checkpoint": model.state_dict(),
        "config": config,
        "device": torch.device("cpu"),
        "fully_shard": fully_shard,
        "ids": ids,
        "init_device_mesh": init_device_mesh,
        "inputs": inputs,
        "labels": ids,
        "model": model,
        "modules": [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)],
        "one_device_model": LlamaForCausalLM(config),
        "set_model_state_dict": set_model_state_dict,
        "sptransform": sptransform,
        "torch": torch,
    }


def _made_small(code: str) -> str:
    """For four ranks on the host and few layers, where a page has GPUs and many."""
    for large, small in _SMALLER.items():
        code = re.sub(large, small, code)
    return code


@contextmanager
def _as_on_a_small_machine(parallelize: Callable[..., Any]) -> Iterator[None]:
    """The group is there, no GPU is, and nothing is compiled by Inductor."""

    @wraps(parallelize)
    def without_inductor(*args: Any, **kwargs: Any) -> Any:
        return parallelize(*args, **{"backend": "aot_eager"} | kwargs)

    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(sptransform, "parallelize", without_inductor))
        patched.enter_context(mock.patch.object(dist, "init_process_group"))
        patched.enter_context(mock.patch.object(torch.cuda, "set_device"))
        yield
