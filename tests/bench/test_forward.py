"""Timing of models that look once, and the same model by transformers and diffusers with the same inputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from qlora_tools.bench import forward, worker
from qlora_tools.bench.hf_forward import class_of, load
from qlora_tools.bench.record import Case, Workload
from qlora_tools.errors import MissingError, UnsupportedError, UsageError
from qlora_tools.models.feeds import draw_feed

BODY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
CASE = {"prompt_tokens": 6, "batch": 2}


class Sleeper:
    """Notes what it is asked; ``took`` are the seconds of its passes, one after another."""

    def __init__(self, clock, took):
        self.clock, self.took, self.passes, self.fed = clock, iter(took), [], []

    def feed(self, case, seed, given=None):
        self.fed.append((case["batch"], case["prompt_tokens"], seed))
        return "feed"

    def forward(self, feed):
        self.passes.append(feed)
        self.clock[0] += next(self.took)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(forward.time, "perf_counter", lambda: now[0])
    return now


def test_a_run_is_one_pass_and_nothing_is_decoded(clock):
    engine = Sleeper(clock, [5.0, 1.0, 1.0, 1.0, 0.5, 0.25])
    found = worker.measure_latency(engine, Workload(repeats=2, warmup=3, most_warmup=8, seed=4).job(Case(7, 9, 3)), {"work": "forward"})
    assert engine.fed == [(3, 7, 4)] and engine.passes == ["feed"] * 6
    assert found["warmup_s"] == [5.0, 1.0, 1.0, 1.0] and found["is_steady"]
    assert found["runs"] == [{"prefill_s": each, "ttft_s": each, "decode_s": [], "total_s": each} for each in (0.5, 0.25)]


def test_an_engine_says_that_it_looks_once():
    assert forward.is_forward({"work": "forward"}) and not forward.is_forward({}) and not forward.is_forward({"work": "decoder"})


def saved(folder, config, owner):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = owner(config).eval()
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def expected(model, feed):
    return model(**{name: torch.from_numpy(array) for name, array in feed.items()})


def test_a_classifier_of_text_runs_as_its_class_does(tmp_path):
    model = saved(tmp_path, transformers.BertConfig(**BODY, vocab_size=60, num_labels=3), transformers.BertForSequenceClassification)
    engine = load(str(tmp_path), threads=1)
    found = engine.read(engine.forward(engine.feed(CASE, 3)))
    feed = draw_feed(["input_ids", "attention_mask", "token_type_ids"], json.loads((tmp_path / "config.json").read_text()), batch=2, length=6, seed=3)
    assert list(found) == ["logits"] and found["logits"].shape == (2, 3)
    np.testing.assert_allclose(found["logits"], expected(model, feed).logits.numpy(), atol=1e-6)
    info = engine.info()
    assert (info["work"], info["runtime"], info["dtype"]) == ("forward", "transformers", "float32") and "prompt" not in info
    assert info["weights_bytes"] >= 4 * sum(parameter.numel() for parameter in model.parameters())
    wide = load(str(tmp_path), threads=1, task="fill-mask")
    assert wide.read(wide.forward(wide.feed(CASE, 3)))["logits"].shape == (2, 6, 60)


def test_a_task_changes_only_a_class_that_is_for_another(tmp_path):
    config = transformers.CLIPVisionConfig(**BODY, image_size=16, patch_size=8)
    config.save_pretrained(tmp_path)

    def found(*architectures, task=None):
        return class_of(tmp_path, {"architectures": list(architectures)}, task).__name__

    assert found("CLIPVisionModelWithProjection", task="feature-extraction") == "CLIPVisionModelWithProjection"
    assert found("CLIPVisionModel", task="denoising") == "CLIPVisionModel" and found(task="feature-extraction") == "CLIPVisionModel"
    transformers.BertConfig(**BODY).save_pretrained(tmp_path)
    assert found("BertForMaskedLM", task="feature-extraction") == "BertModel" and found("BertForMaskedLM", task="fill-mask") == "BertForMaskedLM"
    with pytest.raises(UnsupportedError, match="no architecture"):
        found()


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_dense_folder_is_quantized_while_it_is_loaded(tmp_path, quantize):
    saved(tmp_path, transformers.BertConfig(**{**BODY, "hidden_size": 64}, vocab_size=60, num_labels=32), transformers.BertForSequenceClassification)
    dense, small = load(str(tmp_path), threads=1), load(str(tmp_path), threads=1, quantize=quantize, dtype="fp32")
    exact, found = (engine.read(engine.forward(engine.feed(CASE, 0)))["logits"] for engine in (dense, small))
    assert small.info()["quantization"] == "bitsandbytes" and small.info()["weights_bytes"] < dense.info()["weights_bytes"]
    assert 0 < np.linalg.norm(found - exact) < 0.3 * np.linalg.norm(exact)


@pytest.mark.gpu
def test_on_a_gpu_inputs_lie_there_and_a_pass_is_waited_for(tmp_path):
    saved(tmp_path, transformers.BertConfig(**BODY, vocab_size=60, num_labels=3), transformers.BertForSequenceClassification)
    here, there = load(str(tmp_path), threads=1), load(str(tmp_path), threads=1, device="cuda")
    feed = there.feed(CASE, 0)
    assert all(tensor.is_cuda for tensor in feed.values())
    np.testing.assert_allclose(there.read(there.forward(feed))["logits"], here.read(here.forward(here.feed(CASE, 0)))["logits"], atol=1e-3)


def test_a_classifier_of_images_ignores_the_prompt(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4)
    model = saved(tmp_path, config, transformers.ResNetForImageClassification)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}, "crop_pct": 0.875}))
    engine = load(str(tmp_path), threads=1, dtype="bf16")
    feed = engine.feed({"prompt_tokens": 99, "batch": 2}, 0)
    assert feed["pixel_values"].shape == (2, 3, 32, 32) and feed["pixel_values"].dtype == torch.bfloat16
    found = engine.read(engine.forward(feed))["logits"]
    assert found.dtype == np.float32 and engine.info()["prompt"] == "ignored" and engine.info()["dtype"] == "bfloat16"
    pixels = draw_feed(["pixel_values"], {}, batch=2, length=1, seed=0, processor={"size": 32})
    np.testing.assert_allclose(found, expected(model, pixels).logits.numpy(), atol=0.05)


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_of_a_model_in_two_halves_the_reading_one_is_kept(tmp_path, kind):
    if kind == "t5":
        config = transformers.T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
        model, names = saved(tmp_path, config, transformers.T5ForConditionalGeneration), ["input_ids", "attention_mask"]
    else:
        sizes = {
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        }
        tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 4}
        config = transformers.WhisperConfig(vocab_size=60, d_model=32, num_mel_bins=8, max_source_positions=10, max_target_positions=8, **sizes, **tokens)
        model, names = saved(tmp_path, config, transformers.WhisperForConditionalGeneration), ["input_features"]
    engine = load(str(tmp_path), threads=1)
    found = engine.read(engine.forward(engine.feed(CASE, 1)))
    feed = draw_feed(names, json.loads((tmp_path / "config.json").read_text()), batch=2, length=6, seed=1)
    np.testing.assert_allclose(found["last_hidden_state"], expected(model.get_encoder(), feed).last_hidden_state.numpy(), atol=1e-6)
    assert engine.info()["part"] == "encoder" and ("prompt" in engine.info()) == (kind == "whisper")
    assert engine.info()["weights_bytes"] < 4 * sum(parameter.numel() for parameter in model.parameters())


def test_a_denoiser_runs_as_diffusers_does(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"block_out_channels": (16,), "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2, **blocks, **added).eval()
    model.save_pretrained(tmp_path)
    engine = load(str(tmp_path), threads=1)
    found = engine.read(engine.forward(engine.feed(CASE, 1)))
    names = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    feed = {name: torch.from_numpy(array) for name, array in draw_feed(names, dict(model.config), batch=2, length=1, seed=1).items()}
    added = {name: feed.pop(name) for name in ("text_embeds", "time_ids")}
    with torch.inference_mode():
        wanted = model(**feed, added_cond_kwargs=added).sample.numpy()
    assert list(found) == ["out_sample"] and engine.info()["runtime"] == "diffusers" and engine.info()["prompt"] == "ignored"
    np.testing.assert_allclose(found["out_sample"], wanted, atol=1e-5)


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(MissingError, match="no config.json"):
        load(str(tmp_path), threads=1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForNothing"]}))
    with pytest.raises(UsageError, match="fp8"):
        load(str(tmp_path), threads=1, dtype="fp8")
    with pytest.raises(UnsupportedError, match="BertForNothing"):
        load(str(tmp_path), threads=1)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(UnsupportedError, match="AutoencoderKL"):
        load(str(tmp_path), threads=1)
    with pytest.raises(UnsupportedError, match="no adapter"):
        load(str(tmp_path), threads=1, adapter="a")


def test_a_classifier_in_a_pickle_and_a_denoiser_in_one_are_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    saved(tmp_path / "text", transformers.BertConfig(**BODY, vocab_size=60, num_labels=3), transformers.BertForSequenceClassification)
    diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(16,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).save_pretrained(tmp_path / "image", safe_serialization=False)
    (tmp_path / "text/model.safetensors").unlink()
    torch.save({}, tmp_path / "text/pytorch_model.bin")
    for folder in ("text", "image"):
        with pytest.raises(UnsupportedError, match="pickle files can run code"):
            load(str(tmp_path / folder), threads=1)


def test_diffusers_is_told_to_read_safetensors_alone(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    told = {}

    def from_pretrained(folder, **words):
        told.update(words)
        raise OSError("enough")

    monkeypatch.setattr(diffusers.UNet2DModel, "from_pretrained", from_pretrained)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="diffusers cannot load it: enough"):
        load(str(tmp_path), threads=1)
    assert told["use_safetensors"] is True and told["local_files_only"] is True


def test_a_config_that_transformers_cannot_read_is_refused_with_a_task_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "architectures": ["BertModel"], "auto_map": {"AutoConfig": "own.Config"}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"transformers cannot read its config\.json"):
        load(str(tmp_path), threads=1, task="fill-mask")
