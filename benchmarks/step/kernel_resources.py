"""Registers, spills and shared memory of every kernel, compiled ahead of time; no GPU is needed.

python -m benchmarks.step.kernel_resources [-o resources.json]
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saemill.train.backends.gpu.kernels import above, groups, residual, rows, segments, select

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90)
SHAPES = ((768, 24576, 32), (2304, 65536, 64), (2304, 65536, 128))
"""Width, latents, active latents."""
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Job:
    """One kernel with its argument types, constants and options."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    """Type of each pointer that is given; the others are None."""
    integers: tuple[str, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def compile(self, architecture: int) -> Any:
        """Compile the kernel, its pointers and integers multiples of 16 as in training."""
        names = self.kernel.arg_names
        signature = {name: f"*{kind}" for name, kind in self.pointers.items()}
        signature |= dict.fromkeys(self.integers, "i32")
        absent = {name: None for name in names if name not in signature and name not in self.constants}
        constants = self.constants | absent
        signature = {name: signature.get(name, "constexpr") for name in names}
        divisible = [["tt.divisibility", 16]]
        attributes = {(i,): divisible for i, name in enumerate(names) if name not in constants}
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=self.options)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    kernel: str
    architecture: int
    n_warps: int
    registers: int
    """Per thread."""
    spill_bytes: int
    """Stack and local memory per thread."""
    shared_bytes: int
    barriers: int


def measure(job: Job, architecture: int) -> Resources:
    """Compile and ask cuobjdump."""
    compiled = job.compile(architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(BIN / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = {k: int(n) for k, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout + text.stderr)}
    return Resources(
        job.name,
        architecture,
        job.options["num_warps"],
        counts["REG"],
        counts["STACK"] + counts["LOCAL"],
        compiled.metadata.shared,
        compiled.asm["ptx"].count("bar.sync"),
    )


def select_job(f: int, k: int, dtype: torch.dtype, is_signed: bool = False) -> Job:
    constants, options = select.launch(f, k, dtype, is_signed)
    pointers = {"bits_ptr": f"i{constants['WIDTH']}", "val_ptr": "fp32", "idx_ptr": "i32"}
    name = f"select F={f} K={k} {NAMES[dtype]}{' signed' if is_signed else ''}"
    return Job(name, select.select_kernel, pointers, ("F",), constants, options)


def residual_job(d: int, k: int, dtype: torch.dtype) -> Job:
    constants, options = residual.launch(d, k)
    kind = NAMES[dtype]
    pointers = dict.fromkeys(("val_ptr", "b_ptr", "dot_ptr", "sse_ptr"), "fp32")
    pointers |= dict.fromkeys(("w_ptr", "x_ptr", "e_ptr"), kind) | {"idx_ptr": "i32"}
    return Job(f"residual D={d} K={k} {kind}", residual.residual_kernel, pointers, (), constants, options)


def above_job(f: int, dtype: torch.dtype) -> Job:
    constants, options = above.launch(f)
    kind = NAMES[dtype]
    pointers = {"pre_ptr": kind, "floor_ptr": "fp32", "val_ptr": "fp32", "idx_ptr": "i32", "n_ptr": "i64"}
    return Job(f"above F={f} {kind}", above.above_kernel, pointers, ("F", "n_slots"), constants, options)


def groups_job(d: int, n_groups: int, kind: str = "bf16") -> Job:
    constants, options = groups.launch(d, n_groups, n_groups - 1)
    pointers = dict.fromkeys(("val_ptr", "b_ptr", "dot_ptr", "sse_ptr"), "fp32")
    pointers |= dict.fromkeys(("w_ptr", "x_ptr", "e_ptr"), kind)
    pointers |= dict.fromkeys(("idx_ptr", "ends_ptr"), "i32")
    pointers |= {"weights_ptr": "fp32", "rows_ptr": kind} if n_groups > 1 else {}
    name, integers = f"groups D={d} G={n_groups} {kind}", ("n_tokens", "n_slots")
    return Job(name, groups.groups_kernel, pointers, integers, constants, options)


def latent_sums_job(free: bool = False, by_rank: bool = False) -> Job:
    constants, options = segments.LATENT_SUMS_LAUNCH
    floats = ("val_ptr", "dpre_ptr", "hyper_ptr", "aux_b_ptr", "dpre_sum_ptr", "db_ptr")
    floats += () if free else ("dot_ptr", "toward_ptr")
    pointers = dict.fromkeys(("latents_ptr", "starts_ptr", "order_ptr", "slot_ptr"), "i32")
    pointers |= dict.fromkeys(floats, "fp32") | {"fired_ptr": "i8"}
    name, integers = "latent_sums" + " free" * free + " by rank" * by_rank, ("K", "n_shown")[: 1 + by_rank]
    return Job(name, segments.latent_sums_kernel, pointers, integers, constants, options)


def chunk_sums_job(d: int, grouped: bool = False) -> Job:
    constants, options = segments.chunk_sums_launch(d, segments.CHUNK_PAIRS)
    tables = ["starts_ptr", "first_chunk_ptr", "chunk_latent_ptr", "n_chunks_ptr", "order_ptr"]
    tables += ["row_ptr"] * grouped
    pointers = dict.fromkeys(tables, "i32") | dict.fromkeys(("x_ptr", "e_ptr"), "bf16")
    pointers |= dict.fromkeys(("val_ptr", "dpre_ptr", "partial_ptr"), "fp32")
    name = f"chunk_sums D={d}" + " groups" * grouped
    return Job(name, segments.chunk_sums_kernel, pointers, ("K",), constants, options)


def update_job(
    d: int,
    optimizer: str,
    moment: str,
    aux: bool = False,
    inputs: str = "bf16",
    grouped: bool = False,
    rows_are: str = "unit",
) -> Job:
    constants, options = rows.launch(d, segments.CHUNK_PAIRS, optimizer, rows_are == "unit")
    integers = ["latents_ptr", "starts_ptr", "first_chunk_ptr", "order_ptr"] + ["slot_ptr"] * aux
    integers += ["row_ptr"] * grouped + ["seed_ptr"] * (moment != "fp32")
    floats = ["val_ptr", "dpre_ptr", "b_ptr", "partial_ptr", "dpre_sum_ptr", "db_ptr", "hyper_ptr"]
    floats += ["w_enc_ptr", "b_enc_ptr", "w_dec_ptr", "m_b_ptr", "v_b_ptr"]
    floats += ["toward_ptr"] * (rows_are != "free") + ["aux_enc_ptr", "aux_dec_ptr"] * aux
    copies = ["copy_enc_ptr", "copy_dec_ptr"] if inputs == "bf16" else []
    moments = ["m_enc", "m_dec", "v_enc", "v_dec"]
    floats += [f"{name}_scale_ptr" for name in moments if moment == "8bit"]
    pointers = dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32") | dict.fromkeys(copies, "bf16")
    pointers |= dict.fromkeys(("x_ptr", "e_ptr"), inputs)
    pointers |= {
        f"{name}_ptr": {"m": "i8", "v": "u8"}[name[0]] if moment == "8bit" else moment for name in moments
    }
    kinds = [f"update D={d} {optimizer} {moment}", "aux" * aux, "fp32 inputs" * (inputs == "fp32")]
    kinds += ["groups" * grouped, rows_are * (rows_are != "unit")]
    name = " ".join(kind for kind in kinds if kind)
    return Job(name, rows.update_kernel, pointers, ("K",), constants, options)


def jobs() -> Iterator[Job]:
    """List every kernel, in the forms that training uses."""
    for d, f, k in SHAPES:
        yield select_job(f, k, torch.bfloat16)
        yield residual_job(d, k, torch.bfloat16)
    yield select_job(24576, 32, torch.float32)
    yield select_job(24576, 32, torch.bfloat16, is_signed=True)
    yield select_job(131072, 64, torch.bfloat16)
    yield select_job(8192, 512, torch.bfloat16)
    yield residual_job(768, 32, torch.float32)
    yield above_job(24576, torch.float32)
    yield groups_job(768, 5, "fp32")
    yield groups_job(4096, 10)
    yield latent_sums_job()
    yield latent_sums_job(free=True)
    yield latent_sums_job(by_rank=True)
    for f in sorted({f for _, f, _ in SHAPES}):
        yield above_job(f, torch.bfloat16)
    for d in sorted({d for d, _, _ in SHAPES}):
        yield groups_job(d, 1)
        yield groups_job(d, 5)
        yield chunk_sums_job(d)
        yield chunk_sums_job(d, grouped=True)
        yield update_job(d, "adam", "fp32")
        yield update_job(d, "adam", "bf16", aux=True, grouped=True)
        yield update_job(d, "adam", "8bit", grouped=True)
        yield update_job(d, "adam", "bf16", aux=True)
        yield update_job(d, "adam", "8bit", aux=True)
    yield update_job(768, "sgd", "fp32")
    yield update_job(768, "adam", "fp32", inputs="fp32")
    yield update_job(768, "adam", "fp32", rows_are="free")
    yield update_job(768, "adam", "8bit", rows_are="penalised")


def main() -> None:
    """Print a table, and write it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    print(f"{'kernel':40} sm warps registers spills shared barriers", flush=True)
    resources = []
    for job in jobs():
        for architecture in ARCHITECTURES:
            r = measure(job, architecture)
            resources.append(asdict(r))
            numbers = f"{r.architecture} {r.n_warps:5} {r.registers:9} {r.spill_bytes:6}"
            print(f"{r.kernel:40} {numbers} {r.shared_bytes:6} {r.barriers:8}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(resources, indent=1))


if __name__ == "__main__":
    main()
