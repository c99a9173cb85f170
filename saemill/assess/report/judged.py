"""The dictionary's health, probes and absorption, by the names that their templates have."""

from typing import Any

from saemill.assess.health import MOST_DENSE, dense_rows, health_rows, least_c_dec_sentences
from saemill.assess.probes.tables import (
    absorption_rows,
    concept_rows,
    examples_sentences,
    label_rows,
    probe_notes,
    probe_rows,
)


def judged(assessment: dict[str, Any]) -> dict[str, Any]:
    """Lay out the sections."""
    entries = assessment["variants"] + assessment["controls"]
    splits = {each["split_by"] for each in (assessment.get("probes") or {"examples": ()})["examples"]}
    return {
        "health": health_rows(entries),
        "l0_sentences": least_c_dec_sentences(assessment["least_c_dec"]),
        "dense": {e["name"]: rows for e in assessment["variants"] if (rows := dense_rows(e))},
        "most_dense": MOST_DENSE,
        "probes": probe_rows(assessment),
        "labels": {e["name"]: rows for e in entries if (rows := label_rows(assessment, e))},
        "absorption": absorption_rows(assessment),
        "concepts": {entry["name"]: rows for entry in entries if (rows := concept_rows(entry))},
        "examples": examples_sentences(assessment),
        "probe_notes": probe_notes(assessment),
        "split_words": " or ".join(f"{split}s" for split in sorted(splits)),
    }
