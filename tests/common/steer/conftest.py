"""Tiny models of every kind."""

from typing import Any

import pytest
import transformers
from splicing import CAUSAL, KINDS


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, str]) -> dict[str, Any]:
    autos = {kind: transformers.AutoModelForCausalLM for kind in CAUSAL}
    autos["bert"] = transformers.AutoModelForMaskedLM
    return {kind: autos[kind].from_pretrained(tiny_models[kind]).eval() for kind in KINDS}
