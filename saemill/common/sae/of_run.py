"""SAEs in the folder of the run that trained them, which its record answers for."""

from pathlib import Path

import torch

from saemill.common.errors import StoreError
from saemill.common.sae import formats
from saemill.common.sae.formats import seal
from saemill.common.sae.sae import Sae
from saemill.common.stores.runs import ANEW, FINISHED, Finished


def check(folder: Path, cfg: str, record: Path) -> None:
    """Refuse a variant's folder that holds another SAE than the run's record answers for.

    Args:
        folder: of the variant.
        cfg: the checksum that the record has of its cfg.json.
        record: the record's file.

    Raises:
        StoreError: it does, or its cfg.json is damaged.
    """
    if seal.checksum(folder) != cfg:
        raise StoreError(f"{folder} holds another SAE than {record} tells of. {ANEW}")


def load(folder: Path, name: str, record: Finished, device: str | torch.device = "cpu") -> Sae:
    """Load a variant's SAE; of one that diverged the weights need not be finite.

    Raises:
        StoreError: it is damaged, or another than the run's record answers for.
    """
    check(folder / name, record.cfgs[name], folder / FINISHED)
    read = formats.read if name in record.diverged else formats.load
    return Sae.of(read(folder / name)).to(device)
