"""What `rlhf label` asks of models: who judges, which pairs are asked about, who revises. Imported where there are some."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.data.records import Record, prompt_lines, spoken
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.job import frozen_models
from rlhf_cli.figures import count
from rlhf_cli.files import sha256_file, to_json, write_atomic, write_json
from rlhf_cli.judges.asking import UPDATES, EndpointJudge, Verdicts, prepare
from rlhf_cli.judges.endpoint import connect
from rlhf_cli.judges.judge import Judge, compare
from rlhf_cli.judges.local import LocalJudge
from rlhf_cli.judges.question import Question, read_principles
from rlhf_cli.labels import revise
from rlhf_cli.labels.questions import Row
from rlhf_cli.labels.select import choose, ensemble_scores, find_ensemble, only
from rlhf_cli.labels.verdicts import Judging, Verdict, now
from rlhf_cli.models.load import load_config, quiet_libraries, resolve_dtype
from rlhf_cli.models.memory import auto_budget, estimate
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.labels import LabelRecipe, Revise, Select
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.rewards import KINDS
from rlhf_cli.reports.labels import write_revisions
from rlhf_cli.rollout.judge_terms import LocalModel, find_judge
from rlhf_cli.rollout.reward_models import RewardModel
from rlhf_cli.runs.folder import RunFolder, read_metrics
from rlhf_cli.runs.manifest import Parent, build_manifest
from rlhf_cli.runs.parents import Start
from rlhf_cli.runs.resume import opened
from rlhf_cli.stages.training import FINE

TOGETHER = 64
"""Pairs that are asked about before their verdicts are written; an endpoint's answers are kept one by one beside them."""
VERDICTS = {1.0: "a", 0.5: "tie", 0.0: "b"}


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that a labelling asks, before any weights are loaded."""

    recipe: LabelRecipe
    place: str  # of the judge, begins every message
    local: LocalModel | None  # that judges; None: an endpoint does, or people
    ensemble: list[RewardModel]  # that chooses what is judged

    @property
    def parents(self) -> list[Parent]:
        """The runs that they come from."""
        starts = [*([self.local.start] if self.local else []), *(model.start for model in self.ensemble)]
        return [start.parent for start in starts if start.parent is not None]

    def judge(self, judging: Judging, name: str, folder: RunFolder, console: Console) -> None:
        """Ask until all is judged. RunError: the model does not answer."""
        recipe = self.recipe

        def say(done: int, total: int) -> None:
            console.say(f"{name} has judged {done:,} of {count(total, 'pair')}")

        with contextlib.closing(judging), contextlib.ExitStack() as stack:
            if self.local is not None:
                placed, most = frozen_models(recipe, Ranks(expected=False)), budget(recipe, self.local.start)
                judge: EndpointJudge | LocalJudge = self.local.load(recipe.judge, "pairwise", placed, "judge", most)
            else:
                answers = stack.enter_context(contextlib.closing(Verdicts(folder.path / "answers.jsonl")))
                judge = prepare(recipe.judge, "pairwise", self.place, lambda: answers)
            seeded = dataclasses.replace(judge.wording, seed=recipe.seed)
            judge_by_model(judging, name, dataclasses.replace(judge, wording=seeded), say)

    def selected(self, rows: Sequence[Row], settings: Select, folder: RunFolder, console: Console) -> list[Row]:
        """The rows with the pairs that are to be asked about; of a resumed run those that were chosen before."""
        if folder.selected.exists():
            chosen = list(read_metrics(folder.selected))
        else:
            scores = None
            if self.ensemble:
                most = min(budget(self.recipe, model.start) for model in self.ensemble)
                scores = ensemble_scores(self.ensemble, rows, frozen_models(self.recipe, Ranks(expected=False)), most)
            chosen = choose(rows, scores, settings, self.recipe.seed)
            write_atomic(folder.selected, b"".join(to_json(each) + b"\n" for each in chosen))
        console.say(f"{count(len(chosen), 'pair')} chosen by {settings.by}: {folder.selected}")
        if len(chosen) < settings.n:
            console.say(f"select.n: {settings.n:,} were asked for, and there are no more")
        return only(rows, chosen, folder.selected)


def find_models(loaded: Loaded, recipe: LabelRecipe, inputs: dict[str, str], check: bool) -> Models:
    """`inputs`: takes what a resumed run must have in common. UsageError: a model cannot judge, or score."""
    quiet_libraries()
    settings, place, trust = recipe.judge, loaded.named("judge"), recipe.trust_remote_code
    local, ensemble = None, list[RewardModel]()
    if settings.asks_model:
        local = find_judge(settings, "pairwise", place, trust_remote_code=trust, check=check)
        files = {"prompt": settings.prompt, "principles": settings.principles}
        inputs |= {f"judge.{name}": sha256_file(Path(path)) for name, path in files.items() if path is not None}
        inputs |= {"judge": local.identity} if local is not None else {}
    if recipe.select is not None and recipe.select.ensemble:
        where = loaded.named("select.ensemble")
        ensemble = find_ensemble(recipe.select.ensemble, where, trust_remote_code=trust, check=check)
        inputs |= {f"ensemble {model.name}": to_json(model.source).decode() for model in ensemble}
    return Models(recipe, place, local, ensemble)


def judge_by_model(judging: Judging, name: str, judge: Judge, say: Callable[[int, int], None]) -> None:
    """Ask about the pairs that are open. RunError: there is no answer; what was said before is written down."""
    left = judging.left(name)
    for start in range(0, len(left), TOGETHER):
        some, since = left[start : start + TOGETHER], time.monotonic()
        questions = [
            Question(prompt_lines(row.prompt), *(spoken(row.responses[number]) for number in order)) for row, order in some
        ]
        found = compare(judge, questions)
        took = round((time.monotonic() - since) / len(some), 4)
        for at, (row, order) in enumerate(some):
            drawn = [each.principle for each in judge.wording.drawn(questions[at])] if judge.wording.principles else []
            line = Verdict(
                row=row.number,
                order=[*order],
                verdict=VERDICTS[float(found.outcomes[at])],
                p=float(found.probability[at]),
                annotator=name,
                seconds=took,
                time=now(),
                hash=row.hash,
                first=found.first[:, at].tolist(),
                principles=drawn,
            )
            judging.add(line)
        done = start + len(some)
        if done == len(left) or done * UPDATES // len(left) > start * UPDATES // len(left):
            say(done, len(left))


def budget(recipe: LabelRecipe, start: Start) -> int:
    """Tokens of one forward pass of a model."""
    if recipe.tokens_per_device != "auto":
        return recipe.tokens_per_device
    device, trust = Ranks(expected=False).device, recipe.trust_remote_code
    config, dtype = load_config(start.base, start.revision, trust), resolve_dtype(recipe.dtype, device)
    memory = estimate(config, sections.Model("", trust_remote_code=trust), rank=1, dtype=dtype)
    return auto_budget(memory, 1, device)  # what is longer has a pass of its own


def revise_prompts(
    loaded: Loaded,
    recipe: LabelRecipe,
    settings: Revise,
    records: Sequence[Record],
    inputs: dict[str, str],
    *,
    check: bool,
    resume: bool,
    force: bool,
) -> None:
    """Answer the prompts, criticise, write anew. RunError: with its exit code; every text is kept, and --resume goes on."""
    quiet_libraries()
    console, place, started = Console(), loaded.named("revise"), time.monotonic()
    principles = read_principles(Path(settings.principles), f"{place}.principles")
    inputs["revise.principles"] = sha256_file(Path(settings.principles))
    writer: revise.Writer | None = None
    local: LocalModel | None = None
    if settings.endpoint is None:
        judge, trust = sections.Judge(path=settings.model), recipe.trust_remote_code
        local = LocalModel.find(judge, f"{place}.model", trust_remote_code=trust, check=check)
        inputs["revise.model"] = local.identity
    else:
        writer = _endpoint(loaded, recipe, settings, records)
    name = KINDS["model"].default_name(settings.model) if local else settings.model or "endpoint"
    sft = {row for row, record in enumerate(records) if revise.for_sft(record.prompt, recipe.seed, settings.split)}
    plan: list[tuple[str, object]] = [
        ("writes", name),
        ("prompts", f"{len(records):,}: {len(sft):,} for sft, {len(records) - len(sft):,} for pairs"),
        ("principles", f"{len(principles)}; one for each of {count(settings.rounds, 'round')}"),
    ]
    console.plan([("revision", plan)])
    if check:
        console.say(FINE)
        return
    with opened(recipe, loaded.stage, inputs, resume=resume, force=force) as folder:
        drawn = [revise.principles_of(record, principles, settings.rounds, recipe.seed) for record in records]
        with contextlib.closing(revise.Steps(folder.revisions, records)) as steps:
            if local is not None:
                models = frozen_models(recipe, Ranks(expected=False))
                models.add("writer", local.start)
                writer = revise.LocalWriter(local, models.hosts["writer"], recipe.rollout)
            assert writer is not None
            chains = revise.revise(records, drawn, recipe.seed, writer, steps, console.say)
        _write(folder, records, chains, sft, name, recipe.seed)
        console.say(f"{folder.supervised}, {folder.pairs}; report: {folder.page}")
        own: dict[str, Any] = {"prompts": len(records), "seconds": round(time.monotonic() - started, 3)}
        own["parents"] = [dataclasses.asdict(local.start.parent)] if local and local.start.parent else []
        write_json(folder.manifest, build_manifest(folder, "label", "finished", recipe.seed, own))


def _endpoint(loaded: Loaded, recipe: LabelRecipe, settings: Revise, records: Sequence[Record]) -> revise.EndpointWriter:
    """UsageError: the endpoint is none, or cannot be told all of a prompt."""
    if any(record.given for record in records):
        what = "prompts with tools or options of a chat template are answered by a local model alone"
        raise UsageError(f"{loaded.named('prompts')}: {what}. name one in revise.model, or leave them out")
    judge = sections.Judge(endpoint=settings.endpoint, model=settings.model or "default", timeout=settings.timeout)
    place = loaded.named("revise")
    return revise.EndpointWriter(connect(judge, place), settings.retries, settings.parallel, recipe.rollout, place)


def _write(
    folder: RunFolder, records: Sequence[Record], chains: dict[int, list[revise.Step]], sft: set[int], name: str, seed: int
) -> None:
    """Rows, figures and report; a pair of equal texts is none."""
    changed = {row for row, own in chains.items() if own[-1].text.strip() != own[0].text.strip()}
    supervised = [revise.sft_row(records[row], own) for row, own in chains.items() if row in sft]
    pairs = [revise.pair_row(records[row], chains[row], name) for row in sorted(changed - sft)]
    for path, rows in ((folder.supervised, supervised), (folder.pairs, pairs)):
        write_atomic(path, b"".join(to_json(row) + b"\n" for row in rows))
    counts = {"prompts": len(records), "lost": len(records) - len(chains), "sft": len(supervised), "pairs": len(pairs)}
    drift = revise.drift([*chains.values()], seed)
    figures = {**counts, "unchanged": len(chains.keys() - sft - changed), "rounds": drift}
    write_json(folder.labels, figures)
    write_revisions(folder, figures)
