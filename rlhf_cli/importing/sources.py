"""Where other trainers' configurations name their rows → data.train, data.eval and data.holdout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rlhf_cli.data.conversations import SPEAKERS
from rlhf_cli.data.files import is_hub_id
from rlhf_cli.importing.job import TABLES, UNKNOWN, Job, asks
from rlhf_cli.recipe.yaml_reader import scalar

Source = dict[str, Any]

COLUMNS = {"query": "input", "response": "output", "messages": "conversations", "kto_tag": "label"}
"""As dataset_info.json calls them → ours, where that differs. Its `prompt` is our `instruction`, but of pairs."""
FIELDS = {"field_human": "prompt", "field_model": "completion", "field": "text"}
"""As axolotl calls them → ours, where that is not the name after `field_`."""
TURN_KEYS = {"role": ("role", "from"), "content": ("content", "value")}
BY_COLUMNS = "rows are read by their columns, and written by the chat template"


def read_sources(job: Job) -> None:
    {"TRL": _trl, "LLaMA-Factory": _factory, "axolotl": _axolotl}[job.tool](job)
    if not job.values["data.train"] and not job.refused:
        job.refuse("dataset", "no rows are named. add them, or write `data: {train: FILE}` in a recipe of your own")
    if not job.values.get("data.eval"):
        job.values.pop("data.eval", None)
    size = job.take("val_size", "val_set_size", "test_split_size")
    if not asks(size) or "data.eval" in job.values:
        job.leave_out("rows of data.eval are held out already", *[job.name("data.holdout")] * asks(size))
        return
    if isinstance(size, (int, float)) and size >= 1:
        if not (rows := job.count()):
            job.tell("To fill in", f"data.holdout, a share: {size:g} rows there, of rows that could not be counted")
            return
        job.tell("Computed", f"data.holdout: {size:g} of {rows} rows")
        size = math.ceil(size / rows * 1e4) / 1e4
    job.put("data.holdout", size)


def _source(path: str, name: Any = None, split: Any = None, revision: Any = None, **more: Any) -> Source:
    """One of ours. What chooses on the hub is said of the hub's rows alone, a split of a folder's too."""
    hub, split = is_hub_id(path), split if split != "train" else None
    chosen = {"name": name, "revision": revision, "split": split} if hub else {"split": split} if Path(path).is_dir() else {}
    return {key: value for key, value in {"path": path, **chosen, **more}.items() if value not in (None, {})}


def _files(one: dict[str, Any]) -> list[str]:
    files, path = one.pop("data_files", None), one.pop("path", None) or one.pop("id", "")
    return [str(file) for file in (files if isinstance(files, list) else [files or path])]


def _trl(job: Job) -> None:
    mixture, mixer = job.take("dataset_mixture", form=dict) or {}, job.take("dataset_mixer", form=dict) or {}
    splits = job.take("dataset_splits", form=list) or []
    train, test = job.take("dataset_train_split") or "train", job.take("dataset_test_split") or "test"
    named, config = job.take("dataset_name", form=str), job.take("dataset_config", "dataset_config_name")
    if "test_split_size" in mixture:
        job.rest["test_split_size"] = mixture["test_split_size"]
    job.told[UNKNOWN] += [f"dataset_mixture.{n}" for n in mixture if n not in ("datasets", "test_split_size")]
    if mixer:
        train = next((split for split in splits if "train" in split), train)
        test = next((split for split in splits if "test" in split), test)
    alone = {"path": named, "name": config, "split": train}
    listed = [{"path": path, "weight": share, "split": train} for path, share in mixer.items()]
    listed = listed or mixture.get("datasets") or job.take("datasets", form=list) or [alone] * bool(named)
    text = job.take("dataset_text_field") or "text"
    columns, found = {"text": text} if text != "text" else {}, list[Source]()
    for number, one in enumerate({"path": one} if isinstance(one, str) else dict(one) for one in listed):
        options = {"name": one.pop("name", None) or one.pop("config", None), "split": one.pop("split", None), "columns": columns}
        if len(listed) > 1:
            options["weight"] = one.pop("fraction", None)
        if (kept := one.pop("weight", 1)) != 1:
            job.tell("To fill in", f"data.train.{number}.limit: a share of {kept} of the rows is taken there; write their number")
        if one.pop("columns", None):
            job.left_out[BY_COLUMNS].append(f"datasets.{number}.columns")
        found += [_source(path, **options) for path in _files(one)]
        job.told[UNKNOWN] += [f"datasets.{number}.{name}" for name in one]
    job.values["data.train"] = found
    if asks(job.rest.get("eval_strategy", job.rest.get("evaluation_strategy"))) and "test_split_size" not in job.rest:
        held_out = [_source(one["path"], one.get("name"), test, columns=columns) for one in found]
        job.values["data.eval"] = [one for one in held_out if "split" in one]
    elif test != "test":
        job.leave_out("no evaluation is asked for", f"the split {test}")


def _factory(job: Job) -> None:
    info, folder = _dataset_info(job)
    limit, shares = job.take("max_samples", form=int), job.take("interleave_probs")
    if asks(strategy := job.take("mix_strategy")) and strategy != "concat":
        job.leave_out("sources are mixed by the weights of data.train", "mix_strategy")
    for key, ours in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        found = list[Source]()
        for name in map(str, _listed(job.take(key))):
            if isinstance(info.get(name), dict):
                found.append(_described(job, name, info[name], folder) | ({"limit": limit} if limit else {}))
            elif Path(name).exists() or is_hub_id(name):
                found.append(_source(name, limit=limit))
            else:
                job.refuse(key, f"{name} is neither a file nor in a dataset_info.json, here or in {folder}. name a file")
        if len(found) > 1 and ours == "data.train" and shares:
            found = [one | {"weight": scalar(str(share))} for one, share in zip(found, _listed(shares), strict=False)]
        job.values[ours] = found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [part.strip() for part in str(value or "").split(",") if part.strip()]


def _dataset_info(job: Job) -> tuple[dict[str, Any], Path]:
    """What dataset_info.json says, in the configuration's dataset_dir or beside it, and the folder it is in."""
    named = Path(str(job.take("dataset_dir") or "data"))
    for folder in (named, job.path.parent / named, job.path.parent):
        path = folder / "dataset_info.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))), folder
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError) as error:
            job.refuse("dataset_dir", f"{path} cannot be read: {error}. mend it")
    return {}, named


