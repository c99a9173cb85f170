"""Runs over several processes: dealt variants, split latents and tokens, kills, restarts, hung peers."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import ENVIRONMENT, SUPPORT, finish, launch, launch_held
from ranks import KINDS, OF_TRITON
from stores import make_store
from training import files, structured
from waiting import LIMIT_SECONDS, wait_until

from saemill.cli import app
from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.world import Group, World
from saemill.train.backends.team import ALONE
from saemill.train.sweep.placement import allowed_latent_ranks, choose, cost, deal
from saemill.train.sweep.variant import Variant


def variants_of(widths: list[int]) -> list[Variant]:
    return [
        Variant(name=f"v{i}", site="a", k=2, num_latents=f, lr=1.0, k_aux=1) for i, f in enumerate(widths)
    ]


@given(st.lists(st.integers(8, 10_000), min_size=1, max_size=30), st.integers(1, 8))
def test_every_variant_is_dealt_once_and_evenly(latents: list[int], n_teams: int) -> None:
    """Oracle: Graham's bound for a greedy list: the mean load and what is above it of one variant."""
    variants = variants_of(latents)
    hands = deal(variants, {"a": 16}, n_teams)
    assert sorted(v.name for hand in hands for v in hand) == sorted(v.name for v in variants)
    costs = [sum(cost(v, 16) for v in hand) for hand in hands]
    largest = max(cost(v, 16) for v in variants)
    assert max(costs) <= sum(costs) / n_teams + largest * (1 - 1 / n_teams) + 1e-6


@given(st.integers(0, 100), st.integers(1, 9))
def test_parts_cover_everything_once(n: int, size: int) -> None:
    """Oracle: the numbers 0 to n − 1 in order, and sizes that differ by one at most."""
    parts = Group(list(range(size)), 0).slices(n)
    assert [i for part in parts for i in range(n)[part]] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("n_variants", "n_processes", "teams", "latent_ranks"),
    [(8, 2, 2, 1), (8, 8, 8, 1), (1, 2, 1, 2), (2, 3, 1, 3), (9, 8, 4, 2), (4, 8, 4, 2)],
)
def test_the_spread_is_chosen_by_estimated_time(
    n_variants: int, n_processes: int, teams: int, latent_ranks: int
) -> None:
    """Oracle: by hand; nine like variants on eight processes would leave seven of them idle half the time."""
    placement = choose(variants_of([4096] * n_variants), {"a": 64}, n_processes)
    assert (len(placement.teams), placement.latent_ranks, placement.data_ranks) == (teams, latent_ranks, 1)
    assert "processes" in placement.describe()


def test_spreads_that_cannot_be_are_refused() -> None:
    """Oracle: the message says what to change."""
    variants = variants_of([64, 64])
    with pytest.raises(ConfigError, match=r"data_ranks 3 × latent_ranks 1 does not divide .* 4"):
        choose(variants, {"a": 16}, 4, data_ranks=3, latent_ranks=1)
    with pytest.raises(ConfigError, match="4 teams for 2 variants: some would idle"):
        choose(variants, {"a": 16}, 4, latent_ranks=1)
    with pytest.raises(ConfigError, match=r"in 64 parts some SAE has fewer than k latents in each"):
        choose(variants, {"a": 16}, 64, latent_ranks=64)


def test_a_spread_has_k_latents_in_each_part_and_fits_the_memory() -> None:
    """Oracle: by hand: 64 latents in 4 parts are fewer than k = 32; two variants of 14 KiB per latent row
    pair of D = 1,000 need two devices that hold one, four that hold half of one."""
    narrow = [Variant(name=f"v{i}", site="a", k=32, num_latents=64, lr=1.0, k_aux=1) for i in range(2)]
    assert choose(narrow, {"a": 16}, 4, idle_allowed=True).latent_ranks == 2
    large = variants_of([1000, 1000])
    one = 2 * 1000 * 1000 * 14
    assert large[0].optimizer_state == "fp32"
    placement = choose(large, {"a": 1000}, 4, memory_bytes=2 * one)
    assert (len(placement.teams), placement.latent_ranks) == (2, 2)
    assert choose(large, {"a": 1000}, 2, memory_bytes=2 * one).latent_ranks == 1
    with pytest.raises(ConfigError, match=r"need 0.0 GiB per process, its device has 0.0 GiB; start more"):
        choose(large, {"a": 1000}, 2, memory_bytes=one)


def run(command: list[str]) -> None:
    """One process, this one, to its end."""
    app(command, standalone_mode=False)


@pytest.fixture(scope="module")
def alone(one_thread: None) -> dict[str, Any]:
    return {kind: ranks.train(kind, ALONE, "torch") for kind in KINDS}


