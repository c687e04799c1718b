"""Random streams: no two share their numbers, and none changes unnoticed."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from rlhf_cli.data.streams import Stream

NUMBERS = (0, 1, 2, 3, 10, 12, 21, 121)


def test_no_encoding_begins_another() -> None:
    """Neighbours in sorted order are enough: whatever begins with another stands behind it before all that do not."""
    found = [each.encode(*parts) for each in Stream for parts in product(NUMBERS, repeat=1 + each.value[1])]
    assert len(found) == len(set(found)) == 2 * 8 + 3 * 64 + 2 * 512 + 4096
    assert not any(later.startswith(earlier) for earlier, later in pairwise(sorted(found)))


def test_what_is_dealt_and_what_is_drawn_have_nothing_in_common() -> None:
    """Of two steps they once shared a seed: (seed, step 2, stream 1) was also (seed, stream 2, step 1)."""
    dealt, drawn = ({each.seed(0, step) for step in range(1, 2000)} for each in (Stream.UPDATES, Stream.ROLLOUT))
    assert len(dealt | drawn) == 2 * 1999
    assert all(0 <= seed < 2**63 for seed in dealt | drawn)


@pytest.mark.parametrize("each", Stream)
def test_each_wants_its_numbers(each: Stream) -> None:
    name, count = each.value
    with pytest.raises(ValueError, match=f"the stream {name} is told apart by {count} numbers, not {count + 1}"):
        each.seed(0, *range(count + 1))


PINNED = {
    "DROPOUT": 5051883473382528206,
    "UPDATES": 1738258803646916915,
    "ROLLOUT": 5075996919134367243,
    "REDRAW": 8249827216029516474,
    "EXPLORE": 3555407750975076042,
    "MISMATCHES": 5537449692696039799,
    "HELD_OUT": 1402514149577765731,
    "PROBE": 9127516452569460947,
}


@pytest.mark.parametrize("each", Stream)
def test_values_stay(each: Stream) -> None:
    """blake2b of e.g. b"rollout:7,1;", its first 63 bits."""
    assert each.seed(7, *range(1, 1 + each.value[1])) == PINNED[each.name]
