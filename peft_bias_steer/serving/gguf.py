"""Steering vectors in llama.cpp's GGUF files: as a control vector, or as biases inside a model file."""

import os
import shutil
import struct
import sys
from types import ModuleType
from typing import Any, BinaryIO

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..architectures import GGUF_BIAS, GGUF_BIAS_ARCHITECTURE
from ..residual import find_layers, residual_width
from ..vectors import active_vectors, from_vectors, unwrap
from ..whole_files import whole_file
from .stock_checkpoint import refuse_trained_modules


__all__ = ["export_control_vector", "export_gguf", "from_control_vector"]


def export_control_vector(model: PeftModel, path: str | os.PathLike, *, drop_first_layer: bool = False) -> float:
    """
    Writes the active vectors, summed at their present scale, as a control vector for llama.cpp
    (`llama-cli --control-vector FILE`): a GGUF file with one tensor `direction.N` for the output of each layer N.

    llama.cpp refuses a file with a vector for layer 0.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        path (`str` or `os.PathLike`): File to write.
        drop_first_layer (`bool`, *optional*, defaults to `False`): Leave out the vector of layer 0 if it is not zero.

    Returns:
        `float`: Norm of the vector of layer 0, which the file does not hold.

    Raises:
        ValueError: If layer 0 has a vector that `drop_first_layer` does not give up, no other layer has any, or the
            adapter trained other modules too.
    """
    refuse_trained_modules(model, "a control vector")
    vectors = active_vectors(model)
    dropped = vectors.pop(0, torch.zeros(1)).norm().item()
    others = sum(vector.norm().item() ** 2 for vector in vectors.values()) ** 0.5
    if dropped and not drop_first_layer:
        raise ValueError(
            f"llama.cpp takes no vector for layer 0, but this one has norm {dropped:.4g} (the others together "
            f"{others:.4g}): give it up with drop_first_layer=True (--drop_first_layer), or keep it with export_gguf() or "
            "export_stock_checkpoint() (--format gguf or stock)"
        )
    if not vectors:
        raise ValueError("expected vectors for layers above 0, got none: llama.cpp takes no file without any")
    write_control_vector(model, vectors, path)
    return dropped


def write_control_vector(
    model: PeftModel, vectors: dict[int, torch.Tensor], path: str | os.PathLike, notes: dict[str, str] | None = None
) -> None:
    """Writes vectors by index of their layer, and notes under `controlvector.`, into a GGUF file without a check."""
    gguf = _import_gguf()
    config = unwrap(model).config.get_text_config(decoder=True)
    with whole_file(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, "controlvector")
        writer.add_string("controlvector.model_hint", config.model_type)
        writer.add_uint32("controlvector.layer_count", config.num_hidden_layers)
        for name, note in (notes or {}).items():
            writer.add_string(f"controlvector.{name}", note)
        for index, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{index}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def from_control_vector(
    path: str | os.PathLike, model: PeftModel | PreTrainedModel, adapter_name: str = "default"
) -> PeftModel:
    """
    Reads a control vector of llama.cpp or repeng as a BiasSteer adapter. The layers that the file does not name are not steered.

    Args:
        path (`str` or `os.PathLike`): GGUF file with tensors `direction.N`.
        model (`PeftModel` or `PreTrainedModel`): Model to steer; a `PeftModel` gets one more adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the new adapter.

    Returns:
        `PeftModel`: The steered model.

    Raises:
        ValueError: If the file is damaged, holds no control vector, or one of another size. `model` is unchanged then.
    """
    vectors = {}
    for tensor in _read_gguf(path).tensors:
        prefix, _, index = tensor.name.partition(".")
        # 01 would stand for 1 once more
        is_layer = index.isdecimal() and index == str(int(index))
        if prefix != "direction" or not is_layer or tensor.tensor_type.name != "F32":
            raise ValueError(f"expected tensors direction.N of F32, got {tensor.name} of {tensor.tensor_type.name}")
        vectors[int(index)] = torch.from_numpy(tensor.data.copy())
    if not vectors:
        raise ValueError(f"expected a control vector with tensors direction.N, got none in {path}")
    return from_vectors(vectors, model, adapter_name)


def export_gguf(model: PeftModel, gguf_in: str | os.PathLike, gguf_out: str | os.PathLike) -> None:
    """
    Copies a llama.cpp model and adds the active vectors to it as biases `blk.N.ffn_down.bias`, layer 0 included.

    Metadata and all other tensors stay as they are, byte for byte, whatever their quantisation.

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter; its active vectors are summed at their present scale.
        gguf_in (`str` or `os.PathLike`): GGUF file of the base model, of architecture `llama`.
        gguf_out (`str` or `os.PathLike`): GGUF file to write.

    Raises:
        ValueError: If the file is damaged, of another architecture or size, or has such biases already, or if the
            adapter trained other modules too.
    """
    refuse_trained_modules(model, "such a file")
    vectors = {GGUF_BIAS.format(index=index): vector for index, vector in sorted(active_vectors(model).items())}
    reader = _read_gguf(gguf_in)
    _check_gguf_fits(reader, model, vectors)
    swapped = ">" if sys.byteorder == "little" else "<"
    order = swapped if reader.byte_order == "S" else "="
    field = reader.tensors[-1].field
    infos_end = field.offset + sum(part.nbytes for part in field.parts)
    magic_and_version, tensors_and_rest = reader.data[:8].tobytes(), reader.data[16:infos_end].tobytes()
    old_size = len(reader.data) - reader.data_offset
    offset = _padded(old_size, reader.alignment)
    infos, data = b"", b"\0" * (offset - old_size)
    for name, vector in vectors.items():
        values = vector.numpy().astype(f"{order}f4").tobytes()
        infos += struct.pack(f"{order}Q{len(name)}sIQIQ", len(name), name.encode(), 1, len(vector), 0, offset)
        data += values.ljust(_padded(len(values), reader.alignment), b"\0")
        offset += _padded(len(values), reader.alignment)
    count = struct.pack(f"{order}Q", len(reader.tensors) + len(vectors))
    head = magic_and_version + count + tensors_and_rest + infos
    with open(gguf_in, "rb") as source, whole_file(gguf_out) as unfinished, unfinished.open("wb") as file:
        file.write(head.ljust(_padded(len(head), reader.alignment), b"\0"))
        source.seek(reader.data_offset)
        shutil.copyfileobj(source, file)
        file.write(data)


