"""What benchmarks/conversation.py makes of the times that it took."""

import common
import conversation
import pytest


def test_turns_are_compared_one_by_one_and_the_first_does_not_count() -> None:
    runs = [
        {"with": [9.0, 1.0, 2.0], "without": [1.0, 2.0, 6.0]},
        {"with": [9.0, 1.0, 1.0], "without": [1.0, 3.0, 4.0]},
    ]
    report = common.Report("Conversation")
    conversation.tell(report, {"branch": runs, "whole": [{"with": [1.0, 2.0], "without": [1.0, 2.0]}]})
    assert report.ratios == {"turn_with_cache_vs_without": pytest.approx(3)}  # of 2, 3, 3 and 4
    assert report.figures["turn_with_cache_vs_without, whole"] == pytest.approx(1)
    assert report.figures["branch, with cache, first token ms"] == pytest.approx(1000)