@pytest.mark.parametrize(
    ("n", "spreads"),
    [(2, ("1x2:numba,triton", "2x1:torch,numba,triton")), (3, ("1x3:numba",)), (4, ("2x2:numba",))],
)
def test_a_team_trains_as_one_process_does(
    alone: dict[str, Any], tmp_path: Path, n: int, spreads: tuple[str, ...]
) -> None:
    """Oracle: one process in torch on the same batches, up to the order of sums; AuxK with dead latents on
    all processes, sizes that no number of processes divides. The processes check that they agree bitwise.
    Triton's kernels run in its interpreter."""
    out = tmp_path / "found.pt"
    finish(launch(n, str(SUPPORT / "ranks.py"), str(out), *spreads))
    for kind in ("adam", "small"):
        assert alone[kind]["n_dead"] > KINDS[kind].k_aux
    assert 0 < alone["few dead"]["n_dead"] < KINDS["few dead"].k_aux
    found = torch.load(out)
    asked = [spread.partition(":") for spread in spreads]
    assert set(found) == {(spread, kernels) for spread, _, every in asked for kernels in every.split(",")}
    for (spread, kernels), of_kernels in found.items():
        assert set(of_kernels) == set(OF_TRITON[spread] if kernels == "triton" else KINDS)
        for kind, of_kind in of_kernels.items():
            check_trained_alike(of_kind, alone[kind], kind)


