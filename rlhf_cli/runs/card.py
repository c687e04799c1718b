"""The model card of what a run trained: the README.md of its folder, from the run's own files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf_cli.data.files import is_hub_id
from rlhf_cli.errors import RunError
from rlhf_cli.figures import percent, short
from rlhf_cli.files import write_atomic
from rlhf_cli.hub import is_meant_as_path, model_folder
from rlhf_cli.metrics import in_order
from rlhf_cli.recipe.dump import dumped_stage
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.runs.ancestry import ancestors, json_if_any, run_of
from rlhf_cli.runs.folder import RunFolder, member_folders, read_metrics
from rlhf_cli.runs.resume import INPUTS, recorded_recipe

LICENCE = ("license", "license_name", "license_link")
"""What a card's metadata says of it."""


class _Told(NamedTuple):
    """What the files of a run say of it."""

    stage: str
    objective: Mapping[str, Any]  # its kind and its keys
    start: Mapping[str, Any]  # path and revision of the model that it started from
    data: Mapping[str, str]  # source → fingerprint
    lora: Mapping[str, Any]  # empty: all weights were trained


def write_card(folder: Path, source: Path, manifest: Mapping[str, Any], repo: str | None = None) -> None:
    """Write README.md into a folder of weights. Of paths on this machine only the last name is told, but for an adapter's base.

    source: the run, or its checkpoint, that they are of; manifest: the run's, empty for a checkpoint; repo: where they go.
    """
    run = run_of(str(source)) or source
    told, adapter = _read(run, manifest), json_if_any(folder / "adapter_config.json")
    stage = TRAINING_STAGES.get(told.stage)
    of_reward = stage is not None and stage.role == "reward"
    origin, revision = _origin(run, told)
    licence = _licence(origin, revision)
    front = {
        **({"base_model": origin} if origin and _is_on_hub(origin) else {}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if of_reward else "text-generation",
        **licence,
        **({"datasets": own} if (own := [path for path in told.data if is_hub_id(path)]) else {}),
        "tags": list(dict.fromkeys(["rlhf", told.stage, told.objective["kind"], *(["lora"] if told.lora else [])])),
    }
    what, labels = "A reward model: it scores a response to a prompt" if of_reward else "A language model", 1
    if told.objective["kind"] == "steps":
        what = "A process reward model: σ of its score at the last token of a step is the probability that the step is right"
    if told.objective["kind"] == "general":
        labels = int(told.objective["width"])
        what = (
            "A general preference model: the first of two responses, whose vectors v and w are scaled to length 1, is preferred "
        )
        what += f"with probability σ(Σ (v₂ₖ w₂ₖ₊₁ − v₂ₖ₊₁ w₂ₖ)/{told.objective['tau']}), k from 0"
    if several := len(member_folders(folder)):
        what = f"{what}. The first of {several}, which `member-0` to `member-{several - 1}` hold each: their mean is what counts"
    how = f"a LoRA adapter of rank {told.lora['r']}{'' if adapter else ', merged'}" if told.lora else "all weights were trained"
    keys = ", ".join(f"{key} {json.dumps(own)}" for key, own in told.objective.items() if key != "kind")
    lines = [
        f"# {repo or f'{told.stage} of {Path(origin).name}' if origin else told.stage}",
        f"{what}. Made by {_stage(told)}{f' ({keys})' if keys else ''}; {how}.",
        "## Where it comes from",
        "\n".join(_lineage(run, origin, revision, manifest)),
        "## Data",
        f"Each with its fingerprint, a hash of its rows; a part may have been held out.\n\n{_listed(told.data, chr(10))}",
        "## Figures on held-out rows",
        "\n".join(_figures(run, source, manifest.get("reward_model") or {})),
        "## How to load it",
        "\n".join(_loading(adapter, repo, manifest.get("pad_token_id"), of_reward, labels)),
        "## Licence",
        f"The licence of the base model is `{licence['license']}`, as its own files say."
        if licence["license"] != "unknown"
        else "The licence of the base model is unknown: its files name none. Whoever shares this model has to find out.",
    ]
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    write_atomic(folder / "README.md", f"---\n{text}---\n\n" + "\n\n".join(lines) + "\n")


def load_lines(model: str, base: str | None, revision: str | None, pad_id: int | None, labels: int = 1) -> list[str]:
    """The code that loads a model, or an adapter on `base`, with its tokenizer. pad_id: of a reward model; None: a policy."""
    kind = "AutoModelForCausalLM" if pad_id is None else "AutoModelForSequenceClassification"
    own = json.dumps(model)
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({own})"
    if base is None:
        return [f"from transformers import {kind}, AutoTokenizer", "", f"model = {kind}.from_pretrained({own})", tokenizer]
    more = [f"revision={json.dumps(revision)}"] if revision else []
    more += [] if pad_id is None else [f"num_labels={labels}", f"pad_token_id={pad_id}"]
    ends = f"model.generation_config = GenerationConfig.from_pretrained({own})  # it stops where responses end"
    return [
        "from peft import PeftModel",
        f"from transformers import {kind}, AutoTokenizer" + (", GenerationConfig" if pad_id is None else ""),
        "",
        f"base = {kind}.from_pretrained({', '.join([json.dumps(base), *more])})",
        f"model = PeftModel.from_pretrained(base, {own})",
        *([ends] if pad_id is None else []),
        tokenizer,
    ]


def _read(run: Path, manifest: Mapping[str, Any]) -> _Told:
    """From files that may be damaged or gone: a model is worth having without them."""
    recipe: Mapping[str, Any] = {}
    with suppress(RunError):
        recipe = recorded_recipe(run)
    stage = str(manifest.get("stage") or (recipe and dumped_stage(RunFolder(run).recipe)) or "unknown")
    inputs, sources = json_if_any(run / INPUTS), _section(recipe, "data").get("train")
    paths = [source["path"] for source in sources or () if isinstance(source, dict) and "path" in source]
    return _Told(
        stage,
        {"kind": stage, **(_section(manifest, "objective") or _section(recipe, "objective"))},
        _section(recipe, "model") or _section(manifest, "base_model"),
        _section(manifest, "data") or {path: inputs.get(path, "not recorded") for path in paths},
        _section(manifest, "lora") or _section(recipe, "lora"),
    )


def _section(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return own if isinstance(own := of.get(key), dict) else {}


def _stage(told: _Told) -> str:
    title = TRAINING_STAGES[told.stage].title if told.stage in TRAINING_STAGES else "a stage of another release"
    return f"`rlhf {told.stage}` ({title}), objective `{told.objective['kind']}`"


def _is_on_hub(path: str) -> bool:
    return not Path(path).exists() and not is_meant_as_path(path)


def _listed(data: Mapping[str, str], between: str) -> str:
    names = ((path if is_hub_id(path) else Path(path).name, own) for path, own in data.items())
    return between.join(f"- `{name}`: `{own}`" if between == "\n" else f"`{name}` (`{own}`)" for name, own in names) or "unknown"


def _origin(run: Path, told: _Told) -> tuple[str | None, str | None]:
    """(path, revision) of the model that the run's ancestors began with, as far back as their folders are there."""
    path, seen = None, set[Path]()
    while "path" in told.start:
        seen.add(run.resolve())
        path, revision = str(told.start["path"]), told.start.get("revision")
        before = run_of(path)
        if before is None or before.resolve() in seen:
            break
        run, told = before, _read(before, json_if_any(before / "manifest.json"))
    if path is None:
        return None, None
    with suppress(RunError):
        config = json_if_any(model_folder(path, revision, weights=False) / "adapter_config.json")
        return config.get("base_model_name_or_path", path), config.get("revision", revision)
    return path, revision


def _licence(origin: str | None, revision: str | None) -> dict[str, Any]:
    """What the base's own card says of its licence, else its config; "unknown" where neither can be read or says anything."""
    found: dict[str, Any] = {}
    with suppress(RunError, OSError, ValueError, yaml.YAMLError):
        if origin is not None:
            from huggingface_hub.repocard import metadata_load

            folder = model_folder(origin, revision, weights=False)
            card = (folder / "README.md").exists() and metadata_load(folder / "README.md")
            found = {key: own for key, own in {**json_if_any(folder / "config.json"), **(card or {})}.items() if key in LICENCE}
    link = str(found.get("license_link", "://"))
    if "://" not in link and origin and _is_on_hub(origin):
        found["license_link"] = f"https://huggingface.co/{origin}/blob/main/{link}"
    return {"license": "unknown", **found}


def _lineage(run: Path, origin: str | None, revision: str | None, manifest: Mapping[str, Any]) -> Iterator[str]:
    name = "unknown" if origin is None else f"`{origin if _is_on_hub(origin) else Path(origin).name}`"
    base = _section(manifest, "base_model")
    weights = f", weights `{base['weights_hash']}` (xxh3-128)" if origin and base.get("path") == origin else ""
    yield f"- base model {name}" + (f", revision `{revision}`" if revision else "") + weights
    with suppress(RunError):
        for path in (Path(each.path) for each in ancestors(str(run))):
            if path.resolve() != run.resolve():
                told = _read(path, json_if_any(path / "manifest.json"))
                yield f"- the run `{path.resolve().name}`: {_stage(told)}, on {_listed(told.data, ', ')}"
    for parent in manifest.get("parents", ()):
        if run_of(parent["path"]) is None:
            yield f"- the run `{Path(parent['path']).name}`, whose files are gone (manifest `{parent['manifest_hash']}`)"


def _figures(run: Path, source: Path, card: Mapping[str, Any]) -> Iterator[str]:
    """The last ones, of a checkpoint those of its step; of a reward model also what its card warns of."""
    step, lines = source.name.removeprefix("step-"), list[dict[str, Any]]()
    with suppress(RunError):
        lines = [line for line in read_metrics(RunFolder(run).metrics) if line["split"] == "eval"]
    if source.resolve() != run.resolve() and step.isdigit():
        lines = [line for line in lines if line["step"] == int(step)]
    if not lines:
        yield "None were measured."
        return
    yield f"After step {lines[-1]['step']}:\n\n| figure | value |\n|---|---|"
    for row, name in in_order(lines[-1]):
        if row.label and row.progress:
            yield f"| {row.labelled(name)} | {short(lines[-1][name])} |"
    if card.get("accuracy_low") is not None:
        yield f"| 95 % interval of the accuracy | {percent(card['accuracy_low'])} to {percent(card['accuracy_high'])} |"
    if card.get("warning"):
        yield f"\n{card['warning']}"


def _loading(adapter: Mapping[str, Any], repo: str | None, pad_id: int | None, of_reward: bool, labels: int) -> Iterator[str]:
    if of_reward and pad_id is None:
        yield "transformers has no class for it: `rlhf` alone loads it."
        return
    yield "```python"
    if repo is None:
        yield '# "." is this folder. From elsewhere, write its path, or its name on the hub.'
    yield from load_lines(repo or ".", adapter.get("base_model_name_or_path"), adapter.get("revision"), pad_id, labels)
    yield "```"
