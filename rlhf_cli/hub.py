"""The Hugging Face hub: whether it answers, what it holds and what it refuses, in our words; and its models as folders."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from rlhf_cli.console import leave, of_rank
from rlhf_cli.errors import MachineError, RunError, UsageError
from rlhf_cli.signals import stopping
from rlhf_cli.suggest import closest_path, did_you_mean

PROBE_SECONDS, ANSWER_SECONDS = 1.0, 10.0
SETTINGS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "README.md"]
WEIGHTS = ["model*.safetensors", "adapter_model*.safetensors"]
"""What transformers and PEFT load; some repositories have the same weights again under another name."""

Kind = Literal["model", "dataset"]


class Found(NamedTuple):
    """A repository."""

    commit: str | None  # None: the hub is silent, and its cache is all there is
    files: dict[str, int]  # name → bytes
    silence: str = ""  # why there was no answer


@cache
def why_silent() -> str:
    """Why the hub is not asked, if it is not: offline work is asked for, or nothing answers a connection within a second.

    Found out once, and best before the hub's libraries are imported: they would retry for a minute.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    asked = [key for key in switches if os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE")]
    why = f"{asked[0]} is set" if asked else "" if _answers() else f"{endpoint()} cannot be reached"
    if why:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
    return why


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _answers() -> bool:
    """Does the hub, or the proxy to it, take a connection?"""
    scheme = urlsplit(endpoint()).scheme
    target = urlsplit(getproxies().get(scheme, endpoint()))
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
    return answered.is_set()


def find(path: str, kind: Kind, revision: str | None) -> Found:
    """A repository of the hub, asked for once, without retries.

    UsageError: there is no such repository or revision. MachineError: it is gated, or the token is refused.
    """
    why = why_silent()
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        validate_repo_id(path)
        if why:
            return Found(None, {}, why)
        asked: Any = {"repo_type": kind, "revision": revision, "files_metadata": kind == "model"}
        info: Any = HfApi().repo_info(path, timeout=ANSWER_SECONDS, **asked)
        files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if info.gated and files:  # who is not let in may list them all the same, and read the first ones (README.md)
            url = hf_hub_url(path, next(reversed(files)), repo_type=kind, revision=info.sha)
            get_hf_file_metadata(url, timeout=ANSWER_SECONDS)
    except RunError:
        raise
    except Exception as error:  # also of the HTTP library, and of a page that is no hub's
        return Found(None, {}, _why(error, path, kind, revision))
    return Found(info.sha, files)


def _why(error: Exception, path: str, kind: Kind, revision: str | None) -> str:
    """Raises what the recipe or the token has wrong; else says why there was no answer."""
    from huggingface_hub import HfApi, errors, get_token

    what, folder = ("model", "") if kind == "model" else ("data set", "datasets/")
    login = "use a token that may read it" if get_token() else "set HF_TOKEN to a token that may read it"
    if isinstance(error, errors.GatedRepoError):
        todo = f"accept its conditions at {endpoint()}/{folder}{path}, and {login}"
        raise MachineError(f"the {what} {path} is gated\n  {todo}") from error
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        near = closest_path(path)
        hint = f"did you mean {near}?" if near else f"mend the name, or if it is private {login}"
        raise UsageError(f"there is no {what} {path}, neither here nor on the hub. {hint}") from error
    if isinstance(error, errors.RevisionNotFoundError):
        names = ["main"]
        with suppress(Exception):
            refs = HfApi().list_repo_refs(path, repo_type=kind)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
        hint = did_you_mean(str(revision), names, f"there are {', '.join(names)}, and the hashes of commits")
        raise UsageError(f"the {what} {path} has no revision {revision}. {hint}") from error
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in (401, 403):
        raise MachineError(f"the {what} {path} may not be read with your token (HF_TOKEN, or of `hf auth login`). {login}")
    return f"{endpoint()} answers {status}" if status else f"{endpoint()} does not answer ({type(error).__name__})"


def uncached(path: str, found: Found, revision: str | None) -> RunError:
    """What to say of what the cache lacks while the hub is silent."""
    near, what = closest_path(path), f"revision {revision} of {path}" if revision else path
    text = f"{what} is not in the cache, or not whole, and {found.silence or 'the hub fell silent'}"
    return UsageError(f"{text}. did you mean {near}?") if near else MachineError(text)


@cache
def say_cached(path: str, silence: str) -> None:
    """Once: what is used may be older than what the hub has. Who asked for that knows."""
    if silence and not silence.endswith("is set"):
        of_rank().warn(f"{silence}: {path} is taken from the cache")


