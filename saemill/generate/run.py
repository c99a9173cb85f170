"""`saemill generate`: unconditional samples of some models, as datasets of one number of tokens."""

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.device import choose_device
from saemill.common.errors import ConfigError, DataError, Interrupted, StoreError
from saemill.common.log import counted, progress, say
from saemill.common.models.architecture import limits_of
from saemill.common.models.model import LanguageModel, choose_model_dtype, fingerprint_model
from saemill.common.models.sites import load_model_config
from saemill.common.models.tokenizer import load_tokenizer
from saemill.common.setting import identity
from saemill.common.signals import stop_on_signal
from saemill.generate.config import GenerateConfig
from saemill.generate.dataset import Batches, rows_of, trimmed, write
from saemill.generate.sampling import Frame, check_causal, frame_of, sample, uniforms

EMPTY_SAMPLES = 100
"""Samples after which a model is refused if all of them are empty."""
MANIFEST = "manifest.yaml"
"""Not JSON, so that `saemill tokenize` takes the whole folder, where all data files are parquet."""


class Begun(records.Record):
    """`identity.json` of samples that are being made: the settings that they must be continued with."""

    format: Literal["saemill samples begun 2"] = "saemill samples begun 2"
    settings: dict[str, Any]


class Dataset(records.Record):
    """One model's samples, as the manifest lists them."""

    file: records.Name
    model: str
    n_samples: records.Count
    n_samples_generated: records.Count
    n_tokens_generated: records.Count
    start_id: records.Count
    end_ids: tuple[records.Count, ...]
    bytes: records.Count
    xxh3: records.Hash


