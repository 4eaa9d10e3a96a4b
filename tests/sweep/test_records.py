"""What a file of results says."""

from pathlib import Path

from sptransform.sweep.records import Record, Status, append, read


def test_the_last_record_says_whether_an_architecture_was_built(tmp_path: Path) -> None:
    def record(name: str, strategy: str, status: Status) -> Record:
        return Record(name, "causal-lm", strategy, 2 if strategy else 0, status, {"torch": "1"})

    file = tmp_path / "results.jsonl"
    append(file, [record("built later", "", Status.NOT_BUILT), record("built before", "ring", Status.EXACT)])
    append(file, [record("built later", "ring", Status.REFUSED), record("built before", "", Status.NOT_BUILT)])
    append(file, [record("built later", "ring", Status.EXACT)])
    with file.open("a") as out:
        out.write('{"architecture": "cut')
    assert [(x.architecture, x.status) for x in read(file)] == [
        ("built before", Status.NOT_BUILT),
        ("built later", Status.EXACT),
    ]
