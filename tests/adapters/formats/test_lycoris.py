from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, get_peft_model
from peft.tuners.lycoris_utils import LycorisLayer

from qlora_tools.adapters.formats import diffusers, kohya, lycoris
from qlora_tools.errors import CorruptError, IncompatibleError, NonFiniteError, QltError, UnsupportedError
from tests.adapters.formats.tiny_images import applied, modules_of, product

PREFIX = "lora_unet_"


class Layers(torch.nn.Module):
    """One of each kind of layer that image models adapt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = torch.nn.Linear(12, 18)
        self.wide_kernel = torch.nn.Conv2d(8, 12, (3, 5))
        self.point = torch.nn.Conv2d(6, 8, 1)


def by_peft(config):
    """(file of this format, module -> delta by PEFT, module shapes) of an adapter of random numbers."""
    model = Layers()
    shapes = modules_of(model)
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    tensors, deltas = {}, {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LycorisLayer):
            for leaf in module.adapter_layer_names:
                for parameter in getattr(module, leaf).values():
                    parameter.data = torch.randn(parameter.shape)
                    tensors[f"{PREFIX}{name}.{leaf}"] = parameter.data
            tensors[f"{PREFIX}{name}.alpha"] = torch.tensor(float(config.alpha))
            deltas[name] = module.get_delta_weight("default").detach().double()
    return tensors, deltas, shapes


TARGETS = ["proj", "wide_kernel", "point"]


class TestExpansion:
    @pytest.mark.parametrize(
        "config",
        [
            LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
            LoHaConfig(r=7, alpha=3, target_modules=TARGETS),
            LoHaConfig(r=2, alpha=3, target_modules=TARGETS, use_effective_conv2d=True),
            LoKrConfig(r=1, alpha=3, target_modules=TARGETS),
            LoKrConfig(r=1, alpha=3, target_modules=TARGETS, decompose_both=True),
            LoKrConfig(r=1, alpha=3, target_modules=TARGETS, decompose_factor=2),
            LoKrConfig(r=1, alpha=3, target_modules=TARGETS, use_effective_conv2d=True),
            LoKrConfig(r=16, alpha=16, target_modules=TARGETS),
        ],
        ids=["loha", "loha above full rank", "loha tucker", "lokr", "lokr both", "lokr factor", "lokr tucker", "lokr whole"],
    )
    def test_plain_factors_equal_peft(self, config):
        tensors, deltas, shapes = by_peft(config)
        assert lycoris.recognise(tensors, {}) and not kohya.recognise(tensors, {}) and not diffusers.recognise(tensors, {})
        layers = lycoris.read(tensors, {}, shapes)["unet"].layers
        assert set(layers) == set(TARGETS)
        for name, delta in deltas.items():
            layer = layers[name]
            assert layer.rank <= min(shapes[name][0], torch.Size(shapes[name][1:]).numel())
            torch.testing.assert_close(product(layer), delta, rtol=0, atol=1e-5 * float(delta.abs().max()))

    def test_half_precision_factors_are_expanded_without_rounding(self):
        torch.manual_seed(0)
        w1_a, w1_b, w2_a, w2_b = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((6, 2), (2, 5), (6, 2), (2, 5)))
        tensors = {f"{PREFIX}a.hada_{leaf}": t for leaf, t in {"w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b}.items()}
        reference = (w1_a.double() @ w1_b.double()) * (w2_a.double() @ w2_b.double())
        portable = lycoris.read(tensors, {}, {"a": (6, 5)})["unet"]
        torch.testing.assert_close(product(portable.layers["a"]), reference, rtol=1e-14, atol=1e-14)
        assert portable.layers["a"].rank == 4 and "rank 2 became up to 4" in portable.notes[0]

    def test_two_whole_kronecker_factors_have_no_scale(self):
        w1, w2 = torch.randn(2, 3), torch.randn(4, 5)
        tensors = {f"{PREFIX}a.lokr_w1": w1, f"{PREFIX}a.lokr_w2": w2, f"{PREFIX}a.alpha": torch.tensor(9.0)}
        layer = lycoris.read(tensors, {}, {"a": (8, 15)})["unet"].layers["a"]
        torch.testing.assert_close(product(layer), torch.kron(w1.double(), w2.double()))

    @pytest.mark.parametrize("leaf", ["lokr_w1", "lokr_w2"])
    def test_alpha_is_divided_by_the_rank_of_the_factored_side(self, leaf):
        w1, w2, a, b = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 2), torch.randn(2, 4)
        sides = {"lokr_w1": w1, "lokr_w2": w2}
        sides[leaf] = a @ b
        tensors = {f"{PREFIX}a.{name}": side for name, side in sides.items() if name != leaf}
        tensors |= {f"{PREFIX}a.{leaf}_a": a, f"{PREFIX}a.{leaf}_b": b, f"{PREFIX}a.alpha": torch.tensor(6.0)}
        layer = lycoris.read(tensors, {}, {"a": (16, 16)})["unet"].layers["a"]
        torch.testing.assert_close(product(layer), 3.0 * torch.kron(sides["lokr_w1"].double(), sides["lokr_w2"].double()), rtol=1e-5, atol=1e-5)

    def test_middle_kernel_is_contracted(self):
        torch.manual_seed(0)
        down, mid, up = torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 2), torch.randn(7, 3, 1, 1)
        tensors = {
            f"{PREFIX}c.lora_down.weight": down,
            f"{PREFIX}c.lora_mid.weight": mid,
            f"{PREFIX}c.lora_up.weight": up,
            f"{PREFIX}c.alpha": torch.tensor(1.5),
        }
        pixels = torch.randn(2, 5, 6, 6, dtype=torch.float64)
        conv = torch.nn.functional.conv2d
        expected = 0.5 * conv(conv(conv(pixels, down.double()), mid.double()), up.double())
        layer = lycoris.read(tensors, {}, {"c": (7, 5, 3, 2)})["unet"].layers["c"]
        assert layer.rank == 3 and layer.a.shape == (3, 5, 3, 2)
        torch.testing.assert_close(conv(pixels, product(layer)), expected, rtol=1e-5, atol=1e-5)

    def test_scalar_multiplies(self):
        tensors = {f"{PREFIX}a.lora_down.weight": torch.ones(1, 2), f"{PREFIX}a.lora_up.weight": torch.ones(2, 1), f"{PREFIX}a.scalar": torch.tensor(0.25)}
        assert lycoris.read(tensors, {}, {"a": (2, 2)})["unet"].layers["a"].scale == 0.25

    def test_lengths_of_outputs_are_kept_beside_an_expansion(self):
        tensors, _, shapes = by_peft(LoHaConfig(r=2, alpha=3, target_modules=["wide_kernel"]))
        lengths = torch.rand(12) + 0.5
        tensors[f"{PREFIX}wide_kernel.dora_scale"] = lengths.reshape(12, 1, 1, 1)
        layer = lycoris.read(tensors, {}, shapes)["unet"].layers["wide_kernel"]
        torch.testing.assert_close(applied(torch.randn(12, 8, 3, 5), layer).flatten(1).norm(dim=1), lengths.double())

    def test_plain_and_expanded_modules_may_share_a_file(self):
        tensors, _, shapes = by_peft(LoHaConfig(r=2, alpha=2, target_modules=["proj"]))
        tensors |= {f"{PREFIX}point.lora_down.weight": torch.ones(1, 6, 1, 1), f"{PREFIX}point.lora_up.weight": torch.ones(8, 1, 1, 1)}
        portable = lycoris.read(tensors, {}, shapes)["unet"]
        assert set(portable.layers) == {"proj", "point"} and portable.notes[0].startswith("1 modules")

    def test_other_prefixes_name_their_component(self):
        tensors = {"transformer.a.lokr_w1": torch.ones(1, 1), "transformer.a.lokr_w2": torch.ones(2, 2)}
        assert set(lycoris.read(tensors, {}, {"a": (2, 2)})) == {"transformer"}
        tensors = {"lycoris_a.lokr_w1": torch.ones(1, 1), "lycoris_a.lokr_w2": torch.ones(2, 2)}
        assert set(lycoris.read(tensors, {}, {"a": (2, 2)})) == {""}

    def test_pefts_own_kronecker_adapters_are_not_its(self):
        assert not lycoris.recognise(["base_model.model.a.lokr_w1", "base_model.model.a.lokr_w2"], {})


class TestWithoutBase:
    def test_linear_of_stable_diffusion_is_read(self):
        name = "lora_unet_mid_block_attentions_0_proj_in"
        tensors = {f"{name}.hada_{leaf}": torch.ones(shape) for leaf, shape in {"w1_a": (6, 1), "w1_b": (1, 5), "w2_a": (6, 1), "w2_b": (1, 5)}.items()}
        assert lycoris.read(tensors, {})["unet"].layers["mid_block.attentions.0.proj_in"].a.shape == (1, 5)

    def test_flattened_kernel_needs_the_base(self):
        tensors = {
            f"lora_unet_conv_in.hada_{leaf}": torch.ones(shape) for leaf, shape in {"w1_a": (6, 1), "w1_b": (1, 36), "w2_a": (6, 1), "w2_b": (1, 36)}.items()
        }
        with pytest.raises(UnsupportedError, match="kernel"):
            lycoris.read(tensors, {})
        assert lycoris.read(tensors, {}, {"conv_in": (6, 4, 3, 3)})["unet"].layers["conv_in"].a.shape == (1, 4, 3, 3)

    def test_kernel_that_the_file_has_is_enough(self):
        tensors = {"lora_unet_conv_in.lokr_w1": torch.ones(2, 2), "lora_unet_conv_in.lokr_w2": torch.ones(3, 2, 3, 3)}
        layer = lycoris.read(tensors, {})["unet"].layers["conv_in"]
        assert layer.a.shape[1:] == (4, 3, 3) and layer.b.shape[0] == 6


class TestRefused:
    @pytest.mark.parametrize(
        ("leaf", "kind"),
        [
            ("diff", "full difference"),
            ("diff_b", "full difference"),
            ("w_norm", "norm"),
            ("on_input", "IA"),
            ("oft_blocks", "OFT"),
            ("a1.weight", "GLoRA"),
            ("lambda_layer", "T-LoRA"),
            ("bias_values", "sparse"),
        ],
    )
    def test_other_kinds_are_refused_by_name_with_a_way_out(self, leaf, kind):
        tensors = {f"{PREFIX}a.{leaf}": torch.ones(2, 2)}
        assert lycoris.recognise(tensors, {}) and not kohya.recognise(tensors, {}) and not diffusers.recognise(tensors, {})
        with pytest.raises(UnsupportedError, match=kind) as caught:
            lycoris.read(tensors, {}, {"a": (2, 2)})
        assert f"{PREFIX}a.{leaf}" in str(caught.value) and "qlt extract" in caught.value.hint

    def test_scale_that_stands_in_diffusers_metadata_is_not_ignored(self):
        tensors = {"unet.a.lokr_w1": torch.ones(1, 1), "unet.a.lokr_w2": torch.ones(2, 2)}
        with pytest.raises(UnsupportedError, match="metadata"):
            lycoris.read(tensors, {diffusers.METADATA_KEY: "{}"}, {"a": (2, 2)})

    def test_rank_above_the_limit_is_refused(self):
        tensors, _, shapes = by_peft(LoHaConfig(r=3, alpha=3, target_modules=["proj"]))
        assert lycoris.read(tensors, {}, shapes, max_rank=9)
        with pytest.raises(UnsupportedError, match="rank 9"):
            lycoris.read(tensors, {}, shapes, max_rank=8)

    @pytest.mark.parametrize(
        ("tensors", "error", "text"),
        [
            ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2)}, CorruptError, "hada_w2_b"),
            ({"hada_w1_a": (6, 2), "hada_w1_b": (3, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}, CorruptError, "multiply"),
            ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)}, CorruptError, "multiply"),
            ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5), "hada_t1": (2, 2, 3, 3)}, CorruptError, "hada_t2"),
            ({"hada_w1_a": (7, 2), "hada_w1_b": (2, 5), "hada_w2_a": (7, 2), "hada_w2_b": (2, 5)}, IncompatibleError, "7 x 5"),
            ({"lokr_w1": (2, 1)}, CorruptError, "lokr_w2_a"),
            ({"lokr_w1": (2, 1), "lokr_w2": (3, 5), "lokr_w2_a": (3, 1)}, CorruptError, "lokr_w2_a"),
            ({"lokr_w1_a": (2, 1), "lokr_w1_b": (2, 1), "lokr_w2": (3, 5)}, CorruptError, "multiply"),
            ({"lokr_w1": (5,), "lokr_w2": (3, 5)}, CorruptError, "matrix"),
            ({"lokr_w1": (2, 1), "lokr_w2": (3, 5), "hada_w1_a": (1, 1)}, CorruptError, "mixes"),
            ({"lokr_w1": (2, 1), "lokr_w2": (3, 5), "lora_up.weight": (1, 1)}, CorruptError, "mixes"),
            ({"lora_mid.weight": (2, 2, 3, 3), "lora_down.weight": (2, 5, 1, 1)}, CorruptError, "lora_up"),
            ({"lora_mid.weight": (2, 3, 3, 3), "lora_down.weight": (2, 5, 1, 1), "lora_up.weight": (6, 2, 1, 1)}, CorruptError, "kernel"),
            ({"lora_mid.weight": (2, 2), "lora_down.weight": (2, 5), "lora_up.weight": (6, 2)}, CorruptError, "kernel"),
            ({"lora_mid.weight": (2, 2, 3, 3), "lora_down.weight": (2, 5, 3, 3), "lora_up.weight": (6, 2, 1, 1)}, CorruptError, "1x1"),
            ({"lora_mid.weight": (3, 2, 1, 1), "lora_down.weight": (2, 5, 1, 1), "lora_up.weight": (6, 2, 1, 1)}, CorruptError, "multiply"),
            ({"lora_mid.weight": (20000, 1, 1, 1), "lora_down.weight": (1, 20000, 1, 1), "lora_up.weight": (6, 20000, 1, 1)}, UnsupportedError, "rank 20000"),
            ({"lokr_t1": (1, 1), "lokr_w1": (2, 1), "lokr_w2": (3, 5)}, UnsupportedError, "lokr_t1"),
            ({"hada_w9": (1, 1), "lokr_w1": (2, 1), "lokr_w2": (3, 5)}, IncompatibleError, "hada_w9"),
        ],
    )
    def test_broken_groups_are_refused_by_name(self, tensors, error, text):
        with pytest.raises(error, match=text):
            lycoris.read({f"{PREFIX}a.{leaf}": torch.ones(shape) for leaf, shape in tensors.items()}, {}, {"a": (6, 5)})

    def test_huge_kronecker_products_are_refused_before_they_are_made(self):
        tensors = {f"{PREFIX}a.lokr_w1": torch.ones(1000, 1000), f"{PREFIX}a.lokr_w2": torch.ones(300, 300)}
        with pytest.raises(UnsupportedError, match="rank 300000"):
            lycoris.read(tensors, {}, {"a": (300_000, 300_000)})

    def test_nan_is_refused_by_name(self):
        tensors, _, shapes = by_peft(LoHaConfig(r=2, alpha=2, target_modules=["proj"]))
        tensors[f"{PREFIX}proj.hada_w2_a"][0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="hada_w2_a"):
            lycoris.read(tensors, {}, shapes)

    @settings(max_examples=40, deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from([*lycoris.LOHA, *lycoris.LOHA_TUCKER, *lycoris.LOKR, lycoris.MID, lycoris.SCALAR, "alpha", "lora_down.weight", "lora_up.weight"]),
            st.lists(st.integers(0, 3), max_size=4).map(torch.ones),
        )
    )
    def test_any_group_is_read_or_refused_on_purpose(self, leaves):
        tensors = {f"{PREFIX}conv_in.{leaf}": tensor for leaf, tensor in leaves.items()}
        for modules in (None, {"conv_in": (2, 2, 3, 3)}, {"conv_in": (4, 4)}):
            with contextlib.suppress(QltError):
                lycoris.read(tensors, {}, modules)
