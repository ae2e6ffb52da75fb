"""Images in one folder per class, as numbered rows; how each becomes numbers is ``live/images.py``'s business.

Axes: B images, C = 3 colours, H rows, W columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qlora_tools.errors import MissingError, UsageError
from qlora_tools.live.images import PROCESSOR_FILE, Preparation, open_image
from qlora_tools.training.rows import Batch, Indices, class_numbers

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageRecords:
    """Image files under ``folder`` with their class names, in the order of their paths."""

    folder: Path
    paths: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Sequence[int]) -> ImageRecords:
        """The images of these numbers, in this order."""
        return replace(self, paths=tuple(self.paths[index] for index in indices), labels=tuple(self.labels[index] for index in indices))


def read_images(folder: Path) -> ImageRecords:
    """The images of ``folder/<class>/*``; hidden files and other endings are passed over.

    Raises:
        MissingError: no such folder. UsageError: it holds no images in class folders.
    """
    if not folder.is_dir():
        raise MissingError(f"{folder}: no such folder of images")
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    found = [(file, one.name) for one in classes for file in sorted(one.iterdir()) if file.suffix.lower() in ENDINGS and not file.name.startswith(".")]
    if not found:
        raise UsageError(f"{folder} holds no images in folders of their classes", hint=f"lay them out as {folder.name}/<class>/<name>.png")
    return ImageRecords(folder, tuple(str(file.relative_to(folder)) for file, _ in found), tuple(label for _, label in found))


class ImageRows:
    """Rows of one image each, read when they are asked for.

    Raises:
        UsageError: one class, or a preparation that leaves images of different sizes. IncompatibleError: see ``class_numbers``.
    """

    def __init__(self, records: ImageRecords, preparation: Preparation, *, id2label: Mapping[int, str] | None = None) -> None:
        if (preparation.size is None or (preparation.size[1] is None and preparation.crop_pct is None)) and preparation.crop is None:
            raise UsageError(f"{PROCESSOR_FILE} neither resizes nor crops to one size, so images cannot share a batch", hint="set size to a height and a width")
        self.records, self.preparation = records, preparation
        self.names, self.classes = class_numbers(records.labels, id2label)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def tokens_per_epoch(self) -> int:
        """Images: a vision model has no tokens that the data knows of."""
        return len(self.records)

    @property
    def sha256(self) -> str:
        """Of the preparation, and of every file's path, class and bytes."""
        digest = hashlib.sha256(repr((self.preparation, self.names, self.classes.tolist())).encode())
        for name in self.records.paths:
            digest.update(name.encode() + b"\0" + hashlib.sha256((self.records.folder / name).read_bytes()).digest())
        return digest.hexdigest()

    def longest(self) -> int:
        """All images have one size once prepared."""
        return 0

    def batch(self, indices: Indices) -> Batch:
        numbers = [int(index) for index in indices]
        pixels_BCHW = np.stack([self.preparation.pixels(open_image(self.records.folder / self.records.paths[number])) for number in numbers])
        return Batch({"pixel_values": torch.from_numpy(pixels_BCHW)}, torch.from_numpy(self.classes[numbers]), len(numbers), len(numbers))
