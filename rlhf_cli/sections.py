"""The sections of recipes: every key with its type, default, meaning and bounds, in one place each.

The loader, `--help`, the docs and the resolved recipe read these dataclasses; data and models are configured by them.
`key(default, help, …)` attaches what a type cannot say. A key without a default is required.
"""

# ruff: noqa: RUF009  (key() only makes a dataclass field)

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal


class Expanded(str):
    """A text of a recipe in which ${NAME} was replaced by the environment's value, which is nobody's to read in a run folder."""

    written: str  # as the recipe has it


def as_written(text: str | None) -> str | None:
    """A text as its recipe has it."""
    return text.written if isinstance(text, Expanded) else text


def key(
    default: Any = MISSING,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    path: bool = False,
    last: bool = False,
) -> Any:
    """A dataclass field with a one-line help, inclusive bounds, and whether it is a path, which a run folder has in full.

    `last`: it is shown and written after the keys that subclasses add.
    """
    metadata = {"help": help, "low": low, "high": high, "path": path, "last": last}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Model:
    path: str = key(help="hub id, transformers folder, or the folder of an earlier run", path=True)
    revision: str | None = key(None, "hub revision")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "of frozen weights and of compute; trained weights are float32"
    )
    attention: Literal["auto", "sdpa", "flex", "flash", "eager"] = key(
        "auto", "attention kernel; auto: one call per tree on a CPU, on an NVIDIA GPU what is fastest there"
    )
    quantize: Literal["4bit", "8bit"] | None = key(None, "quantised frozen base (extra: quant)")
    gradient_checkpointing: bool = key(False, "recompute activations in backward: less memory, ~30 % more time")
    chat_template: str | None = key(None, "null: the tokenizer's own, else a plain built-in one; a Jinja file; none", path=True)
    template_options: dict[str, bool | int | float | str] = key(
        {}, "variables of the chat template, e.g. {enable_thinking: false}; kept with the model"
    )
    trust_remote_code: bool = key(False, "run code from the model folder; only with --set, never from the file")


@dataclass(frozen=True)
class Lora:
    r: int = key(16, "rank", low=1)
    alpha: float = key(32.0, "scale: the update is alpha/r · B·A")
    dropout: float = key(0.0, "on the adapter's input", low=0.0, high=0.99)
    target_modules: str | list[str] = key("all-linear", "module names, or all-linear")
    train_tokens: list[str | int] = key([], "tokens, or their ids, whose embeddings train too: those that the base never saw")
    merge_parent: bool = key(False, "merge the parent's adapter into the base when its settings differ")


RowFormat = Literal[
    "auto",
    "messages",
    "sharegpt",
    "prompt-completion",
    "alpaca",
    "text",
    "preference",
    "hh",
    "choice",
    "ranked",
    "scored",
    "unpaired",
    "tree",
    "steps",
    "prompt",
]
"""The names of data/formats.FORMATS, and auto: the one that the rows have."""


@dataclass(frozen=True)
class Rows:
    """Rows of a file, a folder or the hub."""

    path: str = key(
        help="hub id, .jsonl[.gz] | .json | .csv | .tsv | .parquet file, glob, folder, or what save_to_disk wrote", path=True
    )
    revision: str | None = key(None, "hub revision: a branch, a tag or the hash of a commit")
    name: str | None = key(None, "hub configuration, or a folder of the data set")
    split: str = key("train", "split of the hub, or of a folder that has train, test or validation")
    format: RowFormat = key("auto", "row format")
    columns: dict[str, str] = key({}, 'ours: theirs, or a text with columns in braces, as in "{instruction}\\n\\n{input}"')
    ignore: list[str] = key([], "columns, and keys of turns, that change what a row means and are left out on purpose")
    limit: int | None = key(None, "first N rows after a seeded shuffle", low=1)


@dataclass(frozen=True)
class Source(Rows):
    weight: float = key(1.0, "share of each epoch when there are several sources, whatever their sizes", low=0.0)


@dataclass(frozen=True)
class EvalSource(Rows):
    holdout: float = key(
        0.0, "only the rows that training with this holdout on the same source has held out; 0: all", low=0.0, high=0.9
    )
    holdout_seed: int | None = key(None, "of those rows; null: that of the models' runs, else 0", low=0)


