"""Texts become token ids, in this process or in several."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from saemill.common.models.tokenizer import load_tokenizer
from saemill.tokenize.source import Batch


def encode(
    batches: Iterator[Batch], tokenizer: Any, name: str, revision: str | None, num_proc: int
) -> Iterator[Batch]:
    """Tokenize the batches: yield them with their `input_ids`, in order.

    Args:
        batches: of texts, or of ids, which stay as they are.
        tokenizer: that of this process.
        name: hub id or folder, from which other processes load it.
        revision: of the hub's tokenizer.
        num_proc: processes; more than one read ahead by no more than two batches each.
    """
    if num_proc == 1:
        for batch in batches:
            yield _encode_batch(tokenizer, batch)
        return
    with ProcessPoolExecutor(num_proc, get_context("spawn"), _load_in_worker, (name, revision)) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode_in_worker, batch))
                if len(waiting) > 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _load_in_worker(name: str, revision: str | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["tokenizer"] = load_tokenizer(name, revision)[0]


def _encode_in_worker(batch: Batch) -> Batch:
    return _encode_batch(_worker["tokenizer"], batch)


def _encode_batch(tokenizer: Any, batch: Batch) -> Batch:
    if batch.texts is None:
        return batch
    encoded = tokenizer(batch.texts, add_special_tokens=False, verbose=False)
    return Batch(batch.source_index, batch.texts, encoded["input_ids"])
