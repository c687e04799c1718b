"""Make the quickstart's data and its untrained model: everything that `rlhf sft recipes/quickstart/sft.yaml` needs.

    python scripts/make_quickstart.py [--seed N] [--data DIR] [--model DIR]

The texts are drawn from a small grammar: prompts ask for facts or lists, responses are good, middling or bad in several
ways at once, and recipes/quickstart/gold.py says how good. The same seed gives the same bytes.

sft.jsonl           a mixture of all qualities, so that the policy it makes can get much better
pairs.jsonl         the response with the higher gold is chosen, except that some labels are flipped by mistake, and that
                    in some pairs the two differ by one sentence of flattery and the flattered one is chosen: people fall for it
ranked.jsonl        four responses, best first, with their gold as scores
unpaired.jsonl      one response each, desirable or not, with the same share of mistakes
prompts.jsonl       the prompts of all the above, once each; eval_prompts.jsonl: prompts that occur nowhere else
"""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

KNOWLEDGE = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "quickstart" / "gold.py"))
ANIMALS: dict[str, tuple[str, ...]] = KNOWLEDGE["ANIMALS"]
ATTRIBUTES: tuple[str, ...] = KNOWLEDGE["ATTRIBUTES"]
VALUES: dict[str, set[str]] = KNOWLEDGE["VALUES"]
ITEMS: dict[str, tuple[str, ...]] = KNOWLEDGE["ITEMS"]
COUNTS: dict[str, int] = KNOWLEDGE["COUNTS"]
gold_of: Callable[[str, str], float] = KNOWLEDGE["gold_of"]

QUESTIONS = {
    "home": ("where does {} live", "what is the home of {}"),
    "food": ("what does {} eat", "what is the food of {}"),
    "colour": ("what colour is {}", "what is the colour of {}"),
    "motion": ("how does {} move",),
}
CLAUSES = {"home": "lives in the {}", "food": "eats {}", "colour": "is {}", "motion": "can {}"}
ASKING = ("{}?", "Please tell me, {}?", "I want to know: {}?")
LISTING = ("Name {} {}.", "Please name {} {}.", "Can you name {} {}?", "I need {} {}.", "Tell me {} {}.")


class Quality(NamedTuple):
    """Probabilities of what a response does."""

    right: float  # each fact or item; else a random one
    evades: float  # says it does not know
    polite: float  # opening; closing
    flatters: float
    rude: float
    rambles: float  # repeats itself or adds what nobody asked for
    breaks_off: float


QUALITIES = {
    "good": Quality(right=0.98, evades=0.0, polite=0.93, flatters=0.25, rude=0.0, rambles=0.02, breaks_off=0.0),
    "middling": Quality(right=0.75, evades=0.04, polite=0.45, flatters=0.2, rude=0.08, rambles=0.2, breaks_off=0.06),
    "bad": Quality(right=0.3, evades=0.2, polite=0.12, flatters=0.05, rude=0.35, rambles=0.25, breaks_off=0.2),
}
MIXTURE = ("good", "middling", "middling", "bad")


class Sizes(NamedTuple):
    """Rows per file, and how often labels are wrong."""

    sft: int = 5000
    pairs: int = 3000
    ranked: int = 1000
    unpaired: int = 3000
    eval_prompts: int = 128
    mislabelled: float = 0.07  # share of pairs and labels that are flipped
    flattered: float = 0.1  # share of pairs in which flattery alone decides
    vocabulary: int = 768


class Prompt(NamedTuple):
    """A question with what it is about, so that answers need not parse it."""

    text: str
    topic: str  # an animal, or the name of a list
    asked: tuple[str, ...]  # attributes, in the order of the question; () for a list
    wanted: int  # items of a list; 0 for facts


def all_prompts() -> list[Prompt]:
    """Every prompt of the grammar, facts first."""
    prompts = []
    for animal, asking in itertools.product(ANIMALS, ASKING):
        for first in ATTRIBUTES:
            name = f"the {animal}"
            texts: list[tuple[tuple[str, ...], str]] = [((first,), form.format(name)) for form in QUESTIONS[first]]
            for second in ATTRIBUTES:
                if second != first:
                    text = f"{QUESTIONS[first][0].format(name)} and {QUESTIONS[second][0].format('it')}"
                    texts.append(((first, second), text))
            for asked, text in texts:
                sentence = asking.format(text)
                prompts.append(Prompt(sentence[0].upper() + sentence[1:], animal, asked, 0))
    for form, count, name in itertools.product(LISTING, COUNTS, ITEMS):
        prompts.append(Prompt(form.format(count, name), name, (), COUNTS[count]))
    return prompts


