"""What a run with two variants is on the hub."""

from typing import Any

import yaml

VARIANTS = ["layers.1-k2-f128-s0-lr0.003", "layers.1-k16-f128-s0-lr0.003"]
SAE_FILES = [f"{name}/{file}" for name in VARIANTS for file in ("cfg.json", "sae.safetensors")]
OF_A_RUN = [
    "README.md",
    "config.yaml",
    "features.json",
    "final_assessment.json",
    "finished.json",
    "identity.json",
    "latents.parquet",
    "pareto.svg",
    "report-latents/0.js",
    "report-latents/1.js",
    "report-latents/words.js",
    "report.html",
]


def metadata(card: bytes) -> dict[str, Any]:
    """The YAML before a card."""
    head = card.decode().split("---\n")[1]
    read: dict[str, Any] = yaml.safe_load(head)
    return read