class Manifest(records.Record):
    """`manifest.yaml` of finished samples."""

    format: Literal["saemill samples 2"] = "saemill samples 2"
    tokens_per_dataset: records.Positive
    """Tokens of each dataset."""
    datasets: tuple[Dataset, ...]
    settings: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Source:
    """A model that fits the settings; its weights are not loaded yet."""

    model: str
    tokenizer: Any
    frame: Frame
    fingerprint: str

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text, special tokens written out."""
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


def run(config: GenerateConfig) -> Manifest:
    """Sample from every model into `config.out`; a finished output with the same settings is left as it is.

    The folder appears whole. Batches are kept beside it meanwhile, and a stopped run goes on after the
    last one.

    Returns: the manifest.

    Raises:
        ConfigError: settings that do not fit a model, or an output made with others.
        StoreError: another process is sampling, or what it left is damaged.
        DataError: a model that gives no tokens.
        DiskError: the disk is full.
        Interrupted: a signal came.
    """
    settings.check_folder(config.out)
    device = choose_device(config.device)
    dtype = choose_model_dtype(config.dtype, device)
    sources = {name: _source(model, config) for name, model in config.named().items()}
    identity = _identity(config, dtype, sources)
    partial = config.out.absolute().with_name(config.out.absolute().name + ".partial")
    with durable.exclusive(partial), stop_on_signal() as stop:
        if manifest := _finished(config.out, identity):
            outcome = f"{config.out} is finished already"
        else:
            _claim(partial, identity)
            batches = {}
            for name, source in sources.items():
                batches[name] = Batches(partial / "parts" / name)
                _fill(batches[name], source, name, config, dtype, device, stop)
            manifest = _finish(config, identity, sources, batches, partial)
            outcome = str(config.out)
        shutil.rmtree(partial)
    say(f"{outcome}: {_summary(manifest)}")
    return manifest


def _source(model: str, config: GenerateConfig) -> _Source:
    """Refuse a model before any is run: its kind, its tokenizer, its context."""
    model_config = load_model_config(model, config.revision)
    if not any(
        "CausalLM" in name or name.endswith("LMHeadModel") for name in model_config.architectures or []
    ):
        architectures = ", ".join(model_config.architectures or ["a config that names no architecture"])
        raise ConfigError(f"{model!r} is no causal language model, but {architectures}; name one that is")
    tokenizer, _ = load_tokenizer(model, config.revision)
    limit = limits_of(model_config).row_length
    if limit is not None and config.max_tokens > limit:
        raise ConfigError(
            f"max_tokens must be at most {limit}, the context of {model!r}, got {config.max_tokens}"
        )
    frame = frame_of(tokenizer, model_config, model, config.stop_at_eos)
    return _Source(model, tokenizer, frame, fingerprint_model(model, config.revision))


def _identity(config: GenerateConfig, dtype: torch.dtype, sources: Mapping[str, _Source]) -> dict[str, Any]:
    """Collect the settings that decide the samples; `batch_size` and `device` change rounding alone."""
    fingerprints = {name: source.fingerprint for name, source in sources.items()}
    return identity(config) | {"dtype": str(dtype).removeprefix("torch."), "fingerprints": fingerprints}


def _finished(out: Path, identity: dict[str, Any]) -> Manifest | None:
    """Read the manifest of a finished output; None where there is no output.

    Raises:
        ConfigError: it was made with other settings, or holds something else.
        StoreError: the manifest or a dataset is not what was written.
    """
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} holds something else than samples; choose another folder")
    repair = f"Remove {out} to sample again."
    try:
        values = yaml.safe_load((out / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise StoreError(f"{out / MANIFEST} is damaged: {type(error).__name__}. {repair}") from error
    manifest = records.parse(values, Manifest, str(out / MANIFEST), repair)
    settings.check_same(manifest.settings, identity, out)
    for dataset in manifest.datasets:
        file = out / dataset.file
        if not file.is_file() or durable.hash_file(file) != dataset.xxh3:
            raise StoreError(f"{file} is missing or damaged. {repair}")
    return manifest


def _claim(partial: Path, identity: dict[str, Any]) -> None:
    """Begin, or continue what was begun with the same settings.

    Raises:
        ConfigError: it was begun with others.
        StoreError: the record of its settings is damaged.
    """
    file, repair = partial / "identity.json", f"Remove {partial} to sample again."
    if file.exists() or (partial / "parts").exists():
        begun = records.read(file, Begun, repair)
        settings.check_same(begun.settings, identity, partial)
    else:
        records.write(file, Begun(settings=identity))


def _fill(
    batches: Batches,
    source: _Source,
    name: str,
    config: GenerateConfig,
    dtype: torch.dtype,
    device: torch.device,
    stop: threading.Event,
) -> None:
    """Sample from one model until it has enough."""

    def missing() -> int:
        if config.n_samples is not None:
            return config.n_samples - batches.n_samples
        assert config.tokens_per_dataset is not None
        return config.batch_size if batches.n_tokens < config.tokens_per_dataset else 0

    if missing() <= 0:
        return
    if batches.n_samples:
        say(f"{name}: continued after {counted(batches.n_samples, 'sample')}")
    model = LanguageModel(source.model, revision=config.revision, dtype=dtype, device=device, with_head=True)
    check_causal(model, source.model, source.frame.start_id)
    total, unit, done = (
        (config.n_samples, "samples", batches.n_samples)
        if config.n_samples
        else (config.tokens_per_dataset, "tokens", batches.n_tokens)
    )
    with progress(f"generate {name}", total, unit, done) as advance:
        while (n := min(missing(), config.batch_size)) > 0:
            u_RS = uniforms(name, config.seed, batches.n_samples, n, config.max_tokens)
            try:
                ids = sample(model, source.frame, u_RS, config.temperature, config.top_p, stop)
            except Interrupted:
                raise Interrupted(
                    f"stopped with {counted(batches.n_samples, 'sample')} of {name}; the same command "
                    "continues"
                ) from None
            batches.add(rows_of(ids, batches.n_samples, source.decode))
            if batches.n_tokens == 0 and batches.n_samples >= EMPTY_SAMPLES:
                raise DataError(
                    f"{batches.n_samples} samples of {name} are all empty: it puts EOS first; remove "
                    f"{batches.folder.parent.parent} and say --no-stop-at-eos"
                )
            advance(n if unit == "samples" else sum(map(len, ids)))


def _finish(
    config: GenerateConfig,
    identity: dict[str, Any],
    sources: Mapping[str, _Source],
    batches: Mapping[str, Batches],
    partial: Path,
) -> Manifest:
    """Cut all datasets to one number of tokens, and let the output appear."""
    n_tokens = config.tokens_per_dataset or min(model_batches.n_tokens for model_batches in batches.values())
    if n_tokens == 0:
        raise DataError(
            f"all samples of a model are empty: it puts EOS first; remove {partial}, and ask for more "
            "samples or say --no-stop-at-eos"
        )
    finished = partial / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    datasets = []
    for name, source in sources.items():
        file = finished / f"{name}.parquet"
        n_samples = write(file, trimmed(batches[name].tables(), n_tokens, source.decode))
        datasets.append(
            Dataset(
                file=file.name,
                model=source.model,
                n_samples=n_samples,
                n_samples_generated=batches[name].n_samples,
                n_tokens_generated=batches[name].n_tokens,
                start_id=source.frame.start_id,
                end_ids=source.frame.end_ids,
                bytes=file.stat().st_size,
                xxh3=durable.hash_file(file),
            )
        )
    packages = ("saemill", "torch", "transformers", "tokenizers")
    manifest = Manifest(
        tokens_per_dataset=n_tokens,
        datasets=tuple(datasets),
        settings=identity,
        versions={package: version(package) for package in packages},
    )
    text = yaml.safe_dump(records.content(manifest), sort_keys=False)
    durable.write_bytes(finished / MANIFEST, [text.encode()])
    finished.replace(config.out)
    durable.sync_folder(config.out.absolute().parent)
    return manifest


def _summary(manifest: Manifest) -> str:
    n_tokens = counted(manifest.tokens_per_dataset, "token")
    datasets = (f"{d.file} ({counted(d.n_samples, 'sample')})" for d in manifest.datasets)
    return f"{n_tokens} each in {', '.join(datasets)}"
