"""Whether 8-bit products choose the codes: measured for each shape, once on a machine, and remembered.

Candidates from 8-bit scores cost a longer selection than pre-activations in the product's dtype. Which is
faster depends on the CPU: where it sums 8-bit integers by one instruction (VNNI) but bf16 products take
AVX-512, they are; where bf16 products have tiles of their own (AMX), they are not.
"""

import hashlib
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import Tensor

from saemill.common import durable, records
from saemill.common.errors import StoreError
from saemill.common.sae.topk import topk
from saemill.train.backends.cpu.loops.quantise import LEAST_COLUMNS, quantise
from saemill.train.backends.cpu.loops.select import select
from saemill.train.backends.cpu.threads import one_in_torch

N_TOKENS = 256
"""Tokens that are scored to measure."""
N_ROUNDS = 4
"""Times that each way is timed, in turns; the fastest counts."""
K = 32
"""Codes per token meanwhile."""
REPAIR = "Remove the file: it is measured again"
CPU_INFO = Path("/proc/cpuinfo")


class Measured(records.Record):
    """What was measured on a machine for one shape."""

    by_8_bits_s: float
    """Seconds of an 8-bit product and the selection from its scores."""
    whole_s: float
    """Seconds of a product in `--precision` and the selection from it."""

    @property
    def faster_by_8_bits(self) -> bool:
        """Tell whether 8-bit products are the faster way."""
        return self.by_8_bits_s < self.whole_s


def chooses_by_8_bits(n_latents: int, d: int, dtype: torch.dtype) -> bool:
    """Tell whether 8-bit products find the codes of an SAE fastest on this machine.

    Rows of fewer than `LEAST_COLUMNS` are not to be quantised; without an instruction that sums 8-bit
    products it is not worth a measurement. What was measured is kept in the user's cache folder, so that a
    run that goes on on such a machine has the product it had. Several processes measure one at a time.

    Args:
        n_latents: of the SAE.
        d: width of its input.
        dtype: of the encoder's product.
    """
    if d < LEAST_COLUMNS or n_latents < 2 * K or not torch.cpu._is_vnni_supported():
        return False
    file = folder() / f"{machine()}-{n_latents}-{d}-{str(dtype).removeprefix('torch.')}.json"
    try:
        with durable.exclusive(file.parent, wait=True):
            known = records.if_whole(lambda: records.read(file, Measured, REPAIR))
            measured = known or measure(n_latents, d, dtype)
            if known is None:
                records.write(file, measured)
    except (OSError, StoreError):  # a home that cannot be written to: nothing is remembered
        measured = measure(n_latents, d, dtype)
    return measured.faster_by_8_bits


def folder() -> Path:
    """Return where measurements are kept."""
    return user_cache_path("saemill") / "products"


def machine() -> str:
    """Return a hash of what decides the speed of products: CPU, its instructions, torch. 16 hex digits."""
    kept = ("model name", "flags", "cpu family", "model", "stepping")
    lines = CPU_INFO.read_text().split("\n\n")[0].splitlines() if CPU_INFO.is_file() else []
    cpu = [line for line in lines if line.split(":")[0].strip() in kept] or [platform.processor()]
    known = "\n".join([*cpu, platform.machine(), torch.__version__])
    return hashlib.sha256(known.encode()).hexdigest()[:16]


@one_in_torch()
def measure(n_latents: int, d: int, dtype: torch.dtype) -> Measured:
    """Time both ways on random rows, in one thread."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(N_TOKENS, d, generator=generator).to(dtype)
    w_FD = (torch.randn(n_latents, d, generator=generator) / d**0.5).to(dtype)
    bias_F, tokens, latents = torch.zeros(n_latents), quantise(x_TD), quantise(w_FD)
    scores_TF = torch.empty(N_TOKENS, n_latents, dtype=torch.int32)
    pre_TF = torch.empty(N_TOKENS, n_latents, dtype=dtype)
    val_TK, idx_TK = torch.empty(N_TOKENS, K), torch.empty(N_TOKENS, K, dtype=torch.int64)

    def by_8_bits() -> None:
        tokens.fill(x_TD)
        torch._int_mm(tokens.codes_ND, latents.codes_ND.T, out=scores_TF)
        select(scores_TF, tokens, latents, x_TD, w_FD, bias_F, val_TK, idx_TK)

    def whole() -> Tensor:
        torch.addmm(bias_F.to(dtype), x_TD, w_FD.T, out=pre_TF)
        return topk(pre_TF, K)[0].float()

    rounds = [(_seconds(by_8_bits), _seconds(whole)) for _ in range(N_ROUNDS)]
    return Measured(by_8_bits_s=min(s for s, _ in rounds), whole_s=min(s for _, s in rounds))


def _seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
