"""Hardware files: every number has a source, and none comes from the measurements that the model is judged by."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sptransform.cost.hardware import hardware_names, hardware_of
from sptransform.diagnostics.errors import UsageError

UNITS = {"", "B", "B/s", "FLOP/s", "s", "keys", "queries"}
# where tests/data/measured comes from
JUDGED = re.compile(
    "ring-flash-attention|long-context-attention|yunchang|magiattention|torchtitan|huggingface/trl|prime-rl|maxtext"
    "|megatron|calculon|vllm-omni",
    re.IGNORECASE,
)


def test_there_are_files() -> None:
    assert set(hardware_names()) >= {"h100-nvlink", "h100-ib", "h200", "h800", "a100-nvlink", "a100-pcie", "b200"}
    assert set(hardware_names()) >= {"l20-pcie", "4090-pcie", "tpu-v5p"}


@pytest.mark.parametrize("name", hardware_names())
def test_every_constant_has_a_source_that_is_not_judged(name: str) -> None:
    for key, (value, unit, source) in hardware_of(name).constants.items():
        assert unit in UNITS, key
        assert len(source) > 15, f"{name} does not say where {key} comes from"
        # whether messages overlap is no number: nothing can be fitted by it
        assert isinstance(value, bool) or not JUDGED.search(source), f"{name}: {key} comes from what is judged"
        assert isinstance(value, bool | str) or value > 0, key


def test_an_unknown_name_lists_the_files() -> None:
    with pytest.raises(UsageError, match=r"there is no hardware 'h100'\n.*a100-nvlink"):
        hardware_of("h100")


def test_an_unknown_constant_lists_those_like_it() -> None:
    with pytest.raises(UsageError, match=r"says nothing of memory.bandwith\n.*memory.bandwidth"):
        hardware_of("h200")["memory.bandwith"]


def test_a_file_that_extends_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"what": "faster", "extends": "h100-ib", "constants": {"memory.bandwidth": [4e12, "B/s", "me"]}}')
    mine = hardware_of(path)
    assert (mine.name, mine["memory.bandwidth"], mine["node.ranks"]) == ("mine", 4e12, 8)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "copy.json"
    hardware_of("a100-pcie").replaced("a test", launch__seconds=1e-6).write(path)
    copy = hardware_of(str(path))
    assert copy.constants["launch.seconds"] == (1e-6, "s", "a test")
    assert copy.constants.keys() == hardware_of("a100-nvlink").constants.keys()


@pytest.mark.parametrize("text", ["{", '{"what": "x"}', '{"what": "x", "constants": {"a": 1}}', "[]"])
def test_what_is_no_file_of_hardware(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="is no file of hardware"):
        hardware_of(path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("memory.bandwith", "4e12", r"nothing reads[\s\S]*fix: memory\.bandwidth"),
        ("peak_flops.bfloat61", "4e14", r"nothing reads[\s\S]*fix: peak_flops\.bfloat16"),
        ("peak_flops.bfloat16", '"fast"', "above 0"),
        ("peak_flops.bfloat16", "0", "above 0"),
        ("peak_flops.bfloat16", "NaN", "above 0"),
        ("inside.latency", "-1e-6", "0 or above"),
        ("inside.overlaps", "1", "true or false"),
        ("attention.kernel", "3", "a name"),
    ],
)
def test_constants_of_no_use_are_refused(tmp_path: Path, name: str, value: str, says: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(f'{{"what": "mine", "extends": "h100-ib", "constants": {{"{name}": [{value}, "", "me"]}}}}')
    with pytest.raises(UsageError, match=says):
        hardware_of(path)


def test_a_file_extends_another_beside_it_but_not_itself(tmp_path: Path) -> None:
    form = (
        '{{"what": "mine", "extends": "{}", "constants": {{"attention.mine.forward.flops": [1e14, "FLOP/s", "me"]}}}}'
    )
    (tmp_path / "one.json").write_text(form.format("h200"))
    (tmp_path / "two.json").write_text(form.format("one.json"))
    (tmp_path / "self.json").write_text(form.format("self.json"))
    assert hardware_of(tmp_path / "two.json")["attention.mine.forward.flops"] == 1e14
    with pytest.raises(UsageError, match="extends itself"):
        hardware_of(tmp_path / "self.json")


@pytest.mark.parametrize("hardware", [5, True, b"h100-ib", ["h100-ib"]], ids=repr)
def test_what_is_neither_a_name_nor_a_file(hardware: object) -> None:
    with pytest.raises(UsageError, match="hardware is a name or a file"):
        hardware_of(hardware)  # type: ignore[arg-type]
