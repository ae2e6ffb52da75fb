from dataclasses import replace

from bench_records import make_record
from page_records import make_forward, make_swept

from qlora_tools.bench.plots import write_plots
from qlora_tools.bench.plots_more import draw_decay
from qlora_tools.plot_style import new_figure, styled

NAMES = ["size-kl.png", "latency-kl.png", "decode.png", "prefill.png", "memory.png", "layer-energy.png", "singular-values.png"]
MORE = ["vram-kl.png", "device-memory.png", "by-batch.png", "by-prompt.png", "layer-change.png"]


def test_every_plot_is_a_png_and_the_same_record_gives_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    written = write_plots(make_swept(), tmp_path / "a", dpi=30)
    assert sorted(path.name for path in written) == sorted(NAMES + MORE)
    write_plots(make_swept(), tmp_path / "b", dpi=30)
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content == (tmp_path / "b" / path.name).read_bytes()


def test_one_case_and_no_accelerator_have_no_sweeps_and_no_memory_of_a_device(tmp_path):
    assert [path.name for path in write_plots(make_record(), tmp_path, dpi=30)] == NAMES


def test_a_model_that_looks_once_is_drawn_by_its_forward(tmp_path):
    names = [path.name for path in write_plots(make_forward(), tmp_path, dpi=30)]
    assert names == ["size-error.png", "latency-error.png", "forward.png", "memory.png"]


def test_plots_without_data_are_not_written(tmp_path):
    record = make_record()
    assert write_plots(replace(record, rows=record.rows[3:], settings=record.settings[3:], quality=(), layers=()), tmp_path) == []


def test_a_plot_that_became_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "plots/decode.png").symlink_to(tmp_path / "mine")
    write_plots(make_record(), tmp_path / "plots", dpi=30)
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "plots/decode.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(NAMES)


def test_names_are_drawn_as_they_are_and_never_as_formulas(tmp_path):
    record = make_swept()
    named = tuple(replace(setting, label=f"a$_$b {setting.id}") for setting in record.settings)
    layers = tuple(replace(layer, name=f"{layer.name}.$_$") for layer in record.layers)
    assert sorted(path.name for path in write_plots(replace(record, settings=named, layers=layers), tmp_path, dpi=30)) == sorted(NAMES + MORE)


def test_axes_of_powers_have_plain_numbers():
    with styled():
        figure = new_figure(4, 3)
        axes = figure.add_subplot()
        assert draw_decay(axes, make_swept().layers)
        figure.canvas.draw()
        labels = [tick.label1.get_text() for tick in (*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks())]
    assert any(labels) and not [label for label in labels if "$" in label]
