"""What `rlhf label` asks of models: who judges, which pairs are asked about, who revises. Imported where there are some."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.data.records import Record, prompt_lines, spoken
from rlhf_cli.data.requests import Lent
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.job import frozen_models
from rlhf_cli.figures import count
from rlhf_cli.files import sha256_file, to_json, write_atomic, write_json
from rlhf_cli.judges.asking import UPDATES, EndpointJudge, Verdicts, prepare
from rlhf_cli.judges.endpoint import connect
from rlhf_cli.judges.judge import Comparisons, Judge, compare
from rlhf_cli.judges.local import LocalJudge
from rlhf_cli.judges.question import Question, read_principles
from rlhf_cli.labels import revise
from rlhf_cli.labels.questions import Row, Shown
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
from rlhf_cli.rollout.reward_functions import PARALLEL, TIMEOUT, RewardFunction, load_function
from rlhf_cli.rollout.reward_models import RewardModel
from rlhf_cli.rollout.rewards import Answers
from rlhf_cli.runs.folder import RunFolder, read_metrics
from rlhf_cli.runs.manifest import Parent, build_manifest
from rlhf_cli.runs.parents import Start
from rlhf_cli.runs.resume import opened
from rlhf_cli.stages.training import FINE

TOGETHER = 64
"""Pairs that are asked about before their verdicts are written; an endpoint's answers are kept one by one beside them."""
NONSENSE = 5
"""Answers of an endpoint in a row that are no verdicts and are put up with."""
VERDICTS = {1.0: "a", 0.5: "tie", 0.0: "b"}
Asked = tuple[Comparisons, list[list[str]]]
"""What was said of pairs, and the principles of each."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The models, or the function, that a labelling asks, before any weights are loaded."""

    recipe: LabelRecipe
    place: str  # of the judge, begins every message
    local: LocalModel | None  # that judges; None: an endpoint does, or a function, or people
    function: RewardFunction | None
    columns: Lent  # that the function reads
    ensemble: list[RewardModel]  # that chooses what is judged

    @property
    def parents(self) -> list[Parent]:
        """The runs that they come from."""
        starts = [*([self.local.start] if self.local else []), *(model.start for model in self.ensemble)]
        return [start.parent for start in starts if start.parent is not None]

    def judge(self, judging: Judging, name: str, folder: RunFolder, console: Console) -> None:
        """Ask until all is judged. RunError: the model does not answer."""
        with contextlib.closing(judging), self._asking(folder) as ask:
            judge_pairs(judging, name, ask, lambda done, of: console.say(f"{name} has judged {done:,} of {count(of, 'pair')}"))
        if silent := sum(line.verdict == "skip" for line in judging.said(name)):
            console.say(f"{count(silent, 'pair')} skipped: {name} said nothing that is a verdict")

    @contextlib.contextmanager
    def _asking(self, folder: RunFolder) -> Iterator[Callable[[Sequence[Shown]], Asked]]:
        """Who judges, with their weights."""
        recipe = self.recipe
        if self.function is not None:
            yield partial(ask_function, self.function, recipe.judge.rationality)
            return
        with contextlib.ExitStack() as stack:
            if self.local is not None:
                placed, most = frozen_models(recipe, Ranks(expected=False)), budget(recipe, self.local.start)
                judge: EndpointJudge | LocalJudge = self.local.load(recipe.judge, "pairwise", placed, "judge", most)
            else:
                answers = stack.enter_context(contextlib.closing(Verdicts(folder.path / "answers.jsonl")))
                asked = prepare(recipe.judge, "pairwise", self.place, lambda: answers)
                judge = dataclasses.replace(asked, asking=dataclasses.replace(asked.asking, nonsense=NONSENSE))
            yield partial(ask_model, dataclasses.replace(judge, wording=dataclasses.replace(judge.wording, seed=recipe.seed)))

    def selected(
        self, rows: Sequence[Row], labelled: Sequence[Row], settings: Select, folder: RunFolder, console: Console
    ) -> list[Row]:
        """The rows with the pairs that are to be asked about; of a resumed run those that were chosen before."""
        if folder.selected.exists():
            chosen = list(read_metrics(folder.selected))
        else:
            scores = None
            if self.ensemble:
                most = min(budget(self.recipe, model.start) for model in self.ensemble)
                scores = ensemble_scores(self.ensemble, rows, frozen_models(self.recipe, Ranks(expected=False)), most)
            chosen = choose(rows, scores, settings, self.recipe.seed, labelled)
            write_atomic(folder.selected, b"".join(to_json(each) + b"\n" for each in chosen))
        console.say(f"{count(len(chosen), 'pair')} chosen by {settings.by}: {folder.selected}")
        if len(chosen) < settings.n:
            console.say(f"select.n: {settings.n:,} were asked for, and there are no more")
        return only(rows, chosen, folder.selected)


