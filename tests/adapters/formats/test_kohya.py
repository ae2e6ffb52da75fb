from __future__ import annotations

import contextlib

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.adapters.formats import diffusers, kohya, lycoris, sgm
from qlora_tools.adapters.formats.names import flat
from qlora_tools.adapters.portable import CONV, EMBEDDING, LINEAR, Layer, Portable
from qlora_tools.errors import CorruptError, IncompatibleError, NonFiniteError, QltError, UnsupportedError, UsageError
from tests.adapters.formats.tiny_images import Sd, Sdxl, applied, assert_same_weights, clip, modules_of, product, random_pairs, sd1, sdxl, weights_of


def underscored(modules, prefix="lora_unet_", alpha=None, spell=flat):
    """A file of this format for every module."""
    tensors = {}
    for name, down, up in random_pairs(modules):
        key = prefix + spell(name)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha(name) if callable(alpha) else alpha))
    return tensors


def sgm_spelling(modules):
    research = {module: spelling for spelling, module in sgm.spellings(modules)}
    return lambda name: flat(research[name])


def in_text_model(modules):
    return {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in modules.items()}


class TestRead:
    def test_every_layer_of_an_sd1_unet_and_text_encoder_equals_diffusers_own_loader(self):
        pipe = Sd()
        unet, text = modules_of(pipe.unet), modules_of(pipe.text_encoder)
        tensors = underscored(unet, alpha=3.0) | underscored(in_text_model(text), "lora_te_", alpha=3.0)
        before = weights_of(pipe.unet), weights_of(pipe.text_encoder)
        found = kohya.read(tensors, {}, {"unet": unet, "text_encoder": text})
        assert set(found) == {"unet", "text_encoder"} and set(found["unet"].layers) == set(unet) and set(found["text_encoder"].layers) == set(text)
        pipe.load_lora_weights(dict(tensors))
        assert_same_weights(pipe.unet, before[0], found["unet"])
        assert_same_weights(pipe.text_encoder, before[1], found["text_encoder"])

    def test_research_names_of_sdxl_equal_diffusers_own_loader(self):
        pipe = Sdxl()
        unet, first, second = modules_of(pipe.unet), modules_of(pipe.text_encoder), modules_of(pipe.text_encoder_2)
        second.pop("text_projection")
        tensors = underscored(unet, alpha=2.0, spell=sgm_spelling(unet))
        tensors |= underscored(in_text_model(first), "lora_te1_", 2.0) | underscored(in_text_model(second), "lora_te2_", 2.0)
        before = weights_of(pipe.unet), weights_of(pipe.text_encoder), weights_of(pipe.text_encoder_2)
        found = kohya.read(tensors, {}, {"unet": unet, "text_encoder": first, "text_encoder_2": second})
        pipe.load_lora_weights(dict(tensors))
        for (component, model), base in zip(pipe.components.items(), before, strict=True):
            assert_same_weights(model, base, found[component])

    @pytest.mark.parametrize("model", [sd1, sdxl])
    def test_research_names_of_every_module_are_those_of_diffusers_checkpoint_converter(self, model):
        unet = model()
        modules = modules_of(unet)
        research = {module: spelling for spelling, module in sgm.spellings(modules)}
        assert set(research) == set(modules)
        marked = {f"model.diffusion_model.{research[name]}.{leaf}": torch.tensor(index) for index, name in enumerate(modules) for leaf in ("weight", "bias")}
        converted = convert_ldm_unet_checkpoint(marked, unet.config)
        assert {name: int(converted[f"{name}.weight"]) for name in modules} == {name: index for index, name in enumerate(modules)}

    def test_alpha_of_each_module_divides_by_its_own_rank_and_is_its_rank_where_absent(self):
        modules = {"down_blocks.0.attentions.0.proj_in": (6, 5), "down_blocks.0.attentions.0.proj_out": (5, 6), "conv_in": (6, 3, 3, 3)}
        alphas = {"down_blocks.0.attentions.0.proj_in": 8.0, "down_blocks.0.attentions.0.proj_out": 0.5}
        tensors = underscored(modules, alpha=lambda name: alphas.get(name, 1.0))
        del tensors["lora_unet_conv_in.alpha"]
        layers = kohya.read(tensors, {}, modules)["unet"].layers
        for index, (name, down, up) in enumerate(random_pairs(modules)):
            scale = alphas[name] / (1 + index) if name in alphas else 1.0
            reference = scale * torch.einsum("or,r...->o...", up.double().flatten(1), down.double())
            torch.testing.assert_close(product(layers[name]), reference, rtol=1e-12, atol=1e-12)

    def test_factors_are_the_files_own_bytes(self):
        modules = {"conv_in": (6, 3, 3, 3)}
        tensors = {key: tensor.half() for key, tensor in underscored(modules).items()}
        layer = kohya.read(tensors, {}, modules)["unet"].layers["conv_in"]
        assert layer.a.dtype == torch.float16 and torch.equal(layer.a, tensors["lora_unet_conv_in.lora_down.weight"]) and layer.kind == CONV

    def test_linear_stored_as_a_convolution_is_squeezed_and_the_other_way_round(self):
        down, up = torch.randn(2, 5), torch.randn(6, 2)
        as_conv = {"lora_unet_conv_in.lora_down.weight": down[..., None, None], "lora_unet_conv_in.lora_up.weight": up[..., None, None]}
        as_linear = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
        linear = kohya.read(as_conv, {}, {"conv_in": (6, 5)})["unet"].layers["conv_in"]
        conv = kohya.read(as_linear, {}, {"conv_in": (6, 5, 1, 1)})["unet"].layers["conv_in"]
        assert (linear.kind, linear.a.shape, linear.b.shape) == (LINEAR, (2, 5), (6, 2))
        assert (conv.kind, conv.a.shape, conv.b.shape) == (CONV, (2, 5, 1, 1), (6, 2, 1, 1))

    @pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
    def test_dora_scale_becomes_lengths_of_outputs(self, shape):
        tensors = underscored({"conv_in": shape}, alpha=2.0)
        lengths = torch.rand(6) + 0.5
        tensors["lora_unet_conv_in.dora_scale"] = lengths.reshape(6, *(1 for _ in shape[1:]))
        layer = kohya.read(tensors, {}, {"conv_in": shape})["unet"].layers["conv_in"]
        rows = applied(torch.randn(shape), layer).flatten(1).norm(dim=1)
        torch.testing.assert_close(rows, lengths.double())

    def test_lengths_of_inputs_are_refused(self):
        tensors = underscored({"conv_in": (6, 6)}) | {"lora_unet_conv_in.dora_scale": torch.ones(1, 6)}
        with pytest.raises(UnsupportedError, match="rescales inputs"):
            kohya.read(tensors, {}, {"conv_in": (6, 6)})

    def test_text_encoders_match_with_and_without_the_text_model_part(self):
        modules = modules_of(clip())
        tensors = underscored(in_text_model(modules), "lora_te_")
        assert set(kohya.read(tensors, {}, modules)["text_encoder"].layers) == set(modules)
        assert set(kohya.read(tensors, {}, in_text_model(modules))["text_encoder"].layers) == set(in_text_model(modules))

    def test_base_with_research_names_matches_them(self):
        modules = {"model.diffusion_model.double_blocks.0.img_attn.qkv": (9, 4)}
        tensors = underscored({"double_blocks.0.img_attn.qkv": (9, 4)})
        assert set(kohya.read(tensors, {}, modules)["unet"].layers) == set(modules)


