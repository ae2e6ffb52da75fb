"""Five numbers from many processes, and the identities between them."""

import pytest

from qlora_tools.bench.device import LimitSearch, summarise_device
from qlora_tools.bench.record import Attempt, DeviceMemory

MIB = 1 << 20


def reading(used, process=None):
    return {"used_bytes": used * MIB, "process_bytes": None if process is None else process * MIB, "energy_mj": None}


def attempt(during, after=100, process=None, arena=None, status="ok", reason=None):
    device = {"before": reading(100), "during": reading(100 + during, process), "after": reading(after)}
    if arena is not None:
        device["arena"] = {"peak_bytes": arena * MIB, "source": "log"} if isinstance(arena, int) else arena
    return Attempt(0, status, reason, 1.0, None, None, device=device if status == "ok" else {})


def context(*sizes):
    return [attempt(size, process=size) for size in sizes]


def held(memory: DeviceMemory):
    return [identity.held for identity in memory.identities]


def test_all_five_where_the_driver_shows_our_process():
    memory, unknown = summarise_device(
        [attempt(0, process=5000), attempt(0, process=5100)], [attempt(0, process=4000, arena=3600)], context(390, 400, 900), 3000 * MIB
    )
    assert unknown == {"device_memory.smallest_limit_bytes": "it was not asked for"}
    assert (memory.weights_bytes, memory.arena_peak_bytes, memory.context_bytes) == (3000 * MIB, 3600 * MIB, 400 * MIB)
    assert (memory.process_peak_bytes, memory.as_deployed_peak_bytes, memory.method, memory.residual_bytes) == (4000 * MIB, 5100 * MIB, "process", None)
    assert held(memory) == [True, True, True]


def test_a_bracket_where_it_does_not_and_contended_rounds_count_for_nothing():
    rounds = [attempt(5000, after=104), attempt(9000, after=3000), attempt(5010, after=98)]
    memory, unknown = summarise_device(rounds, [attempt(4000, arena=3600)], context(400), 3000 * MIB)
    assert memory.as_deployed_peak_bytes == 5010 * MIB and memory.method == "bracket" and memory.residual_bytes == 4 * MIB
    assert set(unknown) == {"device_memory.smallest_limit_bytes"}


def test_contended_in_every_round_is_a_reason():
    memory, unknown = summarise_device([attempt(9000, after=3000)] * 3, [], [], None)
    assert memory.as_deployed_peak_bytes is None and unknown["device_memory.as_deployed_peak_bytes"].startswith("contended")
    assert unknown["device_memory.arena_peak_bytes"] == unknown["device_memory.process_peak_bytes"] == "it was not measured"
    assert unknown["device_memory.weights_bytes"] == "the engine does not tell" and held(memory) == [None, None, None] and memory.method is None


def test_a_failed_attempt_gives_its_reason():
    lean = [attempt(0, status="oom", reason="no room")]
    _, unknown = summarise_device([attempt(5)], lean, [], 1)
    assert unknown["device_memory.arena_peak_bytes"] == unknown["device_memory.process_peak_bytes"] == "no room"


def test_a_context_that_could_not_be_held_gives_its_reason():
    _, unknown = summarise_device([attempt(5)], [attempt(5)], [attempt(0, status="error", reason="no provider")] * 2, 1)
    assert unknown["device_memory.context_bytes"] == "no provider"


def test_an_arena_that_was_not_logged_gives_its_reason():
    lean = [attempt(0, process=4000, arena={"peak_bytes": None, "reason": "onnxruntime logged no arena on cuda"})]
    assert summarise_device([], lean, [], 1)[1]["device_memory.arena_peak_bytes"] == "onnxruntime logged no arena on cuda"


@pytest.mark.parametrize(
    ("weights", "arena", "process", "deployed", "expected"),
    [
        (3601, 3600, 4000, 4000, [False, True, True]),  # weights outside the arena
        (3000, 3600, 4220, 4300, [True, False, True]),  # 220 MiB that nobody asked for
        (3000, 3600, 4000, 3700, [True, True, False]),  # the defaults cannot take less
        (3000, 3600, 4000, 3810, [True, True, True]),
    ],
)
def test_identities_that_fail_are_shown(weights, arena, process, deployed, expected):
    memory, _ = summarise_device([attempt(0, process=deployed)], [attempt(0, process=process, arena=arena)], context(400), weights * MIB)
    assert held(memory) == expected


def test_the_limit_is_carried_with_its_reason():
    assert summarise_device([], [], [], 1, limit=LimitSearch(7, ()))[0].smallest_limit_bytes == 7
    assert summarise_device([], [], [], 1, limit=LimitSearch(None, (), "never"))[1]["device_memory.smallest_limit_bytes"] == "never"
