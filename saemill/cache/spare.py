"""Memory of shards that are written, used again by those that follow."""

import torch
from torch import Tensor

from saemill.common.stores.forms.form import Form


class Spare:
    """Memory for stored rows, a piece for each name.

    New memory of so many bytes comes from the system page by page, each cleared first, which takes several
    times as long as the copy into it.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, Tensor] = {}

    def empty(self, name: str, form: Form, n_rows: int) -> Tensor:
        """Make room for stored rows, on the CPU, where those before of this name were. [n_rows, C]."""
        n_bytes = n_rows * form.columns * form.stored.itemsize
        if name not in self._pieces or len(self._pieces[name]) < n_bytes:
            self._pieces[name] = torch.empty(n_bytes, dtype=torch.uint8)
        return self._pieces[name][:n_bytes].view(form.stored).view(n_rows, form.columns)
