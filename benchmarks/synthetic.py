"""Checkpoints of a real shape with random weights, written tensor by tensor so that any size fits.

    python benchmarks/synthetic.py DEST --shape 350m
    python benchmarks/synthetic.py DEST --shape 3b --layers 4      # fewer layers, same tensors
    python benchmarks/synthetic.py DEST --shape 350m --tuned-from BASE --rank 16
    python benchmarks/synthetic.py DEST --adapter-for BASE --rank 16

A tuned copy is the base plus a known delta: rank-16 with a decaying spectrum and white noise, together about
1.5 % of the weight norm. Weights have the spread that trained models have (std 0.02), norms are ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.checkpoint.writer import CheckpointWriter
from qlora_tools.specs import TensorSpec

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "11m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 4096},
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000},
    "350m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config_of(shape: str, layers: int | None = None, *, tied: bool = True) -> dict:
    """A Llama config.json of that shape."""
    dims = dict(SHAPES[shape])
    dims["num_hidden_layers"] = layers or dims["num_hidden_layers"]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": dims["hidden_size"] // dims["num_attention_heads"],
        "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False, "dtype": "bfloat16", "use_cache": True, **dims,
    }  # fmt: skip


def specs_of(config: dict) -> list[TensorSpec]:
    """Tensor specs of a Llama checkpoint with this config, in bf16."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    rows = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
    }
    rows |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    rows |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (vocab, hidden)), TensorSpec("model.norm.weight", "BF16", (hidden,))]
    specs += [] if config["tie_word_embeddings"] else [TensorSpec("lm_head.weight", "BF16", (vocab, hidden))]
    return specs + [
        TensorSpec(f"model.layers.{layer}.{name}.weight", "BF16", shape) for layer in range(config["num_hidden_layers"]) for name, shape in rows.items()
    ]


def seeded(name: str, salt: int, device: str = "cpu") -> torch.Generator:
    """A generator that depends on the tensor's name, so that the number of layers does not change the others."""
    return torch.Generator(device).manual_seed(sum(ord(letter) * 31**position for position, letter in enumerate(name)) % (1 << 62) + salt)


def write_base(
    dest: Path, shape: str, layers: int | None = None, *, tied: bool = True, spread: float = 0.02, max_shard_bytes: int = 2_000_000_000, device: str = "cpu"
) -> None:
    """Random weights of that shape, their standard deviation ``spread``. Drawn on ``device``, each of which has numbers of its own."""
    config = config_of(shape, layers, tied=tied)
    dest.mkdir(parents=True)
    with CheckpointWriter(dest, specs_of(config), max_shard_bytes) as writer:
        for spec in specs_of(config):
            tensor = (
                torch.ones(spec.shape) if len(spec.shape) == 1 else torch.randn(spec.shape, generator=seeded(spec.name, 0, device), device=device).mul_(spread)
            )
            writer.write(spec.name, tensor.to(torch.bfloat16).cpu())
    (dest / "config.json").write_text(json.dumps(config, indent=2))


def write_tuned(dest: Path, base_folder: Path, rank: int) -> None:
    """The base plus a low-rank delta with noise on every linear."""
    base = open_checkpoint(base_folder)
    dest.mkdir(parents=True)
    with CheckpointWriter(dest, base.specs.values(), 2_000_000_000) as writer:
        for name, spec in base.specs.items():
            weight = base.read(name).float()
            if name.split(".")[-2] in TARGETS:
                generator = seeded(name, 1)
                left, right = torch.randn(spec.shape[0], rank, generator=generator), torch.randn(rank, spec.shape[1], generator=generator)
                delta = (left * torch.logspace(0, -1, rank)) @ right
                delta *= 0.014 * weight.norm() / delta.norm()
                noise = torch.randn(spec.shape, generator=generator)
                weight += delta + noise * (0.005 * weight.norm() / noise.norm())
            writer.write(name, weight.to(torch.bfloat16))
    (dest / "config.json").write_text(json.dumps(dict(base.config), indent=2))


def write_adapter(dest: Path, base_folder: Path, rank: int) -> None:
    """A PEFT LoRA adapter with alpha == rank on every linear of the base."""
    base = open_checkpoint(base_folder)
    pairs = {name.removesuffix(".weight"): spec for name, spec in base.specs.items() if name.split(".")[-2] in TARGETS}
    specs = [
        TensorSpec(f"base_model.model.{module}.lora_{side}.weight", "BF16", shape)
        for module, spec in pairs.items()
        for side, shape in (("A", (rank, spec.shape[1])), ("B", (spec.shape[0], rank)))
    ]
    dest.mkdir(parents=True)
    from qlora_tools.checkpoint.writer import SafetensorsWriter

    writer = SafetensorsWriter(dest / "adapter_model.safetensors", specs)
    for spec in specs:
        writer.write(spec.name, torch.randn(spec.shape, generator=seeded(spec.name, 2)).mul_(0.01).to(torch.bfloat16))
    writer.close()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(TARGETS),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (dest / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_tokenizer(dest: Path, vocab_size: int) -> None:
    """A byte-level tokenizer padded to ``vocab_size``, enough for tools that insist on one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + position for position, letter in enumerate(alphabet)}
    vocab |= {f"<extra_{number}>": number for number in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(dest / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 4096}
    (dest / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="350m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--tuned-from", type=Path)
    parser.add_argument("--adapter-for", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    if options.tuned_from:
        write_tuned(options.dest, options.tuned_from, options.rank)
    elif options.adapter_for:
        write_adapter(options.dest, options.adapter_for, options.rank)
    else:
        write_base(options.dest, options.shape, options.layers, tied=not options.untied)
    if not options.adapter_for:
        write_tokenizer(options.dest, json.loads((options.dest / "config.json").read_text())["vocab_size"])


if __name__ == "__main__":
    main()
