from bench_records import make_record

from qlora_tools.bench.pareto import decode_milliseconds, divergence_points, file_megabytes, frontier


def test_the_frontier_holds_what_nothing_dominates():
    assert frontier([(1, 5), (2, 3), (3, 3), (4, 1), (2, 6)]) == [True, True, False, True, False]


def test_equal_points_do_not_dominate_each_other():
    assert frontier([(1, 1), (1, 1)]) == [True, True]


def test_points_come_by_cost_and_without_the_failed():
    points = divergence_points(make_record(), file_megabytes)
    assert [(point.name, point.x, point.on_frontier) for point in points] == [
        ("int8 <fast> & |small|", 11.0, True),
        ("slow", 20.0, False),
        ("ONNX fp32", 40.0, True),
    ]
    assert len(divergence_points(make_record(), decode_milliseconds)) == 3