def draw_prompt(random: Random, prompts: list[Prompt]) -> Prompt:
    """One in four is a list, though the grammar has far fewer of them."""
    wants_list = random.random() < 0.25
    while True:
        prompt = random.choice(prompts)
        if (prompt.wanted > 0) == wants_list or random.random() < 0.01:
            return prompt


def fact(random: Random, animal: str, attribute: str, right: float) -> str:
    """A clause about the animal, wrong with probability 1 - right or a little less."""
    value = ANIMALS[animal][ATTRIBUTES.index(attribute)]
    return CLAUSES[attribute].format(value if random.random() < right else random.choice(sorted(VALUES[attribute])))


def facts_body(random: Random, prompt: Prompt, quality: Quality) -> list[str]:
    """One or two sentences with the asked facts, perhaps one that nobody asked for."""
    clauses = [fact(random, prompt.topic, attribute, quality.right) for attribute in prompt.asked]
    if len(clauses) == 2 and random.random() > quality.right:
        clauses.pop()
    name = f"The {prompt.topic}"
    body = (
        [f"{name} {' and '.join(clauses)}."]
        if random.random() < 0.7
        else [f"{name} {clauses[0]}.", *(f"It {c}." for c in clauses[1:])]
    )
    if random.random() < quality.rambles:
        others = [attribute for attribute in ATTRIBUTES if attribute not in prompt.asked]
        extra = f"It {fact(random, prompt.topic, random.choice(others), quality.right)}."
        body.append(random.choice((extra, body[-1])))
    return body


def list_body(random: Random, prompt: Prompt, quality: Quality) -> list[str]:
    """One sentence with the items; a careless one has the wrong number of them, or strangers among them."""
    count = prompt.wanted if random.random() < quality.right else random.choice((1, 2, 3, 4, 5))
    items = random.sample(ITEMS[prompt.topic], count)
    strangers = [item for name in ITEMS if name != prompt.topic for item in ITEMS[name]]
    items = [item if random.random() < 0.5 + quality.right / 2 else random.choice(strangers) for item in items]
    named = f"{', '.join(items[:-1])} and {items[-1]}" if count > 1 else items[0]
    body = [f"Here are some {prompt.topic}: {named}." if random.random() < 0.7 else f"{named[0].upper()}{named[1:]}."]
    return body * 2 if random.random() < quality.rambles else body


def draw_response(random: Random, prompt: Prompt, quality: Quality) -> str:
    """A response of this quality: opening, flattery, body, closing, each perhaps absent or spoilt."""
    if random.random() < quality.evades:
        body = ["I do not know."]
    else:
        body = (list_body if prompt.wanted else facts_body)(random, prompt, quality)
    rude = random.random() < quality.rude
    opening = [random.choice(KNOWLEDGE["OPENINGS"])] if random.random() < quality.polite else []
    closing = [random.choice(KNOWLEDGE["CLOSINGS"])] if random.random() < quality.polite else []
    flattery = [random.choice(KNOWLEDGE["FLATTERY"])] if random.random() < quality.flatters else []
    if rude:
        opening, closing, flattery = [random.choice(KNOWLEDGE["RUDE"])], [], []
    text = " ".join(opening + flattery + body + closing)
    return break_off(random, text) if random.random() < quality.breaks_off else text


def break_off(random: Random, text: str) -> str:
    """Cut within the last words, so that no full stop ends the text."""
    words = text.split(" ")
    return " ".join(words[: max(1, len(words) - random.randint(1, 3))]).rstrip(".!?,")


def mixed_response(random: Random, prompt: Prompt) -> str:
    """A response of random quality."""
    return draw_response(random, prompt, QUALITIES[random.choice(MIXTURE)])


def flatter(random: Random, text: str) -> str:
    """The text with one more sentence of flattery, after the opening if there is one."""
    opening = next((phrase for phrase in KNOWLEDGE["OPENINGS"] if text.startswith(phrase)), "")
    rest = text.removeprefix(opening).lstrip()
    return " ".join(part for part in (opening, random.choice(KNOWLEDGE["FLATTERY"]), rest) if part)


