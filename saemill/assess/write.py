"""The files of an assessment: its record, the page, and the sums and firing counts that they follow from."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from saemill.assess.entries import Measured
from saemill.assess.features import Describer
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.report.page import write_html
from saemill.assess.report.picture import pareto
from saemill.assess.report.shards import Shards, write_shards
from saemill.assess.splicing import Splicing
from saemill.assess.sums import DocumentSums
from saemill.common import durable, records
from saemill.common.log import say
from saemill.common.stores import assessments
from saemill.common.stores import explanations as stored_explanations
from saemill.common.stores import features as stored_features
from saemill.common.stores.explanations import Explanations
from saemill.common.stores.features import Features
from saemill.common.stores.runs import (
    BESIDE,
    DOCUMENTS,
    DOCUMENTS_MODEL,
    EXPLANATIONS,
    FEATURES,
    LATENTS,
    PARETO,
    REPORT,
)


def write(
    out: Path,
    values: dict[str, Any],
    features: Features,
    measured: Measured,
    describer: Describer,
    beside: Sequence[int],
    page_bytes: int,
) -> dict[str, Any]:
    """Write the verdict, the report, and the sums and firing counts they follow from: all of them or none.

    All files are complete under temporary names before the first is renamed. The old verdict is removed
    before that, and the new one comes last.

    Args:
        out: the folder.
        values: the content of `final_assessment.json` but for its files.
        features: the latents that the page shows.
        measured: the sums.
        describer: of these latents and others.
        beside: numbers of all latents of the SAE; none where they are not written beside the page.
        page_bytes: most bytes of the page.

    Returns: the content of `final_assessment.json`.
    """
    assessment = assessments.checked(values | {"files": []}).model_dump(mode="json")
    tables = _tables(measured)
    texts = {FEATURES: json.dumps(records.content(features), allow_nan=False)}  # it is long: without indents
    if picture := pareto(assessment):
        texts[PARETO] = picture
    densities = {name: measured.reconstruction.density(name) for name in measured.reconstruction.saes}
    explained = _explained(out, features)
    with ExitStack() as replacements:  # which closes the last opened first
        verdict = replacements.enter_context(durable.replacing(out / assessments.FILE))
        partials = {
            name: replacements.enter_context(durable.replacing(out / name))
            for name in (*tables, *texts, REPORT)
        }
        for name, table in tables.items():
            with durable.writing(out / name, table.nbytes):
                pq.write_table(table, partials[name])
        for name, text in texts.items():
            with durable.writing(out / name):
                durable.write_bytes(partials[name], [text.encode()])
        shards = _shards(assessment, features, len(beside))
        if shards is not None:
            folder = replacements.enter_context(durable.replacing_folder(out / BESIDE))
            partials |= write_shards(folder, shards, features, describer.each(beside))
        with durable.writing(out / REPORT):
            write_html(partials[REPORT], assessment, features, densities, explained, page_bytes, shards)
        assessment["files"] = [_file(name, file) for name, file in partials.items()]
        with durable.writing(out / assessments.FILE):
            records.write(verdict, assessments.checked(assessment))
        for old in (assessments.FILE, BESIDE, *({DOCUMENTS_MODEL, PARETO} - set(partials))):
            durable.remove(out / old)
    return assessment


def show_explanations(out: Path) -> None:
    """Write the page of an assessment anew, with the explanations that are beside it."""
    assessment, features = assessments.read(out), stored_features.load(out)
    explained = stored_explanations.beside(out, features)
    densities, page_bytes = assessments.densities(out), assessment["settings"]["page_bytes"]
    n_beside = len(densities[features.variant]) if (out / BESIDE).exists() else 0
    shards = _shards(assessment, features, n_beside)
    with durable.replacing(out / REPORT) as page, durable.writing(out / REPORT):
        write_html(page, assessment, features, densities, explained, page_bytes, shards)
    kept = [file for file in assessment["files"] if file["path"] != REPORT]
    files = [*kept, _file(REPORT, out / REPORT)]
    records.write(out / assessments.FILE, assessments.checked(assessment | {"files": files}))


def _shards(assessment: dict[str, Any], features: Features, n_latents: int) -> Shards | None:
    """Say what the page knows of the latents beside it; None where there are none."""
    stamp = durable.hash_json([assessment["of"], assessment["settings"], features.variant])
    return Shards(BESIDE, stamp, n_latents) if n_latents else None


def _file(name: str, file: Path) -> dict[str, Any]:
    """Describe a file that the record answers for, where it is written."""
    return {"path": name, "bytes": file.stat().st_size, "xxh3": durable.hash_file(file)}


def _explained(out: Path, features: Features) -> Explanations | None:
    """Read the explanations of an earlier assessment, where they are of the same SAE; say so where they are
    not shown."""
    found = records.if_whole(lambda: stored_explanations.beside(out, features))
    if found is None and (out / EXPLANATIONS).exists():
        say(
            f"{out / EXPLANATIONS} is damaged or of another SAE, and is not shown; `saemill explain` writes "
            "it anew"
        )
    return found


def _tables(measured: Measured) -> dict[str, pa.Table]:
    """Tabulate the sums per document and the latents, by the names of their files."""
    sums = {DOCUMENTS: measured.reconstruction.sums}
    if isinstance(measured.splicing, Splicing):
        sums[DOCUMENTS_MODEL] = measured.splicing.sums
    tables = {name: _sums_table(table) for name, table in sums.items()}
    return tables | {LATENTS: _latents_table(measured.reconstruction, measured.found_in_seeds)}


def _latents_table(
    reconstruction: Reconstruction, found_in_seeds: Mapping[str, NDArray[np.int64]]
) -> pa.Table:
    """Tabulate how every latent of every variant fired, and in how many SAEs of other seeds it is found; null
    where there are none."""
    tables = [
        pa.table(
            {
                "variant": [name] * len(firing.count_F),
                "latent": np.arange(len(firing.count_F)),
                "density": reconstruction.density(name),
                "mean_when_active": (firing.sum_F / firing.count_F.clamp(min=1)).numpy(),
                "min": firing.min_F.numpy(),
                "max": firing.max_F.numpy(),
                "found_in_seeds": pa.array(
                    found_in_seeds.get(name, [None] * len(firing.count_F)), pa.int64()
                ),
            }
        )
        for name, firing in reconstruction.firing.items()
    ]
    return pa.concat_tables(tables)


def _sums_table(sums: DocumentSums) -> pa.Table:
    hashes = pa.array(sums.documents, pa.uint64())
    return pa.table({"text_hash": hashes} | {name: sums.column(name) for name in sums.names})
