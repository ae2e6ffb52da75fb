"""Seeded inputs: the same for every engine, sized by config alone."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.models.feeds import KNOWN, draw_feed, image_size, positions, reads_text

BERT = {"model_type": "bert", "vocab_size": 50, "pad_token_id": 0, "max_position_embeddings": 32}
SDXL = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "sample_size": 16, "cross_attention_dim": 24,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60, "time_cond_proj_dim": 6, "num_class_embeds": 5}  # fmt: skip


def draw(names, config=BERT, batch=2, length=8, seed=0, **more):
    return draw_feed(names, config, batch=batch, length=length, seed=seed, **more)


def test_an_input_is_the_same_whatever_is_drawn_beside_it():
    alone, beside = draw(["input_ids"]), draw(["attention_mask", "token_type_ids", "input_ids"])
    assert (alone["input_ids"] == beside["input_ids"]).all() and list(beside) == ["attention_mask", "token_type_ids", "input_ids"]
    assert (draw(["input_ids"], seed=1)["input_ids"] != alone["input_ids"]).any()


def test_inputs_of_one_seed_do_not_repeat_each_other():
    found = draw(["sample", "encoder_hidden_states", "timestep_cond"], SDXL)
    starts = [array.ravel()[:6].tolist() for array in found.values()]
    assert starts[0] != starts[1] != starts[2] != starts[0]


def test_ids_are_words_of_the_vocabulary_and_end_where_the_model_marks_an_end():
    ids = draw(["input_ids"], batch=64, length=32)["input_ids"]
    assert ids.dtype == np.int64 and ids.min() == 1 and ids.max() == 49
    ended = draw(["input_ids"], {**BERT, "eos_token_id": 2, "bos_token_id": 1})["input_ids"]
    assert (ended[:, -1] == 2).all() and not np.isin(ended[:, :-1], [0, 1, 2]).any()


def test_images_are_smooth_and_of_the_processors_size():
    config = {"image_size": 40, "num_channels": 1}
    image = draw(["pixel_values"], config, processor={"size": {"height": 33, "width": 50}})["pixel_values"]
    assert image.shape == (2, 1, 33, 50) and image.dtype == np.float32
    assert np.abs(np.diff(image, axis=3)).mean() < 0.3 * image.std()
    assert image_size(config, {}) == (40, 40) and image_size({}, {}) == (224, 224)
    assert image_size(config, {"do_center_crop": True, "crop_size": 20, "size": {"shortest_edge": 30}}) == (20, 20)
    assert image_size({"vision_config": {"image_size": [8, 9]}}, {"do_resize": False}) == (8, 9)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("sample", (2, 4, 16, 16)), ("timestep", ()), ("encoder_hidden_states", (2, 77, 24)), ("text_embeds", (2, 12)), ("time_ids", (2, 6)),
        ("timestep_cond", (2, 6)), ("class_labels", (2,)),
    ],
)  # fmt: skip
def test_inputs_of_a_denoiser_have_the_sizes_of_its_config(name, shape):
    assert draw([name], SDXL)[name].shape == shape


def test_sound_is_a_second_of_it_or_a_spectrogram():
    assert draw(["input_values"], {})["input_values"].shape == (2, 16_000)
    assert draw(["input_values"], {"max_length": 100, "num_mel_bins": 16})["input_values"].shape == (2, 100, 16)
    assert draw(["input_features"], {"num_mel_bins": 80, "max_source_positions": 30})["input_features"].shape == (2, 80, 60)
    with pytest.raises(UnsupportedError, match="num_mel_bins"):
        draw(["input_features"], {})


def test_boxes_have_their_corners_in_order():
    boxes = draw(["bbox"], batch=4, length=50)["bbox"]
    assert boxes.shape == (4, 50, 4) and (boxes[..., 0] <= boxes[..., 2]).all() and (boxes[..., 1] <= boxes[..., 3]).all() and boxes.max() <= 1000


def test_what_is_given_stays_and_sizes_the_rest():
    ids = np.array([[7, 8, 9]], np.int64)
    found = draw(["input_ids", "attention_mask", "position_ids"], given={"input_ids": ids})
    assert found["input_ids"] is ids and found["attention_mask"].shape == (1, 3) and found["position_ids"].tolist() == [[0, 1, 2]]
    with pytest.raises(UsageError, match="pixel_values"):
        draw(["input_ids"], given={"pixel_values": np.zeros((1, 3, 4, 4), np.float32)})


def test_a_text_longer_than_the_positions_is_refused_and_images_ignore_the_length():
    with pytest.raises(UsageError, match="32 positions"):
        draw(["input_ids"], length=33)
    assert draw(["pixel_values"], {**BERT, "image_size": 8}, length=999)["pixel_values"].shape == (2, 3, 8, 8)
    assert positions({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}) == 512
    assert positions({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 0}) == 513
    assert positions({}) is None and positions({"text_config": {"max_position_embeddings": 77}}) == 77
    assert reads_text(["decoder_input_ids"]) and not reads_text(["pixel_values"])


def test_an_unknown_input_is_named():
    with pytest.raises(UnsupportedError, match="`pixel_mask`") as caught:
        draw(["pixel_mask"])
    assert all(name in caught.value.hint for name in KNOWN)
