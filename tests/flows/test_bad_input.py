"""Every verb meets bad input with one line, a hint, its own exit code, and an untouched working folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import with_config
from tests.flows.conftest import files

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def adapter(qlt, here, llama, tuned, tmp_path):
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "-o", tmp_path / "adapter").code == 0
    shutil.rmtree(here / ".qlt")
    return tmp_path / "adapter"


def words(verb, model, tuned, adapter):
    return {
        "quantize": ("quantize", model, "--nf4"),
        "extract": ("extract", "--base", model, "--tuned", tuned),
        "extract from": ("extract", "--base", tuned, "--tuned", model),
        "merge": ("merge", "--base", model, "--adapter", adapter),
        "export": ("export", model, "--int8"),
        "inspect": ("inspect", model),
    }[verb]


VERBS = ("quantize", "extract", "extract from", "merge", "export", "inspect")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    return 4, "model.safetensors"


def lie_about_shape(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    assert content.count(b"[96,64]") > 1
    path.write_bytes(content.replace(b"[96,64]", b"[97,64]", 1))
    return 4, "97, 64"


def remove_weights(folder):
    (folder / "model.safetensors").unlink()
    return 9, "model.safetensors"


def lose_a_shard(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({name: tensor for name, tensor in tensors.items() if name != NAME}, folder / "model-00001-of-00002.safetensors")
    weight_map = {name: f"model-0000{2 if name == NAME else 1}-of-00002.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return 9, "model-00002-of-00002.safetensors"


def point_outside(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../model.safetensors")}))
    return 4, "../model.safetensors"


def become_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    return 8, "pickle"


def break_config(folder):
    (folder / "config.json").write_text("{")
    return 4, "config.json"


@pytest.mark.parametrize("damage", [truncate, lie_about_shape, remove_weights, lose_a_shard, point_outside, become_pickle, break_config])
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_checkpoint_is_named(qlt, here, llama, tuned, adapter, tmp_path, verb, damage):
    model = shutil.copytree(llama, tmp_path / "damaged")
    code, text = damage(model)
    done = qlt(*words(verb, model, tuned, adapter))
    assert done.code == code, done.err
    lines = done.err.strip().splitlines()
    assert lines[0].startswith("error: ") and text in lines[0] and lines[-1].startswith("hint: ") and len(lines) == 2
    assert files(here) == set()


@pytest.mark.parametrize("verb", ["quantize", "extract", "merge", "export"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_is_named_with_its_tensor(qlt, here, llama, tuned, adapter, tmp_path, verb, value):
    model = shutil.copytree(llama, tmp_path / "bad")
    tensors = load_file(model / "model.safetensors")
    tensors[NAME][1, 1] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if verb == "merge":  # the adapter must fit the damaged base, or the wrong base is what is reported
        (adapter / "qlt-manifest.json").unlink()
    done = qlt(*words(verb, model, tuned, adapter))
    assert done.code == 6 and NAME in done.err and files(here) == set(), done.err


@pytest.mark.parametrize("verb", ["quantize", "extract", "merge", "export"])
def test_a_full_disk_is_one_line_and_leaves_nothing(here, llama, tuned, adapter, verb):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))

    environment = os.environ | {"NUMBA_DISABLE_JIT": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "qlora_tools.cli", *map(str, words(verb, llama, tuned, adapter))],
        capture_output=True,
        text=True,
        cwd=here,
        preexec_fn=limit,
        env=environment,
    )
    assert done.returncode == 5, done.stderr
    assert "error: " in done.stderr and "hint: free some space" in done.stderr and "Traceback" not in done.stderr
    assert files(here) == set() and not list(here.rglob("*.partial"))


@pytest.mark.parametrize("verb", ["quantize", "extract", "merge", "export"])
def test_an_output_inside_an_input_is_refused(qlt, llama, tuned, adapter, tmp_path, verb):
    model = shutil.copytree(llama, tmp_path / "model")
    before = files(model)
    done = qlt(*words(verb, model, tuned, adapter), "-o", model / "out", "--force")
    assert done.code == 2 and "overlaps" in done.err and files(model) == before


def test_an_unknown_architecture_is_refused_at_export_only(qlt, here, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "strange")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "strange", "architectures": ["StrangeForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    done = qlt("export", model, "--int8")
    assert done.code == 8 and "strange" in done.err.lower() and "hint:" in done.err and files(here) == set()
    assert qlt("quantize", model).code == 0


def test_a_model_that_is_nowhere_says_where_it_looked(qlt, here):
    done = qlt("quantize", "./nowhere")
    assert done.code == 9 and "nowhere" in done.err and files(here) == set()


def test_an_adapter_that_is_no_adapter_is_named(qlt, here, llama):
    done = qlt("merge", "--base", llama, "--adapter", llama)
    assert done.code == 9 and "adapter_config.json" in done.err


def test_a_pickled_adapter_is_refused(qlt, here, llama, adapter):
    torch_file = adapter / "adapter_model.bin"
    torch_file.write_bytes(b"\x80\x04cos\nsystem\n.")
    (adapter / "adapter_model.safetensors").unlink()
    done = qlt("merge", "--base", llama, "--adapter", adapter)
    assert done.code == 8 and "pickle" in done.err


def test_a_fifo_in_place_of_weights_does_not_hang(qlt, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "fifo")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    assert qlt("inspect", model).code == 4


def test_everything_that_was_there_before_is_still_there(qlt, here, llama):
    mine = here / "checkpoints/base-nf4"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    for force in ((), ("--force",)):
        assert qlt("quantize", llama, *force).code == 7
    assert files(here) == {"checkpoints/base-nf4/notes.txt"} and (mine / "notes.txt").read_text() == "mine"


def test_weights_read_while_they_shrink_are_an_error_not_a_crash(llama, tmp_path):
    from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
    from qlora_tools.errors import CorruptError

    path = tmp_path / "model.safetensors"
    shutil.copyfile(llama / "model.safetensors", path)
    with SafetensorsFile(path) as file:
        os.truncate(path, 4096)
        with pytest.raises(CorruptError, match="truncated while being read"):
            file.read(max(file.entries.values(), key=lambda entry: entry.offset).spec.name)


def test_results_written_as_files_replace_nothing_but_results(qlt, here, llama):
    asked = ("inspect", llama, "-o", "out.json")
    assert qlt(*asked).code == 0 and json.loads((here / "out.json").read_text())["kind"]
    again = qlt(*asked)
    assert again.code == 7 and "out.json is already there" in again.err
    assert qlt(*asked, "--force").code == 0
    for mine in ("notes of mine", (llama / "config.json").read_text(), '{"schema": "qlt.bench/2"}', '["qlt.result/1"]', "[" * 100_000):
        (here / "out.json").write_text(mine)
        refused = qlt(*asked, "--force")
        assert refused.code == 7 and "no result of qlt" in refused.err and (here / "out.json").read_text() == mine
    assert qlt("inspect", llama, "-o", "other.json", "--dry-run").code == 0 and files(here) == {"out.json"}


@pytest.mark.parametrize("verb", ["quantize", "merge", "export"])
def test_a_link_beside_the_weights_does_not_bring_out_what_it_points_to(qlt, here, llama, tuned, adapter, tmp_path, verb):
    (tmp_path / "credentials").write_text("secret")
    model = shutil.copytree(llama, tmp_path / "unpacked")
    (model / "vocab.txt").symlink_to(tmp_path / "credentials")
    for dry_run in ((), ("--dry-run",)):
        done = qlt(*words(verb, model, tuned, adapter), *dry_run)
        assert done.code == 4 and "vocab.txt is a link that leaves the folder" in done.err and files(here) == set()


@pytest.mark.parametrize("verb", ["quantize", "merge", "merge onto a text", "export"])
def test_a_text_in_the_output_is_not_lost_with_it(qlt, here, llama, tuned, adapter, verb):
    asked = (*words(verb.split()[0], llama, tuned, adapter), *(("--nf4",) if verb.startswith("merge") else ()), "-o", "out")
    assert qlt(*asked).code == 0
    (here / "out/text.txt").write_text("years of work. " * 200)
    option = "--text" if verb == "merge onto a text" else "--calib"
    for dry_run in ((), ("--dry-run",)):
        done = qlt(*asked, option, "out/text.txt", "--force", *dry_run)
        assert done.code == 2 and "overlaps the input" in done.err and "text.txt" in done.err, done.err
    assert (here / "out/text.txt").exists()


@pytest.mark.parametrize("verb", ["quantize", "merge", "export"])
def test_infinity_in_a_config_is_handed_on(qlt, here, llama, tuned, adapter, tmp_path, verb):
    model = with_config(llama, tmp_path / "model", time_step_limit=[0.0, float("inf")])
    done = qlt(*words(verb, model, tuned, adapter), "-o", "out")
    assert done.code == 0 and json.loads((here / "out/config.json").read_text())["time_step_limit"] == [0.0, float("inf")], done.err


@pytest.mark.parametrize("verb", ["quantize", "merge", "export", "inspect"])
def test_half_a_character_in_a_config_is_refused_by_its_key(qlt, here, llama, tuned, adapter, tmp_path, verb):
    model = with_config(llama, tmp_path / "model", note="\ud800")
    done = qlt(*words(verb, model, tuned, adapter))
    assert done.code == 4 and "'note' holds half of a character" in done.err and files(here) == set()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "holds a list, expected an object"),
        ("{", "is not JSON"),
        ('{"temperature": NaN}', "`temperature` is nan"),
        ('{"top_p": Infinity}', "`top_p` is inf"),
        ('{"top_k": [5]}', "`top_k` is [5]"),
        ('{"eos_token_id": []}', "`eos_token_id` is []"),
        ('{"bos_token_id": NaN}', "`bos_token_id` is nan"),
    ],
)
def test_generation_settings_that_are_none_are_refused_before_the_graph_is_made(qlt, here, llama, tmp_path, monkeypatch, text, complaint):
    from qlora_tools.verbs import export as verb

    monkeypatch.setattr(verb, "write_graph", lambda *_: pytest.fail("the graph was made"))
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "generation_config.json").write_text(text)
    for dry_run in ((), ("--dry-run",)):
        done = qlt("export", model, "--int8", *dry_run)
        assert done.code == 4 and complaint in done.err and files(here) == set(), done.err


def test_memory_that_python_itself_lacks_has_the_code_of_memory():
    from qlora_tools.cli.main import explain
    from qlora_tools.errors import OutOfMemory

    assert explain(MemoryError())[2] == OutOfMemory.exit_code == 10
