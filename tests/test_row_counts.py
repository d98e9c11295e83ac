"""When rows that cannot be used stop a sample, and what is said of them."""

import pytest

from harvest.conversations import Note, Reading
from harvest.row_counts import RowCounts


def counts(read: int, dropped: int) -> RowCounts:
    """Of `read` rows the first ones are dropped."""
    found = RowCounts()
    for row in range(dropped):
        found.drop(Note("not valid JSON"), row)
    for row in range(dropped, read):
        found.use("train", row, Reading([]))
    return found


@pytest.mark.parametrize(
    ("read", "dropped", "of_all", "of_some"),
    [
        (3, 1, False, False),
        (3, 2, True, False),
        (20, 10, False, False),
        (20, 11, True, False),
        (499, 499, True, False),  # fewer than 500 say nothing of the others
        (500, 294, True, False),  # 4 standard deviations of 500 rows are 44.7
        (500, 295, True, True),
        (2000, 1089, True, False),  # of 2,000 they are 89.4
        (2000, 1090, True, True),
    ],
)
def test_more_rows_dropped_than_used_stop_it_and_of_a_part_only_where_that_is_sure(read, dropped, of_all, of_some):
    found = counts(read, dropped)
    assert (found.read, found.dropped_rows) == (read, dropped)
    assert found.stops(all_read=True) == of_all
    assert found.stops(all_read=False) == of_some


def test_five_reasons_are_named_the_most_frequent_first():
    found = counts(700, 2)
    for number in range(1, 7):
        for row in range(number):
            found.drop(Note(f"reason {number}", "<b>" if number == 6 else ""), 10 * number + row)
    found.filtered = 40
    found.not_needed = 5
    assert found.lines(lambda row: f"line {row}") == [
        "warning: 23 of 726 rows read were dropped: 6 reason 6 (as line 60: '<b>'), 5 reason 5 (as line 50), "
        "4 reason 4 (as line 40), 3 reason 3 (as line 30), 2 not valid JSON (as line 0), 3 for other reasons"
    ]
    assert {name: n for name, n in found.summary(800).items() if name.startswith("rows")} == {
        "rows": 800,
        "rows_used": 698,
        "rows_dropped": 23,
        "rows_filtered": 40,
        "rows_not_needed": 5,
        "rows_not_reached": 34,
        "rows_cut": 0,
        "rows_malformed": 0,
    }


@pytest.mark.parametrize(("read", "warns"), [(200, False), (199, True)])
def test_a_warning_is_for_more_than_a_hundredth(read, warns):
    said = f"2 of {read} rows read were dropped: 2 not valid JSON (as row 0)"
    assert counts(read, 2).lines(lambda row: f"row {row}") == [f"warning: {said}" if warns else said]


def test_turns_that_are_cut_and_tags_that_do_not_pair_are_said():
    found = counts(10, 0)
    found.use("holdout", 11, Reading([], cut=Note("role is unknown", "bot")))
    found.use("train", 12, Reading([], cut=Note("role is unknown", "elf"), malformed=True))
    assert found.lines(lambda row: f"row {row}") == [
        "2 conversations were cut before an unusable turn: 2 role is unknown (as row 11: 'bot')",
        "answers kept as text: 1 with thinking tags that do not pair (as row 12)",
    ]
    assert found.used == {"train": 11, "holdout": 1}
