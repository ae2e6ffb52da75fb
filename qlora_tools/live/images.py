"""An image file made into ``pixel_values`` the way a model's ``preprocessor_config.json`` says.

The usual chain of a classifier: RGB, resize (to a size, to a shortest edge, or to an edge and then a crop of
``crop_pct``), centre crop, rescale, normalise. Its numbers are those of transformers' own processors on PIL; any other
step that the file switches on is refused by name, never left out in silence. Files are hostile: PIL's limit on pixels
is an error here. Left out: augmentation, and images with boxes or masks. Brings no torch with it.

Axes: C = 3 colours, H rows, W columns.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_tools.errors import CorruptError, MissingError, UnsupportedError

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR_FILE = "preprocessor_config.json"
_MAX_SIDE = 8192
_BICUBIC, _BILINEAR = 3, 2
_CROP_ABOVE = 384  # ConvNeXt's processor crops only below this edge
#: Processors whose chain this is; the flag tells how they read a ``size`` of one number: as a square's side, or as the shortest edge.
_SQUARE = {"ViT": True, "DeiT": True, "Beit": True, "Siglip": True, "Bit": False, "CLIP": False, "ConvNext": False, "MobileNetV1": False, "MobileNetV2": False}
_KNOWN_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


@dataclass(frozen=True)
class Preparation:
    """How an image becomes numbers. ``size``: (height, width), or (shortest edge, ``None``); ``crop``: (height, width).

    ``crop_pct``: below an edge of 384 the image is resized to ``edge / crop_pct`` and cropped to ``edge``. ``resample``: PIL's number.
    """

    size: tuple[int, int | None] | None = (224, 224)
    crop: tuple[int, int] | None = None
    crop_pct: float | None = None
    resample: int = _BILINEAR
    rescale: float | None = 1 / 255
    mean: tuple[float, float, float] | None = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] | None = (0.5, 0.5, 0.5)

    def pixels(self, image: Image) -> NDArray[np.float32]:
        """f32[C, H, W] of one image."""
        image = image.convert("RGB")
        size, crop = self.size, self.crop
        if size is not None and size[1] is None:
            edge = size[0]
            if self.crop_pct is not None and edge < _CROP_ABOVE:
                size, crop = _from_shortest(image, int(edge / self.crop_pct)), (edge, edge)
            else:
                size = (edge, edge) if self.crop_pct is not None else _from_shortest(image, edge)
        if size is not None:
            image = image.resize((int(size[1] or size[0]), size[0]), self.resample)
        values: NDArray[np.float32] = np.array(image, dtype=np.float32)
        if crop is not None:
            values = _centre(values, *crop).copy()
        if self.rescale is not None:
            values *= np.float32(self.rescale)
        if self.mean is not None and self.std is not None:
            values -= np.asarray(self.mean, dtype=np.float32)
            values /= np.asarray(self.std, dtype=np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def read_preparation(folder: Path) -> Preparation:
    """The preparation that a base folder's ``preprocessor_config.json`` describes.

    Raises:
        MissingError: no such file. CorruptError: not what it should hold. UnsupportedError: a step unknown here.
    """
    path = folder / PROCESSOR_FILE
    if not path.is_file():
        raise MissingError(f"{path}: an image model needs it to know size and normalisation", hint="copy it from the original model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CorruptError(f"{path}: found {type(config).__name__}, expected an object")
    square = _reads_as_square(path, config)
    steps = sorted(key for key, value in config.items() if key.startswith("do_") and value and key not in _KNOWN_STEPS)
    if steps:
        raise UnsupportedError(f"{path} asks for {', '.join(steps)}, which this version does not carry out")
    crops, normalizes = bool(config.get("do_center_crop")), bool(config.get("do_normalize", True))
    size = _size(path, "size", config.get("size", 224), square) if config.get("do_resize", True) else None
    crop = _size(path, "crop_size", config.get("crop_size", config.get("size", 224)), True) if crops else None
    resample = config.get("resample", _BILINEAR)
    if not isinstance(resample, int) or not 0 <= resample <= 5:
        raise CorruptError(f"{path}: resample is {resample!r}, expected 0 to 5")
    return Preparation(
        size=size,
        crop=None if crop is None else (crop[0], crop[1] or crop[0]),
        crop_pct=None if config.get("crop_pct") is None else _number(path, "crop_pct", config["crop_pct"]),
        resample=resample,
        rescale=_number(path, "rescale_factor", config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else None,
        mean=_colour(path, "image_mean", config.get("image_mean")) if normalizes else None,
        std=_colour(path, "image_std", config.get("image_std")) if normalizes else None,
    )


def open_image(path: Path) -> Image:
    """A decoded image.

    Raises:
        CorruptError: not an image, cut off, or so many pixels that PIL takes it for an attack.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise CorruptError(f"{path} would unfold to too many pixels: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError on broken PNG chunks
        raise CorruptError(f"{path} is not an image that can be read: {error}") from error


def _from_shortest(image: Image, edge: int) -> tuple[int, int]:
    """(height, width) of the image scaled so that its shorter side is ``edge``."""
    width, height = image.size
    return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def _centre(values_HWC: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """The middle ``height`` by ``width``; where the image is smaller, black around it."""
    extra = (max(0, height - values_HWC.shape[0]), max(0, width - values_HWC.shape[1]))
    if any(extra):
        before = [-(-each // 2) for each in extra]
        values_HWC = np.pad(values_HWC, ((before[0], extra[0] - before[0]), (before[1], extra[1] - before[1]), (0, 0)))
    top, left = (values_HWC.shape[0] - height) // 2, (values_HWC.shape[1] - width) // 2
    return values_HWC[top : top + height, left : left + width]


def _reads_as_square(path: Path, config: Mapping[str, Any]) -> bool:
    named = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "ViT")
    family = named.removesuffix("Pil").removesuffix("Fast").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if family not in _SQUARE:
        raise UnsupportedError(f"{path} names {named}, whose steps this version does not know; it knows those of {', '.join(sorted(_SQUARE))}")
    return _SQUARE[family]


def _size(path: Path, key: str, value: Any, square: bool) -> tuple[int, int | None]:
    if isinstance(value, int) and not isinstance(value, bool):
        found: tuple[Any, Any] = (value, value if square else None)
    elif isinstance(value, dict) and {"height", "width"} <= value.keys():
        found = (value["height"], value["width"])
    elif isinstance(value, dict) and value.keys() == {"shortest_edge"}:
        found = (value["shortest_edge"], None)
    else:
        raise UnsupportedError(f"{path}: {key} is {value!r}, expected height and width, or shortest_edge")
    if not all(isinstance(side, int) and 0 < side <= _MAX_SIDE for side in found if side is not None):
        raise CorruptError(f"{path}: {key} is {value!r}, expected sides of 1 to {_MAX_SIDE}")
    return found


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise CorruptError(f"{path}: {key} is {value!r}, expected a number in (0, 1]")
    return float(value)


def _colour(path: Path, key: str, value: Any) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in value):
        raise CorruptError(f"{path}: {key} is {value!r}, expected three numbers")
    if key == "image_std" and not all(each > 0 for each in value):
        raise CorruptError(f"{path}: {key} is {value!r}, expected three positive numbers")
    return (float(value[0]), float(value[1]), float(value[2]))
