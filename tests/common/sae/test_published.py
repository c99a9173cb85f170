"""Published SAEs, as small files in their layouts; the oracle is what SAELens makes of the same files."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from peers import require_peers, run_in_peers
from published import CASES, D, make_all, some
from saes import check_same

from saemill import Sae

TOLD: dict[str, tuple[str | None, str, str | None]] = {
    "-res/": ("google/gemma-2-2b", "blocks.20.hook_resid_post", None),
    "-mlp/": ("google/gemma-2-2b", "blocks.20.hook_mlp_out", None),
    "-att/": ("google/gemma-2-2b", "blocks.20.attn.hook_z", None),
    "2b-pt-transcoders/": ("google/gemma-2-2b", "blocks.20.ln2.hook_normalized", "blocks.20.hook_mlp_out"),
    "scope-2-4b-pt/": ("google/gemma-3-4b-pt", "blocks.17.hook_resid_post", None),
    "scope-2-270m-pt/": ("google/gemma-3-270m", "blocks.5.attn.hook_z", None),
    "scope-2-4b-it/": ("google/gemma-3-4b-it", "blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out"),
    "LXR-8x/": ("meta-llama/Llama-3.1-8B", "blocks.15.hook_resid_post", None),
    "R1-Distill/": (None, "blocks.3.hook_resid_post", None),
    "Qwen/": ("Qwen/Qwen3-1.7B-Base", "blocks.7.hook_resid_post", None),
    "Goodfire/": ("meta-llama/Llama-3.1-8B-Instruct", "blocks.19.hook_resid_post", None),
    "qresearch/": ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "blocks.19.hook_resid_post", None),
    "mwhanna/": ("Qwen/Qwen3-14B", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"),
    "ckkissane/": ("gpt2", "blocks.3.attn.hook_z", None),
}
"""Model, hook, and hook that is predicted, by what is in the place."""
OTHERWISE = {"blocks.5.hook_mlp_in": "blocks.5.mlp.hook_in"}
"""Hooks that SAELens names otherwise: hook_mlp_in is before the norm, and the config names what is after."""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    make_all(root)
    return root


def test_published_saes_compute_the_same_as_in_saelens(repositories: Path) -> None:
    """Oracle: SAELens' loader of each, from the same files, codes and reconstructions; and what it tells of
    model and hook. What is imported computes the same."""
    require_peers()
    x_TD = 2 * some(200, D, scale=1.0) + 1
    np.save(repositories / "x.npy", x_TD.numpy())
    jobs, outs = [], []
    for number, (place, case) in enumerate(CASES.items()):
        owner, name, folder = place.split("/", 2)
        outs.append(repositories / f"{number}.npz")
        asked = {"do": "encode_published", "repo": f"{owner}/{name}", "folder": folder}
        jobs.append(asked | {"x": "x.npy", "out": outs[-1]} | case)
    run_in_peers(repositories, *jobs)
    for place, out in zip(CASES, outs, strict=True):
        sae = Sae.load(repositories / place)
        check_same(sae, x_TD, out)
        origin = sae.config.provenance
        hooks = origin.get("hook_name"), origin.get("hook_name_out")
        assert (origin.get("model"), *hooks) == next(told for part, told in TOLD.items() if part in place), (
            place
        )
        told = json.loads(str(np.load(out)["told"]))
        assert hooks == (OTHERWISE.get(told["hook_name"], told["hook_name"]), told.get("hook_name_out")), (
            place
        )
        call("import", repositories / place, "-o", out.with_suffix(""))
        assert Sae.load(out.with_suffix("")).config == sae.config
