"""`rlhf export`: a run as a plain transformers or PEFT folder, compared with the run before it is called done."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from rlhf_cli.data.templates import read_chat_format
from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.files import disk_errors
from rlhf_cli.hub import model_folder
from rlhf_cli.models.backbone import end_ids
from rlhf_cli.models.heads import classifier_class, save_full_reward
from rlhf_cli.models.load import is_reward_model, load_tokenizer, name_ends, quiet_libraries, read_adapter, read_head
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.runs.card import write_card
from rlhf_cli.runs.folder import RunFolder
from rlhf_cli.runs.parents import Start, recorded_template, resolve_start

TOLERANCE = 1e-3
"""Largest difference of log-probabilities or scores in float32: merging B·A into W rounds every weight once."""

WEIGHTS = (".safetensors", ".safetensors.index.json")
MODEL_FILES = ("adapter_config.json", "config.json", "generation_config.json")


def export(run: Path, dest: Path, merge: bool, repo: str | None = None) -> str:
    """Write what `run` trained to `dest`: its adapter, or with `merge` (or after full training) a whole model; says so.

    A policy is a causal language model, a reward model a sequence classifier. repo: where `dest` will be uploaded.

    UsageError: `run` is no finished run, `dest` exists, transformers has no classifier for a reward model's architecture, or
        an adapter on a folder of this machine is to be uploaded.
    NumberError: the exported model gives other log-probabilities or scores than the run, or does not stop where its responses
        end; nothing is left at `dest`.
    """
    quiet_libraries()
    if os.path.lexists(dest):
        raise UsageError(f"{dest} exists; export to a new folder")
    start = resolve_start(str(run), None, "export", TRAINING_STAGES)
    source = RunFolder(run).model
    if not source.is_dir():
        raise UsageError(f"{run} is not a run: it has no model/")
    if repo is not None and start.adapter is not None and not merge and Path(start.base).exists():
        raise UsageError(f"--push {repo}: the adapter sits on {start.base}, which nobody else has. add --merge")
    if merge and start.members:
        raise UsageError(f"--merge: {run} has {len(start.members)} members, each of which would be a whole model. leave it out")
    model, head = _load_run(start)
    pad_id = None if head is None else _pad_id(run, start, model)
    with disk_errors(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent))
        try:
            ids = _probe(start, model)
            wanted = _logps(model, ids) if head is None else _scores_of_run(model, head, ids)
            if start.adapter is None or not merge:
                shutil.copytree(source, part, dirs_exist_ok=True)
            else:
                _merge(model, head, pad_id, source, part)
            if head is None:
                ends = _ends_of_run(run, start, model)
                name_ends(part, ends, model)
                exported = _load_export(AutoModelForCausalLM, start, part)
                what, found = "log-probabilities", _logps(exported, ids)
                if not _stops(exported, GenerationConfig.from_pretrained(str(part)), ids, ends):
                    raise NumberError(f"{dest}: generate() goes on after {ends}, which end responses; nothing was exported")
            else:
                loader = AutoModelForSequenceClassification
                what, found = "scores", _scores(_load_export(loader, start, part, num_labels=len(head), pad_token_id=pad_id), ids)
            difference = float((found - wanted).abs().max())
            if not difference <= TOLERANCE:
                raise NumberError(f"{dest}: {what} differ from the run's by {difference:.2g}; nothing was exported")
            write_card(part, run, start.manifest or {}, repo)
            part.chmod(0o755)
            part.rename(dest)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    kind = "adapter" if (dest / "adapter_config.json").exists() else "model"
    return f"{kind} in {dest}: {what} within {difference:.1e} of the run's"


def _merge(model: Any, head: torch.Tensor | None, pad_id: int | None, source: Path, part: Path) -> None:
    """Write the model with its adapter in its weights, and what else the run's folder has."""
    merged = model.merge_and_unload()
    if head is None:
        merged.save_pretrained(str(part))
    else:
        save_full_reward(merged, head, pad_id, part)
    for file in source.iterdir():
        if not file.name.endswith(WEIGHTS) and file.name not in MODEL_FILES:
            shutil.copy2(file, part / file.name)


def _ends_of_run(run: Path, start: Start, model: Any) -> list[int]:
    """The ids that end a response of the run, where its own sampler stops."""
    tokenizer = load_tokenizer(start.tokenizer, start.revision, False)
    template = recorded_template(start, tokenizer, str(run), "export")
    return end_ids(model, read_chat_format(tokenizer, template).end_ids[-1], tokenizer.eos_token_id)


def _stops(model: Any, generation: GenerationConfig, ids: torch.Tensor, ends: list[int]) -> bool:
    """Does plain `generate` stop after each of these ids? Each is put where a text's third token would be."""
    places = ids[:1].repeat(len(ends), 1)

    def force(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if seen.shape[1] == places.shape[1] + 2:
            scores = torch.full_like(scores, -torch.inf)
            scores[range(len(ends)), ends] = 0.0
        return scores

    asked = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "pad_token_id": ends[0]}
    found = model.generate(input_ids=places, generation_config=generation, logits_processor=[force], **asked)
    return bool(found.shape[1] <= places.shape[1] + 3)


def _load(loader: Any, path: str, revision: str | None = None, **options: Any) -> Any:
    return loader.from_pretrained(str(model_folder(path, revision)), dtype=torch.float32, use_safetensors=True, **options)


def _load_run(start: Start) -> tuple[Any, torch.Tensor | None]:
    """The language model with the run's weights, or with its adapter on it, and the head (labels, D) of a reward model."""
    model = _load(AutoModelForCausalLM, start.base, start.revision)
    if start.adapter is None:
        return model, read_head(Path(start.base)) if is_reward_model(start.base, None) else None
    config, state, head = read_adapter(start.adapter)
    model = get_peft_model(model, config)
    set_peft_model_state_dict(model, state)
    return model, head


def _load_export(loader: Any, start: Start, folder: Path, **options: Any) -> Any:
    """As a user would: the folder alone, or the adapter on its base, which takes `options`."""
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(_load(loader, start.base, start.revision, **options), str(folder))
    return _load(loader, str(folder))


def _pad_id(run: Path, start: Start, model: Any) -> int | None:
    """What the classifier's config is to name as padding."""
    if start.manifest is None:
        raise UsageError(f"{run}: only a finished run of a reward model can be exported")
    if classifier_class(model.config) is None:
        kind = model.config.model_type
        raise UsageError(f"{run}: transformers has no sequence classifier for {kind}, so only rlhf can load it")
    pad_id: int | None = start.manifest["pad_token_id"]
    return pad_id


def _probe(start: Start, model: Any) -> torch.Tensor:
    """Two fixed texts of random tokens, (2, 24), that end as responses do: a classifier must not take their end for padding."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = load_tokenizer(start.tokenizer, start.revision, False).eos_token_id
    return ids


@torch.no_grad()
def _logps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logps: torch.Tensor = model.eval()(input_ids=ids).logits.log_softmax(-1)
    return logps


@torch.no_grad()
def _scores_of_run(model: Any, head: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The head at the last token of each text, (2, labels)."""
    states = model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    scores: torch.Tensor = states[:, -1] @ head.float().T
    return scores


@torch.no_grad()
def _scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """One text at a time, since some tokenizers have nothing to pad with."""
    model.eval()
    return torch.cat([model(input_ids=row[None]).logits for row in ids])