@contextmanager
def fetching(path: str, size: int | None = None) -> Iterator[None]:
    """Says what is fetched, and how many bytes; on a terminal with the library's bars. MachineError for what breaks it off."""
    if size != 0:
        of_rank().say(f"fetching {path}" + (f" ({size / 1e6:,.1f} MB)" if size else ""))
    try:
        with _bars(size != 0):
            yield
    except RunError:
        raise
    except Exception as error:
        todo = "start again: files that have arrived are kept"
        raise MachineError(f"{path} could not be fetched: {reason(error)}\n  {todo}") from error


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """The library's, on a terminal. A signal ends the process at once: the library would first wait for its threads."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if wanted and of_rank().enabled and sys.stderr.isatty():
        enable_progress_bars()
    handlers = {number: signal.signal(number, leave) for number in stopping()}
    try:
        yield
    finally:
        disable_progress_bars()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def reason(error: BaseException) -> str:
    """What an error says first; if others caused it, the first of them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


find_once = cache(find)
"""So that all that a process reads of a model is of one commit."""


def model_folder(path: str, revision: str | None, weights: bool = True) -> Path:
    """A model's folder: a local one as it is, else one in the hub's cache, filled with what it lacks.

    Raises what `find` does; UsageError: no safetensors; MachineError: neither in the cache nor to be fetched.
    """
    return Path(path) if Path(path).exists() else _snapshot(path, revision, weights)


@cache
def _snapshot(path: str, revision: str | None, weights: bool) -> Path:
    found = find_once(path, "model", revision)
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    tensors = [name for name in found.files if "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHTS)]
    if found.commit and not tensors:
        raise UsageError(f"{path} has no model.safetensors, and pickled weights are not read. name another model or revision")
    if weights and found.commit:
        _snapshot(path, revision, False)  # which keeps what the revision stands for
        revision = found.commit
    lacking = [name for name in tensors if not try_to_load_from_cache(path, name, revision=found.commit)]
    patterns = [*SETTINGS, *WEIGHTS] if weights else SETTINGS
    with fetching(path, weights * sum(found.files[name] for name in lacking)):
        try:
            options: Any = {"allow_patterns": patterns, "ignore_patterns": "*/*", "local_files_only": not found.commit}
            folder = Path(snapshot_download(path, revision=revision, **options))
        except LocalEntryNotFoundError as error:
            if found.commit:
                raise
            raise uncached(path, found, revision) from error
    if weights and not any(folder.glob("*.safetensors")):
        raise uncached(path, found, revision)
    say_cached(path, found.silence)
    return folder


def check_upload(repo: str) -> str:
    """OWNER/NAME of a repository to upload to; the owner of the token where `repo` names none.

    UsageError: no repository can have this name. MachineError: the hub is silent, there is no token, or the hub refuses it.
    """
    why, place = why_silent(), f"--push {repo}"
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UsageError(f"{place}: no repository can have this name. write OWNER/NAME") from None
    if why:
        raise MachineError(f"{place}: {why}")
    if not get_token():
        raise MachineError(f"{place}: there is no token. set HF_TOKEN to one that may write, or run `hf auth login`")
    with _uploading(place):
        owner = HfApi().whoami()["name"]
    return repo if "/" in repo else f"{owner}/{repo}"


def upload(folder: Path, repo: str) -> str:
    """Commit a folder to a model repository, made (private) where there is none; says where it is, and who can see it.

    Other weights and settings that the repository has go: a loader might prefer them. MachineError: the hub refuses, or fails.
    """
    from huggingface_hub import HfApi

    size, api = sum(file.stat().st_size for file in folder.iterdir()), HfApi()
    stale = [*WEIGHTS, "model.safetensors.index.json", "config.json", "adapter_config.json", "generation_config.json"]
    of_rank().say(f"pushing {folder} to {repo} ({size / 1e6:,.1f} MB)")
    with _bars(True), _uploading(f"--push {repo}", f"\n  {folder} is whole; to try again: hf upload {repo} {folder}"):
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns=stale, commit_message="Upload by rlhf export")
        private = api.model_info(repo).private
    who = "private: its settings on the hub make it public" if private else "public"
    return f"pushed to {endpoint()}/{repo}, which is {who}"


@contextmanager
def _uploading(place: str, todo: str = "") -> Iterator[None]:
    """MachineError for what the hub refuses. What it says may hold the token; that is left out, and so are causes."""
    from huggingface_hub import errors, get_token

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    except Exception as caught:
        error: BaseException = caught
        while error.__cause__ is not None and not isinstance(error, errors.HfHubHTTPError):
            error = error.__cause__
        if isinstance(error, errors.HfHubHTTPError):
            status, said = error.response.status_code, error.server_message
            hints = {401: "the token is not valid", 403: "the token may not write there", 404: "there is no such owner"}
            what = f"{endpoint()} answers {status}" + "".join(f", {own}" for own in (hints.get(status), said) if own)
        else:
            what = f"{endpoint()}: {reason(error)}"
        text = f"{place}: {what}{todo}".replace(get_token() or "\0", "…")
        raise MachineError(text) from None


def is_meant_as_path(path: str) -> bool:
    """A hub id is a name or owner/name; everything else, and what lies in a folder that exists, is a path."""
    owner, _, rest = path.partition("/")
    inside = "/" in rest or (bool(rest) and Path(owner).is_dir())
    return inside or path.startswith((".", "/", "~")) or path.endswith(("/", ".gguf"))
