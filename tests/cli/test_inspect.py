from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cli_process import assert_one_line_error, weightwire

from weightwire.cli.difference import comparable, differences
from weightwire.cli.documents import Document, from_json, to_json
from weightwire.cli.inspect import select
from weightwire.errors import ConfigError, NoSourceError
from weightwire.identity.identity import Identity
from weightwire.manifest.leaves import canonical_order
from weightwire.manifest.records import DIGEST_BYTES, Entry, Layout, Manifest, View
from weightwire.types import Coordinates, Stage, TensorClass
from weightwire.wire.messages import PublicationRecord

IDENTITY = Identity(model_id="acme/tiny", architecture="Tiny", dtype="bfloat16", engine="module", tp_size=2)
MIB = 1 << 20


def entry(name: str, nbytes: int, **fields: Any) -> Entry:
    given: dict[str, Any] = {"dtype": "uint8", "shape": (nbytes,), "order": (0,), "kind": TensorClass.WEIGHT}
    return Entry(name=name, nbytes=nbytes, **(given | fields))


def manifest(*entries: Entry, salt: bytes = b"\0", bad: tuple[int, ...] = ()) -> Manifest:
    layout = Layout(entries=canonical_order(entries), state={"head": {"alpha": 0.5}}, absent=("head.bias",))
    digests = [bytes([n % 256, n in bad]) + salt * (DIGEST_BYTES - 2) for n in range(len(layout.leaves))]
    return Manifest(layout=layout, digests=b"".join(digests))


def document(**fields: Any) -> Document:
    return Document(**({"name": "it", "about": {"revision": "r1"}} | fields))


FULL = manifest(
    entry("a.weight", 3 * MIB, aliases=("b.weight",)),
    entry("c.weight", 5, views=(View(name="c.half", dtype="uint8", shape=(2,), stride=(1,), offset=1),)),
    entry("d.weight", 7),
    entry("rope", 16, kind=TensorClass.DERIVED),
)


def test_a_document_comes_back_from_json_as_it_was() -> None:
    whole = document(identity=IDENTITY, manifest=FULL)
    again = from_json("it", json.loads(json.dumps(to_json(whole))))
    assert again == whole
    assert again.manifest is not None
    assert again.manifest.content_id == FULL.content_id
    assert from_json("it", IDENTITY.to_dict()).identity == IDENTITY


def test_a_document_that_contradicts_itself_is_refused() -> None:
    def spoiled(**changes: Any) -> dict[str, Any]:
        plain = json.loads(json.dumps(to_json(document(manifest=FULL))))
        plain["manifest"] |= changes
        return dict(plain)

    good = spoiled()
    cases: list[Any] = [
        spoiled(content_id="0" * 64),
        spoiled(digests=good["manifest"]["digests"][:-1]),
        spoiled(digests=["00"] * len(good["manifest"]["digests"])),
        spoiled(entries=[each | {"nbytes": 1 << 60} for each in good["manifest"]["entries"]]),
        spoiled(entries="none"),
        good | {"format": "weightwire.inspect.v0"},
        good | {"identity": {"model_id": "x"}},
        [],
    ]
    for bad in cases:
        with pytest.raises(ConfigError, match=r"^it "):
            from_json("it", bad)


def told(left: Document, right: Document) -> list[tuple[str, str, str]]:
    return [(each.part, each.name, each.field) for each in differences(left, right)]


def test_equal_documents_do_not_differ() -> None:
    assert told(document(identity=IDENTITY, manifest=FULL), document(identity=IDENTITY, manifest=FULL)) == []


def test_identities_are_explained_field_by_field() -> None:
    other = dataclasses.replace(IDENTITY, dtype="float16", tp_size=4, revision="r2")
    found = differences(document(identity=IDENTITY), document(identity=other))
    assert {(each.name, each.left, each.right, each.matters) for each in found} == {
        ("dtype", "bfloat16", "float16", True),
        ("tp_size", "2", "4", True),
        ("revision", "none", "r2", False),
    }


def test_manifests_are_explained_tensor_by_tensor() -> None:
    other = manifest(
        entry("a.weight", 3 * MIB, dtype="int8"),
        entry("c.weight", 6),
        entry("e.weight", 7),
        entry("rope", 16, kind=TensorClass.DERIVED),
    )
    found = told(document(manifest=FULL), document(manifest=other))
    assert ("tensor", "a.weight", "dtype") in found
    assert ("tensor", "a.weight", "aliases") in found
    assert ("tensor", "c.weight", "shape") in found
    assert ("tensor", "c.weight", "views") in found
    assert ("tensor", "d.weight", "") in found
    assert ("tensor", "e.weight", "") in found
    assert not [each for each in found if each[1] == "rope" or each[0] == "bytes"]