def _check_gguf_fits(reader: Any, model: PeftModel, vectors: dict[str, torch.Tensor]) -> None:
    architecture = _gguf_value(reader, "general.architecture")
    experts = _gguf_value(reader, f"{architecture}.expert_count") or 0
    if architecture != GGUF_BIAS_ARCHITECTURE or experts:
        raise ValueError(
            f"expected a dense GGUF model of architecture {GGUF_BIAS_ARCHITECTURE}, got {architecture} with {experts} "
            "experts, for which llama.cpp knows no such bias: use export_control_vector()"
        )
    base = unwrap(model)
    expected = (len(find_layers(base)[1]), residual_width(base))
    got = tuple(_gguf_value(reader, f"{architecture}.{name}") for name in ("block_count", "embedding_length"))
    if got != expected:
        raise ValueError(f"expected a GGUF model of (layers, width) = {expected}, got {got}: take that of this base")
    present = sorted(vectors.keys() & {tensor.name for tensor in reader.tensors})
    if present:
        raise ValueError(f"expected a GGUF model without biases, got one with {present[0]}: take the unsteered one")


def _gguf_value(reader: Any, name: str) -> object:
    value = reader.get_field(name)
    return None if value is None else value.contents()


def _read_gguf(path: str | os.PathLike) -> Any:
    gguf = _import_gguf()
    try:
        _check_claimed_sizes(path)
        return gguf.GGUFReader(path)
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
        raise ValueError(
            f"expected a complete GGUF file, got {os.path.getsize(path)} bytes in {path} that do not parse ({error})"
        ) from error


def _check_claimed_sizes(path: str | os.PathLike) -> None:
    """
    Refuses a GGUF file that claims to hold more than it does: the reader would look for each value on its own.

    Raises:
        ValueError: If it does, or holds an array of arrays, which no program writes.
    """
    with open(path, "rb") as file:
        magic, version = file.read(4), file.read(4)
        # the small number of the version tells the byte order
        order = "<" if version[:2] != b"\0\0" else ">"
        if magic != b"GGUF" or len(version) < 4:
            raise ValueError("it does not begin as one")
        claims = _Claims(file, order)
        num_tensors, num_fields = claims.count(item_bytes=24), claims.count(item_bytes=13)
        for _ in range(num_fields):
            claims.skip(claims.count())
            claims.skip_value(*claims.unpack("I"))
        for _ in range(num_tensors):
            claims.skip(claims.count())
            (num_dims,) = claims.unpack("I")
            claims.skip(8 * num_dims + 12)


class _Claims:
    """Sizes that a file claims, each compared with what is left of it."""

    # of the type of a value: 1-byte numbers and booleans, 2 bytes, 4 bytes, 8 bytes
    VALUE_BYTES = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
    STRING, ARRAY = 8, 9

    def __init__(self, file: BinaryIO, order: str) -> None:
        self.file, self.order, self.size = file, order, os.fstat(file.fileno()).st_size

    def unpack(self, form: str) -> tuple[Any, ...]:
        form = self.order + form
        return struct.unpack(form, self.file.read(struct.calcsize(form)))

    def count(self, item_bytes: int = 1) -> int:
        (number,) = self.unpack("Q")
        left = self.size - self.file.tell()
        if number * item_bytes > left:
            raise ValueError(f"{number} items of at least {item_bytes} bytes are claimed where {left} bytes are left")
        return number

    def skip(self, size: int) -> None:
        if size > self.size - self.file.tell():
            raise ValueError(f"{size} bytes are claimed where {self.size - self.file.tell()} are left")
        self.file.seek(size, os.SEEK_CUR)

    def skip_value(self, kind: int) -> None:
        if kind == self.STRING:
            self.skip(self.count())
        elif kind == self.ARRAY:
            (item_kind,) = self.unpack("I")
            if item_kind == self.STRING:
                for _ in range(self.count(item_bytes=8)):
                    self.skip(self.count())
            else:
                size = self._value_bytes(item_kind)
                self.skip(size * self.count(item_bytes=size))
        else:
            self.skip(self._value_bytes(kind))

    def _value_bytes(self, kind: int) -> int:
        if kind not in self.VALUE_BYTES:
            raise ValueError(f"a value of unknown type {kind}")
        return self.VALUE_BYTES[kind]


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need one more package: pip install 'peft_bias_steer[gguf]'") from error
    return gguf


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
