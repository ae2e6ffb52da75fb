from dataclasses import replace

from bench_records import figures, make_record

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


def test_a_divergence_of_rounding_size_is_as_good_as_none():
    record = make_record()
    quality = [replace(record.quality[0], figures=figures(1e-12, 1.0)), record.quality[1], replace(record.quality[2], figures=figures(0.0, 1.0))]
    points = divergence_points(replace(record, quality=tuple(quality)), file_megabytes)
    assert [(point.name, point.on_frontier) for point in points] == [("int8 <fast> & |small|", True), ("slow", True), ("ONNX fp32", False)]