def find_models(loaded: Loaded, recipe: LabelRecipe, inputs: dict[str, str], check: bool) -> Models:
    """`inputs`: takes what a resumed run must have in common. UsageError: a model cannot judge, or score."""
    quiet_libraries()
    settings, place, trust = recipe.judge, loaded.named("judge"), recipe.trust_remote_code
    local, function, columns, ensemble = None, None, dict[str, str | None](), list[RewardModel]()
    if (named := settings.function) is not None:
        called = load_function(named, place)
        function = RewardFunction(KINDS["function"].default_name(named), 1.0, place, named, called, PARALLEL, TIMEOUT)
        inputs |= function.code
        columns |= function.columns(sections.Reward(function=named), place)
        if not recipe.rows and (needed := [name for name, who in columns.items() if who is not None]):
            raise UsageError(f"{place}: {named} reads the column '{needed[0]}', and samples have no columns. give rows")
    elif not settings.asks_people:
        local = find_judge(settings, "pairwise", place, trust_remote_code=trust, check=check)
        files = {"prompt": settings.prompt, "principles": settings.principles}
        inputs |= {f"judge.{name}": sha256_file(Path(path)) for name, path in files.items() if path is not None}
        inputs |= {"judge": local.identity} if local is not None else {}
    if recipe.select is not None and recipe.select.ensemble:
        where = loaded.named("select.ensemble")
        ensemble = find_ensemble(recipe.select.ensemble, where, trust_remote_code=trust, check=check)
        inputs |= {f"ensemble {model.name}": to_json(model.source).decode() for model in ensemble}
    return Models(recipe, place, local, function, columns, ensemble)


def ask_model(judge: Judge, some: Sequence[Shown]) -> Asked:
    """RunError: there is no answer."""
    questions = [Question(prompt_lines(row.prompt), *(spoken(row.responses[number]) for number in order)) for row, order in some]
    drawn = [judge.wording.drawn(each) if judge.wording.principles else [] for each in questions]
    return compare(judge, questions), [[each.principle for each in own] for own in drawn]


def ask_function(function: RewardFunction, rationality: float | None, some: Sequence[Shown]) -> Asked:
    """P(the first is better) by the difference of the numbers it gives; NaN where it returns None. One call for all pairs.

    With a rationality β it is a Bradley–Terry annotator's, σ(β · difference) (Lee et al. 2021, B-Pref), else that of one who is
    never wrong. UsageError: it fails, or returns no numbers.
    """
    texts = [[spoken(row.responses[number]) for number in order] for row, order in some]
    answers = Answers([], [row.record for row, _ in some], texts, [[True, True]] * len(some))
    one, other = function.score(answers).reshape(-1, 2).T
    sure = np.sign(one - other) if rationality is None else np.tanh(rationality * (one - other) / 2)
    return Comparisons(np.stack([(1 + sure) / 2] * 2), ~np.isnan(sure)), [[] for _ in some]


def judge_pairs(judging: Judging, name: str, ask: Callable[[Sequence[Shown]], Asked], say: Callable[[int, int], None]) -> None:
    """Ask about the pairs that are open. RunError: there is no answer; what was said before is written down."""
    left = judging.left(name)
    for start in range(0, len(left), TOGETHER):
        some, since = left[start : start + TOGETHER], time.monotonic()
        found, principles = ask(some)
        took = round((time.monotonic() - since) / len(some), 4)
        for at, (row, order) in enumerate(some):
            p, first = float(found.probability[at]), found.first[:, at].tolist()
            said = not math.isnan(p)
            verdict = VERDICTS[float(found.outcomes[at])] if said else "skip"
            line = Verdict(row.number, [*order], verdict, p if said else None, name, took, now(), row.hash)
            judging.add(dataclasses.replace(line, first=first if said else None, principles=principles[at]))
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
    place = loaded.named("revise")
    server = connect(settings.endpoint, settings.model or "default", settings.timeout, place)
    return revise.EndpointWriter(server, settings.retries, settings.parallel, recipe.rollout, place)


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
