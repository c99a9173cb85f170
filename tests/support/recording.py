"""What a CUDA graph does, on a CPU: a step's operations and kernel launches are recorded, then repeated.

A graph repeats launches with the addresses and numbers of its capture, and results land in the memory that
they had then. So here: views and Python do not happen again, an operation in place is repeated on the same
tensors, and what makes a new tensor has its result copied into the recorded one. Memory that was merely
allocated holds rubbish.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

UNSAFE_TAGS = {
    torch.Tag.cudagraph_unsafe,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}
"""torch's own marks, by which torch.compile decides what it leaves out of its graphs."""
WAITING_METHODS = {
    "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "cpu", "item", "numpy",
    "pin_memory", "tolist",
}  # fmt: skip
"""A tensor on the CPU gives its values without an operation."""


class Waits(Exception):
    """Something was met that a capture would refuse."""


class Methods(TorchFunctionMode):
    """Refuses the methods that look into a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITING_METHODS:
            raise Waits(f"Tensor.{name} within a captured step")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """What was done, in order; `replay` does it again."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_unsafe(func, args):
            raise Waits(f"{func} within a captured step")
        result = func(*args, **kwargs)
        schema = func._schema
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        is_view = any(r.alias_info is not None for r in schema.returns) and not writes
        if is_view or torch.Tag.inplace_view in func.tags or func.namespace == "profiler":
            return result
        self.names.append(str(func))
        made = [] if writes else [alias(tensor) for tensor in tree_leaves(result)]
        if "empty" in func.overloadpacket.__name__:
            self._calls.append(lambda: spoil(made))
        else:
            args, kwargs = tree_map(alias, (args, kwargs))
            self._calls.append(lambda: repeat(func, args, kwargs, made))
        return result

    def launch(self, kernel: Any, run: Any, args: Any, options: Any) -> None:
        """Note a kernel's launch, and do it."""

        def call() -> None:
            with _disable_current_modes():
                run(kernel, *args, **options)

        self.names.append(kernel.__name__)
        self._calls.append(call)
        call()

    def replay(self) -> None:
        """Once more, with the same arguments."""
        for call in self._calls:
            call()


def is_unsafe(func: Any, args: Any) -> bool:
    """Whether an operation waits for the device, or brings a number of the host to it."""
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return func.overloadpacket is torch.ops.aten.lift_fresh or not UNSAFE_TAGS.isdisjoint(func.tags)


def alias(leaf: Any) -> Any:
    """A tensor's memory as it is seen now: its shape may be changed in place."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def repeat(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Call `func` again; what it makes goes where it went before."""
    result = func(*args, **kwargs)
    for before, now in zip(made, tree_leaves(result), strict=True) if made else ():
        assert before.shape == now.shape, f"{func}: the shape depends on the data"
        before.copy_(now)


def spoil(made: list[Tensor]) -> None:
    """Fill with what no result may depend on."""
    for tensor in made:
        tensor.view(torch.uint8).fill_(0x7F)


@contextmanager
def recorded(tape: Tape) -> Iterator[None]:
    """Everything within goes onto the tape, and is done."""
    run = InterpretedFunction.run

    def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tape.launch(kernel, run, args, {"grid": grid, "warmup": warmup, **options})

    InterpretedFunction.run = noted
    try:
        with Methods(), tape:
            yield
    finally:
        InterpretedFunction.run = run


class RecordedGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.tape = Tape()
        self.n_replays = 0

    def replay(self) -> None:
        """Recording has done the work once already, which a capture does not."""
        if self.n_replays:
            self.tape.replay()
        self.n_replays += 1


class Stream:
    """Stands in for torch.cuda.Stream: on a CPU all is in order."""

    def __init__(self, device: torch.device) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


@contextmanager
def capture(graph: RecordedGraph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
    """Stands in for torch.cuda.graph."""
    with recorded(graph.tape):
        yield


def stand_in_for_cuda(patch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Make `saemill.train.graph` work on a CPU. Returns: the graphs, as they are made."""
    made: list[RecordedGraph] = []

    def new_graph() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "current_stream", Stream)
    patch.setattr(torch.cuda, "stream", nullcontext)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    patch.setattr(torch.cuda, "CUDAGraph", new_graph)
    patch.setattr(torch.cuda, "graph", capture)
    return made


class Eager:
    """Stands in for `graph.Graphs`: the same step, done anew each time."""

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        work()
