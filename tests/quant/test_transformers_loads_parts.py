"""A checkpoint folder whose linears are our parts loads in stock transformers, which then computes what we decode."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import spec_of


@pytest.mark.parametrize("codec", [NF4(), NF4(double_quant=False), NF4(128), Int8()], ids=repr)
def test_a_folder_of_our_parts_loads_and_holds_our_values(llama, tmp_path, codec):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "quantized"
    shutil.copytree(llama, folder)
    dense = load_file(folder / "model.safetensors")
    quantized = {name: spec_of(name, tensor) for name, tensor in dense.items() if "_proj" in name and tensor.ndim == 2}
    stored = {name: tensor for name, tensor in dense.items() if name not in quantized}
    for name, spec in quantized.items():
        stored |= codec.encode(spec, dense[name])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = codec.describe() | {"llm_int8_skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16)
    held = model.state_dict()
    for name, spec in quantized.items():
        expected = codec.encode(spec, dense[name])
        for part in expected:
            if ".quant_state." not in part:
                assert torch.equal(held[part].view(torch.uint8), expected[part].view(torch.uint8)) if expected[part].dim() else held[part] == expected[part], (
                    part
                )
        parts = {part: held[part] for part in expected}  # what transformers and bitsandbytes would save again
        assert torch.equal(codec.decode(spec, parts), codec.decode(spec, expected))