class TestWithoutBase:
    @pytest.mark.parametrize("model", [sd1, sdxl])
    @pytest.mark.parametrize("research", [False, True])
    def test_names_of_stable_diffusion_are_understood(self, model, research):
        modules = modules_of(model())
        tensors = underscored(modules, spell=sgm_spelling(modules) if research else flat)
        assert set(kohya.read(tensors, {})["unet"].layers) == set(modules)

    def test_research_names_of_sdxl_are_the_same_with_and_without_it(self):
        table = dict(sgm.spellings(sgm.sdxl_modules()))
        assert len(table) == len(sgm.sdxl_modules())
        tensors = {f"lora_unet_{flat(name)}.{leaf}": torch.ones(1, 1) for name in table for leaf in ("lora_down.weight", "lora_up.weight")}
        assert set(kohya.read(tensors, {})["unet"].layers) == set(table.values())

    def test_other_names_need_the_base(self):
        with pytest.raises(UnsupportedError, match="some_made_up_layer") as caught:
            kohya.read(underscored({"some.made_up.layer": (4, 4)}), {})
        assert "--base" in caught.value.hint


class TestHostile:
    good = staticmethod(lambda: underscored({"conv_in": (6, 3, 3, 3)}, alpha=1.0))

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"lora_unet_conv_in.lora_up.weight": None}, CorruptError, "lora_unet_conv_in.lora_up.weight"),
            ({"lora_unet_conv_in.lora_down.weight": None}, CorruptError, "lora_unet_conv_in.lora_down.weight"),
            ({"lora_unet_conv_in.alpha": torch.tensor(float("nan"))}, NonFiniteError, "conv_in.alpha"),
            ({"lora_unet_conv_in.alpha": torch.tensor(0.0)}, UnsupportedError, "conv_in.alpha"),
            ({"lora_unet_conv_in.alpha": torch.ones(2)}, CorruptError, "one number"),
            ({"lora_unet_conv_in.lora_up.weight": torch.full((6, 1, 1, 1), float("inf"))}, NonFiniteError, "lora_up"),
            ({"lora_unet_conv_in.lora_up.weight": torch.ones(6, 1, 1, 1, dtype=torch.int8)}, CorruptError, "int8"),
            ({"lora_unet_conv_in.lora_up.weight": torch.ones(6, 2, 1, 1)}, CorruptError, "do not multiply"),
            ({"lora_unet_conv_in.lora_up.weight": torch.ones(6, 1, 3, 3)}, CorruptError, "do not multiply"),
            ({"lora_unet_conv_in.lora_up.weight": torch.ones(7, 1, 1, 1)}, IncompatibleError, "conv_in"),
            ({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 3, 5, 5)}, IncompatibleError, "conv_in"),
            (
                {"lora_unet_conv_in.lora_down.weight": torch.ones(0, 3, 3, 3), "lora_unet_conv_in.lora_up.weight": torch.ones(6, 0, 1, 1)},
                CorruptError,
                "conv_in",
            ),
            ({"lora_unet_conv_in.lora_down.weight": torch.ones(1)}, CorruptError, "conv_in"),
            ({"lora_unet_conv_in.lora_down.weight": torch.tensor(1.0)}, CorruptError, "conv_in"),
            ({"lora_unet_conv_in.surprise": torch.ones(1)}, IncompatibleError, "lora_unet_conv_in.surprise"),
            ({"something_else": torch.ones(1)}, IncompatibleError, "something_else"),
            ({"lora_unet_conv_inn.lora_up.weight": torch.ones(6, 1)}, IncompatibleError, "conv_inn"),
            ({"lora_unet_conv_in.dora_scale": torch.ones(5, 1, 1, 1)}, IncompatibleError, "DoRA"),
            ({"lora_unet_norm.lora_up.weight": torch.ones(6, 1), "lora_unet_norm.lora_down.weight": torch.ones(1, 1)}, IncompatibleError, "norm"),
        ],
    )
    def test_broken_files_are_refused_by_name(self, change, error, text):
        tensors = {key: tensor for key, tensor in (self.good() | change).items() if tensor is not None}
        with pytest.raises(error, match=text.replace(".", r"\.")):
            kohya.read(tensors, {}, {"conv_in": (6, 3, 3, 3), "norm": (6,)})

    def test_every_bad_module_is_in_one_error(self):
        modules = {"conv_in": (6, 3, 3, 3), "conv_out": (3, 6, 3, 3)}
        with pytest.raises(IncompatibleError, match=r"conv_in.*conv_out"):
            kohya.read(underscored(modules), {}, {"conv_in": (6, 4, 3, 3), "conv_out": (4, 6, 3, 3)})

    def test_empty_file_is_refused(self):
        with pytest.raises(CorruptError):
            kohya.read({}, {})

    def test_names_that_two_modules_share_are_refused(self):
        modules = {"a.b_c": (4, 4), "a_b.c": (4, 4)}
        with pytest.raises(IncompatibleError, match=r"a\.b_c, a_b\.c"):
            kohya.read(underscored({"a.b_c": (4, 4)}), {}, modules)

    def test_the_same_module_twice_is_refused(self):
        tensors = underscored({"encoder.layers.0.mlp.fc1": (4, 4)}, "lora_te_") | underscored({"encoder.layers.0.mlp.fc1": (4, 4)}, "lora_te1_")
        with pytest.raises(IncompatibleError, match="both mean"):
            kohya.read(tensors, {}, {"encoder.layers.0.mlp.fc1": (4, 4)})

    @settings(max_examples=60, deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from(["lora_unet_conv_in", "lora_unet_conv_out", "lora_te_x", "x", ""]).flatmap(
                lambda name: st.sampled_from(["lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "weight"]).map(lambda leaf: f"{name}.{leaf}")
            ),
            st.lists(st.integers(0, 3), max_size=4).map(torch.ones),
        )
    )
    def test_any_file_is_read_or_refused_on_purpose(self, tensors):
        with contextlib.suppress(QltError):
            kohya.read(tensors, {}, {"conv_in": (2, 2, 3, 3), "conv_out": (2, 2)}, component="unet")


class TestComponents:
    def test_one_base_for_a_file_of_several_asks_which(self):
        tensors = underscored({"conv_in": (4, 4)}) | underscored({"encoder.layers.0.mlp.fc1": (4, 4)}, "lora_te_")
        with pytest.raises(UsageError, match="text_encoder and unet"):
            kohya.read(tensors, {}, {"conv_in": (4, 4)})

    def test_one_component_is_read_alone_and_the_rest_is_mentioned(self):
        tensors = underscored({"conv_in": (4, 4)}) | underscored({"encoder.layers.0.mlp.fc1": (4, 4)}, "lora_te_")
        found = kohya.read(tensors, {}, {"conv_in": (4, 4)}, component="unet")
        assert set(found) == {"unet"} and "text_encoder" in found["unet"].notes[0]

    def test_transformer_may_be_asked_for_where_trainers_say_unet(self):
        assert set(kohya.read(underscored({"conv_in": (4, 4)}), {}, component="transformer")) == {"unet"}

    def test_component_that_is_not_there_is_refused(self):
        with pytest.raises(UsageError, match="text_encoder"):
            kohya.read(underscored({"conv_in": (4, 4)}), {}, component="text_encoder")

    def test_two_names_of_one_component_are_refused(self):
        tensors = underscored({"conv_in": (4, 4)}) | underscored({"conv_out": (4, 4)}, "lora_transformer_")
        with pytest.raises(IncompatibleError, match="several names"):
            kohya.read(tensors, {}, {"unet": {"conv_in": (4, 4), "conv_out": (4, 4)}})

    def test_base_without_the_component_is_refused(self):
        with pytest.raises(IncompatibleError, match="unet"):
            kohya.read(underscored({"conv_in": (4, 4)}), {}, {"vae": {"conv_in": (4, 4)}})


class TestRecognise:
    def test_recognises_its_own_and_no_other(self):
        plain = underscored({"conv_in": (4, 4)}, alpha=1.0)
        assert kohya.recognise(plain, {}) and not lycoris.recognise(plain, {}) and not diffusers.recognise(plain, {})

    @pytest.mark.parametrize(
        "keys",
        [
            ["base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"],
            ["lora_unet_a.hada_w1_a", "lora_unet_b.lora_down.weight"],
            ["unet.a.lora_A.weight"],
            ["lora_unet_a.alpha"],
            [],
        ],
    )
    def test_others_are_not_its(self, keys):
        assert not kohya.recognise(keys, {})


class TestWrite:
    def components(self, unet, text):
        def layers(modules):
            return {name: Layer(down, up, 0.1 * (1 + index), CONV if down.ndim > 2 else LINEAR) for index, (name, down, up) in enumerate(random_pairs(modules))}

        return {"unet": Portable(layers(modules_of(unet))), "text_encoder": Portable(layers(in_text_model(modules_of(text))))}

    def test_round_trip_keeps_factors_and_scales(self):
        unet, text = sd1(), clip()
        written = self.components(unet, text)
        tensors, metadata = kohya.write(written)
        assert kohya.recognise(tensors, metadata) and metadata["ss_network_dim"] == "Dynamic"
        assert any(key.startswith("lora_te_text_model") for key in tensors)
        found = kohya.read(tensors, metadata, {"unet": modules_of(unet), "text_encoder": in_text_model(modules_of(text))})
        for component, portable in written.items():
            for name, layer in portable.layers.items():
                back = found[component].layers[name]
                assert torch.equal(back.a, layer.a) and torch.equal(back.b, layer.b) and back.scale == pytest.approx(layer.scale, rel=1e-6)

    def test_diffusers_loads_what_is_written_for_sdxl(self):
        pipe = Sdxl()
        base = weights_of(pipe.unet)
        unet = {
            name: Layer(down, up, 2.0 / (1 + index % 4), CONV if down.ndim > 2 else LINEAR)
            for index, (name, down, up) in enumerate(random_pairs(modules_of(pipe.unet)))
        }
        tensors, _ = kohya.write({"unet": Portable(unet)}, modules=modules_of(pipe.unet))
        assert any("input_blocks_4_1" in key for key in tensors) and not any("down_blocks" in key for key in tensors)
        pipe.load_lora_weights(dict(tensors))
        assert_same_weights(pipe.unet, base, Portable(unet))

    def test_two_text_encoders_are_numbered(self):
        layers = {"text_model.encoder.layers.0.mlp.fc1": Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
        tensors, _ = kohya.write({"text_encoder": Portable(layers), "text_encoder_2": Portable(layers)})
        assert {key.split("_text_model")[0] for key in tensors} == {"lora_te1", "lora_te2"}

    def test_sdxl_is_told_by_its_modules(self):
        one = Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
        deep = "up_blocks.0.attentions.1.transformer_blocks.1.attn1.to_q"
        tensors, _ = kohya.write({"unet": Portable({deep: one})})
        assert "lora_unet_output_blocks_1_1_transformer_blocks_1_attn1_to_q.alpha" in tensors
        tensors, _ = kohya.write({"unet": Portable({deep: one})}, use_sgm_names=False)
        assert f"lora_unet_{flat(deep)}.alpha" in tensors

    def test_research_name_that_does_not_exist_is_not_made_up(self):
        with pytest.raises(UnsupportedError, match=r"conv_inn"):
            kohya.write({"unet": Portable({"conv_inn": Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)})}, use_sgm_names=True)

    def test_dora_round_trips(self):
        layer = Layer(torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1), 0.5, CONV, magnitude=torch.rand(4) + 1)
        tensors, _ = kohya.write({"unet": Portable({"conv_in": layer})})
        assert tensors["lora_unet_conv_in.dora_scale"].shape == (4, 1, 1, 1)
        assert torch.equal(kohya.read(tensors, {}, {"conv_in": (4, 3, 3, 3)})["unet"].layers["conv_in"].magnitude, layer.magnitude)

    @pytest.mark.parametrize(
        ("portable", "text"),
        [
            (Portable({"a": Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0, bias=torch.ones(2))}), "a"),
            (Portable({"e": Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0, EMBEDDING)}), "e"),
            (Portable({}, replacements={"norm.weight": torch.ones(2)}), "norm.weight"),
            (Portable({}, token_rows={"embed.weight": ((1,), torch.ones(1, 2))}), "embed.weight"),
        ],
    )
    def test_what_the_format_cannot_hold_is_refused_by_name(self, portable, text):
        with pytest.raises(UnsupportedError, match=text):
            kohya.write({"unet": portable})

    def test_unknown_component_is_refused(self):
        with pytest.raises(UnsupportedError, match="vae"):
            kohya.write({"vae": Portable({"a": Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)})})

    def test_names_that_would_collide_are_refused(self):
        layer = Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
        with pytest.raises(UnsupportedError, match="a_b_c"):
            kohya.write({"unet": Portable({"a.b_c": layer, "a_b.c": layer})})
