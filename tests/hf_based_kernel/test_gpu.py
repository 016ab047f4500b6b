"""The operation and the models on a GPU: what a CPU cannot show of the Triton form, and everything above it once."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from hf_based_kernel import RebasedConfig, RebasedForCausalLM, rebased_attention, taylor_attention


pytestmark = pytest.mark.gpu

# TF32x3 keeps about 22 bits, and eight more roundings of that kind lie on the way through the layers.
FLOAT32_TOLERANCE = 1e-3
# Eight bits of mantissa, through some ten roundings.
BFLOAT16_TOLERANCE = 0.05


def make_model(**options) -> RebasedForCausalLM:
    """On the CPU, in float32: convolution and linear attention in turn."""
    config = RebasedConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        # Large enough for the kernel to have contrast, as after training.
        initializer_range=0.1,
        **options,
    )
    return RebasedForCausalLM(config).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, 64, shape)


def make_inputs(*, seq_len: int = 1000, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """q, k and v of 2 sequences and 4 heads on the GPU, with gradients."""
    return [torch.randn(2, seq_len, 4, dim, device="cuda", dtype=dtype).requires_grad_() for dim in (16, 16, 64)]


def results_of(inputs: list[torch.Tensor], grad_out: torch.Tensor) -> list[torch.Tensor]:
    out = rebased_attention(*inputs, backend="triton")
    return [out, *torch.autograd.grad(out, inputs, grad_out)]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest element."""
    expected = expected.float().cpu()
    return ((got.float().cpu() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kernel", ["rebased", "taylor"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE)], ids=str
)
@torch.no_grad()
def test_logits_are_those_of_the_torch_form_on_the_cpu(kernel, dtype, tolerance):
    model, input_ids = make_model(kernel=kernel), tokens(2, 300)
    expected = model(input_ids).logits

    logits = model.to("cuda", dtype)(input_ids.cuda()).logits

    assert logits.dtype == dtype
    assert relative_error(logits, expected) < tolerance


@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
@torch.no_grad()
def test_cached_decoding_matches_full_forward(num_key_value_heads):
    model, input_ids = make_model(num_key_value_heads=num_key_value_heads).cuda(), tokens(2, 300).cuda()
    expected = model(input_ids).logits
    cache, logits = None, []
    for piece in input_ids.split([200, 1, 1, 97, 1], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)

    assert relative_error(torch.cat(logits, dim=1), expected) < FLOAT32_TOLERANCE


def test_generate_with_state_matches_generate_without():
    model, input_ids = make_model().cuda(), tokens(2, 40).cuda()
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}

    with_state = model.generate(input_ids, use_cache=True, **options)

    assert with_state.shape == (2, 56)
    assert torch.equal(with_state, model.generate(input_ids, use_cache=False, **options))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_three_steps_of_the_trainer_lower_the_loss(tmp_path, bf16):
    row = tokens(256)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=bf16,
    )
    trainer = Trainer(make_model(), arguments, train_dataset=[{"input_ids": row, "labels": row}] * 12)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert len(losses) == 3
    # False for NaN too.
    assert losses[2] < losses[1] < losses[0] < float("inf")


def test_autocast_stays_close_to_float32_and_gives_finite_gradients():
    model, input_ids = make_model().cuda(), tokens(2, 300).cuda()
    with torch.no_grad():
        expected = model(input_ids).logits
    with torch.autocast("cuda", torch.bfloat16):
        outputs = model.train()(input_ids, labels=input_ids)
    outputs.loss.backward()

    assert relative_error(outputs.logits.detach(), expected) < BFLOAT16_TOLERANCE
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_compiled_model_gives_the_logits_of_the_eager_one():
    model, input_ids = make_model().cuda(), tokens(2, 300).cuda()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)

    logits = compiled(input_ids, use_cache=False).logits

    assert relative_error(logits, model(input_ids, use_cache=False).logits) < FLOAT32_TOLERANCE


def test_compiled_training_step_gives_the_gradients_of_an_eager_one():
    model, input_ids = make_model().cuda().train(), tokens(2, 300).cuda()
    other = copy.deepcopy(model)
    torch.compiler.reset()
    torch.compile(other, fullgraph=True)(input_ids, labels=input_ids).loss.backward()
    model(input_ids, labels=input_ids).loss.backward()

    for parameter, compiled in zip(model.parameters(), other.parameters()):
        assert relative_error(compiled.grad, parameter.grad) < FLOAT32_TOLERANCE


# 1000 tokens are one span or several; 70 end in the middle of a chunk.
@pytest.mark.parametrize("seq_len", [70, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph_replays_forward_and_backward_on_new_inputs(seq_len, dtype):
    inputs = make_inputs(seq_len=seq_len, dtype=dtype)
    grad_out = torch.randn_like(inputs[2])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Compiled and allocated before the capture.
        for _ in range(3):
            results_of(inputs, grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = results_of(inputs, grad_out)
    for _ in range(2):
        new_inputs, new_grad_out = make_inputs(seq_len=seq_len, dtype=dtype), torch.randn_like(grad_out)
        with torch.no_grad():
            for tensor, new in zip([*inputs, grad_out], [*new_inputs, new_grad_out]):
                tensor.copy_(new)
        graph.replay()
        expected = results_of(new_inputs, new_grad_out)

        assert all(torch.equal(x, y) for x, y in zip(replayed, expected))


def test_two_streams_at_the_same_time_give_what_one_gives():
    batches = [make_inputs(seq_len=4096) for _ in range(2)]
    grads_out = [torch.randn_like(inputs[2]) for inputs in batches]
    expected = [results_of(inputs, grad_out) for inputs, grad_out in zip(batches, grads_out)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in batches], [[] for _ in batches]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(results_of(batches[i], grads_out[i]))
    torch.cuda.synchronize()

    for i, rounds in enumerate(results):
        for result in rounds:
            assert all(torch.equal(x, y) for x, y in zip(result, expected[i]))


class OperatorRecorder(TorchDispatchMode):
    """Notes this package's operators and what they were called with."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("hf_based_kernel"):
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", [rebased_attention, taylor_attention])
@pytest.mark.parametrize("with_state", [False, True])
def test_operators_obey_the_rules_of_torch_library(attention, with_state):
    inputs = make_inputs(seq_len=70, dtype=torch.float32)
    state = attention(*inputs, return_state=True, backend="triton")[1].detach() if with_state else None
    with OperatorRecorder() as recorder:
        out, final_state = attention(*inputs, initial_state=state, return_state=True, backend="triton")
        (out.sum() + final_state.sum()).backward()

    assert {func._opname for func in recorder.calls} >= {"forward", "backward"}
    for func, args in recorder.calls.items():
        differentiable = func._opname == "forward"
        args = [
            x.detach().clone().requires_grad_(differentiable and x.is_floating_point())
            if isinstance(x, torch.Tensor)
            else x
            for x in args
        ]
        # A second run sums in the same order, the traced one may round once more.
        checks = torch.library.opcheck(func, args, atol=1e-4, rtol=1e-4)

        assert set(checks.values()) == {"SUCCESS"}, func
