from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_tools.adapters.formats import diffusers, kohya, lycoris
from qlora_tools.adapters.portable import CONV, EMBEDDING, LINEAR, Layer, Portable
from qlora_tools.errors import CorruptError, IncompatibleError, NonFiniteError, QltError, UnsupportedError, UsageError
from tests.adapters.formats.tiny_images import Sd, Sdxl, applied, assert_same_weights, clip, merged_by_peft, modules_of, random_pairs, sd1, weights_of

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "conv1", "conv2", "conv_in", "conv_shortcut", "time_emb_proj", "net.0.proj", "net.2", "linear_1"]


def randomised(model, config, **kwargs):
    """``model`` with an adapter whose every number is random."""
    model.add_adapter(config, **kwargs)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data = parameter.data * (0.5 + torch.rand(parameter.shape, generator=generator))
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def opened(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata() or {}


def saved(tensors, metadata, folder):
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata)
    return str(folder)


def layers_for(modules, *, dora=False, bias=False, scale=lambda index: 0.25 * (1 + index % 5)):
    generator = torch.Generator().manual_seed(2)
    return {
        name: Layer(
            down,
            up,
            scale(index),
            CONV if down.ndim > 2 else LINEAR,
            torch.randn(up.shape[0], generator=generator) if bias else None,
            torch.rand(up.shape[0], generator=generator) + 0.5 if dora else None,
        )
        for index, (name, down, up) in enumerate(random_pairs(modules))
    }


def with_biases(model):
    """The modules that have a bias: PEFT does not merge biases into others."""
    return {name: shape for name, shape in modules_of(model).items() if model.get_submodule(name).bias is not None}


class TestReadsWhatDiffusersSaves:
    @pytest.mark.parametrize(
        "options",
        [
            {"r": 2, "lora_alpha": 6},
            {"r": 4, "lora_alpha": 6, "use_rslora": True},
            {"r": 2, "lora_alpha": 3, "rank_pattern": {"to_k": 3, "^conv_in": 1}, "alpha_pattern": {"to_q": 5.0, "conv1": 0.5}},
            {"r": 2, "lora_alpha": 4, "use_dora": True},
            {"r": 2, "lora_alpha": 4, "lora_bias": True},
        ],
        ids=["alpha", "rslora", "patterns", "dora", "bias"],
    )
    def test_unet_saved_alone_with_its_metadata(self, options, tmp_path):
        unet = sd1()
        base, biases = weights_of(unet), {name: module.bias for name, module in unet.named_modules() if getattr(module, "bias", None) is not None}
        biases = {name: bias.detach().clone() for name, bias in biases.items()}
        randomised(unet, LoraConfig(target_modules=list(with_biases(unet)) if "lora_bias" in options else EVERYTHING, **options))
        unet.save_lora_adapter(tmp_path)
        tensors, metadata = opened(tmp_path / "pytorch_lora_weights.safetensors")
        assert diffusers.recognise(tensors, metadata)
        found = diffusers.read(tensors, metadata, {name: tuple(weight.shape) for name, weight in base.items()})
        assert set(found) == {""}
        assert_same_weights(unet, base, found[""])
        for name, layer in found[""].layers.items():
            assert (layer.bias is not None) == options.get("lora_bias", False)
            if layer.bias is not None and name in biases:
                torch.testing.assert_close(unet.get_submodule(name).base_layer.bias.detach(), biases[name] + layer.bias)

    def test_pipeline_with_text_encoder_and_metadata_for_each(self, tmp_path):
        pipe = Sd()
        base = weights_of(pipe.unet), weights_of(pipe.text_encoder)
        modules = {"unet": modules_of(pipe.unet), "text_encoder": modules_of(pipe.text_encoder)}
        first = LoraConfig(r=2, lora_alpha=5, target_modules=ATTENTION)
        second = LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj", "fc1"])
        randomised(pipe.unet, first)
        randomised(pipe.text_encoder, second)
        Sd.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="default"),
            text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder, adapter_name="default"),
            unet_lora_adapter_metadata=first.to_dict(),
            text_encoder_lora_adapter_metadata=second.to_dict(),
        )
        found = diffusers.read(*opened(tmp_path / "pytorch_lora_weights.safetensors"), modules)
        assert_same_weights(pipe.unet, base[0], found["unet"])
        assert_same_weights(pipe.text_encoder, base[1], found["text_encoder"])


