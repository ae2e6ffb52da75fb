"""The loss plot: a readable picture of equal bytes for equal metrics, whatever the metrics hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlora_tools.errors import StorageError, UsageError
from qlora_tools.training.events import Evaluation, Event, Sample, Step
from qlora_tools.training.plot import plot_loss, smoothed

LAST = {"epoch": 1.0, "steps": 40, "grad_norm": 1.0, "tokens": 1, "trained_tokens": 1, "tokens_per_s": 1.0, "peak_bytes": 1}


def run(seed: int = 0, steps: int = 40, spike: float = 0.0) -> list[Event]:
    noise = np.random.default_rng(seed)
    told: list[Event] = [Sample(step=0, prompt="a", text="b")]
    for number in range(1, steps + 1):
        loss = 3 / number**0.3 + 0.1 * noise.standard_normal() + (spike if number == 2 else 0)
        told.append(Step(step=number, loss=loss, lr=2e-4 * (1 - number / steps), seconds=noise.random(), **LAST))
        if number % 10 == 0:
            told.append(Evaluation(step=number, loss=3 / number**0.3, best=True))
    return told


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_the_picture_is_a_png_of_a_fixed_size_with_something_on_it(tmp_path):
    image = pixels(plot_loss(run(), tmp_path / "loss.png"))
    assert image.shape == (630, 960, 3)
    blue = (image[..., 2] - image[..., 0] > 0.4).sum()
    assert blue > 500 and (image.sum(-1) < 0.6).sum() > 200


def test_equal_metrics_give_equal_bytes_and_times_do_not_show(tmp_path):
    first, second = plot_loss(run(), tmp_path / "a.png"), tmp_path / "b.png"
    plot_loss([Step(**{**vars(event), "seconds": 7.0}) if isinstance(event, Step) else event for event in run()], second)
    assert first.read_bytes() == second.read_bytes() and b"matplotlib" not in first.read_bytes() and b"tIME" not in first.read_bytes()


def test_several_runs_get_a_colour_each(tmp_path):
    image = pixels(plot_loss({"rank 8": run(0), "full": run(1)}, tmp_path / "both.png"))
    assert (image[..., 2] - image[..., 0] > 0.4).sum() > 200 and (image[..., 0] - image[..., 2] > 0.4).sum() > 200


@pytest.mark.parametrize(
    "losses",
    [[1.0], [math.nan] * 3, [1.0, math.inf, 0.5], [-1.0, -2.0], [0.0, 0.0], [1e300, 1.0]],
    ids=["one step", "only NaN", "infinity", "negative", "zero", "huge"],
)
def test_odd_runs_are_drawn_too(tmp_path, losses):
    told = [Step(step=number, loss=loss, lr=0.0, seconds=0.0, **LAST) for number, loss in enumerate(losses, 1)]
    assert plot_loss([*told, Evaluation(step=1, loss=math.nan, best=False)], tmp_path / "loss.png").stat().st_size > 1000


def test_a_spike_does_not_flatten_the_rest(tmp_path):
    calm, spiked = pixels(plot_loss(run(steps=400), tmp_path / "a.png")), pixels(plot_loss(run(steps=400, spike=100.0), tmp_path / "b.png"))
    at_the_end = [int(np.flatnonzero((image[..., 2] - image[..., 0] > 0.4)[:420, 600:900].any(1)).min()) for image in (calm, spiked)]
    assert abs(at_the_end[0] - at_the_end[1]) < 20


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UsageError, match="no step to draw"):
        plot_loss([Sample(step=0, prompt="a", text="b")], tmp_path / "loss.png")
    with pytest.raises(UsageError, match="no step to draw in second"):
        plot_loss({"first": run(), "second": []}, tmp_path / "loss.png")
    with pytest.raises(UsageError):
        plot_loss({}, tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere"):
        plot_loss(run(), tmp_path / "nowhere" / "loss.png")


def test_no_global_figure_is_left_behind(tmp_path):
    from matplotlib import pyplot, rcParams

    size = rcParams["font.size"]
    plot_loss(run(), tmp_path / "loss.png")
    assert pyplot.get_fignums() == [] and rcParams["font.size"] == size


def test_smoothing_is_the_weighted_mean_with_forgotten_weights():
    values = [3.0, 1.0, math.nan, 4.0]
    keep = 1 - 2 / (3 + 1)
    wanted = [3.0, (3 * keep + 1) / (keep + 1), (3 * keep + 1) / (keep + 1), (3 * keep**2 + 1 * keep + 4) / (keep**2 + keep + 1)]
    assert smoothed(values, 3) == pytest.approx(wanted, rel=1e-12)
    assert smoothed([2.0, 5.0], 0) == [2.0, 5.0] and math.isnan(smoothed([math.nan, 1.0], 5)[0])
