"""Do the tests notice? Each of these faults is put into a copy of the project, one line each, and its tests are run on it.

Prints what caught each fault, and exits 1 if one survives. Some minutes; words on the command line choose faults that have them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NO_TESTS = 5
"""Pytest's exit code where none has the mark."""


class Fault(NamedTuple):
    what: str
    file: str
    right: str
    wrong: str
    tests: str


FAULTS = (
    Fault(
        "dpo: label smoothing has the wrong sign",
        "objectives/dpo.py",
        "+ self.label_smoothing * super().hard_loss(-margin)",
        "- self.label_smoothing * super().hard_loss(-margin)",
        "objectives",
    ),
    Fault(
        "discopop: the two losses change sides", "objectives/discopop.py", "(-switch).sigmoid()", "switch.sigmoid()", "objectives"
    ),
    Fault("truncation: a weight may be of any size", "objectives/advantages.py", ".clip(max=MOST_WEIGHT)", "", "rollout"),
    Fault(
        "truncation: nothing is weighed",
        "rollout/source.py",
        "advantages.advantages * weights",
        "advantages.advantages",
        "rollout",
    ),
    Fault(
        "vllm: the gap is that of probabilities turned round",
        "rollout/experience.py",
        "tokens.old) - np.concatenate(told)",
        "tokens.old) + np.concatenate(told)",
        "rollout",
    ),
    Fault(
        "vllm: it draws from the weights of before",
        "rollout/vllm.py",
        "        if rank is None:",
        "        if rank is None and not begun:",
        "rollout",
    ),
    Fault("wpo: a pair may weigh more than 1", "objectives/wpo.py", ".clamp(max=0.0)", "", "objectives"),
    Fault("tdpo2: chosen responses are held back too", "objectives/tdpo2.py", "figure.detach()", "figure", "objectives"),
    Fault(
        "aot: what is below learns nothing", "objectives/aot.py", "other_a - ends[1]", "other_a - ends[1].detach()", "objectives"
    ),
    Fault(
        "general: vectors keep their length",
        "models/heads.py",
        "(v / (v * v).sum(-1)[..., None] ** 0.5 for",
        "(v for",
        "objectives",
    ),
    Fault(
        "sppo: a response that wins half is pushed too", "objectives/sppo.py", "(side.scores - 0.5)", "side.scores", "objectives"
    ),
    Fault(
        "dno: labels are certain",
        "objectives/dno.py",
        "(pair.chosen.scores - pair.rejected.scores).sigmoid()",
        "1.0",
        "objectives",
    ),
    Fault(
        "self-play: a response does not meet itself", "rollout/source.py", "((k - 1) * score + 0.5) / k", "score", "objectives"
    ),
    Fault(
        "xpo: the reference draws with the policy's random numbers",
        "rollout/source.py",
        "Stream.EXPLORE.seed",
        "Stream.ROLLOUT.seed",
        "objectives",
    ),
    Fault("exploitability below 0", "evaluation/winrate.py", "max(0.0, each - 0.5)", "each - 0.5", "evaluation"),
    Fault(
        "step: statistics take parts of a batch for it",
        "training/step.py",
        "start + tree for tree",
        "tree for tree",
        "objectives",
    ),
    Fault(
        "soft labels: a margin is asked of the chosen response alone",
        "objectives/bradley_terry.py",
        "logsigmoid(-d - m)",
        "logsigmoid(m - d)",
        "objectives",
    ),
    Fault("ipo: the target is 1/β", "objectives/ipo.py", "return 1 / (2 * self.beta)", "return 1 / self.beta", "objectives"),
    Fault(
        "kto: z0 may be below 0", "objectives/kto.py", 'logratio - max(given["kl"], 0.0)', 'logratio - given["kl"]', "objectives"
    ),
    Fault(
        "ppo: γ is forgotten between tokens",
        "objectives/advantages.py",
        "+= gamma * lam * sums[:, t + 1]",
        "+= lam * sums[:, t + 1]",
        "objectives",
    ),
    Fault(
        "rloo: a response is in its own baseline",
        "objectives/rloo.py",
        "- returns) / (np.bincount(prompt)[prompt] - 1)",
        ") / np.bincount(prompt)[prompt]",
        "objectives",
    ),
    Fault(
        "ppo: the upper clip is 1 + 2ε",
        "objectives/policy_loss.py",
        "1 - self.low, 1 + self.high)",
        "1 - self.low, 1 + 2 * self.high)",
        "objectives",
    ),
    Fault(
        "grpo: long responses count for more",
        "objectives/policy_loss.py",
        "return share if",
        "return 1.0 if",
        "objectives",
    ),
    Fault(
        "grpo: tied scores keep their rounding noise",
        "objectives/grpo.py",
        "np.where(is_tied(values, prompt), 0.0, centred)",
        "centred",
        "objectives",
    ),
    Fault(
        "grpo: the same prompts are drawn again",
        "rollout/source.py",
        "self.prompts.batch(step + k)",
        "self.prompts.batch(step)",
        "rollout",
    ),
    Fault(
        "plackett_luce: the best of the wrong rest",
        "objectives/plackett_luce.py",
        "tree.flip(0).logcumsumexp(0).flip(0)",
        "tree.logcumsumexp(0)",
        "objectives",
    ),
    Fault(
        "step: the loss is divided by its pass",
        "training/step.py",
        "scale / max(1, counts[unit])",
        "scale / max(1, len(batch.trees))",
        "training",
    ),
    Fault("step: no gradient is clipped", "training/step.py", "update.max_grad_norm, total)", "1e9, total)", "training"),
    Fault(
        "step: a metric of two units loses one",
        "training/step.py",
        "found[name] = found.get(name, 0.0) + total",
        "found[name] = total",
        "training objectives",
    ),
    Fault(
        "step: every update has the same dropout",
        "training/step.py",
        "update.step, update.number, ranks.rank)",
        "update.step, 0, ranks.rank)",
        "training reliability",
    ),
    Fault("trees: branches see each other", "data/trees.py", "same_tree & reachable &", "same_tree &", "data models"),
    Fault(
        "trees: a branch starts one position late",
        "data/trees.py",
        "np.arange(prompt, prompt + len(response))",
        "np.arange(prompt + 1, prompt + 1 + len(response))",
        "data models",
    ),
    Fault("attention: the window is a token wider", "models/attention.py", "(age < window)", "(age <= window)", "models"),
    Fault("attention: a sequence's window is a token wider", "models/attention.py", "window - 1, 0", "window, 0", "models"),
    Fault("rollout: a recorded step has old tokens", "rollout/decoders.py", "[:live] = tokens", "[:1] = tokens[:1]", "rollout"),
    Fault("sources: every epoch in one order", "data/sources.py", "DataStream.EPOCH, epoch]", "DataStream.EPOCH, 0]", "data"),
    Fault(
        "sources: a prompt's rows on both sides of the hold-out",
        "data/sources.py",
        "prompt_share(record, seed)",
        "prompt_share(record._replace(prompt=record.where), seed)",
        "data",
    ),
    Fault("sources: truncated rows are not lost", "data/dataset.py", " + e.truncated for e", " for e", "data stages"),
    Fault(
        "sources: the last short batch is dropped",
        "data/batches.py",
        "math.ceil(len(self.trees) / self.batch_size)",
        "max(1, len(self.trees) // self.batch_size)",
        "data",
    ),
    Fault(
        "checkpoint: damage is not noticed",
        "training/checkpoint.py",
        "return bool(recorded == found)",
        "return True",
        "training reliability",
    ),
    Fault(
        "checkpoint: the oldest counts as the newest",
        "training/checkpoint.py",
        'glob("step-*"), reverse=True)',
        'glob("step-*"))',
        "training reliability",
    ),
    Fault(
        "checkpoint: one too few is kept", "training/checkpoint.py", "[:-keep]", "[: 1 - keep or None]", "training reliability"
    ),
    Fault(
        "checkpoint: other roles' weights are not put back",
        "training/checkpoint.py",
        "parameter.copy_(saved[name])",
        "saved[name]",
        "training reliability",
    ),
    Fault(
        "resume: lines after the checkpoint stay",
        "training/loop.py",
        "log.truncate_after(size, digest)",
        "True",
        "reliability",
    ),
    Fault(
        "resume: sums before the stop are lost",
        "training/loop.py",
        "partial.sums + result.sums",
        "result.sums",
        "reliability",
    ),
    Fault(
        "resume: other data is taken without a word",
        "runs/resume.py",
        "if key in keys and old.get(key) != inputs.get(key)]",
        "if key == 0]",
        "reliability runs",
    ),
    Fault("rollout: a prompt's samples are alike", "rollout/generate.py", "{number},{sample}", "{number}", "rollout"),
    Fault(
        "rollout: the penalty is for those that ended",
        "rollout/experience.py",
        "missing_eos_penalty * ~ended",
        "missing_eos_penalty * ended",
        "invariance/test_rollouts.py",
    ),
    Fault(
        "rollout: scores times their deviation",
        "rollout/reward_models.py",
        "- self.mean) / self.std",
        "- self.mean) * self.std",
        "rollout",
    ),
    Fault("rollout: the worst response ranks best", "rollout/source.py", "lambda k: -own[k]", "lambda k: own[k]", "rollout"),
    Fault(
        "evaluation: equal texts are told apart by noise",
        "evaluation/winrate.py",
        "np.where(same, 0.0, own - other)",
        "own - other",
        "evaluation",
    ),
    Fault(
        "evaluation: intervals of few prompts too narrow",
        "evaluation/intervals.py",
        "student(prompts - 1) * math.sqrt(prompts / (prompts - 1))",
        "student(prompts - 1)",
        "evaluation",
    ),
    Fault(
        "evaluation: best of n weighs ranks wrongly",
        "evaluation/overoptimisation.py",
        "((rank - n) / (rank - 1))",
        "((rank - n) / rank)",
        "evaluation",
    ),
    Fault(
        "evaluation: lines at equal KL are straight in KL",
        "evaluation/at_kl.py",
        "np.sqrt(np.maximum(kl, 0.0))",
        "np.maximum(kl, 0.0)",
        "evaluation",
    ),
    Fault(
        "evaluation: a judge's second order is read as its first",
        "judges/judge.py",
        "1 - found[each.swapped()]",
        "found[each.swapped()]",
        "judges",
    ),
    Fault(
        "evaluation: ratings without the prior", "evaluation/winrate.py", "met.sum(0) + 0.5", "met.sum(0) + 1e-9", "evaluation"
    ),
)


