"""The model card of a reward model."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cli.evaluation.agreement import Agreement, Card, Rate
from rlhf_cli.figures import Interval, percent, short
from rlhf_cli.reports.document import Block, Column, Finding, Paragraph, Picture, Section, Table


def model_card(card: Card, pictures: list[Picture]) -> Section:
    """The section of the report."""
    own, blocks = card.agreement, list[Block]()
    if own.rate:
        blocks += [*_accuracy(card, own.rate), *_calibration(own, own.rate, card.unit), *pictures]
    else:
        head = f"No {card.unit}s were held out: how well it judges is not known."
        blocks.append(Finding("warning", head, "Set `data.holdout: 0.05` or `data.eval`."))
    of, rest = "responses", "Only scores of one prompt's responses compare: the preferences say nothing of the rest."
    if card.unit == "step":
        of, rest = "steps", "σ of a score is the probability that the step is right."
    said = f"Scores of {card.score_responses:,} training {of} have mean {short(card.score_mean)} and standard deviation "
    said += f"{short(card.score_std)}. {rest}"
    if card.triples is not None:
        said = f"Of {card.triples:,} triples of responses to a prompt it puts {card.cyclic:,} in a circle, which no scores can."
    blocks.append(Paragraph(said))
    if card.disagreement is not None:
        said = f"Its {len(card.members)} members disagree: the deviation of their normalised scores is "
        blocks.append(Paragraph(f"{said}{short(card.disagreement)}."))
    return Section("card", "Model card", tuple(blocks))


def _accuracy(card: Card, rate: Rate) -> Iterator[Block]:
    several, unit = rate.pairs > rate.prompts, card.unit
    of = f"{rate.pairs:,} held-out {unit}s" + (f" of {rate.prompts:,} prompts" if several else "")
    method = f"; it allows for {unit}s of one prompt being alike" if several else ""
    mean, bounds = _share(rate.interval)
    said, more = f"The better response of {of} has the higher score in {mean}", ""
    if unit == "step":
        said, more = f"Of {of} {mean} are judged rightly", f" F1 of a response's first wrong step: {percent(card.first_error)}."
    yield Paragraph(f"{said} (95 % interval {bounds}{method}). Ties count half.{more}")
    if card.warning:
        yield Finding("warning", card.warning, "")
    rows = [("this model", *_share(rate.interval))]
    if length := card.agreement.length_baseline:
        rows.append((length.rule.replace("preferring ", ""), *_share(length.interval)))
        rows.append((f"the difference, {unit} by {unit}", *_share(length.lead)))
    rows.append(("the same score for all" if unit == "pair" else "calling every step right", percent(card.constant), ""))
    columns = Column("accuracy"), Column("95 % interval")
    yield Table(f"Accuracy on held-out {unit}s", (Column("by"), *columns), tuple(rows))
    if card.members:
        own = tuple((f"member {k}", *(_share(m.rate.interval) if m.rate else ("", ""))) for k, m in enumerate(card.members))
        yield Table("The members, of whose mean this card is", (Column("by"), *columns), own)
    if subsets := card.agreement.subsets:
        of_subsets = tuple((name, f"{own.pairs:,}", *_share(own.interval)) for name, own in subsets.items())
        yield Table("The same by subset", (Column("subset"), Column("pairs"), *columns), of_subsets)


def _share(own: Interval) -> tuple[str, str]:
    return percent(own.mean), f"{percent(own.low)} to {percent(own.high)}"


def _calibration(own: Agreement, rate: Rate, unit: str) -> Iterator[Block]:
    assert own.confidence is not None
    beside = f" (a perfectly calibrated judge of as many {unit}s: {percent(own.ece_expected)})" if own.ece_expected else ""
    # Said only where the mean confidence is outside the accuracy's interval.
    leaning = ": they agree within the interval"
    if own.confidence > rate.high:
        leaning = ": it is over-confident"
    elif own.confidence < rate.low:
        leaning = ": it is under-confident"
    yield Paragraph(
        f"Calibration: expected error {percent(own.ece)}{beside}. A mean confidence σ(|margin|) of {percent(own.confidence)} "
        f"against an accuracy of {percent(rate.accuracy)}{leaning}."
    )
    rows = tuple(
        (f"{each.low:.2f} to {each.high:.2f}", f"{each.count:,}", percent(each.confidence), percent(each.accuracy))
        for each in own.reliability
    )
    heads = ("confidence", f"{unit}s", "mean confidence", "accuracy")
    yield Table("Calibration", tuple(map(Column, heads)), rows)
