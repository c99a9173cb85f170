"""What a CUDA graph does, on a CPU: a step's operations and kernel launches are recorded, then repeated.

A graph repeats launches with the addresses and numbers of its capture, and results land in the memory that
they had then. So here: views and Python do not happen again, an operation in place is repeated on the same
tensors, and what makes a new tensor has its result copied into the recorded one. Memory that was merely
allocated holds rubbish.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

WAITING_OPS = {
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "lift_fresh", "masked_select", "nonzero",
    "repeat_interleave", "unique_dim", "_unique2",
}  # fmt: skip
"""They wait for the device, or bring a number of the host to it."""
WAITING_METHODS = {
    "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "cpu", "item", "numpy",
    "pin_memory", "tolist",
}  # fmt: skip
"""The same where a tensor on the CPU gives its values without an operation."""


class Waits(Exception):
    """Something was met that a capture would refuse."""


class _Methods(TorchFunctionMode):
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
        packet = func.overloadpacket.__name__
        if packet in WAITING_OPS:
            raise Waits(f"{func} within a captured step")
        result = func(*args, **kwargs)
        schema = func._schema
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        is_view = any(r.alias_info is not None for r in schema.returns) and not writes
        if is_view or torch.Tag.inplace_view in func.tags or func.namespace == "profiler":
            return result
        self.names.append(str(func))
        made = [] if writes else [alias(tensor) for tensor in tree_leaves(result)]
        if "empty" in packet:
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
def recorded() -> Iterator[Tape]:
    """Everything within goes onto a tape, and is done."""
    tape, run = Tape(), InterpretedFunction.run

    def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tape.launch(kernel, run, args, {"grid": grid, "warmup": warmup, **options})

    InterpretedFunction.run = noted
    try:
        with _Methods(), tape:
            yield tape
    finally:
        InterpretedFunction.run = run


class Tapes:
    """Stands in for `graph.Graphs`: the first time as it is, the second recorded, later replayed."""

    def __init__(self) -> None:
        self.tapes: dict[Hashable, Tape | None] = {}
        self.n_replays = 0

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if key not in self.tapes:
            self.tapes[key] = None
            work()
        elif (tape := self.tapes[key]) is not None:
            tape.replay()
            self.n_replays += 1
        else:
            with recorded() as tape:
                work()
            self.tapes[key] = tape


class Eager:
    """Stands in for `graph.Graphs`, too: the same step, done anew each time."""

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        work()