def check_trained_alike(found: dict[str, Any], expected: dict[str, Any], kind: str) -> None:
    if kind in ("diverging", "spoilt"):
        assert found["diverged"] == expected["diverged"] != []
        return
    assert found["n_dead"] == expected["n_dead"]
    assert found["totals"] == pytest.approx(expected["totals"], rel=5e-3 if kind == "muon" else 1e-5)
    for name, weights in expected["weights"].items():
        if kind == "muon":  # its iteration's products are of bfloat16
            assert float((found["weights"][name] - weights).norm() / weights.norm()) < 0.05
        else:
            torch.testing.assert_close(found["weights"][name], weights, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("spread")
    return make_store(folder, n_rows=256, ctx_len=32, d=16, shard_tokens=2048, values_TD=structured(256 * 32))


def train_command(store: ActivationStore, out: Path, *more: str) -> list[str]:
    return [
        "train", str(store.path), "--site", "a,b", "-o", str(out), "--k", "4",
        "--num-latents", "48,65", "--lr", "3e-3", "--batch-size", "128", "--max-tokens", "40k",
        "--save-every", "10", "--precision", "fp32", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The same run by one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(train_command(store, out))
    return out


def test_dealt_variants_stopped_and_resumed_equal_one_process(
    store: ActivationStore, whole: Path, tmp_path: Path
) -> None:
    """Oracle: one process, bit by bit; stopped with two processes by SIGTERM, resumed with three, then
    with one."""
    out = tmp_path / "run"
    command = train_command(store, out, "--latent-ranks", "1")
    for n, step in ((2, 15), (3, 25)):
        process = launch_held(n, command, f"{step}:never")
        wait_until(lambda least=step - 5: _step(out) >= least, process)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode != 0
        assert "same command continues" in stderr
        assert _step(out) <= step + 1
    assert not (out / "finished.json").exists()
    run(command)
    assert files(out) == files(whole)
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in whole.iterdir())


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def test_a_killed_worker_is_restarted_and_the_result_is_the_same(
    store: ActivationStore, whole: Path, tmp_path: Path
) -> None:
    """Oracle: one process that was never killed, bit by bit; torchrun restarts the workers."""
    out = tmp_path / "run"
    command = train_command(store, out, "--latent-ranks", "1")
    process = launch_held(2, command, f"15:{tmp_path / 'go'}", "--max-restarts", "2")
    wait_until(lambda: _step(out) >= 10, process)
    (tmp_path / "go").touch()
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, stderr
    assert "continuing after step" in stdout
    assert files(out) == files(whole)


def test_split_latents_resume_with_another_number_of_processes(
    store: ActivationStore, whole: Path, tmp_path: Path
) -> None:
    """Oracle: one process: the same loss to 1% of it, through a change from two parts to three and one."""
    out = tmp_path / "run"
    for n, step in ((2, 15), (3, 25)):
        process = launch_held(n, train_command(store, out, "--latent-ranks", str(n)), f"{step}:never")
        wait_until(lambda least=step - 5: _step(out) >= least, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT_SECONDS)
        assert _step(out) <= step + 1
    run(train_command(store, out, "--latent-ranks", "1"))
    last, expected = (json.loads((o / "metrics.jsonl").read_text().splitlines()[-1]) for o in (out, whole))
    for name, metrics in expected["variants"].items():
        assert last["variants"][name]["fvu"] == pytest.approx(metrics["fvu"], rel=0.01)
        assert last["variants"][name]["l0"] == pytest.approx(metrics["l0"], rel=0.01)
        assert Sae.load(out / name).W_enc.shape == Sae.load(whole / name).W_enc.shape


def _step(out: Path) -> int:
    path = out / "checkpoint.json"
    return int(json.loads(path.read_text())["step"]) if path.exists() else 0


@contextmanager
def by_hand(n: int, command: list[str], **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """n processes that find each other by torchrun's variables, without torchrun; killed at the end."""
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as port:
        # While it is bound here nobody else is given this port, and the first process may listen at it.
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", 0))
        shared["MASTER_PORT"] = str(port.getsockname()[1])
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT | shared | {"RANK": str(i), "LOCAL_RANK": str(i)} | environment,
            )
            for i in range(n)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()


@pytest.mark.parametrize("latent_ranks", ["1", "2"])
def test_a_hung_peer_is_given_up(store: ActivationStore, tmp_path: Path, latent_ranks: str) -> None:
    """Oracle: a process that waits for one that is stopped, at the end of a step or within a team, ends with
    its rank and host; and its groups' time limit is the one that the user sets."""
    command = train_command(store, tmp_path / "run", "--latent-ranks", latent_ranks)
    limit = {"SAEMILL_PEER_TIMEOUT_SECONDS": str(LIMIT_SECONDS), "HUNG": str(tmp_path / "hung")}
    with by_hand(2, [str(SUPPORT / "hung.py"), *command], **limit) as (first, second):
        _, stderr = first.communicate(timeout=LIMIT_SECONDS)
        assert first.returncode not in (0, 75)
        assert f"failed (rank 0 of 2 on {socket.gethostname()})" in stderr
        assert "imed out" in stderr
        assert second.poll() is None


def test_a_wrong_setting_is_told_by_each_rank(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the message, with rank and host, from a plain exit."""
    command = train_command(store, tmp_path / "run", "--latent-ranks", "64")
    with by_hand(2, ["-m", "saemill", *command]) as processes:
        for i, process in enumerate(processes):
            _, stderr = process.communicate(timeout=LIMIT_SECONDS)
            assert process.returncode == 2
            assert f"error (rank {i} of 2 on" in stderr
            assert "does not divide the number of processes, 2" in stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, World()),
        (
            {
                "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
                "MASTER_ADDR": "node1", "MASTER_PORT": "1234",
            },
            World(4, 5, 0, 1, {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}),
        ),
    ],
)  # fmt: skip
def test_the_world_is_read_from_the_environment(environment: dict[str, str], expected: World) -> None:
    """Oracle: by hand; a batch script's SLURM_NTASKS alone makes no world of many."""
    assert World.here(environment) == expected


def test_a_torchrun_environment_that_is_cut_is_told() -> None:
    """Oracle: the message names what is missing."""
    with pytest.raises(ConfigError, match=r"LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
        World.here({"RANK": "0", "WORLD_SIZE": "2"})


WIDTHS = {"a": 16, "b": 24, "c": 16, "a+b": 40}


def test_what_needs_whole_saes_is_not_split() -> None:
    """Oracle: by hand: on a GPU there are no kernels for signum, Muon, clipping, and targets of another
    width; the loops of a CPU have all of them. Groups of latents are nowhere split."""
    plain = Variant(name="v", site="a", k=4, num_latents=64, lr=1e-2, k_aux=8)
    changed = (
        {"optimizer": "signum"},
        {"optimizer": "muon"},
        {"clip_grad_norm": 1.0},
        {"target_site": "b"},
        {"site": "a+b", "architecture": "relu", "k": None, "decoder_rows": "free"},
    )
    for changes in changed:
        variants = [plain, replace(plain, **changes)]  # type: ignore[arg-type]
        assert allowed_latent_ranks(None, variants, "triton", WIDTHS) == 1
        assert allowed_latent_ranks(2, variants, "numba", WIDTHS) == 2
        with pytest.raises(
            ConfigError,
            match="latent_ranks 2: on a GPU signum, muon, clip_grad_norm, frozen decoders, free rows",
        ):
            allowed_latent_ranks(2, variants, "triton", WIDTHS)
    alike = [plain, replace(plain, target_site="c")]
    assert allowed_latent_ranks(2, alike, "triton", WIDTHS) == 2
    assert allowed_latent_ranks(None, [plain], "triton", WIDTHS) is None
    grouped = [plain, replace(plain, architecture="groupmax")]
    assert allowed_latent_ranks(None, grouped, "numba", WIDTHS) == 1
    with pytest.raises(
        ConfigError, match="latent_ranks 2: multi_topk, nested_k and groupmax need all latents"
    ):
        allowed_latent_ranks(2, grouped, "numba", WIDTHS)
