"""Files of stores changed at random: they are read as they were written, or refused in words."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import changed_bytes, changed_json
from stores import files_of, make_embeddings, make_store

from saemill.common import durable, records
from saemill.common.errors import SaemillError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.tokens import TokenStore
from saemill.show import describe, problems

N = int(os.environ.get("SAEMILL_FUZZ", "150"))
"""Changes per kind of store."""


def everything(path: Path) -> list[Any]:
    """All that a reader gets of a store."""
    store = ActivationStore(path)
    found: list[Any] = [
        store.fingerprint,
        store.mask,
        store.text.held_out_R.tolist(),
        store.text.provenance(store.mask),
    ]
    addresses = np.arange(0, store.n_tokens, 7)
    found += [store.text.document_of(addresses).tolist(), store.text.documents.to_pydict()]
    if isinstance(store.text, TokenStore):
        found += [store.text.rows(0, store.text.n_rows).tolist(), store.text.tokenizer_folder.name]
    else:
        found.append(store.text.texts(0, store.text.n_rows))
    for name in store.sites:
        site = store.site(name)
        statistics = site.statistics
        found += [name, site.read(0, store.n_tokens).tolist(), statistics.mean_D.tolist()]
        found += [statistics.variance_D.tolist(), statistics.mean_squared_norm, dict(statistics.distances)]
    return found


def reseal(file: Path, chance: random.Random) -> None:
    """Change a value in a record and give it the checksum that fits."""
    value = json.loads(file.read_text())
    holder = value.get("attributes", {"saemill": value})
    if "saemill" not in holder or records.CHECKSUM not in holder["saemill"]:
        file.write_text(json.dumps(changed_json(file.read_bytes(), chance)))
        return
    fields = {key: field for key, field in holder["saemill"].items() if key != records.CHECKSUM}
    new = records.sealed(changed_json(json.dumps(fields).encode(), chance))
    if "attributes" in value:
        value["attributes"]["saemill"] = new
    else:
        value = new
    file.write_text(json.dumps(value))


def relist(folder: Path, name: str) -> None:
    """Give a file that a manifest lists the size and hash that it has now."""
    for text in ("tokens", "passages"):
        manifest = folder / text / "manifest.json"
        if not name.startswith(f"{text}/") or not manifest.exists():
            continue
        value = json.loads(manifest.read_text())
        for entry in value["files"]:
            if f"{text}/{entry['path']}" == name:
                entry |= {"bytes": (folder / name).stat().st_size, "xxh3": durable.hash_file(folder / name)}
        del value[records.CHECKSUM]
        manifest.write_text(json.dumps(records.sealed(value)))


def mutate(whole: Path, copy: Path, name: str, fits: bool, chance: random.Random) -> None:
    """Mutate a file of a copy of a store; where it `fits`, with the hash or checksum that goes with it."""
    if fits and name.endswith(".json") and "tokenizer/" not in name:
        reseal(copy / name, chance)
        return
    (copy / name).write_bytes(changed_bytes((whole / name).read_bytes(), chance))
    if fits:
        relist(copy, name)


def try_mutations(whole: Path, work: Path, n: int, seed: int) -> tuple[int, int]:
    """Mutate files of a store in turn and read all of it; how many mutations were told, and how many not.

    Bytes that change anywhere are told, or what is read is what was written. Where a hash or a checksum was
    made to fit, nothing but an error of ours may come of it.
    """
    chance, expected = random.Random(seed), everything(whole)
    copy = Path(shutil.copytree(whole, work / "copy"))
    names = files_of(whole)
    n_told = n_same = 0
    for number in range(n):
        name = names[number % len(names)]
        fits = chance.random() < 0.4
        mutate(whole, copy, name, fits, chance)
        try:
            found = everything(copy)
            assert fits or found == expected, f"{name}: something else came through"
            n_same += 1
        except SaemillError:
            n_told += 1
        try:
            if not fits and (copy / name).read_bytes() != (whole / name).read_bytes():
                assert problems(copy) or name.endswith(".json")
            describe(copy)
        except SaemillError:
            pass
        for changed_name in (name, "tokens/manifest.json", "passages/manifest.json"):
            if (whole / changed_name).exists():
                shutil.copyfile(whole / changed_name, copy / changed_name)
    return n_told, n_same


@pytest.mark.parametrize("kind", ["tokens", "packed", "embeddings"])
def test_no_mutation_of_any_file_ends_in_a_traceback(tmp_path: Path, kind: str) -> None:
    """Oracle: what was written, or an error of ours; mutations in turn over all files."""
    if kind != "embeddings":
        form = ("int8", "zstd") if kind == "packed" else ("fp32", None)
        whole = make_store(tmp_path, n_rows=24, ctx_len=16, d=4, shard_tokens=256, form=form).path
    else:
        whole, _ = make_embeddings(tmp_path)
    told, same = try_mutations(whole, tmp_path / "changed", N, seed=0)
    assert told > 0.6 * N, (told, same)
