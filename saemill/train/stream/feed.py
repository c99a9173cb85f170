"""Batches on the device: on a GPU the next one is copied while the present one is trained on."""

from typing import Any

import torch
from torch import Tensor

from saemill.train.stream.loader import Loader
from saemill.train.stream.whole_rows import Text, WholeRows


class Feed:
    """The loader's batches, in order, on `device`.

    On a GPU a batch goes through one of two page-locked buffers per site, on a stream of its own, in
    stored rows, which are decoded there: half the bytes of float32, of int8 a quarter. On a CPU it is
    returned as the loader decodes it.
    """

    def __init__(self, loader: Loader | WholeRows, device: torch.device) -> None:
        self.loader, self.device = loader, device
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: list[dict[str, Tensor]] = [{}, {}]
        self._copied = [cuda.Event(), cuda.Event()] if self._stream else []
        self._ahead: dict[int, dict[str, Tensor]] = {}

    def batch(self, i: int) -> dict[str, Tensor]:
        """Return batch number i: per site [T, D] as the store's rows are read."""
        if self._stream is None:
            return self.loader.batch(i)
        self.prefetch(i)
        now = torch.cuda.current_stream(self.device)
        now.wait_event(self._copied[i % 2])
        batch = self._ahead.pop(i)
        for rows_TC in batch.values():
            rows_TC.record_stream(now)
        return {site: self.loader.sites[site].decode(rows_TC) for site, rows_TC in batch.items()}

    def text(self, i: int) -> Text | None:
        """Return the rows of text that batch number i is; None where it is tokens of any."""
        return self.loader.text(i) if isinstance(self.loader, WholeRows) else None

    def prefetch(self, i: int) -> None:
        """Start to copy batch number i; to be called when the work on the one before is under way."""
        if self._stream is None or i in self._ahead:
            return
        pinned, copied = self._pinned[i % 2], self._copied[i % 2]
        copied.synchronize()
        for site, rows_TC in self.loader.stored(i).items():
            if site not in pinned:
                pinned[site] = torch.empty_like(rows_TC, pin_memory=True)
            pinned[site].copy_(rows_TC)
        with torch.cuda.stream(self._stream):
            self._ahead[i] = {s: rows.to(self.device, non_blocking=True) for s, rows in pinned.items()}
            copied.record(self._stream)