def spelled(modules, style):
    """A file in one of the older spellings, with the attention projections of ``modules``."""
    tensors = {}
    for name, down, up in random_pairs(modules):
        block, _, projection = name.rpartition(".to_")
        if style == "processor":
            key = f"{block}.processor.to_{projection.removesuffix('.0')}_lora"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        else:
            tensors |= {f"{name}.{style.format('down')}": down, f"{name}.{style.format('up')}": up}
    return tensors


class TestSpellings:
    modules = staticmethod(lambda model: {name: shape for name, shape in modules_of(model).items() if name.endswith(tuple(ATTENTION))})

    @pytest.mark.parametrize("style", ["processor", "lora.{}.weight"])
    @pytest.mark.parametrize("prefix", ["unet.", ""])
    def test_older_spellings_equal_diffusers_own_loader(self, style, prefix):
        unet = sd1()
        base, modules = weights_of(unet), self.modules(unet)
        tensors = {prefix + key: tensor for key, tensor in spelled(modules, style).items()}
        assert diffusers.recognise(tensors, {}) and not kohya.recognise(tensors, {}) and not lycoris.recognise(tensors, {})
        found = diffusers.read(tensors, {}, modules_of(unet))
        assert set(found) == {prefix.removesuffix(".")}
        unet.load_lora_adapter(dict(tensors), prefix="unet" if prefix else None)
        assert_same_weights(unet, base, found[prefix.removesuffix(".")])

    @pytest.mark.parametrize("style", ["lora_linear_layer.{}.weight", "old"])
    def test_older_text_encoder_spellings_equal_diffusers_own_loader(self, style):
        pipe = Sd()
        base = weights_of(pipe.text_encoder)
        modules = {name: shape for name, shape in modules_of(pipe.text_encoder).items() if "self_attn" in name}
        old = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
        tensors = {}
        for name, down, up in random_pairs(modules):
            block, _, last = name.rpartition(".")
            key = f"text_encoder.text_model.{block}.{old[last]}.{{}}.weight" if style == "old" else f"text_encoder.text_model.{name}.{style}"
            tensors |= {key.format("down"): down, key.format("up"): up}
        found = diffusers.read(tensors, {}, modules_of(pipe.text_encoder))
        pipe.load_lora_weights(dict(tensors))
        assert_same_weights(pipe.text_encoder, base, found["text_encoder"])

    def test_dotted_down_and_up_with_alpha(self):
        down, up = torch.randn(2, 4), torch.randn(3, 2)
        tensors = {
            "diffusion_model.blocks.0.q.lora_down.weight": down,
            "diffusion_model.blocks.0.q.lora_up.weight": up,
            "diffusion_model.blocks.0.q.alpha": torch.tensor(1),
        }
        layer = diffusers.read(tensors, {}, {"blocks.0.q": (3, 4)})["diffusion_model"].layers["blocks.0.q"]
        assert diffusers.recognise(tensors, {}) and layer.scale == 0.5 and torch.equal(layer.a, down)

    def test_alpha_beside_the_oldest_spelling_is_that_of_the_projection(self):
        tensors = spelled({"mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (4, 4)}, "processor")
        tensors["mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.alpha"] = torch.tensor(3.0)
        assert diffusers.read(tensors, {})[""].layers["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"].scale == 3.0

    def test_adapter_name_in_the_key_is_dropped(self):
        tensors = {"unet.a.lora_A.default.weight": torch.ones(1, 2), "unet.a.lora_B.default.weight": torch.ones(2, 1)}
        assert set(diffusers.read(tensors, {})["unet"].layers) == {"a"}

    def test_without_alpha_or_metadata_the_scale_is_one(self):
        tensors = {"unet.a.lora_A.weight": torch.ones(4, 2), "unet.a.lora_B.weight": torch.ones(2, 4)}
        assert diffusers.read(tensors, {})["unet"].layers["a"].scale == 1.0


class TestRecognise:
    @pytest.mark.parametrize(
        "keys",
        [
            ["unet.down_blocks.0.a.lora_A.weight", "unet.down_blocks.0.a.lora_B.weight"],
            ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"],
            ["transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0.ffn.net.2.lora_A.weight"],
            ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight"],
            ["down_blocks.0.attentions.0.proj_in.lora.down.weight"],
        ],
    )
    def test_its_own(self, keys):
        assert diffusers.recognise(keys, {})

    @pytest.mark.parametrize(
        "keys",
        [
            ["base_model.model.unet.a.lora_A.weight"],
            ["transformer.h.0.attn.c_attn.lora_A.weight", "transformer.h.0.attn.c_attn.lora_B.weight"],
            ["transformer.blocks.0.attn.Wqkv.lora_A.weight"],
            ["model.layers.0.self_attn.q_proj.lora_A.weight"],
            ["transformer.h.0.attn.attn.lora_A"],
            ["layers.0.attn.q_proj.lora_a.weight"],
            ["lora_unet_a.lora_down.weight"],
            ["unet.a.hada_w1_a"],
            ["unet.a.lora_A.weight", "something.else"],
            ["encoder.layer.0.lora_A"],
            [],
        ],
    )
    def test_others(self, keys):
        assert not diffusers.recognise(keys, {})


class TestHostile:
    good = staticmethod(lambda: {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)})

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"unet.a.lora_B.weight": None}, CorruptError, "unet.a.lora_A.weight"),
            ({"unet.a.lora_A.weight": None}, CorruptError, "unet.a.lora_B.weight"),
            ({"unet.a.alpha": torch.tensor(float("nan"))}, NonFiniteError, "unet.a.alpha"),
            ({"unet.a.alpha": torch.tensor(0)}, UnsupportedError, "unet.a.alpha"),
            ({"unet.a.lora_B.weight": torch.full((4, 2), float("nan"))}, NonFiniteError, "unet.a.lora_B"),
            ({"unet.a.lora_B.weight": torch.ones(4, 3)}, CorruptError, "do not multiply"),
            ({"unet.a.lora_A.weight": torch.tensor(1.0)}, CorruptError, "unet.a.lora_A"),
            ({"unet.a.lora_B.weight": torch.ones(5, 2)}, IncompatibleError, "a"),
            ({"unet.a.lora_A.weight": torch.ones(2, 3, 3, 3)}, IncompatibleError, "a"),
            ({"unet.a.lora_A.bias": torch.ones(2)}, CorruptError, "lora_A.bias"),
            ({"unet.a.lora_B.bias": torch.ones(3)}, IncompatibleError, "lora_B.bias"),
            ({"unet.a.lora_magnitude_vector": torch.ones(3)}, IncompatibleError, "DoRA"),
            ({"unet.a.processor.qkv_lora1.down.wait": torch.ones(2)}, IncompatibleError, "qkv_lora1"),
            ({"unet.a.lora.down.weight": torch.ones(2, 3)}, IncompatibleError, "same factor"),
            ({"b.lora_A.weight": torch.ones(2, 3)}, IncompatibleError, "b.lora_A.weight"),
            ({"lora_controlnet": torch.ones(1)}, IncompatibleError, "lora_controlnet"),
            ({"unet.zz.lora_A.weight": torch.ones(1, 1), "unet.zz.lora_B.weight": torch.ones(1, 1)}, IncompatibleError, "zz"),
        ],
    )
    def test_broken_files_are_refused_by_name(self, change, error, text):
        tensors = {key: tensor for key, tensor in (self.good() | change).items() if tensor is not None}
        with pytest.raises(error, match=text.replace(".", r"\.")):
            diffusers.read(tensors, {}, {"a": (4, 3)})

    @pytest.mark.parametrize(
        ("content", "error", "text"),
        [
            ("{", CorruptError, "not JSON"),
            ("[" * 100_000, CorruptError, "not JSON"),
            ("[]", CorruptError, "object"),
            ({"unet.r": 5, "unet.lora_alpha": 5}, IncompatibleError, "rank 2"),
            ({"unet.r": 0}, QltError, "r"),
            ({"unet.r": 2, "unet.use_dora": True}, IncompatibleError, "use_dora"),
            ({"unet.r": 2, "unet.use_qalora": True}, UnsupportedError, "use_qalora"),
            ({"unet.r": 2, "unet.init_lora_weights": "pissa"}, UnsupportedError, "pissa"),
        ],
    )
    def test_broken_metadata_is_refused(self, content, error, text):
        metadata = {diffusers.METADATA_KEY: content if isinstance(content, str) else json.dumps(content)}
        with pytest.raises(error, match=text):
            diffusers.read(self.good(), metadata, {"a": (4, 3)})

    def test_alpha_that_contradicts_the_metadata_is_refused(self):
        metadata = {diffusers.METADATA_KEY: json.dumps({"unet.r": 2, "unet.lora_alpha": 2})}
        diffusers.read(self.good() | {"unet.a.alpha": torch.tensor(2.0)}, metadata)
        with pytest.raises(IncompatibleError, match="metadata"):
            diffusers.read(self.good() | {"unet.a.alpha": torch.tensor(1.0)}, metadata)

    def test_several_components_with_one_base_ask_which(self):
        tensors = self.good() | {"text_encoder.b.lora_A.weight": torch.ones(1, 1), "text_encoder.b.lora_B.weight": torch.ones(1, 1)}
        with pytest.raises(UsageError):
            diffusers.read(tensors, {}, {"a": (4, 3)})
        assert set(diffusers.read(tensors, {}, {"a": (4, 3)}, component="unet")) == {"unet"}
        assert set(diffusers.read(tensors, {})) == {"unet", "text_encoder"}

    def test_two_names_of_one_module_are_refused(self):
        tensors = {f"text_encoder.{prefix}encoder.a.lora_{side}.weight": torch.ones(1, 1) for prefix in ("", "text_model.") for side in "AB"}
        with pytest.raises(IncompatibleError, match="two names"):
            diffusers.read(tensors, {}, {"encoder.a": (1, 1)})

    @settings(max_examples=60, deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from(["unet.a", "unet.a.processor", "text_encoder.x", "", "a.to_q_lora"]).flatmap(
                lambda name: st.sampled_from(["lora_A.weight", "lora_B.weight", "lora.up.weight", "alpha", "lora_magnitude_vector", "weight"]).map(
                    lambda leaf: f"{name}.{leaf}"
                )
            ),
            st.lists(st.integers(0, 3), max_size=4).map(torch.ones),
        )
    )
    def test_any_file_is_read_or_refused_on_purpose(self, tensors):
        diffusers.recognise(tensors, {})
        with contextlib.suppress(QltError):
            diffusers.read(tensors, {}, {"unet": {"a": (2, 2)}, "text_encoder": {"x": (2, 2)}})


