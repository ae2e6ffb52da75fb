"""Loaded bases against transformers' own loading of the same folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.checkpoint.reader import tensor_sha256
from qlora_tools.errors import CorruptError, IncompatibleError, UnsupportedError
from qlora_tools.live.base import Base, build_empty, load_base
from qlora_tools.live.frozen import FrozenConv1D, FrozenConv2d, FrozenLinear
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.verbs.quantize import quantize
from tests.conftest import build_llama, save_model, with_config

IDS = torch.tensor([[1, 7, 2, 60, 5], [3, 3, 9, 11, 30]])
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
BERT = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 16}
LABELS = ("bad", "so so", "good")


def gpt2(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    return save_model(folder, GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)))


def opt(folder: Path) -> Path:
    """Tied, and without a family file of its own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64}
    return save_model(folder, OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=16)))


def bert(folder: Path, kind: Any = BertForSequenceClassification, **settings: Any) -> Path:
    torch.manual_seed(0)
    return save_model(folder, kind(BertConfig(**BERT, **settings)))


def resnet(folder: Path) -> Path:
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return save_model(folder, model)


def vit(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
    return save_model(folder, ViTForImageClassification(ViTConfig(**sizes, num_labels=3)))


def rewritten(folder: Path, rename: Any = None, *, drop: str = "\0", **changed: torch.Tensor) -> Path:
    """The checkpoint with other tensors in it."""
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if drop not in name}
    tensors = {rename(name) if rename else name: tensor for name, tensor in tensors.items()} | changed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path, task: str, codec: Codec | None = None, **options: Any) -> Base:
    return load_base(open_checkpoint(folder), task, codec, **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    if model.main_input_name == "pixel_values":
        return model(pixel_values=PIXELS.to(next(model.parameters()).dtype)).logits
    return model(input_ids=IDS).logits


def layers(base: Base, kind: Any = (FrozenLinear, FrozenConv1D, FrozenConv2d)) -> dict[str, Any]:
    return {path: module for path, module in base.model.named_modules() if isinstance(module, kind)}


MODELS = {
    "llama": (build_llama, "language", AutoModelForCausalLM, 14),
    "llama, tied": (lambda folder: build_llama(folder, tie_word_embeddings=True), "language", AutoModelForCausalLM, 14),
    "gpt2": (gpt2, "language", AutoModelForCausalLM, 8),
    "opt": (opt, "language", AutoModelForCausalLM, 12),
    "bert": (bert, "classification", AutoModelForSequenceClassification, 13),
    "resnet": (resnet, "image", AutoModelForImageClassification, None),
    "vit": (vit, "image", AutoModelForImageClassification, None),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", MODELS)
def test_a_dense_base_is_what_from_pretrained_gives(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build, task, kind, count = MODELS[case]
    base = loaded(build(tmp_path / "model"), task, dtype=dtype)
    expected = kind.from_pretrained(tmp_path / "model", dtype=dtype)
    if case == "gpt2" and dtype == torch.float32:  # its Conv1D multiplies in another order of sums
        torch.testing.assert_close(logits(base.model), logits(expected), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(logits(base.model), logits(expected))
    assert base.fresh == () and not base.model.training and not any(parameter.requires_grad for parameter in base.model.parameters())
    assert len(layers(base)) == count if count else layers(base)
    ours, theirs = dict(base.model.named_buffers()), dict(expected.named_buffers())
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    assert {name for name, parameter in base.model.named_parameters()} <= {name for name, parameter in expected.named_parameters()}  # ties are ties


@pytest.mark.parametrize("case", ["llama", "gpt2", "opt"])
def test_an_nf4_base_is_transformers_own_4_bit_model(case: str, tmp_path: Path) -> None:
    _, task, kind, _ = MODELS[case]
    build = {"llama": lambda folder: build_llama(folder, intermediate_size=128), "gpt2": gpt2, "opt": opt}[case]  # rows of whole blocks
    base = loaded(build(tmp_path / "model"), task, NF4())
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = kind.from_pretrained(tmp_path / "model", quantization_config=config, dtype=torch.bfloat16)
    expected, found = logits(theirs).float(), logits(base.model).float()
    assert float((found - expected).norm()) < 2e-2 * float(expected.norm())
    assert float((found - logits(loaded(tmp_path / "model", task).model).float()).norm()) > 3e-2 * float(expected.norm())  # it is quantized
    assert {layer.codec_name for layer in layers(base).values()} == {"nf4"}


@pytest.mark.parametrize("codec", [NF4(), NF4(128, double_quant=False), Int8()], ids=["nf4", "nf4 single", "int8"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "resnet", "vit"])
def test_every_weight_is_its_codecs_image_of_the_stored_one(case: str, codec: Codec, tmp_path: Path) -> None:
    build, task, _, _ = MODELS[case]
    base = loaded(build(tmp_path / "model"), task, codec)
    checkpoint = open_checkpoint(tmp_path / "model")
    for path, layer in layers(base).items():
        dense = checkpoint.read(base.tensor_of[path])
        dense = dense.T.contiguous() if isinstance(layer, FrozenConv1D) else dense
        if codec.name == "int8" and dense.ndim != 2:
            assert layer.codec_name == "dense" and torch.equal(layer.stored.dense(), dense)
            continue
        spec = layer.stored.spec
        assert torch.equal(layer.stored.dense(), codec.decode(spec, codec.encode(spec, dense)))
    assert torch.isfinite(logits(base.model)).all()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantized_checkpoint_keeps_its_very_bytes(scheme: str, tmp_path: Path) -> None:
    """And a 16-bit one gets the bytes that the quantize verb would give it."""
    for build in (build_llama, gpt2):
        source = build(tmp_path / build.__name__)
        quantize(model=source, scheme=scheme, output=tmp_path / f"{build.__name__}-{scheme}")
        codec: Codec = NF4() if scheme == "nf4" else Int8()
        kept, made = loaded(tmp_path / f"{build.__name__}-{scheme}", "language", codec), loaded(source, "language", codec)
        stored = open_checkpoint(tmp_path / f"{build.__name__}-{scheme}").stored
        for path, layer in layers(kept).items():
            for name, part in layer.stored.parts.items():
                assert torch.equal(part.view(torch.uint8), stored.read(name).view(torch.uint8))
                assert kept.sha256[name] == tensor_sha256(part)
            for ours, theirs in zip(layer.stored.parts.items(), layers(made)[path].stored.parts.items(), strict=True):
                assert ours[0] == theirs[0] and torch.equal(ours[1].flatten(), theirs[1].flatten())
        assert torch.equal(logits(kept.model), logits(made.model))


@pytest.mark.parametrize(("held", "asked"), [("nf4", Int8()), ("int8", NF4()), ("nf4", None)])
def test_another_stored_form_is_refused(held: str, asked: Codec | None, llama: Path, tmp_path: Path) -> None:
    quantize(model=llama, scheme=held, output=tmp_path / "held")
    with pytest.raises(IncompatibleError, match=f"is stored in {held}, the run asks for {asked.name if asked else 'bf16'}") as raised:
        loaded(tmp_path / "held", "language", asked)
    assert f"--{held}" in str(raised.value.hint)


def test_a_sharded_checkpoint_is_the_same_base(tmp_path: Path) -> None:
    whole = loaded(build_llama(tmp_path / "whole"), "language", NF4())
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shards = loaded(tmp_path / "shards", "language", NF4())
    assert torch.equal(logits(whole.model), logits(shards.model)) and whole.identity == shards.identity


def test_the_identity_is_that_of_the_weights(llama: Path, tuned: Path) -> None:
    first, again, other = (loaded(folder, "language", NF4()) for folder in (llama, llama, tuned))
    assert first.identity == again.identity != other.identity
    stored = open_checkpoint(llama).stored
    assert first.sha256 == {name: stored.sha256(name) for name in stored.specs}


def test_nothing_dense_is_kept(tmp_path: Path) -> None:
    folder = build_llama(tmp_path / "model", hidden_size=128, intermediate_size=256)
    dense, nf4, int8 = (loaded(folder, "language", codec).bytes for codec in (None, NF4(), Int8()))
    checkpoint = open_checkpoint(folder)
    linears = sum(spec.numel for name, spec in checkpoint.specs.items() if "_proj" in name)
    rest = sum(spec.nbytes for name, spec in checkpoint.specs.items() if "_proj" not in name)
    assert dense - rest < 2 * linears + 4096
    assert nf4 - rest < 0.6 * linears + 14 * 1400  # codes and scales; tables of 1.2 KB a layer
    assert int8 - rest < 1.1 * linears


@pytest.mark.parametrize("tie", [True, False])
def test_tied_heads_share_memory(tie: bool, tmp_path: Path) -> None:
    model = loaded(build_llama(tmp_path / "model", tie_word_embeddings=tie), "language", NF4()).model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tie


def test_ties_that_only_transformers_knows_need_no_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_tools.live.base._load_by_transformers", None)
    base = loaded(opt(tmp_path / "model"), "language", NF4())
    assert base.fresh == () and base.model.lm_head.weight is base.model.model.decoder.embed_tokens.weight


def test_a_prefix_is_found_or_left_out(tmp_path: Path) -> None:
    """GPT-2's first checkpoints have no `transformer.` before their names."""
    folder = gpt2(tmp_path / "model")
    expected = loaded(folder, "language", NF4())
    bare = rewritten(folder, lambda name: name.removeprefix("transformer."), drop="lm_head")
    base = loaded(bare, "language", NF4())
    assert torch.equal(logits(base.model), logits(expected.model))
    assert base.tensor_of["transformer.h.0.attn.c_attn"] == "h.0.attn.c_attn.weight"
    assert base.model.lm_head.weight is base.model.transformer.wte.weight and base.fresh == ()


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_new_head_is_drawn_from_the_seed(kind: Any, tmp_path: Path) -> None:
    folder = bert(tmp_path / "model", kind)
    if kind is BertForMaskedLM:  # it has no pooler, which a classification needs
        extra = {"bert.pooler.dense.weight": torch.randn(64, 64).bfloat16(), "bert.pooler.dense.bias": torch.zeros(64).bfloat16()}
        rewritten(folder, **extra)
    first, again, other = (loaded(folder, "classification", NF4(), labels=LABELS, seed=seed) for seed in (3, 3, 4))
    assert first.fresh == ("classifier",) and first.model.classifier.weight.shape == (3, 64)
    assert first.model.config.id2label == {0: "bad", 1: "so so", 2: "good"}
    weight = first.model.classifier.weight
    assert torch.equal(weight, again.model.classifier.weight) and not torch.equal(weight, other.model.classifier.weight)
    assert 0.01 < float(weight.float().std()) < 0.03 and not first.model.classifier.bias.any()
    assert len(layers(first)) == 13 and torch.isfinite(logits(first.model)).all()


def test_a_stored_head_is_kept_when_it_fits_the_labels(tmp_path: Path) -> None:
    folder = bert(tmp_path / "model", num_labels=3)
    assert loaded(folder, "classification", labels=LABELS).fresh == ()


@pytest.mark.parametrize("case", ["bert", "resnet", "vit"])
def test_a_head_for_other_classes_starts_anew(case: str, tmp_path: Path) -> None:
    build, task, _, _ = MODELS[case]
    base = loaded(build(tmp_path / "model"), task, labels=("a", "b", "c", "d", "e"))
    assert len(base.fresh) == 1 and base.fresh[0].startswith("classifier")
    assert logits(base.model).shape == (2, 5) and torch.isfinite(logits(base.model)).all()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = rewritten(build_llama(tmp_path / "model"), drop="layers.1.mlp.up_proj")
    with pytest.raises(IncompatibleError, match=r"1 weights of LlamaForCausalLM are not in the checkpoint: .*layers\.1\.mlp\.up_proj\.weight"):
        loaded(folder, "language")


def test_a_language_model_never_gets_a_made_up_head(tmp_path: Path) -> None:
    folder = rewritten(build_llama(tmp_path / "model"), drop="lm_head")
    with pytest.raises(IncompatibleError, match=r"lm_head\.weight"):
        loaded(folder, "language", NF4())


def test_missing_parts_of_a_quantized_checkpoint_are_named(llama: Path, tmp_path: Path) -> None:
    quantize(model=llama, scheme="nf4", output=tmp_path / "held")
    rewritten(tmp_path / "held", drop="layers.0.self_attn.k_proj")
    with pytest.raises(IncompatibleError, match=r"layers\.0\.self_attn\.k_proj\.weight"):
        loaded(tmp_path / "held", "language", NF4())


@pytest.mark.parametrize(
    ("name", "shape"), [("model.layers.0.mlp.up_proj.weight", (97, 64)), ("model.layers.0.mlp.up_proj.weight", (64, 96)), ("model.norm.weight", (65,))]
)
def test_shapes_that_do_not_fit_the_config_are_refused(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = rewritten(build_llama(tmp_path / "model"), **{name: torch.zeros(shape).bfloat16()})
    for codec in (None, NF4()):
        with pytest.raises(IncompatibleError, match=rf"{name}` is \[{', '.join(map(str, shape))}\], the model has") as raised:
            loaded(folder, "language", codec)
        assert "config.json" in str(raised.value.hint)


def test_a_bias_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = rewritten(gpt2(tmp_path / "model"), **{"transformer.h.0.attn.c_attn.bias": torch.zeros(5).bfloat16()})
    with pytest.raises(IncompatibleError, match="c_attn.bias"):
        loaded(folder, "language")


@pytest.mark.parametrize(("task", "model_type"), [("image", "llama"), ("language", "no-such-model"), ("language", "vit")])
def test_a_task_without_a_class_is_refused(task: str, model_type: str, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": model_type, "architectures": None}))
    with pytest.raises(UnsupportedError, match=f"transformers builds no {task} model") as raised:
        loaded(tmp_path / "model", task)
    assert "--task" in str(raised.value.hint)


# --- checkpoints that transformers renames ------------------------------------------------------------------------------------


def old_style(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_old_names_are_read_by_transformers(tmp_path: Path) -> None:
    expected = loaded(bert(tmp_path / "new", num_labels=3), "classification", NF4())
    folder = rewritten(bert(tmp_path / "old", num_labels=3), old_style)
    base = loaded(folder, "classification", NF4(), labels=LABELS)
    assert torch.equal(logits(base.model), logits(expected.model)) and base.fresh == ()
    assert layers(base).keys() == layers(expected).keys() and base.bytes == expected.bytes
    assert base.model.config.id2label[2] == "good" and not any(parameter.requires_grad for parameter in base.model.parameters())
    stored = open_checkpoint(folder)
    assert base.sha256 == {name: stored.stored.sha256(name) for name in stored.stored.specs}  # a changed base is noticed on this way, too
    assert base.tensor_of["bert.encoder.layer.1.attention.self.query"] == "bert.encoder.layer.1.attention.self.query.weight"


def test_old_names_with_a_new_head(tmp_path: Path) -> None:
    folder = rewritten(bert(tmp_path / "old", BertModel), old_style)
    state = torch.random.get_rng_state()
    first, again, other = (loaded(folder, "classification", labels=LABELS, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.fresh == ("classifier",)
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)
    resized = loaded(rewritten(bert(tmp_path / "other", num_labels=5), old_style), "classification", labels=LABELS)
    assert resized.fresh == ("classifier",) and logits(resized.model).shape == (2, 3)


def test_layers_under_another_name_are_traced_to_their_tensors(tmp_path: Path) -> None:
    """transformers renames the linears of this model while it loads it."""
    base = loaded(vit(tmp_path / "model"), "image", NF4())
    stored = open_checkpoint(tmp_path / "model").stored
    assert not base.tensor_of.keys() & {name.removesuffix(".weight") for name in stored.specs if ".layer." in name}
    for path, layer in layers(base).items():
        dense = stored.read(base.tensor_of[path])
        assert torch.equal(layer.stored.dense(), NF4().decode(layer.stored.spec, NF4().encode(layer.stored.spec, dense)))


def test_old_names_with_weights_missing_are_refused(tmp_path: Path) -> None:
    folder = rewritten(bert(tmp_path / "old", BertModel), old_style, drop="pooler")
    with pytest.raises(IncompatibleError, match=r"pooler\.dense"):
        loaded(folder, "classification", labels=LABELS)


# --- configs that describe no model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -4096},
        {"num_attention_heads": -4},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 100_000_000},
        {"vocab_size": "many"},
        {"rope_theta": float("inf")},
    ],
)
def test_a_size_that_no_model_has_is_named_before_anything_is_built(changes: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=rf"config\.json: `{next(iter(changes))}` is") as raised:
        build_empty(open_checkpoint(with_config(llama, tmp_path / "model", **changes)), "language")
    assert raised.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 100, "num_attention_heads": 32},
        {"rms_norm_eps": "x"},
        {"layer_types": 5},
        {"hidden_act": ["a"]},
        {"rope_parameters": 7},
        {"head_dim": 7},
    ],
)
def test_a_config_that_its_class_refuses_is_one_refusal(changes: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"transformers builds no language model from its config\.json") as raised:
        build_empty(open_checkpoint(with_config(llama, tmp_path / "model", **changes)), "language")
    assert raised.value.hint


def test_transformers_is_told_to_read_safetensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def from_pretrained(folder: Path, **words: Any) -> Any:
        told.update(words)
        raise OSError("enough")

    folder = rewritten(bert(tmp_path / "old", num_labels=3), old_style)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    with pytest.raises(UnsupportedError, match="transformers cannot load it: enough"):
        loaded(folder, "classification")
    assert told["use_safetensors"] is True and told["trust_remote_code"] is False and told["local_files_only"] is True


@pytest.mark.gpu
def test_a_base_loads_onto_a_gpu(llama: Path) -> None:
    base = loaded(llama, "language", NF4(), device="cuda")
    assert all(tensor.is_cuda for tensor in [*base.model.parameters(), *base.model.buffers()])
    with torch.no_grad():
        found = base.model(input_ids=IDS.cuda()).logits.float().cpu()
    expected = logits(loaded(llama, "language", NF4()).model).float()
    assert float((found - expected).norm()) < 3e-2 * float(expected.norm())
