"""Every kernel compiled ahead of time for sm_80 and sm_90, which needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

ROOT = Path(__file__).parents[2]


def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    """Oracle: Triton's compiler and cuobjdump, in a process of its own without the interpreter."""
    out = tmp_path / "resources.json"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "benchmarks.step.kernel_resources", "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(out.read_text())
    kernels = {row["kernel"].split()[0] for row in found}
    assert kernels == {"select", "above", "residual", "groups", "latent_sums", "chunk_sums", "update"}
    for row in found:
        assert row["spill_bytes"] == 0, f"{row} spills registers to memory"
        assert row["registers"] * row["n_warps"] * 32 <= 65536
        assert row["shared_bytes"] <= 48 << 10
    assert len(found) == 2 * len({row["kernel"] for row in found})
