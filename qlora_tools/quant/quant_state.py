"""The JSON that bitsandbytes keeps beside a 4-bit tensor (``X.weight.quant_state.bitsandbytes__nf4``), written and doubted.

Written: the same dict bitsandbytes writes, as UTF-8 in a uint8 tensor. One number in it, the mean of the scales, is known only after the
data was read, so the text is padded with trailing spaces, which JSON allows, to a length that follows from the shape alone.
Read: the bytes come from a stranger's file; every field is checked for type, range and fit with the tensors beside it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from qlora_tools.errors import CorruptError, UnsupportedError

MAX_STATE_BYTES = 4096  # bitsandbytes writes about 160 bytes
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
_MAX_ELEMENTS = 1 << 48
_NUMBER_CHARS = 24  # "-1.1754943508222875e-38" has 23

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_WRITTEN = {name: word for word, name in _DTYPES.items()}
_REQUIRED = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


@dataclass(frozen=True)
class QuantState:
    """What the JSON says. ``dtype`` is a safetensors name; ``offset`` is the mean of the absmax, ``None`` without double quantization."""

    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    offset: float | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE
    quant_type: str = "nf4"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.blocksize)

    @property
    def packed_bytes(self) -> int:
        return (self.numel + 1) // 2

    @property
    def nested_blocks(self) -> int:
        return -(-self.blocks // self.nested_blocksize)


def _text(state: QuantState) -> str:
    if state.dtype not in _WRITTEN:
        raise UnsupportedError(f"bitsandbytes stores 4-bit tensors of bf16, fp16 or fp32, not {state.dtype}", hint="cast the tensor to one of them first")
    fields: dict[str, object] = {"quant_type": state.quant_type, "blocksize": state.blocksize, "dtype": _WRITTEN[state.dtype], "shape": list(state.shape)}
    if state.offset is not None:
        fields |= {"nested_blocksize": state.nested_blocksize, "nested_dtype": "float32", "nested_offset": state.offset}
    return json.dumps(fields)


def stored_length(state: QuantState) -> int:
    """Bytes of the padded JSON; the value of ``offset`` does not matter, only whether there is one."""
    return len(_text(state)) + (0 if state.offset is None else _NUMBER_CHARS - len(json.dumps(state.offset)))


def write_state(state: QuantState) -> torch.Tensor:
    """The JSON as uint8[``stored_length``]."""
    text = _text(state).encode()
    return torch.frombuffer(bytearray(text.ljust(stored_length(state))), dtype=torch.uint8)


def read_state(name: str, blob: torch.Tensor) -> QuantState:
    """Parse and check the JSON stored for the tensor ``name``.

    Raises:
        CorruptError: too large, not JSON, fields missing, unknown, of the wrong type or out of range.
        UnsupportedError: a quantization other than NF4, or a dtype that is not in the table.
    """

    def wrong(what: str) -> CorruptError:
        return CorruptError(
            f"{name}: its bitsandbytes quant_state {what}", hint="the checkpoint is damaged or was not written by bitsandbytes; download it again"
        )

    if blob.dtype != torch.uint8 or blob.dim() != 1 or not 2 <= blob.numel() <= MAX_STATE_BYTES:
        raise wrong(f"is {blob.dtype} {list(blob.shape)}, expected uint8 of 2 to {MAX_STATE_BYTES} bytes")
    try:
        fields = json.loads(bytes(blob.cpu().numpy()).decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise wrong(f"is not JSON ({type(error).__name__})") from None
    if not isinstance(fields, dict) or not fields.keys() >= _REQUIRED:
        raise wrong(f"lacks {', '.join(sorted(_REQUIRED - set(fields if isinstance(fields, dict) else ())))}")
    nested = bool(_NESTED & fields.keys())
    if unknown := fields.keys() - _REQUIRED - _NESTED:
        raise wrong(f"has unknown fields {', '.join(sorted(unknown))[:100]}")
    if nested and not fields.keys() >= _NESTED:
        raise wrong(f"lacks {', '.join(sorted(_NESTED - fields.keys()))}")

    if fields["quant_type"] != "nf4":
        raise UnsupportedError(
            f"{name}: quant_type {str(fields['quant_type'])[:40]!r} is not supported", hint="only nf4 is; dequantize the model with bitsandbytes first"
        )
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in _DTYPES:
        raise UnsupportedError(f"{name}: quant_state dtype {str(fields['dtype'])[:40]!r}, expected one of {', '.join(_DTYPES)}")
    blocksize, shape = fields["blocksize"], fields["shape"]
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise wrong(f"has blocksize {str(blocksize)[:40]}, expected one of {BLOCKSIZES}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8 or any(type(size) is not int or not 0 < size <= _MAX_ELEMENTS for size in shape):
        raise wrong(f"has shape {str(shape)[:60]}, expected 1 to 8 positive whole numbers")
    if math.prod(shape) > _MAX_ELEMENTS:
        raise wrong(f"has shape {shape}, more elements than any tensor")
    if not nested:
        return QuantState(blocksize, _DTYPES[fields["dtype"]], tuple(shape))

    offset, inner = fields["nested_offset"], fields["nested_blocksize"]
    if type(offset) not in (int, float) or not abs(offset) <= 3.4028235e38:
        raise wrong(f"has nested_offset {str(offset)[:40]}, expected a finite fp32")
    if type(inner) is not int or inner != NESTED_BLOCKSIZE:
        raise wrong(f"has nested_blocksize {str(inner)[:40]}, expected {NESTED_BLOCKSIZE}, the only one bitsandbytes multiplies with")
    if fields["nested_dtype"] != "float32":
        raise wrong(f"has nested_dtype {str(fields['nested_dtype'])[:40]!r}, expected 'float32'")
    return QuantState(blocksize, _DTYPES[fields["dtype"]], tuple(shape), float(offset), inner)
