"""Files that EasySteer and hotwire-vllm load."""

import json

import gguf
import numpy as np
import pytest
import torch
from peft import get_peft_model

from peft_bias_steer import (
    BiasSteerConfig,
    export_easysteer,
    export_hotwire,
    set_steering_vectors,
    steering_vectors,
)
from tests.peft_bias_steer.tiny_models import make_base, steer


@pytest.fixture
def steered():
    model = steer(make_base(), layers_to_transform=[0, 2])
    model.set_scale("default", 0.5)
    return model


def read_as_easysteer(path):
    """
    What `_read_gguf` of EasySteer's fork of vLLM keeps of a file: `vllm/model_hooks/steering/loading.py` at 4ca76fd.
    """
    directions = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith("direction."):
            directions[int(tensor.name.removeprefix("direction."))] = np.array(tensor.data, copy=True)
    return {layer: np.ascontiguousarray(np.asarray(value, dtype=np.float32)) for layer, value in directions.items()}


def test_easysteer_reads_every_vector_layer_zero_too(steered, tmp_path):
    steering = export_easysteer(steered, tmp_path / "steer.gguf")

    read = read_as_easysteer(tmp_path / "steer.gguf")
    expected = {index: 0.5 * vector for index, vector in steering_vectors(steered).items()}
    assert list(read) == list(expected) == [0, 2]
    assert all(torch.equal(torch.from_numpy(read[index]), expected[index]) for index in expected)
    vector = steering["vectors"][0]
    assert vector == {
        "source": str(tmp_path / "steer.gguf"),
        "algorithm": "direct",
        "scale": 1.0,
        "apply": {"prompt": "all", "generation": "all"},
    }


def test_easysteer_is_told_that_the_vectors_are_for_hidden_states(steered, tmp_path):
    """`StatisticalControlVector.import_gguf`, in `easysteer/extraction/result.py` at 9905dd4, reads these fields."""
    export_easysteer(steered, tmp_path / "steer.gguf")

    fields = gguf.GGUFReader(tmp_path / "steer.gguf").fields
    read = {name.partition(".")[2]: fields[name].contents() for name in fields if name.startswith("controlvector.")}
    assert read["model_hint"] == "llama" and read["method"] == "bias_steer"
    assert json.loads(read["easysteer"]) == {"version": 1, "component": "hidden_states", "metadata": None}


def test_hotwire_loads_every_vector_and_finds_each_by_its_layer(steered, tmp_path):
    """With hotwire's own code for reading files, parsing a request and finding the vector of a layer."""
    state = pytest.importorskip("hotwire._state")
    request = export_hotwire(steered, tmp_path / "steer.pt")

    server = state.SteerState(3, 32, max_tokens=8, device=torch.device("cpu"), dtype=torch.float32, n_slots=2)
    server.load_store(str(tmp_path))
    expected = {index: 0.5 * vector for index, vector in steering_vectors(steered).items()}
    entries = state.parse_spec(json.dumps(request))
    assert [entry["layer"] for entry in entries] == [0, 2]
    for entry in entries:
        slot = server.slot_for(entry["id"], entry["layer"], entry["scale"])
        assert torch.equal(server.bank.bank[slot] * server.bank.scales[slot], expected[entry["layer"]])
    # one slot for each layer of each scale: a third one is not served
    assert server.slot_for("steer", 2, 0.8) is None
    assert server.slot_for("unknown", 0, 1.0) is None


def test_layers_without_a_vector_are_zero_for_hotwire(steered, tmp_path):
    export_hotwire(steered, tmp_path / "steer.pt")

    rows = torch.load(tmp_path / "steer.pt", weights_only=True)
    assert rows.shape == (3, 32) and rows.dtype == torch.float32
    assert not rows[1].any() and rows[0].all() and rows[2].all()


@pytest.mark.parametrize(("export", "suffix"), [(export_easysteer, ".gguf"), (export_hotwire, ".pt")])
def test_what_such_a_file_cannot_hold_is_refused(steered, tmp_path, export, suffix):
    with pytest.raises(ValueError, match=f"a file named \\*{suffix}, the only one that is loaded, got .*steer.bin"):
        export(steered, tmp_path / "steer.bin")
    of_modules = get_peft_model(make_base(), BiasSteerConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="expected vectors on decoder layers"):
        export(of_modules, tmp_path / f"steer{suffix}")
    with_head = steer(make_base(), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        export(with_head, tmp_path / f"steer{suffix}")
    steered.base_model.model.model.layers[2].bias_steer.vector("default").data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"finite.*layer 2"):
        export(steered, tmp_path / f"steer{suffix}")
    assert not list(tmp_path.iterdir())
    set_steering_vectors(steered, {2: torch.zeros(32)})
    export(steered, tmp_path / f"steer{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"steer{suffix}"]
