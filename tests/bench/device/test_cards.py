"""Which GPU a word means, with CUDA's own rules of what is visible."""

import pytest

from qlora_tools.bench.device.cards import Card, choose, shown
from qlora_tools.errors import MissingError, UsageError
from tests.bench.device.fake_nvml import GPU_A, GPU_B, MIG_A

TWO = [Card(GPU_A, "A"), Card(GPU_B, "B")]
DIVIDED = [Card(GPU_A, "A", True, (MIG_A, "MIG-dddddddd")), Card(GPU_B, "B")]


def test_numbers_count_what_is_visible():
    assert choose("cuda", TWO, None) == choose("cuda:0", TWO, None) == GPU_A
    assert choose("cuda:1", TWO, None) == GPU_B
    assert choose("cuda", TWO, "1") == choose("cuda", TWO, GPU_B) == choose("cuda:1", TWO, f"{GPU_A}, {GPU_B}") == GPU_B


def test_the_first_entry_that_fits_nothing_ends_the_list():
    assert shown(TWO, "1,7,0") == [GPU_B] and shown(TWO, "") == shown(TWO, "-1,0") == [] and shown(TWO, "NoDevFiles") == []


def test_a_uuid_may_be_cut_short_while_it_names_one():
    assert choose("GPU-aaaab", TWO, None) == GPU_B
    assert choose(GPU_B, TWO, "0") == GPU_B  # named outright
    with pytest.raises(UsageError, match="beginning of 2 GPUs"):
        choose("GPU-aaaa", TWO, None)
    assert shown(TWO, "GPU-aaaab") == [GPU_B] and shown(TWO, "GPU-aaaa") == []


def test_a_divided_gpu_is_its_parts():
    assert choose("cuda:0", DIVIDED, None) == choose("cuda", DIVIDED, "0") == choose("MIG-c", DIVIDED, None) == choose("cuda", DIVIDED, MIG_A) == MIG_A
    with pytest.raises(MissingError, match="divided") as caught:
        choose(GPU_A, DIVIDED, None)
    assert MIG_A in caught.value.hint
    with pytest.raises(MissingError, match="divided") as caught:
        choose(GPU_A, [Card(GPU_A, "A", True)], None)
    assert "MIG off" in caught.value.hint


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "0", "GPU-", "cuda:1:2", ""])
def test_words_that_name_no_gpu_are_refused(word):
    with pytest.raises(UsageError, match="is no GPU"):
        choose(word, TWO, None)


def test_a_gpu_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(MissingError, match="2 GPUs are visible") as caught:
        choose("cuda:2", TWO, None)
    assert GPU_A in caught.value.hint and "B" in caught.value.hint
    with pytest.raises(MissingError, match="0 GPUs are visible with CUDA_VISIBLE_DEVICES=''"):
        choose("cuda", TWO, "")
    with pytest.raises(MissingError, match="no GPU `GPU-ffff`"):
        choose("GPU-ffff", TWO, None)
    with pytest.raises(MissingError) as caught:
        choose("cuda", [], None)
    assert "nvidia-smi" in caught.value.hint