def _described(job: Job, name: str, entry: dict[str, Any], folder: Path) -> Source:
    place, columns, tags = f"dataset_info.json: {name}", entry.get("columns") or {}, entry.get("tags") or {}
    if not (isinstance(columns, dict) and isinstance(tags, dict)):
        job.refuse(place, "columns and tags are keys with values. write them so")
        return {"path": ""}
    if columns.keys() & {"images", "videos", "audios"}:
        job.refuse(place, "has pictures, video or sound, and only text is read")
    for tag, value in tags.items():
        if str(value) not in TURN_KEYS.get(tag.removesuffix("_tag"), SPEAKERS):
            job.refuse(f"{place}: tags.{tag}", f"{value} is not known. rename it in the rows")
    ours: dict[str, Any] = {COLUMNS.get(str(theirs), str(theirs)): column for theirs, column in columns.items()}
    if entry.get("formatting", "alpaca") == "alpaca":
        parts = [ours.pop("prompt", "instruction"), *([ours.pop("input")] if "input" in ours else [])]
        if job.given.get("stage") == "pt":
            ours = {"text": parts[0]}
        elif entry.get("ranking"):
            ours = {"prompt": "\n".join(f"{{{part}}}" for part in parts) if len(parts) > 1 else parts[0]} | ours
        else:
            ours = dict(zip(("instruction", "input"), parts, strict=False)) | ours
            if len(parts) > 1 or not columns:
                job.tell("Done otherwise", "instruction and input are joined by a blank line; there by a line break")
    path = entry.get("hf_hub_url") or ("file_name" in entry and folder / str(entry["file_name"]))
    if not path:
        job.refuse(place, "is neither a file nor of the Hugging Face hub. fetch it, and name the file")
    job.told[UNKNOWN] += [f"{place}: {name}" for name in entry if name not in TABLES["entry"]]
    different = {key: column for key, column in ours.items() if column not in (key, "messages")}
    options = {"name": entry.get("subset"), "split": entry.get("split"), "revision": entry.get("revision")}
    return _source(str(path), **options, columns=different, limit=entry.get("num_samples"))


def _axolotl(job: Job) -> None:
    for key, ours in (("datasets", "data.train"), ("pretraining_dataset", "data.train"), ("test_datasets", "data.eval")):
        listed = job.take(key) or []
        found = [_entry(job, f"{key}.{n}", one) for n, one in enumerate(listed if isinstance(listed, list) else [listed])]
        job.values[ours] = job.values.get(ours, []) + [source for sources in found for source in sources]


def _entry(job: Job, place: str, given: Any) -> list[Source]:
    """The sources of an entry of axolotl's; a list of files has several."""
    one = {name: value for name, value in (given if isinstance(given, dict) else {"path": given}).items() if value is not None}
    kind, mapped, roles = one.pop("type", ""), one.pop("message_property_mappings", {}), one.pop("roles", {})
    if not all(isinstance(value, dict) for value in (mapped, roles)) or not isinstance(one.get("roles_to_train", []), list):
        job.refuse(place, "roles and message_property_mappings are keys with values, roles_to_train is a list. write them so")
        return []
    if isinstance(kind, dict):
        one |= kind
    elif "alpaca" in str(kind):
        job.tell("Done otherwise", f"{place}.type {kind}: Alpaca's texts frame the prompt there, the chat template here")
    for name in [name for name in one if name.endswith("format") or name == "system_prompt"]:
        if one.pop(name) not in ("{instruction}", "{prompt}", "{chosen}", "{rejected}", "{completion}"):
            job.refuse(f"{place}.type.{name}", "is a prompt of its own. write it as data.train.0.columns: {prompt: TEXT}")
    fields = [name for name in one if name.startswith("field") and name != "field_thinking"]
    columns = {FIELDS.get(name, name.removeprefix("field_")): one.pop(name) for name in fields}
    if "messages" in columns and job.stage in ("dpo", "ipo", "train-rm"):
        columns["prompt"] = columns.pop("messages")
    turns = mapped | {key: one.pop(f"message_field_{key}") for key in TURN_KEYS if f"message_field_{key}" in one}
    wrong = [value for key, value in turns.items() if value not in TURN_KEYS.get(key, (key,))]
    wrong += [name for names in roles.values() for name in _listed(names) if name not in SPEAKERS]
    wrong += [name for name in one.pop("roles_to_train", []) if SPEAKERS.get(str(name)) != "assistant"]
    for value in wrong:
        job.refuse(place, f"{value} is not read there. rename it in the rows; the assistant's turns are those that are learned")
    options = {name: one.pop(name, None) for name in ("name", "split", "revision")}
    sources = [_source(path, **options, columns={o: t for o, t in columns.items() if o != t}) for path in _files(one)]
    known = one.keys() & {"ds_type", "conversation", "train_on_eos", "chat_template"}
    job.left_out[BY_COLUMNS] += [f"{place}.{name}" for name in sorted(known)]
    job.told[UNKNOWN] += [f"{place}.{name}" for name in one if name not in known]
    return sources
