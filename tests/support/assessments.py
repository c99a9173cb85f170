"""Assessments: made in little time, looked into, and written by hand for what reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import Pipeline

from saemill.assess.config import AssessConfig
from saemill.common import records
from saemill.common.stores import assessments


def write_assessment(folder: Path, verdicts: Mapping[str, str]) -> None:
    """`final_assessment.json` of variants with these verdicts, which were not measured."""
    variants = [
        {
            "name": name, "site": "s", "k": 1, "num_latents": 2, "tokens_trained": 3,
            "diverged_at_step": None, "not_measured": "by hand", "metrics": {}, "evidence": [], "checks": [],
            "verdict": verdict, "checks_passed": "unknown",
        }
        for name, verdict in verdicts.items()
    ]  # fmt: skip
    data = {
        "chosen": "none", "tokens_fingerprint": "0" * 16, "unit": "token", "document": "document",
        "n_tokens": 1, "n_documents": 1, "n_documents_left_out_as_seen": 0, "n_tokens_with_losses": 0,
        "mask": {}, "dead_percentage_threshold": 0.1, "identity_splice_nats": None, "sites": {}, "notes": [],
        "model_check": None,
    }  # fmt: skip
    best = next(iter(verdicts))
    other = {"chosen_by": "fvu", "n_documents_chosen_on": 1, "n_documents": 1, "overlap": True, "metrics": {}}
    values = {
        "settings": {}, "of": "0" * 16, "data": data, "thresholds": {}, "best_variant": best,
        "best_on_other_documents": other, "variants": variants, "controls": [],
        "n_processes": 1, "versions": {}, "seconds": 0.5, "files": [],
    }  # fmt: skip
    records.write(folder / assessments.FILE, assessments.checked(values))


def entry(assessment: dict[str, Any], k: int) -> dict[str, Any]:
    """Return what is told of the variant of this k."""
    (found,) = [e for e in assessment["variants"] if e["k"] == k]
    return dict(found)


def brief(causal: Pipeline, out: Path, **values: Any) -> AssessConfig:
    """Return settings that assess a run on few tokens and show no latents."""
    return AssessConfig(run=causal.out, out=out, device="cpu", model_tokens=500, n_latents=0, **values)