def test_declared_state_and_none_are_compared() -> None:
    layout = dataclasses.replace(FULL.layout, state={"head": {"alpha": 0.25}}, absent=())
    found = told(document(manifest=FULL), document(manifest=dataclasses.replace(FULL, layout=layout)))
    assert found == [("state", "head", ""), ("absent", "head.bias", "")]


@pytest.mark.parametrize("leaf", range(5))
def test_tensors_whose_bytes_differ_are_named(leaf: int) -> None:
    entries = FULL.layout.entries
    assert len(FULL.layout.leaves) == 5
    other = manifest(*entries, bad=(leaf,))
    found = {name for part, name, _ in told(document(manifest=FULL), document(manifest=other)) if part == "bytes"}
    span = FULL.layout.leaves[leaf].span
    offset, expected = 0, set()
    for each in entries:
        if offset < span.end and span.offset < offset + each.nbytes:
            expected.add(each.name)
        offset += each.nbytes
    assert found == expected
    assert expected


def test_what_two_documents_have_in_common_is_what_is_compared() -> None:
    assert comparable(document(identity=IDENTITY, manifest=FULL), document(identity=IDENTITY)) == ["identity"]
    assert comparable(document(identity=IDENTITY), document(manifest=FULL)) == []


def record(incarnation: str, shard_key: str, endpoint: str, rank: int = 0) -> PublicationRecord:
    return PublicationRecord(
        shard_key=shard_key,
        replica_key="r" * 64,
        family_key="f" * 64,
        model_id="acme/tiny",
        identity="",
        coordinates=Coordinates(tp_rank=rank, tp_size=2),
        stage=Stage.LOADED,
        incarnation=incarnation,
        replica_incarnation="x",
        endpoints=(endpoint,),
    )


RECORDS = [record("abc1", "key1", "h:1"), record("abc2", "key2", "h:2", 1), record("abc1", "key3", "h:1")]


def test_a_source_is_found_by_what_it_is_called() -> None:
    assert select("key1", RECORDS) is RECORDS[0]
    assert select("abc2", RECORDS) is RECORDS[1]
    assert select("h:2", RECORDS) is RECORDS[1]
    with pytest.raises(NoSourceError, match="no source is called zzz"):
        select("zzz", RECORDS)
    with pytest.raises(ConfigError, match=r"abc means 3 publications: abc1 \(LOADED tp0/2"):
        select("abc", RECORDS)


def written(folder: Path, name: str, values: Any) -> str:
    (folder / name).write_text(json.dumps(values))
    return str(folder / name)


def test_files_are_shown_and_compared_by_the_command(tmp_path: Path) -> None:
    one = written(tmp_path, "one.json", to_json(document(identity=IDENTITY, manifest=FULL)))
    shown = weightwire(tmp_path, "inspect", one, "--names")
    assert shown.code == 0
    assert FULL.content_id in shown.out
    assert "c.half (view)" in shown.out
    again = weightwire(tmp_path, "inspect", one, "--json")
    assert json.loads(again.out) == json.loads(Path(one).read_text())

    other = written(tmp_path, "two.json", dataclasses.replace(IDENTITY, stage=Stage.PROCESSED, layout_id="x").to_dict())
    differ = weightwire(tmp_path, "inspect", "--diff", one, other)
    assert differ.code == 1
    assert "stage" in differ.out
    assert weightwire(tmp_path, "inspect", "--diff", one, one).code == 0
    listed = json.loads(weightwire(tmp_path, "inspect", "--json", "--diff", one, other).out)
    assert listed["compared"] == ["identity"]
    assert [each["name"] for each in listed["differences"]] == ["stage", "layout_id"]


def test_what_cannot_be_inspected_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert_one_line_error(weightwire(tmp_path, "inspect", str(broken)), "broken.json is no JSON")
    assert_one_line_error(weightwire(tmp_path, "inspect", "nowhere"), "there is no file nowhere", "--url HOST:PORT")
    assert_one_line_error(weightwire(tmp_path, "inspect"), "--diff", "weightwire inspect --help", code=2)
