"""The processes of one run: how many there are, which one this is, and the messages between them.

`torchrun` and SLURM's `srun` describe them in the environment; a process started by hand is the only
one. A world of one takes the same path as any other: its collectives change nothing.
"""

import importlib
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from saemill.common import log
from saemill.common.device import choose_device
from saemill.common.errors import ConfigError, SaemillError
from saemill.common.log import counted

T = TypeVar("T")
PEER_TIMEOUT_SECONDS = 600
"""Seconds after which a process that waits for another gives it up as lost; SAEMILL_PEER_TIMEOUT_SECONDS
overrides it."""
LOOK_SECONDS = 0.2
"""Seconds between two looks at whether the first process is done with long work."""


gather_rows: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""torch's all-gather of tensors, called all_gather_into_tensor until torch 2.13, which warns of that name."""


class Group:
    """Some of the processes, in a fixed order.

    Args:
        ranks: the ranks of these processes in the world, ascending.
        rank: this process's place among them.
        handle: torch's process group; none for all processes, and for a group of one.
        timeout: time after which a process that is waited for counts as lost.
    """

    def __init__(
        self,
        ranks: list[int],
        rank: int,
        handle: Any = None,
        timeout: timedelta = timedelta(seconds=PEER_TIMEOUT_SECONDS),
    ) -> None:
        self.ranks, self.rank, self.size, self.handle = ranks, rank, len(ranks), handle
        self.timeout = timeout
        self.board: Any = None
        """torch's store, through which processes leave messages for one another; only the group of all has
        it."""
        self._split: list[Group] = []
        self._n_waits = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replace x by its sum over the group; every process gets the same bits."""
        if self.size > 1:
            dist.all_reduce(x, group=self.handle)
        return x

    def slice_of(self, n: int) -> slice:
        """Compute this process's share of n things: consecutive ones, as many as any other's or one less."""
        return self.slices(n)[self.rank]

    def slices(self, n: int) -> list[slice]:
        """Compute every process's share of n things."""
        return [slice(n * i // self.size, n * (i + 1) // self.size) for i in range(self.size)]

    def all_gather(self, x: Tensor, n: int) -> Tensor:
        """Put together, in the group's order, n rows of which every process has its share."""
        if self.size == 1:
            return x
        padded, most = self._padded(x, n)
        gathered = x.new_empty(self.size * most, *x.shape[1:])
        gather_rows(gathered, padded, group=self.handle)
        return self._joined(gathered, n, most)

    def gather(self, x: Tensor, n: int) -> Tensor | None:
        """Gather as `all_gather` does, to the group's first process alone; None on the others."""
        if self.size == 1:
            return x
        padded, most = self._padded(x, n)
        gathered = x.new_empty(self.size, most, *x.shape[1:]) if self.rank == 0 else None
        into = None if gathered is None else list(gathered)
        dist.gather(padded, into, dst=self.ranks[0], group=self.handle)
        return None if gathered is None else self._joined(gathered.flatten(0, 1), n, most)

    def _padded(self, x: Tensor, n: int) -> tuple[Tensor, int]:
        """Pad x with zeros to as many rows as the largest share."""
        most = -(-n // self.size)
        if len(x) == most:
            return x.contiguous(), most
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        return padded, most

    def _joined(self, gathered: Tensor, n: int, most: int) -> Tensor:
        if n == self.size * most:
            return gathered
        pieces = [gathered[i * most :][: share.stop - share.start] for i, share in enumerate(self.slices(n))]
        return torch.cat(pieces)

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Exchange a value that can be pickled: every process's, in the group's order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        return values

    def first(self, function: Callable[[], T]) -> T:
        """Call `function` on the group's first process alone. Return its result on every process; its errors
        are raised on every process."""
        outcome: tuple[Any, SaemillError | None] = None, None
        if self.rank == 0:
            try:
                outcome = function(), None
            except SaemillError as error:
                outcome = None, error
        value, failed = self.all_gather_objects(outcome)[0]
        if failed is not None:
            raise failed
        return cast(T, value)

    def first_at_length(self, function: Callable[[], T]) -> T:
        """Call `function` as `first` does, where it may take hours, longer than a process is waited for
        otherwise. For the group of all processes."""
        if self.size == 1:
            return function()
        self._n_waits += 1
        done = f"long work {self._n_waits}"

        def work() -> T:
            try:
                return function()
            finally:
                self.board.set(done, "")

        # Where the first process is lost, so is the board, or torchrun ends the others.
        while self.rank > 0 and not self.board.check([done]):
            time.sleep(LOOK_SECONDS)
        return self.first(work)

    def alone(self, function: Callable[[], T]) -> T | None:
        """Call `function` on the group's first process alone. Return its result there, None on the others.
        Its errors are raised on every process. Unlike that of `first`, the result need not be sent."""
        results: list[T] = []
        self.first(lambda: results.append(function()))
        return results[0] if results else None

    def together(self, function: Callable[[], None]) -> None:
        """Call `function` on every process at once; where it ends with an error, that is raised on all."""
        failed: SaemillError | None = None
        try:
            function()
        except SaemillError as error:
            failed = error
        failures = [each for each in self.all_gather_objects(failed) if each is not None]
        if failures:
            raise failures[0]

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is true on some process."""
        return bool(self.all_reduce(torch.tensor(int(flag))))

    def barrier(self) -> None:
        """Wait until every process has come here."""
        self.any(False)

    def split(self, lists: list[list[int]]) -> "Group":
        """Split the group into `lists` of ranks. Return the group that holds this process. All processes call
        it alike."""
        group = None
        for ranks in lists:
            # Left to itself, torch gives a new group 30 minutes.
            handle = dist.new_group(ranks, timeout=self.timeout) if len(ranks) > 1 else None
            if self.ranks[self.rank] in ranks:
                group = Group(ranks, ranks.index(self.ranks[self.rank]), handle, self.timeout)
        if group is None:
            raise ValueError(f"rank {self.ranks[self.rank]} is in none of {lists}")
        self._split.append(group)
        return group

    def forget(self) -> None:
        """Let go of torch's groups; one that outlives `destroy_process_group` aborts the process."""
        for group in [self, *self._split]:
            group.handle = group.board = None


@dataclass(frozen=True, slots=True)
class World:
    """All processes of this run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process among those on this machine."""
    local_size: int = 1
    """Number of processes on this machine."""
    connected_by: Mapping[str, str] | None = None
    """MASTER_ADDR and MASTER_PORT, at which all processes connect."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """Read the world that torchrun or srun describe in the environment.

        Raises:
            ConfigError: SLURM's nodes cannot be named.
        """
        if "RANK" in environment and "WORLD_SIZE" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
            if missing:
                raise ConfigError(f"RANK is set but {', '.join(missing)} is not; start with torchrun")
            meeting = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
            rank, size, local_rank, local_size = (int(environment[name]) for name in names)
            return cls(rank, size, local_rank, local_size, meeting)
        # Not SLURM_NTASKS: a batch script has it too, without being one task of many.
        if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            return cls(
                int(environment["SLURM_PROCID"]),
                int(environment["SLURM_STEP_NUM_TASKS"]),
                int(environment["SLURM_LOCALID"]),
                _tasks_here(environment),
                _slurm_rendezvous(environment),
            )
        return cls()

    @property
    def name(self) -> str:
        """Name of this process, for messages."""
        return f"rank {self.rank} of {self.size} on {socket.gethostname()}"

    def device(self, name: str) -> torch.device:
        """Choose this process's device: on a machine with several GPUs each process has its own.

        Raises:
            ConfigError: there are fewer GPUs than processes on this machine, or one was named for all.
        """
        device = self._choose_device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched where torch's current device is
        return device

    def _choose_device(self, name: str) -> torch.device:
        device = choose_device(name)
        if device.type != "cuda" or self.size == 1:
            return device
        if ":" in name:
            raise ConfigError(f"device {name} would be shared by {self.size} processes; write cuda")
        n_gpus = torch.cuda.device_count()
        if n_gpus == 1 and {"SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU"} & set(os.environ):
            return torch.device("cuda:0")  # so bound, SLURM shows each task its own GPU alone
        if self.local_size > n_gpus:
            raise ConfigError(
                f"{self.local_size} processes on {socket.gethostname()}, but torch "
                f"{torch.__version__} sees {counted(n_gpus, 'GPU')} there; start fewer, or give --device cpu"
            )
        return torch.device(f"cuda:{self.local_rank}")

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[Group]:
        """Connect all processes to a group while the block runs; none leaves before the others are through.

        A process that fails breaks its connections, so that the others fail too instead of waiting;
        one that hangs is given up after `PEER_TIMEOUT_SECONDS`.
        """
        seconds = float(os.environ.get("SAEMILL_PEER_TIMEOUT_SECONDS", PEER_TIMEOUT_SECONDS))
        timeout = timedelta(seconds=seconds)
        everyone = Group(list(range(self.size)), self.rank, timeout=timeout)
        if self.size == 1:
            yield everyone
            return
        # Imported later, by transformers, its functions' defaults would keep the group alive to the end.
        importlib.import_module("torch.distributed.nn.functional")
        everyone.board = _rendezvous(self, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=everyone.board,
            rank=self.rank,
            world_size=self.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        try:
            yield everyone
            everyone.barrier()
        finally:
            everyone.forget()
            dist.destroy_process_group()


def _rendezvous(world: World, timeout: timedelta) -> Any:
    """Make a store for this start of the processes alone.

    torchrun keeps its store over restarts, and in it the addresses of processes that are gone, which
    gloo would connect to. So the first process names the start, and each of the others greets it under
    that name with a token of its own: one that read the name of an earlier start sees no answer to its
    token, and reads again.
    """
    c10d: Any = dist
    address = world.connected_by or {}
    hosts = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    port = int(address["MASTER_PORT"])
    store = c10d.TCPStore(address["MASTER_ADDR"], port, is_master=hosts, timeout=timeout)
    token = uuid.uuid4().hex
    if world.rank == 0:
        store.set("saemill start", token)
        tokens = [store.get(f"{token} {rank}").decode() for rank in range(1, world.size)]
        store.set(f"{token} answer", " ".join(tokens))
        return c10d.PrefixStore(token, store)
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        start = store.get("saemill start").decode()
        store.set(f"{start} {world.rank}", token)
        if store.check([f"{start} answer"]) and token in store.get(f"{start} answer").decode():
            return c10d.PrefixStore(start, store)
        time.sleep(0.05)
    raise TimeoutError(f"the first process did not answer within {timeout}")


def speak_for(world: World) -> None:
    """Let only the first process show progress."""
    log.speaks = world.rank == 0


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Read the number of tasks on this node from SLURM's list of runs such as `2(x3),1`."""
    per_node: list[int] = []
    for run in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        n_tasks, _, n_nodes = run.rstrip(")").partition("(x")
        per_node += [int(n_tasks)] * int(n_nodes or 1)
    return per_node[int(environment["SLURM_NODEID"])]


def _slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Choose the first node, and a port that follows from the job and step, unless the user names them."""
    number = int(environment["SLURM_JOB_ID"]) * 31 + int(environment["SLURM_STEP_ID"])
    port = environment.get("MASTER_PORT", str(20000 + number % 20000))
    if "MASTER_ADDR" in environment:
        return {"MASTER_ADDR": environment["MASTER_ADDR"], "MASTER_PORT": port}
    if environment.get("SLURM_STEP_NUM_NODES") == "1":
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = environment["SLURM_STEP_NODELIST"]
    if not shutil.which("scontrol"):
        raise ConfigError(f"scontrol is not found to name the first of {nodes}; set MASTER_ADDR to it")
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    if listed.returncode:
        raise ConfigError(f"scontrol cannot name the nodes {nodes}: {listed.stderr.strip()}; set MASTER_ADDR")
    return {"MASTER_ADDR": listed.stdout.split()[0], "MASTER_PORT": port}
