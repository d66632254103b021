"""Spans of entry ids say what the list of them says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ledger.spans import Spans

IDS = st.tuples(st.integers(0, 6), st.integers(0, 4))


@given(st.lists(st.tuples(IDS, IDS), max_size=12), st.lists(IDS, max_size=12), st.integers(0, 12))
def test_the_first_span_that_has_an_id_is_found(pairs, ids, early):
    """However they overlap, and whether they were added before or after the first question."""
    spans = Spans()
    for number, (first, last) in enumerate(pairs):
        spans.add(first, last, number)
        if number == early:
            spans.at((0, 0))
    for at in [*ids, *(one for pair in pairs for one in pair)]:
        has_it = [number for number, (first, last) in enumerate(pairs) if first <= at <= last]
        assert spans.at(at) == (has_it[0] if has_it else None)
        assert spans.reach(at) == any(last >= at for _, last in pairs)
    assert [(span.first, span.last) for span in spans] == pairs