@dataclass(frozen=True)
class Data:
    """Where rows come from and how they are read."""

    train: list[Source] = key(help="a path, or a list of sources")
    eval: list[Source] | None = key(None, "the same, held out")
    holdout: float = key(0.0, "share of train that is held out, chosen by the first user turn", low=0.0, high=0.9)
    holdout_seed: int = key(0, "which prompts are held out: independent of seed, and the same in all stages", low=0)
    max_length: int = key(1024, "tokens of prompt + response", low=2)
    overlong: Literal["drop", "error", "truncate-prompt", "truncate-response"] = key("drop", "what happens to longer rows")
    empty_think: Literal["prompt", "learn"] = key(
        "prompt", "a think block with nothing in it that the chat template writes by itself: a part of the prompt, or learned"
    )
    control_tokens: Literal["reject", "keep"] = key("reject", "text that contains the tokenizer's control tokens")
    max_lost: float = key(0.05, "exit 2 if more than this share of rows is dropped or truncated", low=0.0, high=1.0)
    shuffle: bool = key(True, "false: file order")

    @property
    def train_on(self) -> Literal["auto", "all", "last"]:
        """Which assistant turns are supervised: comparing responses says nothing about the turns before them."""
        return "last"


@dataclass(frozen=True)
class SftData(Data):
    train_on: Literal["auto", "all", "last"] = key(
        "auto", "which assistant turns of a conversation are supervised; auto: of Human/Assistant transcripts the last, else all"
    )


@dataclass(frozen=True)
class KeepBest:
    metric: str = key(help="name of an evaluation metric")
    mode: Literal["min", "max"] = key(help="min or max")


@dataclass(frozen=True)
class StopRule:
    above: float | None = key(None, "stop when the metric is above this")
    below: float | None = key(None, "stop when the metric is below this")
    falls: float | None = key(None, "stop when the metric has lost this share of its best", low=0.0, high=1.0)


@dataclass(frozen=True)
class Batches:
    """How long a run is, and what a step sees."""

    epochs: float = key(1.0, "passes over the data", low=0.0)
    steps: int | None = key(None, "overrides epochs", low=1)
    batch_size: int = key(32, "prompts (with all their responses) per optimiser step, over all devices", low=1)
    tokens_per_device: int | Literal["auto"] = key("auto", "packing budget of one forward pass; never changes the result", low=1)


@dataclass(frozen=True)
class Updates:
    """What a step makes of its gradients."""

    learning_rate: float | None = key(None, "default per stage and per LoRA or full", low=0.0)
    schedule: Literal["cosine", "linear", "constant"] = key("cosine", "after the warm-up")
    warmup: float = key(0.03, "share of steps if below 1, else a number of steps", low=0.0)
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = key("adamw", "update rule")
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's", low=0.0, high=0.99999)
    weight_decay: float = key(0.0, "decoupled", low=0.0)
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm", low=0.0)


@dataclass(frozen=True)
class Cadence:
    """What happens now and then; all of it may change when a run is resumed."""

    log_every: int | None = key(
        None, "steps between two printed lines, where there is no terminal; null: about 50 lines a run", low=1
    )
    eval_every: float | None = key(0.25, "below 1: share of the run; else steps; null: at the end alone", low=0.0)
    save_every: float | None = key(0.25, "the same, for checkpoints", low=0.0)
    keep_checkpoints: int = key(2, "the newest N are kept", low=1)
    keep_best: KeepBest | None = key(None, "also keep the best checkpoint by an evaluation metric")
    stop_if: dict[str, StopRule] = key({}, "metric: {above | below | falls: x} ends the run cleanly")


@dataclass(frozen=True)
class Train(Cadence, Updates, Batches):
    """How a run trains."""


@dataclass(frozen=True)
class PolicyReference:
    model: str = key("start", "start: the weights that this stage starts from; base: the bare base model; a path", path=True)


