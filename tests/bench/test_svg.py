import pytest

from qlora_tools.bench.svg import linear_scale, log_scale, place_labels, ticks


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
        width = 6.4 * len(content)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, y - 10, left + width, y))
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