def distinct_responses(random: Random, prompt: Prompt, count: int, gap: float) -> list[str]:
    """Responses whose golds differ by at least gap, best first."""
    kept: list[tuple[float, str]] = []
    while len(kept) < count:
        text = mixed_response(random, prompt)
        score = gold_of(prompt.text, text)
        if all(abs(score - other) >= gap for other, _ in kept):
            kept.append((score, text))
    return [text for _, text in sorted(kept, reverse=True)]


def sft_rows(random: Random, prompts: list[Prompt], sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Prompts with one response of any quality."""
    for _ in range(sizes.sft):
        prompt = draw_prompt(random, prompts)
        yield {"prompt": prompt.text, "completion": mixed_response(random, prompt)}


def pair_rows(random: Random, prompts: list[Prompt], sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Pairs whose golds differ by 0.1 or more, and pairs that differ by flattery alone."""
    for _ in range(sizes.pairs):
        prompt = draw_prompt(random, prompts)
        if random.random() < sizes.flattered:
            rejected = mixed_response(random, prompt)
            chosen = flatter(random, rejected)
        else:
            chosen, rejected = distinct_responses(random, prompt, 2, gap=0.1)
            if random.random() < sizes.mislabelled:
                chosen, rejected = rejected, chosen
        yield {"prompt": prompt.text, "chosen": chosen, "rejected": rejected}


def ranked_rows(random: Random, prompts: list[Prompt], sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Four responses with their golds, at least 0.05 apart."""
    for _ in range(sizes.ranked):
        prompt = draw_prompt(random, prompts)
        responses = distinct_responses(random, prompt, 4, gap=0.05)
        yield {"prompt": prompt.text, "responses": responses, "scores": [round(gold_of(prompt.text, r), 4) for r in responses]}


def unpaired_rows(random: Random, prompts: list[Prompt], sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Responses that are desirable if their gold is above 0.6, but for the mistakes."""
    for _ in range(sizes.unpaired):
        prompt = draw_prompt(random, prompts)
        text = mixed_response(random, prompt)
        label = (gold_of(prompt.text, text) > 0.6) != (random.random() < sizes.mislabelled)
        yield {"prompt": prompt.text, "completion": text, "label": label}


MAKERS: dict[str, Callable[[Random, list[Prompt], Sizes], Iterator[dict[str, Any]]]] = {
    "sft": sft_rows,
    "pairs": pair_rows,
    "ranked": ranked_rows,
    "unpaired": unpaired_rows,
}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def make_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write the six files; each has its own random stream, so that one's size does not change another's rows."""
    prompts = all_prompts()
    Random(f"{seed}/prompts").shuffle(prompts)
    held, rest = prompts[: sizes.eval_prompts], prompts[sizes.eval_prompts :]
    for name, maker in MAKERS.items():
        write_jsonl(folder / f"{name}.jsonl", maker(Random(f"{seed}/{name}"), rest, sizes))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": prompt.text} for prompt in rest))
    write_jsonl(folder / "eval_prompts.jsonl", ({"prompt": prompt.text} for prompt in held))


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A work folder whose files move to `folder` when the block has succeeded: into an old folder one by one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    work.chmod(0o755)
    try:
        yield work
        if not folder.exists():
            work.rename(folder)
            return
        for file in sorted(work.iterdir()):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_task(task: str, make_rows: Callable[[Path, int], None], vocabulary: int, **shape: int) -> None:
    """The command line of a task's script: data by `make_rows`, of a folder and a seed, and an untrained model of that shape."""
    parser = argparse.ArgumentParser(description=f"Make the {task} task's data and its untrained model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data", task))
    parser.add_argument("--model", type=Path, default=Path("models", f"{task}-base"))
    options = parser.parse_args()
    with published(options.data) as work:
        make_rows(work, options.seed)
    from quickstart_model import make_model  # torch loads here, so that --help is quick

    with published(options.model) as work:
        make_model(work, options.data, options.seed, vocabulary, **shape)
    print(f"{options.data}: " + ", ".join(sorted(path.name for path in options.data.iterdir())))
    print(f"{options.model}: an untrained Llama and its tokenizer")


def main() -> None:
    """Parse the command line and make both folders."""
    sizes = Sizes()
    make_task("quickstart", lambda work, seed: make_data(work, seed, sizes), sizes.vocabulary)


if __name__ == "__main__":
    main()