@dataclass(frozen=True)
class Reference(PolicyReference):
    model: str = key(
        "auto",
        "start: the weights that this stage starts from; previous: the policy at the last refresh of rollout; base: the bare "
        "base model; a path; auto: previous for rebel, sppo and dno with rollout, else start",
        path=True,
    )
    cache: bool = key(True, "compute its log-probabilities once and keep them; false: again in every step")


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn from a policy."""

    max_new_tokens: int = key(128, "tokens of a response at most; longer ones are cut off", low=1)
    temperature: float = key(1.0, "of sampling; the KL is that of the policies at 1 alone", low=1e-2, high=100.0)
    responses_per_prompt: int = key(1, "more of them make the intervals narrower", low=1)
    missing_eos_penalty: float = key(0.0, "taken off the score of a response that did not end", low=0.0)


@dataclass(frozen=True)
class VllmServer:
    endpoint: str = key(help="URL of a running `vllm serve`, e.g. http://localhost:8000/v1; its key is OPENAI_API_KEY")
    folder: str | None = key(None, "where both machines have the adapters, under this path; null: a temporary folder", path=True)


@dataclass(frozen=True)
class PolicySampling(Sampling):
    temperature: float = key(1.0, "of sampling; the log-probabilities of the ppo kinds are taken at it too", low=1e-2, high=100.0)
    responses_per_prompt: int = key(1, "rloo and grpo need 2 or more", low=1)
    engine: Literal["transformers", "vllm"] | VllmServer = key(
        "transformers", "what samples; vllm: in this process (an extra); {endpoint: URL}: a running `vllm serve`, for adapters"
    )


@dataclass(frozen=True)
class Warping:
    """From which distribution tokens are drawn instead of the policy's own, in the order in which the keys apply."""

    repetition_penalty: float = key(
        1.0, "of tokens that prompt or response have already: a logit above 0 is divided by it, one below multiplied", low=0.01
    )
    top_k: int | None = key(None, "of the k most likely tokens alone; null: of all", low=1)
    top_p: float = key(1.0, "of the most likely tokens that together reach this probability", low=1e-6, high=1.0)
    min_p: float = key(0.0, "of tokens that have this share of the most likely one's probability", low=0.0, high=1.0)

    @property
    def warps(self) -> dict[str, float]:
        """The keys that change the distribution, with their values."""
        return {key.name: vars(self)[key.name] for key in fields(Warping) if vars(self)[key.name] != key.default}


@dataclass(frozen=True)
class EvalSampling(Warping, Sampling):
    """How responses are drawn from the policies that are evaluated."""


@dataclass(frozen=True)
class OnlineSampling(Warping, PolicySampling):
    responses_per_prompt: int = key(2, "they are ranked by the reward; 2: one pair", low=2)
    refresh: int = key(1, "steps between two draws from the policy; 1: online, more: iterative", low=1)


@dataclass(frozen=True)
class Explore:
    """Optimism: what the reference says itself is made less likely, so that the policy looks elsewhere for what is preferred."""

    kind: Literal["xpo", "selm"] = key(
        "xpo", "xpo: the reference writes one of a prompt's responses; selm: one more, which is not compared"
    )
    alpha: float = key(0.001, "α: weight of log π of that response; of selm, times β, of its log-ratio", low=0.0)


@dataclass(frozen=True)
class Match:
    """Whether a response has the right answer."""

    column: str = key(help="the column of the right answers")
    extract: str = key(
        "text",
        "where an answer stands: text (all of it), last-number, boxed, or a regular expression with one group",
    )
    compare: Literal["exact", "number", "math"] = key("exact", "as text, as numbers, or as mathematics (math-verify, an extra)")


@dataclass(frozen=True)
class Length:
    """A penalty on the tokens of a response, its end included; one of the two."""

    max: int | None = key(None, "0 up to so many tokens, then −1 for each so many more", low=1)
    target: int | None = key(None, "n: −|tokens − n|/n", low=1)


