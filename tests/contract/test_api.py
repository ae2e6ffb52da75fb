"""The public names exist, are functions of keywords or records, and cost nothing until used."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

from qlora_tools import api
from qlora_tools.verbs import engines


def test_every_name_is_listed_once_and_resolves():
    homes = [name for names in api._HOMES.values() for name in names]
    assert sorted(homes) == sorted(set(homes)) == sorted(api.__all__)
    for name in api.__all__:
        assert getattr(api, name).__module__.startswith("qlora_tools.")


@pytest.mark.parametrize("name", [name for name in api.__all__ if name[0].islower()])
def test_verbs_take_keywords_only_and_explain_themselves(name):
    function = getattr(api, name)
    if name != "layers_of":
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in inspect.signature(function).parameters.values())
    assert function.__doc__


@pytest.mark.parametrize("name", [name for name in api.__all__ if name[0].isupper()])
def test_records_are_frozen(name):
    record = getattr(api, name)
    assert dataclasses.is_dataclass(record) and record.__dataclass_params__.frozen and record.__doc__


def test_importing_the_api_imports_nothing_heavy():
    script = "import sys, qlora_tools.api; print([m for m in ('torch', 'onnx', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_quantizing_does_not_load_onnx_or_transformers():
    script = "import sys; from qlora_tools import api; api.quantize, api.extract, api.merge; print([m for m in ('onnx', 'onnxruntime', 'transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        api.nonsense


def test_engines_are_named_by_paths_that_exist():
    from qlora_tools.bench.engine import locate

    assert locate(engines.TORCH_ENGINE) and locate(engines.ONNX_ENGINE)
