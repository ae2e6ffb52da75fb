"""The most that fits, found along a line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qlora_tools.verbs.fitting import CONTEXT_STEP, by_use, fit, largest


@pytest.mark.parametrize("limit", [99, 100, 101, 150, 1_234, 99_999])
def test_a_straight_line_is_followed_to_its_end(limit):
    asked = []
    found = largest(lambda count: asked.append(count) or 90 + 10 * count, limit, 5_000)
    assert found == max(0, min(5_000, (limit - 90) // 10)) and len(asked) <= 6


def test_a_curve_is_never_overstepped():
    for limit in (1_000, 10_000, 777_777):
        found = largest(lambda count: 500 + 100 * count + count * count, limit, 1_000)
        best = max(count for count in range(1_001) if 500 + 100 * count + count * count <= limit)
        assert 0.8 * best < found <= best


@dataclass
class Straight:
    setting: str
    file_bytes: int
    kind: str = "graph"

    def peak_bytes(self, batch, prompt, new):
        return self.file_bytes + 100 * batch * (prompt + new)


def test_contexts_end_where_the_model_does_and_nothing_is_told_as_nothing():
    roomy, tight, none = (fit(Straight("int8", 1_000), 10, 10, limit, 1_000) for limit in (10**9, 1_000 + 100 * 200, 900))
    assert roomy.context == 1_000
    assert tight.batch == 10 and tight.context == 3 * CONTEXT_STEP
    assert (none.batch, none.context) == (0, 0)
    assert [row.setting for row in by_use([none, tight, roomy])][-1] == "int8" and by_use([none, roomy])[0] is roomy
