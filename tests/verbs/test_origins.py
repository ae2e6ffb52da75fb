"""What a manifest records of an input, and finding it again."""

import torch

from qlora_tools.verbs.origins import changed, content_sha256, found_again, whereabouts
from tests.export.tiny_decoders import MemorySource


def test_values_at_any_of_the_places_change_the_fingerprint():
    weight = torch.arange(300 * 40, dtype=torch.float32).reshape(300, 40)
    found = {content_sha256(MemorySource({"w": weight, "b": torch.ones(3)}))}
    for row in (0, 149, 299):
        other = weight.clone()
        other[row, 7] += 1
        found.add(content_sha256(MemorySource({"w": other, "b": torch.ones(3)})))
    found.add(content_sha256(MemorySource({"w": weight, "b": torch.ones(3) * 2})))
    found.add(content_sha256(MemorySource({"w": weight.reshape(600, 20), "b": torch.ones(3)})))
    assert len(found) == 6
    assert content_sha256(MemorySource({"b": torch.ones(3), "w": weight})) in found
    assert content_sha256(MemorySource({"n": torch.tensor(2.0), "e": torch.zeros(0, 4)}))


def test_a_path_goes_from_the_folder_and_back(tmp_path):
    (tmp_path / "models/base").mkdir(parents=True)
    entry = whereabouts(tmp_path / "models/base", tmp_path / "exports/e")
    assert entry == {"path": "../../models/base"}
    (tmp_path / "exports/e").mkdir(parents=True)
    assert found_again(entry, tmp_path / "exports/e") == tmp_path / "models/base"
    (tmp_path / "models/base").rmdir()
    assert found_again(entry, tmp_path / "exports/e") is None and found_again({}, tmp_path) is None


def test_a_snapshot_of_the_hub_is_called_by_its_id(tmp_path):
    folder = tmp_path / "models--org--name/snapshots/0123abc"
    folder.mkdir(parents=True)
    assert whereabouts(folder, tmp_path / "e") == {"hub": "org/name@0123abc"}
    assert found_again({"hub": "org/name@0123abc"}, tmp_path) == "org/name@0123abc"


def test_only_fingerprints_that_both_have_are_compared():
    recorded = {"name": "x", "sha256": "a", "config_sha256": "c"}
    assert changed("adapter", recorded, {"sha256": "a"}) is None
    assert str(changed("adapter", recorded, {"sha256": "a", "config_sha256": "d"})) == "adapter `x` has another adapter_config.json than it had"
    assert str(changed("adapter", recorded, {"sha256": "b"})) == "adapter `x` holds other values than it had"
