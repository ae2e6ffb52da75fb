"""The JSON beside a 4-bit tensor: bitsandbytes reads ours, and a hostile one is refused with a reason."""

from __future__ import annotations

import json

import pytest
import torch
from bitsandbytes.functional import QuantState as BnbQuantState
from bitsandbytes.utils import unpack_tensor_to_dict
from hypothesis import given
from hypothesis import strategies as st

from qlora_tools.errors import CorruptError, QltError, UnsupportedError
from qlora_tools.quant.quant_state import MAX_STATE_BYTES, QuantState, read_state, stored_length, write_state

PLAIN = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]}
NESTED = PLAIN | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


def blob(text: str | bytes) -> torch.Tensor:
    return torch.tensor(list(text.encode() if isinstance(text, str) else text), dtype=torch.uint8)


@given(offset=st.floats(width=32, allow_nan=False, allow_infinity=False), shape=st.lists(st.integers(1, 1 << 20), min_size=1, max_size=2))
def test_any_mean_fits_the_length_known_beforehand_and_comes_back(offset, shape):
    state = QuantState(64, "BF16", tuple(shape), offset)
    written = write_state(state)
    assert written.numel() == stored_length(QuantState(64, "BF16", tuple(shape), 0.0))
    assert read_state("x", written) == state
    assert unpack_tensor_to_dict(written) == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape} | {
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }


def test_bitsandbytes_builds_its_state_from_the_padded_text():
    parts = {"absmax": torch.zeros(4, dtype=torch.uint8), "quant_map": torch.zeros(16), "nested_absmax": torch.ones(1), "nested_quant_map": torch.zeros(256)}
    loaded = BnbQuantState.from_dict(parts | {"quant_state.bitsandbytes__nf4": write_state(QuantState(64, "F16", (4, 64), -1.5))}, torch.device("cpu"))
    assert (loaded.blocksize, loaded.dtype, tuple(loaded.shape), float(loaded.offset)) == (64, torch.float16, (4, 64), -1.5)


def test_without_double_quantization_there_is_nothing_to_pad():
    assert bytes(write_state(QuantState(64, "BF16", (4, 64))).tolist()).decode() == json.dumps(PLAIN)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"blocksize": 48}, "blocksize 48"),
        ({"blocksize": 64.0}, "blocksize"),
        ({"blocksize": True}, "blocksize"),
        ({"blocksize": 10**300}, "blocksize"),
        ({"shape": "4x64"}, "shape"),
        ({"shape": []}, "shape"),
        ({"shape": None}, "shape"),
        ({"shape": [4, -64]}, "shape"),
        ({"shape": [4, 0]}, "shape"),
        ({"shape": [4, 64.0]}, "shape"),
        ({"shape": [True, 64]}, "shape"),
        ({"shape": [1 << 40, 1 << 40]}, "more elements"),
        ({"shape": [10**400]}, "shape"),
        ({"nested_offset": "1"}, "nested_offset"),
        ({"nested_offset": True}, "nested_offset"),
        ({"nested_offset": 1e39}, "nested_offset"),
        ({"nested_offset": 10**400}, "nested_offset"),
        ({"nested_blocksize": 0}, "nested_blocksize 0"),
        ({"nested_blocksize": 512}, "nested_blocksize 512"),
        ({"nested_dtype": "float16"}, "nested_dtype"),
        ({"nested_dtype": ["float32"]}, "nested_dtype"),
        ({"colour": "red"}, "unknown fields colour"),
    ],
)
def test_fields_out_of_range_are_named(fields, complaint):
    with pytest.raises(CorruptError, match=complaint) as caught:
        read_state("layer.weight", blob(json.dumps(NESTED | fields)))
    assert "layer.weight" in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("missing", [*PLAIN, "nested_blocksize", "nested_dtype", "nested_offset"])
def test_missing_fields_are_named(missing):
    with pytest.raises(CorruptError, match=f"lacks {missing}"):
        read_state("x", blob(json.dumps({key: value for key, value in NESTED.items() if key != missing})))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe{}", b"[]", b"null", b"3", b"[" * 4000, b'{"a":' * 600, b'{"nested_offset": NaN}', b" " * (MAX_STATE_BYTES + 1), b"9" * 4000],
    ids=lambda text: repr(text[:12]),
)
def test_texts_that_are_no_state_are_refused(text):
    with pytest.raises(CorruptError):
        read_state("x", blob(text))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_offsets_that_json_should_not_hold_are_refused(constant):
    with pytest.raises(CorruptError, match="nested_offset"):
        read_state("x", blob(json.dumps(NESTED).replace("0.5", constant)))


def test_a_blob_of_another_dtype_or_rank_is_refused():
    for tensor in (torch.zeros(20), torch.zeros(4, 5, dtype=torch.uint8)):
        with pytest.raises(CorruptError, match="expected uint8"):
            read_state("x", tensor)


def test_other_formats_are_unsupported_by_name():
    with pytest.raises(UnsupportedError, match="fp4"):
        read_state("x", blob(json.dumps(PLAIN | {"quant_type": "fp4"})))
    with pytest.raises(UnsupportedError, match="float8"):
        read_state("x", blob(json.dumps(PLAIN | {"dtype": "float8_e4m3fn"})))
    with pytest.raises(UnsupportedError, match="dtype"):
        read_state("x", blob(json.dumps(PLAIN | {"dtype": ["bfloat16"]})))


@given(st.binary(max_size=200))
def test_random_bytes_never_escape_as_another_error(text):
    with pytest.raises(QltError):
        read_state("x", blob(text))


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)),
    st.sampled_from(sorted(NESTED)),
)
def test_any_value_in_any_field_is_read_or_refused_deliberately(value, key):
    try:
        state = read_state("x", blob(json.dumps(NESTED | {key: value})))
    except QltError:
        return
    assert state.blocks > 0
