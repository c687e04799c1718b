"""Data sets of the hub, through `datasets`, and from its cache where the hub is silent."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli import hub
from rlhf_cli.console import of_rank
from rlhf_cli.data.files import rows_of
from rlhf_cli.errors import RunError, UsageError, prefixed
from rlhf_cli.sections import Rows
from rlhf_cli.suggest import did_you_mean


def read_hub(source: Rows, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one split, numbered from 1; `place` begins every message. Code of a data set is never run."""
    with prefixed(place):
        dataset = _load(source)
    yield from rows_of(dataset)


def _load(source: Rows) -> Any:
    path, split = source.path, source.split
    found = hub.find(path, "dataset", source.revision)
    script = f"{path.partition('/')[2]}.py"
    if script in found.files:
        hint = "some such data sets have their rows at revision: refs/convert/parquet"
        raise UsageError(f"{path} makes its rows by a program, {script}, which is never run. {hint}")
    import datasets

    datasets.logging.set_verbosity_error()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.USE_PARQUET_EXPORT = False  # they ask other hosts
    datasets.config.HF_HUB_OFFLINE = not found.commit
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with hub.fetching(path, 0):
        builder = _builder(source, found)
    known = list(map(str, builder.info.splits or builder.config.data_files or ()))
    for name in (part.partition("[")[0].strip() for part in split.split("+")):
        if known and name not in (*known, "all"):
            raise UsageError(f"{path} has no split {name}. {did_you_mean(name, known, 'there are ' + ', '.join(known))}")
    with hub.fetching(path, 0 if Path(builder.cache_dir).exists() else None):
        try:
            builder.download_and_prepare()
            return builder.as_dataset(split=split)
        except (ValueError, AssertionError, datasets.exceptions.DatasetsError) as error:
            raise UsageError(f"{path}, split {split}: {_reason(error)}") from error


def _builder(source: Rows, found: hub.Found) -> Any:
    """Of a configuration, or of the folder of that name: it knows the splits before anything large is fetched."""
    import datasets
    from huggingface_hub import HfApi

    path, name, revision, commit = source.path, source.name, source.revision, found.commit
    try:
        if revision and not commit:
            commit = HfApi().resolve_revision(path, repo_type="dataset", revision=revision, local_files_only=True).resolved
        try:
            builder = datasets.load_dataset_builder(path, name, revision=revision)
        except (ValueError, FileNotFoundError):
            if not any(file.startswith(f"{name}/") for file in found.files):
                raise
            builder = datasets.load_dataset_builder(path, data_dir=name, revision=revision)
    except RunError:
        raise
    except Exception as error:
        where = "" if found.commit else f" in the cache, and {found.silence}"
        if isinstance(error, ValueError) and (listed := re.search(r"\[('.*')\]", str(error))):
            names = re.findall("'([^']+)'", listed[1])
            what = f"no configuration {name}{where}" if name else f"several configurations{where}: `name` must say which"
            raise UsageError(f"{path} has {what}. {did_you_mean(name or '', names, 'there are ' + ', '.join(names))}") from error
        if not found.commit:
            raise hub.uncached(path, found, revision) from error
        if isinstance(error, ValueError | FileNotFoundError | yaml.YAMLError) and "LocalEntryNotFoundError" not in str(error):
            raise UsageError(f"{path}: {_reason(error)}") from error
        raise OSError(_reason(error)) from None
    hub.say_cached(path, found.silence)
    if not found.commit and name is None and builder.config.name != "default":
        of_rank().say(f"{path}: the configuration in the cache is {builder.config.name}")
    if commit and builder.hash != commit:
        raise hub.uncached(path, found, revision)
    return builder


def _reason(error: Exception) -> str:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    if isinstance(error, EmptyDatasetError | DataFilesNotFoundError):
        return "it has no data files of a known format"
    return hub.reason(error).rpartition("Hub either: ")[2].partition(" with any supported")[0]