class TestWrite:
    @pytest.mark.parametrize("options", [{}, {"dora": True}, {"bias": True}], ids=["mixed ranks and scales", "dora", "bias"])
    @pytest.mark.parametrize("with_metadata", [True, False])
    def test_pipeline_loads_the_same_weights(self, options, with_metadata, tmp_path):
        pipe = Sd()
        base = weights_of(pipe.unet), weights_of(pipe.text_encoder)
        unet, text = layers_for(with_biases(pipe.unet) if "bias" in options else modules_of(pipe.unet), **options), layers_for(modules_of(pipe.text_encoder))
        named = {f"text_model.{name}": layer for name, layer in text.items()}
        tensors, metadata = diffusers.write({"unet": Portable(unet), "text_encoder": Portable(named)})
        pipe.load_lora_weights(saved(tensors, metadata if with_metadata else {"format": "pt"}, tmp_path))
        assert_same_weights(pipe.unet, base[0], Portable(unet))
        assert_same_weights(pipe.text_encoder, base[1], Portable(text))

    def test_biases_arrive_in_the_loaded_model(self, tmp_path):
        pipe = Sd()
        before = pipe.unet.conv_in.bias.detach().clone()
        layers = layers_for({"conv_in": (8, 4, 3, 3)}, bias=True)
        pipe.load_lora_weights(saved(*diffusers.write({"unet": Portable(layers)}), tmp_path))
        merged_by_peft(pipe.unet)
        torch.testing.assert_close(pipe.unet.conv_in.base_layer.bias.detach(), before + layers["conv_in"].bias)

    def test_sdxl_pipeline_loads_two_text_encoders(self, tmp_path):
        pipe = Sdxl()
        chosen = {name: {k: v for k, v in modules_of(model).items() if k.endswith(("to_q", "q_proj", "fc1"))} for name, model in pipe.components.items()}
        base = {name: weights_of(model) for name, model in pipe.components.items()}
        portables = {name: Portable(layers_for(modules)) for name, modules in chosen.items()}
        pipe.load_lora_weights(saved(*diffusers.write(portables), tmp_path))
        for name, model in pipe.components.items():
            assert_same_weights(model, base[name], portables[name])

    def test_one_model_without_a_component_name(self, tmp_path):
        unet = sd1()
        base, layers = weights_of(unet), layers_for(modules_of(unet))
        folder = saved(*diffusers.write({"": Portable(layers)}), tmp_path)
        unet.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
        assert_same_weights(unet, base, Portable(layers))

    @pytest.mark.parametrize("dora", [False, True])
    def test_round_trip_gives_the_same_weights(self, dora):
        modules = modules_of(sd1())
        layers = layers_for(modules, dora=dora)
        found = diffusers.read(*diffusers.write({"unet": Portable(layers)}), modules)["unet"].layers
        for name, layer in layers.items():
            assert found[name].scale == 1.0
            weight = torch.randn(modules[name])
            torch.testing.assert_close(applied(weight, found[name]), applied(weight, layer), rtol=1e-5, atol=1e-5)

    def test_baking_widens_b_only_where_its_type_cannot_hold_the_product(self):
        b = torch.tensor([[1.0], [1.0078125]], dtype=torch.bfloat16)
        exact, _ = diffusers.write({"unet": Portable({"a": Layer(torch.ones(1, 2), b, 0.5)})})
        widened, _ = diffusers.write({"unet": Portable({"a": Layer(torch.ones(1, 2), b, 1 / 3)})})
        assert exact["unet.a.lora_B.weight"].dtype == torch.bfloat16 and widened["unet.a.lora_B.weight"].dtype == torch.float32

    @pytest.mark.parametrize(
        ("portables", "text"),
        [
            ({"unet": Portable({"e": Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0, EMBEDDING)})}, "e"),
            ({"unet": Portable({}, replacements={"norm.weight": torch.ones(2)})}, "norm.weight"),
            (
                {
                    "unet": Portable(
                        {"p": Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0), "d": Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0, magnitude=torch.ones(2))}
                    )
                },
                "p",
            ),
            ({"": Portable({}), "unet": Portable({})}, "name"),
        ],
    )
    def test_what_the_format_cannot_hold_is_refused_by_name(self, portables, text):
        with pytest.raises(UnsupportedError, match=text):
            diffusers.write(portables)


def test_text_model_part_of_a_base_is_found_either_way():
    modules = modules_of(clip())
    tensors, metadata = diffusers.write({"text_encoder": Portable(layers_for(modules))})
    older = {f"text_model.{name}": shape for name, shape in modules.items()}
    assert set(diffusers.read(tensors, metadata, older)["text_encoder"].layers) == set(older)
