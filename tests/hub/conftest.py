"""A hub of one's own for a test, where this process and those that it starts look for it, and an empty cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import transformers.utils.hub
from huggingface_hub import constants, hf_api

from rlhf_cli import hub as ours
from tests.hub.server import Hub, serve


def start_again() -> None:
    """As a new process would: nothing of the hub is known yet."""
    for known in (ours.why_silent, ours.find_once, ours._snapshot, ours.say_cached):
        known.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    home = tmp_path / "hf"
    for name in ("HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        for module, names in (
            (constants, {"ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": False}),
            (constants, {"HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"}),
            (constants, {"HF_TOKEN_PATH": str(home / "token"), "HF_HUB_DISABLE_TELEMETRY": True}),
            (constants, {"HF_HUB_DISABLE_XET": True}),
            (hf_api.api, {"endpoint": server.endpoint}),  # of which peft has a method
            (transformers.utils.hub, {"_hf_api": None}),
            (datasets.config, {"HF_ENDPOINT": server.endpoint, "HF_DATASETS_CACHE": home / "datasets", "HF_HUB_OFFLINE": False}),
            (datasets.config, {"HUB_DATASETS_URL": server.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"}),
            (datasets.config, {"DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads"}),
            (datasets.config, {"USE_PARQUET_EXPORT": True, "HF_UPDATE_DOWNLOAD_COUNTS": True}),
        ):
            for name, value in names.items():
                monkeypatch.setattr(module, name, value)
        start_again()
        yield server
    start_again()
