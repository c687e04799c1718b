"""Data sets of the hub, through `datasets`: without a network from its cache, or with an error at once."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.suggest import closest_path

PROBE_SECONDS = 1.0
YES = ("1", "ON", "YES", "TRUE")


def read_hub(path: str, name: str | None, split: str, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one split, numbered from 1; `place` begins every message. Code of a data set is never run."""
    offline = is_offline()
    if offline:
        # Before the import: both libraries read it once, and would otherwise retry for half a minute.
        os.environ["HF_HUB_OFFLINE"] = "1"
    batches = _load(path, name, split, place, offline).iter(batch_size=1000)
    found = (dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True))
    yield from enumerate(found, start=1)


def is_offline() -> bool:
    """Was offline work asked for, or does the hub (or the proxy to it) not answer a connection within a second?"""
    if any(os.environ.get(key, "").upper() in YES for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")):
        return True
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    scheme = urlsplit(endpoint).scheme
    target = urlsplit(getproxies().get(scheme, endpoint))
    address = target.hostname or "", target.port or (80 if target.scheme == "http" else 443)
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection(address, timeout=PROBE_SECONDS).close()
            answered.set()

    # In a thread because looking up a name cannot be given a time limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return not answered.is_set()


def _load(path: str, name: str | None, split: str, place: str, offline: bool) -> Any:
    import datasets
    import huggingface_hub.constants

    if offline:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, name, split=split)
    except (ValueError, datasets.exceptions.DatasetsError, OSError, RuntimeError) as error:
        misnamed = isinstance(error, ValueError)  # an unknown split or configuration, with the known ones
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        unknown = offline and ("cache" in str(error) or not misnamed)
        if (unknown or not misnamed) and (near := closest_path(path)):
            raise UsageError(f"{place}: there is no {path}. did you mean {near}?") from None
        if unknown:
            what = f"the hub cannot be reached and {path} is not in the local cache; connect, or name a local file"
            raise MachineError(f"{place}: {what}") from None
        if misnamed:
            raise UsageError(f"{place}: {path}: {first_line}") from None
        raise MachineError(f"{place}: the data set {path} could not be loaded: {first_line}") from None
