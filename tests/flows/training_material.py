"""Small data and models for training flows, and what is compared between runs."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_tools.training.metrics import TIMED_FIELDS
from tests.conftest import save_model

PROMPTS = 20


def write_pairs(path: Path, count: int = PROMPTS, shift: int = 0) -> Path:
    """Prompts with completions of 1 to 9 letters, so that rows have different numbers of targets."""
    rows = ({"prompt": f"say {number}: ", "completion": "abcd"[(number + shift) % 4] * (1 + number % 9)} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def untimed(path: Path) -> list[dict]:
    """The lines of a metrics file without what the clock and the allocator did."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED_FIELDS} for line in lines]


def adapter_bytes(folder: Path) -> tuple[bytes, bytes]:
    """Both PEFT files."""
    return (folder / "adapter_model.safetensors").read_bytes(), (folder / "adapter_config.json").read_bytes()


def manifest(folder: Path) -> dict:
    """What the run says about itself, without the hash of the metrics, whose times differ, and of the picture."""
    content = json.loads((folder / "qlt-manifest.json").read_text())
    for name in ("metrics.jsonl", "loss.png"):
        content["files"].pop(name)
    return content


def write_labelled(path: Path, count: int = 32) -> Path:
    """Texts that their first word decides."""
    words = (("good", "pos"), ("bad", "neg"))
    path.write_text(
        "".join(json.dumps({"text": f"{words[number % 2][0]} {'xyz'[number % 3]}", "label": words[number % 2][1]}) + "\n" for number in range(count))
    )
    return path


def write_images(folder: Path, count: int = 12) -> Path:
    """Noisy pictures of 32 x 32, red ones and blue ones."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(0, 90, (32, 32, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def build(kind: str, folder: Path, seed: int = 0) -> Path:
    """A tiny random ``gpt2``, ``bert`` (without a head), ``vit`` or ``resnet`` folder with what training reads beside the weights."""
    import torch
    import transformers as hf

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    words = {"vocab_size": 160, "max_position_embeddings": 128}
    torch.manual_seed(seed)
    if kind == "gpt2":
        ends = {"bos_token_id": 0, "eos_token_id": 1}
        return save_model(folder, hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=160, n_positions=128, **ends)), tokenizer=True)
    if kind == "bert":
        return save_model(folder, hf.BertModel(hf.BertConfig(**sizes, **words)), tokenizer=True)
    if kind == "vit":
        save_model(folder, hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=32, patch_size=8)))
    else:
        save_model(folder, hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")))
    write_preparation(folder)
    return folder


def write_preparation(folder: Path) -> None:
    """What an image becomes before a model looks at it, for images of 32 by 32."""
    preparation = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))


def without_estimate_and_picture(monkeypatch) -> None:
    """Both take longer than a tiny run and have tests of their own."""
    monkeypatch.setattr("qlora_tools.verbs.training_run.estimate_run", lambda *arguments: None)
    monkeypatch.setattr("qlora_tools.verbs.train.plot_loss", lambda events, path: path.write_bytes(b""))
