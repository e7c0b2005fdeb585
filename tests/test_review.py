"""The sheets that blind readers of the bench get, and the measure of their agreement."""

import random

import pytest
import review
from sklearn.metrics import cohen_kappa_score


def test_kappa_equals_that_of_sklearn():
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("c", "c"), ("c", "a"), ("b", "b"), ("a", "a")]
    assert review.kappa(pairs) == pytest.approx(cohen_kappa_score(*zip(*pairs)))


def test_sheets_show_what_their_reading_may_see_and_never_two_probes_of_a_dialogue():
    items = list(review.probes("en").values())
    batches = review.deal(items, 25, random.Random(0))
    assert sorted(probe["id"] for batch in batches for _, probe in batch) == sorted(probe["id"] for _, probe in items)
    for batch in batches:
        assert len({dialogue["id"] for dialogue, _ in batch}) == len(batch) <= 25
    dialogue, probe = next(item for item in items if review.reaches_back(item[1]))
    turns, after = [turn["content"] for turn in dialogue["turns"]], probe["after"]
    shown = {reading: review.sheet(reading, [(dialogue, probe)]) for reading in "abc"}
    assert [turn in shown["a"] for turn in turns] == [i < after for i in range(len(turns))]
    assert [turn in shown["b"] for turn in turns] == [False] * len(turns)
    assert [turn in shown["c"] for turn in turns] == [after - 2 <= i < after for i in range(len(turns))]
    assert all(option in text for text in shown.values() for option in (probe["question"], *probe["options"]))
