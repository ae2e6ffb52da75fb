"""Images: the numbers of transformers' own processors, refusals, and hostile files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from qlora_tools.errors import CorruptError, IncompatibleError, MissingError, UnsupportedError, UsageError
from qlora_tools.live.images import Preparation, read_preparation
from qlora_tools.training.images import ENDINGS, ImageRows, read_images
from qlora_tools.training.rows import split

SIZES = [(40, 30), (30, 40), (33, 33), (17, 90), (5, 4)]


def picture(width, height, mode="RGB", seed=0):
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def folder_of(path, *, classes=("cat", "dog"), per_class=3, size=(20, 16)):
    for place, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for number in range(per_class):
            picture(*size, seed=10 * place + number).save(path / name / f"{number}.png")
    return path


@pytest.mark.parametrize(
    ("processor", "options"),
    [
        ("ViT", {"size": {"height": 24, "width": 20}}),
        ("ViT", {"size": {"height": 24, "width": 24}, "do_normalize": False, "resample": 3}),
        ("DeiT", {"size": {"height": 32, "width": 32}, "crop_size": {"height": 24, "width": 24}}),
        ("ConvNext", {"size": {"shortest_edge": 24}, "crop_pct": 0.875}),
        ("ConvNext", {"size": {"shortest_edge": 384}, "crop_pct": 0.875}),
        ("Bit", {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}}),
        ("CLIP", {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}),
        ("Siglip", {"size": {"height": 24, "width": 24}}),
        ("Beit", {"size": {"height": 28, "width": 28}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}}),
        ("MobileNetV2", {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}}),
        ("Bit", {"do_resize": False, "crop_size": {"height": 25, "width": 24}}),
    ],
)
def test_pixels_are_those_of_the_original_processor(tmp_path, processor, options):
    """Saved by transformers, read by us, over wide, high, square and tiny images in three modes."""
    live = getattr(transformers, f"{processor}ImageProcessor")(**options)
    live.save_pretrained(tmp_path)
    preparation = read_preparation(tmp_path)
    for (width, height), mode in [(size, "RGB") for size in SIZES] + [((30, 40), "L"), ((30, 40), "RGBA")]:
        image = picture(width, height, mode)
        wanted = np.asarray(live(image.convert("RGB"), return_tensors="np")["pixel_values"])[0]
        found = preparation.pixels(image)
        assert found.dtype == np.float32 and found.flags.c_contiguous
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("config", "size", "crop"),
    [
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 24}, (24, 24), None),
        ({"feature_extractor_type": "ConvNextFeatureExtractor", "size": 24, "crop_pct": 0.875}, (24, None), None),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "do_center_crop": True, "crop_size": 24}, (28, None), (24, 24)),
        ({"image_processor_type": "ViTImageProcessorFast", "size": {"height": 24, "width": 20}}, (24, 20), None),
    ],
)
def test_configs_of_earlier_versions_are_understood(tmp_path, config, size, crop):
    write(tmp_path, **config)
    found = read_preparation(tmp_path)
    assert (found.size, found.crop) == (size, crop)


def write(folder, **config):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **config}))


@pytest.mark.parametrize(
    ("config", "kind", "says"),
    [
        ({"do_flip_channel_order": True}, UnsupportedError, "do_flip_channel_order"),
        ({"image_processor_type": "DonutImageProcessor"}, UnsupportedError, "DonutImageProcessor, whose steps"),
        ({"size": {"longest_edge": 24}}, UnsupportedError, "longest_edge"),
        ({"size": 10**9}, CorruptError, "expected sides of 1 to 8192"),
        ({"size": {"height": 0, "width": 4}}, CorruptError, "expected sides"),
        ({"size": {"height": "9", "width": 4}}, CorruptError, "expected sides"),
        ({"size": True}, UnsupportedError, "size is True"),
        ({"image_mean": [0.5]}, CorruptError, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, CorruptError, "three positive numbers"),
        ({"resample": "best"}, CorruptError, "resample is 'best'"),
        ({"rescale_factor": -1}, CorruptError, "rescale_factor is -1"),
        ({"crop_pct": 0}, CorruptError, "crop_pct is 0"),
    ],
)
def test_steps_unknown_and_values_out_of_range_are_refused(tmp_path, config, kind, says):
    write(tmp_path, **config)
    with pytest.raises(kind, match=says):
        read_preparation(tmp_path)


def test_a_missing_or_broken_config_is_refused(tmp_path):
    with pytest.raises(MissingError, match="preprocessor_config"):
        read_preparation(tmp_path)
    for content, says in (("{", "not JSON"), ("[]", "found list")):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(CorruptError, match=says):
            read_preparation(tmp_path)


def test_folders_are_classes_and_other_files_are_passed_over(tmp_path):
    folder_of(tmp_path / "d")
    (tmp_path / "d" / "dog" / "notes.txt").write_text("x")
    (tmp_path / "d" / ".hidden").mkdir()
    (tmp_path / "d" / "dog" / ".0.png").write_bytes(b"")
    records = read_images(tmp_path / "d")
    assert records.labels == ("cat",) * 3 + ("dog",) * 3
    assert records.paths[0].endswith("0.png") and len(records) == 6
    train, held = split(records, 0.34, 0)
    assert len(held) == 2 and sorted(train.paths + held.paths) == sorted(records.paths)


def test_a_batch_holds_pixels_and_classes(tmp_path):
    rows = ImageRows(read_images(folder_of(tmp_path / "d")), Preparation(size=(8, 10)))
    batch = rows.batch(np.array([5, 0]))
    assert batch.inputs["pixel_values"].shape == (2, 3, 8, 10) and batch.inputs["pixel_values"].dtype == torch.float32
    assert (batch.targets.tolist(), batch.count, batch.tokens) == ([1, 0], 2, 2)
    assert (rows.names, len(rows), rows.tokens_per_epoch, rows.longest()) == (("cat", "dog"), 6, 6, 0)
    assert rows.batch([0]).inputs["pixel_values"].abs().max() <= 1
    with pytest.raises(IncompatibleError, match="the data holds dog"):
        ImageRows(rows.records, rows.preparation, id2label={0: "cat", 1: "fish"})


def test_a_vision_model_takes_the_batch(tmp_path):
    rows = ImageRows(read_images(folder_of(tmp_path / "d")), Preparation(size=(16, 16)))
    config = transformers.ViTConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    assert transformers.ViTForImageClassification(config)(**rows.batch([0, 5]).inputs).logits.shape == (2, 2)


def test_the_hash_follows_bytes_and_preparation(tmp_path):
    records = read_images(folder_of(tmp_path / "d"))
    found = {ImageRows(records, Preparation(size=size)).sha256 for size in ((8, 8), (9, 8))}
    picture(20, 16, seed=99).save(tmp_path / "d" / "cat" / "0.png")
    found.add(ImageRows(records, Preparation(size=(8, 8))).sha256)
    assert len(found) == 3


def test_images_of_different_sizes_cannot_share_a_batch(tmp_path):
    records = read_images(folder_of(tmp_path / "d"))
    for preparation in (Preparation(size=None), Preparation(size=(8, None))):
        with pytest.raises(UsageError, match="neither resizes nor crops"):
            ImageRows(records, preparation)
    assert ImageRows(records, Preparation(size=(8, None), crop=(8, 8))).batch([0]).inputs["pixel_values"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    folder = folder_of(tmp_path / "d")
    (folder / "cat" / "0.png").write_bytes(content)
    with pytest.raises(CorruptError, match=r"0\.png is not an image"):
        ImageRows(read_images(folder), Preparation(size=(8, 8))).batch([0])


def test_an_image_that_is_cut_off_is_named(tmp_path):
    folder = folder_of(tmp_path / "d")
    whole = (folder / "cat" / "0.png").read_bytes()
    (folder / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptError, match=r"0\.png is not an image"):
        ImageRows(read_images(folder), Preparation(size=(8, 8))).batch([0])


@pytest.mark.parametrize("limit", [200, 100])
def test_an_image_that_unfolds_to_too_many_pixels_is_an_error(tmp_path, monkeypatch, limit):
    """PIL only warns up to twice its limit; both are errors here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(CorruptError, match="too many pixels"):
        ImageRows(read_images(folder_of(tmp_path / "d")), Preparation(size=(8, 8))).batch([0])


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(MissingError):
        read_images(tmp_path / "none")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        read_images(tmp_path)
    assert ".png" in ENDINGS