def outcome(copy: Path, fault: Fault) -> str | None:
    """The first test that fails on the copy with the fault, of the quick ones if one does; None where all pass."""
    path = copy / "rlhf_cli" / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        raise SystemExit(f"{fault.what}: {fault.file} has '{fault.right}' {text.count(fault.right)} times, not once")
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    folders = [f"tests/{name}" for name in fault.tests.split()]
    env = {**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
    for marks in ("not slow", "slow"):
        words = ["-m", "pytest", "-q", "-x", "-n", "2", "-m", marks, "-p", "no:cacheprovider", *folders]
        done = subprocess.run([sys.executable, *words], cwd=copy, env=env, capture_output=True, text=True)
        if failed := [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]:
            break
        if done.returncode not in (0, NO_TESTS):  # an error in a fixture proves nothing
            raise SystemExit(f"{fault.what}: the tests did not run: exit code {done.returncode}\n{done.stdout[-2000:]}")
    path.write_text(text, encoding="utf-8")
    return failed[0] if failed else None


def main() -> int:
    chosen = [fault for fault in FAULTS if not sys.argv[1:] or any(word in fault.what for word in sys.argv[1:])]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for fault in chosen:
            caught = outcome(copy, fault)
            survived += caught is None
            print(f"{'caught  ' if caught else 'SURVIVED'}  {fault.what}{f': {caught}' if caught else ''}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} were caught")
    return int(survived > 0)


if __name__ == "__main__":
    raise SystemExit(main())
