import pytest

from qlora_tools.bench.svg import CHAR_WIDTH, amount, fine_log_scale, linear_scale, log_scale, place_labels, shorten, spread, ticks


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([44.3], ["0", "10", "20", "30", "40", "50"]),
        ([0.0], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([12345.0], ["0", "2,500", "5,000", "7,500", "10,000", "12,500"]),
        ([], None),
    ],
)
def test_linear_ticks_are_round_and_reach_the_data(values, labels):
    scale = linear_scale(values, 0, 100)
    found = ticks(scale)
    assert found[-1][0] >= max(values, default=0)
    assert labels is None or [label for _, label in found] == labels
    assert (scale(scale.low), scale(scale.high)) == (0, 100)


def test_zero_stands_below_the_decades_only_where_there_is_one():
    scale = log_scale([0.0, 0.003, 0.2], 100, 0)
    assert [label for _, label in ticks(scale)] == ["0", "0.001", "0.01", "0.1", "1"]
    assert scale(0.0) == 100
    assert scale(0.001) == pytest.approx(90)
    assert scale(1.0) == 0
    assert [label for _, label in ticks(log_scale([2e-5, 3e-4], 100, 0))] == ["1e-5", "1e-4", "0.001"]


def test_values_far_below_the_rest_share_the_foot_instead_of_squeezing_the_axis():
    scale = log_scale([1e-12, 0.003, 0.2], 100, 0, most_decades=3)
    assert [label for _, label in ticks(scale)] == ["<0.001", "0.001", "0.01", "0.1", "1"]
    assert (scale(1e-12), scale(0.0)) == (100, 100)


def test_labels_of_close_marks_do_not_lie_on_each_other():
    marks = [(100.0, 100.0, "first setting"), (104.0, 101.0, "second setting"), (98.0, 103.0, "third setting")]
    boxes = []
    for (x, y, anchor), (_, _, content) in zip(place_labels(marks, 0, 600, 0, 300), marks, strict=True):
        width = CHAR_WIDTH * len(content)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, y - 10, left + width, y))
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([3.1, 41.0], ["2", "5", "10", "20", "50"]),
        ([1.0, 1.0], ["1", "2"]),
        ([0.02, 0.3], ["0.02", "0.05", "0.1", "0.2", "0.5"]),
        ([2.0, 9e4], ["10", "100", "1,000", "10,000", "100,000"]),
    ],
)
def test_a_short_span_in_powers_has_ticks_between_the_tens(values, labels):
    scale = fine_log_scale(values, 0, 100)
    assert [label for _, label in ticks(scale)] == labels
    assert scale.low <= min(values) and scale.high >= max(values)
    assert (scale(scale.low), scale(scale.high)) == (0, 100)


def test_labels_at_lines_ends_keep_their_distance_and_their_order():
    placed = spread([50.0, 52.0, 51.0, 200.0], 15.0, 0.0, 210.0)
    assert placed[3] <= 210
    assert sorted(placed) == [placed[0], placed[2], placed[1], placed[3]]
    assert all(b - a >= 15 - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
    assert max(spread([100.0] * 6, 15.0, 0.0, 100.0)) == 100.0


def test_a_label_keeps_off_a_line_where_there_is_room():
    mark = (100.0, 100.0, "name")
    assert place_labels([mark], 0, 600, 0, 300)[0][2] == "start"
    assert place_labels([mark], 0, 600, 0, 300, [(100.0, 100.0, 300.0, 100.0)])[0][2] == "end"


def test_a_scale_from_zero_still_shows_what_lies_below():
    scale = linear_scale([-3.0, 5.0], 0, 100)
    assert scale(-3.0) >= 0
    assert scale.low <= -3.0


def test_amounts_are_written_for_readers():
    assert [amount(value) for value in (12345.6, 999.9, 0.05551, 3.0)] == ["12,346", "999.9", "0.05551", "3"]
    assert (shorten("a-long-name", 42.0), shorten("short", 42.0)) == ("…-name", "short")
