"""What `rlhf label` asks of models: who judges, and which pairs are asked about. Imported where there are some."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rlhf_cli.console import Console
from rlhf_cli.evaluation.job import frozen_models
from rlhf_cli.figures import count
from rlhf_cli.files import sha256_file, to_json, write_atomic
from rlhf_cli.judges.asking import EndpointJudge, Verdicts, prepare
from rlhf_cli.judges.local import LocalJudge
from rlhf_cli.labels.models import budget, judge_by_model
from rlhf_cli.labels.questions import Row
from rlhf_cli.labels.select import choose, ensemble_scores, find_ensemble, only
from rlhf_cli.labels.verdicts import Judging
from rlhf_cli.models.load import quiet_libraries
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.labels import LabelRecipe, Select
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.rollout.judge_terms import LocalModel, find_judge
from rlhf_cli.rollout.reward_models import RewardModel
from rlhf_cli.runs.folder import RunFolder, read_metrics
from rlhf_cli.runs.manifest import Parent


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