@dataclass(frozen=True)
class Judge:
    """A language model that compares or scores responses: behind an OpenAI-compatible interface, or a local one."""

    endpoint: str | None = key(
        None, "URL that /chat/completions follows, e.g. http://localhost:8000/v1; its key is OPENAI_API_KEY of the environment"
    )
    model: str | None = key(None, "its name on the server")
    path: str | None = key(None, "instead of an endpoint: a run, an adapter or a model, asked without a server", path=True)
    mode: Literal["score", "pairwise"] | None = key(
        None, "score: how good a response is, 1 to 10; pairwise: is it the better one; null: score in a reward, else pairwise"
    )
    prompt: str | None = key(
        None, "a file with {prompt}, {a}, {b}; to score {prompt}, {response}; null: a built-in one", path=True
    )
    principles: str | None = key(None, "a file with a principle a line, one of which stands at {principle}", path=True)
    draws: int = key(1, "principles that each question is asked with; their answers are averaged", low=1)
    timeout: float = key(60.0, "seconds that an answer may take", low=0.1)
    retries: int = key(4, "how often a question is asked again that got no answer", low=0)
    parallel: int = key(4, "questions under way at once", low=1)


@dataclass(frozen=True)
class Bound:
    """A bound of an ensemble's score; one of the two."""

    lcb: float | None = key(None, "k: mean less k deviations of the members: low where they disagree", low=0.0)
    ucb: float | None = key(None, "k: mean and k deviations: high where they disagree", low=0.0)


@dataclass(frozen=True)
class Reward:
    """One term of the reward: exactly one of model, function, match, format, length and judge."""

    model: str | None = key(
        None, "reward model: the folder of a train-rm run, or a sequence classifier with one label", path=True
    )
    revision: str | None = key(None, "hub revision of the model")
    function: str | None = key(None, "file.py:name: lists of prompts, responses and columns of the rows → numbers", path=True)
    parallel: int | None = key(None, "calls of an async function under way at once; null: 16", low=1)
    timeout: float | None = key(None, "seconds that a call of an async function may take; null: 60", low=0.001)
    compares: bool | None = key(None, "the function gives the probability to win against the prompt's other responses")
    per: Literal["step", "token"] | None = key(None, "a function returns a list for each response: a number a step, or a token")
    separator: str = key("\n\n", 'what stands between steps, with per: step; "": a response is one step')
    match: Match | None = key(None, "1 where the response has the answer that a column of its row has, else 0")
    format: str | None = key(None, "regular expression: 1 where all of the response matches it, else 0")
    length: Length | None = key(None, "a penalty on its tokens")
    judge: Judge | None = key(None, "a language model that judges: {endpoint, model} or {path}")
    name: str | None = key(
        None, "under which it is logged; default: the model's folder, the function's name, or the kind of the term"
    )
    weight: float = key(1.0, "factor of this term in the score")
    combine: Literal["mean", "min"] | Bound | None = key(None, "how the members of a run make one score; null: their mean")
    aggregate: Literal["min", "prod", "last", "mean"] | None = key(None, "of the steps, by a run of kind: steps; null: min")
    per_step: bool = key(False, "each step's probability to be right is a reward where it ends, instead of aggregate")
    normalize: bool | None = key(None, "scores less their mean, over their deviation, as the train-rm run recorded; its default")

    @property
    def least_responses(self) -> int:
        """How many responses of a prompt it needs to say anything."""
        return 2 if self.judge is not None and self.judge.mode == "pairwise" else 1


@dataclass(frozen=True)
class Kl:
    coef: float = key(0.05, "κ: weight of the log-ratio to the reference", low=0.0)
    target: float | None = key(None, "nats a response, at the rollout's temperature: κ is adapted to reach this KL", low=1e-9)
    horizon: int | None = key(
        None, "responses in which κ may change by a fifth; null: a fiftieth of the run's, but those of a step at least", low=1
    )
    estimator: Literal["auto", "k1", "k2", "k3"] = key(
        "auto", "k1: in the reward; k2, k3: as a loss term, whose mean is the policy's; auto: k2 for grpo, else k1"
    )


@dataclass(frozen=True)
class Tracker:
    """Where an experiment tracker shows a run."""

    project: str = key("rlhf", "its project or experiment; one for all trackers")
    name: str | None = key(None, "of the run; null: the tracker's own choice")


SHORT_FORM: dict[type, str] = {Rows: "path", Source: "path", EvalSource: "path"}
"""Where a list of these is expected, one may stand alone, and a plain text stands for one with this key alone."""
