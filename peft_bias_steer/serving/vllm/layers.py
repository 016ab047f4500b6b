"""In a worker of vLLM: decoder layers that add a vector of their own to each token, and the choice for each step."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ...architectures import LAYER_LISTS, VLLM_PLUGIN_CLASSES
from ...residual import layer_lists
from ...vectors import check_vectors
from .settings import POLICY


VECTOR = "steering_vector"
# what the engine's side writes into a request's extra arguments: (row, scale, tokens)
ROW = "bias_steer_row"
# vLLM pads a step to the next size that it has recorded
PADDING = 512

# so many runs of tokens with one vector are added run by run on a CPU; more are gathered first
FEW = 4

# what the present step of an engine steers, by the address of its `rows` buffer: first token, the one after the last, row
# and scale
_runs: dict[int, list[tuple[int, int, int, float]]] = {}


def _steer(hidden: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> None:
    """
    hidden: (..., tokens, hidden_size), changed in place
    table: (adapters, hidden_size), float32; row 0 is zero
    rows: (>= tokens,), the adapter of each token
    scales: (>= tokens, 1), float32
    """
    # a recorded CUDA graph cannot ask; on a CPU the question is nearly all of what an unused plugin costs
    if hidden.is_cpu and len(runs := _runs[rows.data_ptr()]) <= FEW:
        for start, stop, row, scale in runs:
            hidden[..., start:stop, :].add_(table[row], alpha=scale)
        return
    tokens = hidden.shape[-2]
    hidden.add_(table.index_select(0, rows[:tokens]).mul_(scales[:tokens]))


# an operator, so that torch.compile neither looks into it nor fuses what the base model keeps apart
_LIBRARY = torch.library.Library("bias_steer", "FRAGMENT")
_LIBRARY.define("steer_(Tensor(a!) hidden, Tensor table, Tensor rows, Tensor scales) -> ()")
_LIBRARY.impl("steer_", _steer, "CompositeExplicitAutograd")
_LIBRARY.impl("steer_", lambda hidden, table, rows, scales: None, "Meta")


class _SteeredLayer:
    """
    A decoder layer whose output moves: `h' = h + scale * s`, with the scale and vector of each token. Under tensor
    parallelism every rank holds whole vectors, as it holds the whole residual stream.
    """

    steering_table: torch.Tensor
    steering_rows: torch.Tensor
    steering_scales: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # ty: ignore[missing-attribute]
        # vLLM's layers hand on the MLP's output and the residual apart: their sum is what the next one sees
        hidden = output[0] if isinstance(output, tuple) else output
        torch.ops.bias_steer.steer_(hidden, self.steering_table, self.steering_rows, self.steering_scales)
        return output


@functools.cache
def _steered_layer_class(layer_class: type) -> type:
    return type(f"Steered{layer_class.__name__}", (_SteeredLayer, layer_class), {})


class SteeredLayers:
    """
    The decoder layers of this worker's model, changed into steered ones.

    Args:
        model (`torch.nn.Module`): vLLM's model, or the part of it that this pipeline stage holds.
        num_adapters (`int`): Rows of each layer's table, beside row 0.
        num_layers (`int`): Layers of the whole model.
        width (`int`): Width of the residual stream.
        max_tokens (`int`): Most tokens of a step.
    """

    def __init__(self, model: Any, num_adapters: int, *, num_layers: int, width: int, max_tokens: int) -> None:
        self.num_layers, self.width, self.rows_by_name = num_layers, width, dict[str, int]()
        self.layers = dict(_own_layers(model))
        # not of any part of the model: towers for media that are not served stay on the meta device
        device = next(next(iter(self.layers.values())).parameters()).device
        pinned = device.type == "cuda"
        self.rows = torch.zeros(max_tokens + PADDING, dtype=torch.int32, pin_memory=pinned)
        self.scales = torch.zeros(max_tokens + PADDING, 1, pin_memory=pinned)
        self.device_rows, self.device_scales = self.rows.to(device), self.scales.to(device)
        self.used = 0
        # held here too: while vLLM's server takes weights from a trainer, the layers have no buffers
        self.tables = {index: torch.zeros(num_adapters + 1, width, device=device) for index in self.layers}
        for index, layer in self.layers.items():
            # buffers: unlike parameters they survive the engine's sleep, and no checkpoint has to hold them
            layer.register_buffer("steering_table", self.tables[index], persistent=False)
            layer.register_buffer("steering_rows", self.device_rows, persistent=False)
            layer.register_buffer("steering_scales", self.device_scales, persistent=False)
            # the layers exist by now, made by vLLM's own model class, which knows no other
            layer.__class__ = _steered_layer_class(type(layer))
        _runs[self.device_rows.data_ptr()] = []

    def write(self, row: int, name: str, vectors: dict[int, torch.Tensor]) -> None:
        """Puts an adapter into a row that no request uses; layers without a vector are not steered."""
        for index, table in self.tables.items():
            vector = vectors.get(index)
            table[row] = 0.0 if vector is None else vector
        self.rows_by_name[name] = row

    def vectors(self, row: int) -> dict[int, torch.Tensor]:
        """The vectors of a row, (hidden_size,) each, by index of their layer."""
        return {index: table[row].cpu() for index, table in self.tables.items()}

    def take_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """What a trainer sends, without the vectors in it, which become those of the adapter `policy`."""
        for name, weight in weights:
            match = re.search(rf"\.(\d+)\.{VECTOR}$", name)
            if match is None:
                yield name, weight
                continue
            if POLICY not in self.rows_by_name:
                raise ValueError(f"expected an engine with an adapter named {POLICY!r} for {name}, got none")
            index = int(match[1])
            check_vectors({index: weight}, num_layers=self.num_layers, width=self.width)
            if index in self.tables:  # those of this pipeline stage
                self.tables[index][self.rows_by_name[POLICY]] = weight

    def choose(self, choices: list[tuple[int, int, int, float]], tokens: int) -> None:
        """
        Sets what the next step steers.

        Args:
            choices (`list`): First token of the step, the one after the last, row and scale.
            tokens (`int`): Tokens of the step.
        """
        address = self.device_rows.data_ptr()
        if not choices and not _runs[address]:
            return
        rows, scales = self.rows.numpy(), self.scales.numpy()
        end = max(tokens, self.used)
        rows[:end] = 0
        for start, stop, row, scale in choices:
            rows[start:stop], scales[start:stop] = row, scale
        if self.device_rows is not self.rows:
            self.device_rows[:end].copy_(self.rows[:end], non_blocking=True)
            self.device_scales[:end].copy_(self.scales[:end], non_blocking=True)
        self.used = tokens if choices else 0
        _runs[address] = _joined(choices)


def _joined(choices: list[tuple[int, int, int, float]]) -> list[tuple[int, int, int, float]]:
    """Neighbours with the same vector and scale as one."""
    runs: list[tuple[int, int, int, float]] = []
    for start, stop, row, scale in choices:
        if runs and runs[-1][1:] == (start, row, scale):
            start = runs.pop()[0]
        runs.append((start, stop, row, scale))
    return runs


def _own_layers(model: Any) -> Iterator[tuple[int, Any]]:
    from vllm.model_executor.models.utils import PPMissingLayer

    text = model.get_language_model() if hasattr(model, "get_language_model") else model
    _, layers = min(layer_lists(text, LAYER_LISTS), key=lambda entry: entry[0])
    for index, layer in enumerate(layers):
        if not isinstance(layer, PPMissingLayer):
            yield index, layer


def install(worker: Any, num_adapters: int) -> None:
    """Steers the model of a worker from now on. To be called before vLLM compiles it or records graphs of it."""
    runner, config = worker.model_runner, worker.vllm_config.model_config
    model, architecture = worker.get_model(), config.hf_config.architectures[0]
    # what vLLM has no class for runs in transformers' own modules, and was compared so; what it has one for was not
    if architecture not in VLLM_PLUGIN_CLASSES or config.model_impl == "transformers":
        raise ValueError(
            f"it was not verified that vLLM's {architecture} is steered exactly (model_impl={config.model_impl!r}): "
            "serve it with transformers, or see which routes there are with `bias-steer routes`"
        )
    layers = SteeredLayers(
        model,
        num_adapters,
        num_layers=config.get_total_num_hidden_layers(),
        width=config.get_hidden_size(),
        max_tokens=runner.max_num_tokens,
    )
    model.load_weights = _taking_vectors(model.load_weights, layers)
    runner._prepare_inputs = _choosing(runner._prepare_inputs, runner, layers)
    worker.bias_steer = layers


def write_row(worker: Any, row: int, name: str, vectors: dict[int, torch.Tensor]) -> None:
    worker.bias_steer.write(row, name, vectors)


def read_row(worker: Any, row: int) -> dict[int, torch.Tensor]:
    return worker.bias_steer.vectors(row)


def _taking_vectors(load_weights: Callable[..., Any], layers: SteeredLayers) -> Callable[..., Any]:
    def load(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        return load_weights(layers.take_weights(weights), *args, **kwargs)

    return load


def _choosing(prepare_inputs: Callable[..., Any], runner: Any, layers: SteeredLayers) -> Callable[..., Any]:
    def prepare(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        layers.choose(list(_choices(runner, num_scheduled_tokens)), int(num_scheduled_tokens.sum()))
        return prepare_inputs(scheduler_output, num_scheduled_tokens)

    return prepare


def _choices(runner: Any, num_scheduled_tokens: Any) -> Iterator[tuple[int, int, int, float]]:
    batch, start = runner.input_batch, 0
    for index, (request, tokens) in enumerate(zip(batch.req_ids, num_scheduled_tokens.tolist())):
        stop = start + tokens
        arguments = extra_arguments(runner.requests[request])
        if arguments and ROW in arguments:
            row, scale, where = arguments[ROW]
            # where the prompt ends among the tokens of this step
            end = start + int(batch.num_prompt_tokens[index] - batch.num_computed_tokens_cpu[index])
            first = max(start, end) if where == "generated" else start
            last = min(stop, end) if where == "prompt" else stop
            if first < last:
                yield first, last, row, scale
        start = stop


def extra_arguments(request: Any) -> dict[str, Any] | None:
    """What a request, on either side of vLLM's engine, carries beside the arguments that vLLM knows."""
    if request.sampling_params is None:
        return request.pooling_params.extra_kwargs
    return request.sampling_params.extra_args
