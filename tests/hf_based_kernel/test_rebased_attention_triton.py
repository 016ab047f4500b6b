"""The Triton form against the reference: interpreted on the CPU, compiled for GPUs that need not be there, run on one."""

import contextlib
import importlib
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch


triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import hf_based_kernel  # noqa: E402
from hf_based_kernel import rebased_attention, taylor_attention  # noqa: E402
from hf_based_kernel.rebased_attention import rebased_attention_reference  # noqa: E402
from hf_based_kernel.rebased_features import REBASED, TAYLOR, state_size  # noqa: E402


FOLDER = str(Path(hf_based_kernel.__file__).parent)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Sums of up to 37 float32 terms in another order; relative to the largest element.
FLOAT32_TOLERANCE = 1e-5
# Inputs are exact in both forms: what is left is rounding of the output, which the gradients read, and of the gradients.
HALF_TOLERANCES = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


def load_module(name, *, interpreted):
    """A copy of the module and its siblings whose kernels are interpreted or compiled, whatever the environment says."""
    for loaded in [other for other in sys.modules if other.partition(".")[0] == name]:
        del sys.modules[loaded]
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [FOLDER]
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpreted
        return importlib.import_module(f"{name}.rebased_attention_triton")


@pytest.fixture(scope="module")
def interpreted_module():
    return load_module("rebased_attention_interpreted", interpreted=True)


@contextlib.contextmanager
def interpreted_language():
    """Triton's own functions interpreted too, and all of them as before afterwards: its interpreter leaves some changed."""
    # Triton imports gluon when a kernel first runs, and gluon must find the functions as they were.
    importlib.import_module("triton.experimental.gluon")
    spaces = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.core.tensor_descriptor_base)
    before = [dict(vars(space)) for space in spaces]
    for library in (tl, tl.standard):
        for name, member in list(vars(library).items()):
            if isinstance(member, JITFunction):
                setattr(library, name, InterpretedFunction(member.fn))
    yield
    for space, members in zip(spaces, before):
        for name, member in list(vars(space).items()):
            if name not in members:
                delattr(space, name)
            elif member is not members[name]:
                setattr(space, name, members[name])


@pytest.fixture
def interpreted(interpreted_module):
    """The module, ready to run on CPU tensors, even if something has imported triton for compiling before."""
    with interpreted_language():
        yield interpreted_module


def make_inputs(
    *,
    batch_size=1,
    seq_len=21,
    num_heads=1,
    feature_dim=16,
    head_dim=16,
    coefficients=REBASED,
    with_state=False,
    with_mask=False,
    with_segments=False,
    dtype=torch.float32,
    device="cpu",
):
    """Tensors in `dtype`, and the arguments that are not tensors or have no gradient."""
    q, k = torch.randn(2, batch_size, seq_len, num_heads, feature_dim, device=device)
    v = torch.randn(batch_size, seq_len, num_heads, head_dim, device=device)
    options = {"scale": feature_dim**-0.5, "eps": 1e-6, "coefficients": coefficients}
    if with_mask:
        # The first sequence is padded on the left, the last on the right.
        mask = torch.ones(batch_size, seq_len, dtype=torch.bool, device=device)
        mask[0, : seq_len // 6] = False
        mask[-1, seq_len - seq_len // 5 :] = False
        options["attention_mask"] = mask
        q, k, v = (x.masked_fill(~mask[:, :, None, None], 0) for x in (q, k, v))
    if with_segments:
        positions = torch.arange(seq_len, device=device)
        options["segment_ids"] = torch.stack([positions // (9 + 2 * i) for i in range(batch_size)]) - 3
    inputs = [q.to(dtype), k.to(dtype), v.to(dtype)]
    if with_state:
        rows = state_size(feature_dim, coefficients)
        inputs.append(torch.rand(batch_size, num_heads, rows, head_dim + 1, device=device))
    return inputs, options


def run(form, inputs, options, dtypes):
    """Output, final state, and the gradients of all inputs, for one weighting of output and state."""
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes)]
    state = {"initial_state": inputs[3]} if len(inputs) == 4 else {}
    out, final_state = form(*inputs[:3], **state, return_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    weight_out = torch.randn(out.shape, generator=generator).to(inputs[0].dtype).to(out)
    weight_state = torch.randn(final_state.shape, generator=generator).to(final_state) / inputs[0].shape[1]
    if "attention_mask" in options:
        weight_out = weight_out * options["attention_mask"][:, :, None, None]
        out = out * options["attention_mask"][:, :, None, None]
    return [
        out,
        final_state,
        *torch.autograd.grad((out * weight_out).sum() + (final_state * weight_state).sum(), inputs),
    ]


def errors(module, inputs, options):
    """Largest error of each result, relative to its largest element, but at least to 1: some gradients are all zero."""
    dtypes = [x.dtype for x in inputs]
    expected = run(rebased_attention_reference, inputs, options, [torch.float64] * 4)
    results = run(module.rebased_attention_triton, inputs, options, dtypes)
    assert [x.dtype for x in results] == [dtypes[0], torch.float32, *dtypes]
    return [((x - y).abs().max() / y.abs().max().clamp(min=1)).item() for x, y in zip(results, expected)]


CASES = {
    "batch": {"batch_size": 2},
    "state_mask_and_segments": {
        "batch_size": 2,
        "seq_len": 37,
        "with_state": True,
        "with_mask": True,
        "with_segments": True,
    },
    "mask": {"batch_size": 2, "with_mask": True},
    "heads": {"num_heads": 3, "seq_len": 5, "with_state": True},
    "one_token": {"seq_len": 1},
    "one_token_after_a_state": {"seq_len": 1, "with_state": True},
    "two_value_blocks": {"seq_len": 17, "feature_dim": 4, "head_dim": 72, "with_state": True},
    "wide_features": {"seq_len": 17, "feature_dim": 18, "head_dim": 5},
    "one_feature_one_value": {"feature_dim": 1, "head_dim": 1, "with_state": True},
    "taylor_state_mask_and_segments": {
        "batch_size": 2,
        "feature_dim": 5,
        "head_dim": 3,
        "coefficients": TAYLOR,
        "with_state": True,
        "with_mask": True,
        "with_segments": True,
    },
    "taylor_mask": {"batch_size": 2, "seq_len": 17, "coefficients": TAYLOR, "with_mask": True},
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
def test_value_and_every_gradient_match_the_reference(interpreted, sizes):
    assert max(errors(interpreted, *make_inputs(**sizes))) < FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    "sizes",
    [
        {"seq_len": 50},
        {"seq_len": 50, "with_state": True, "with_segments": True, "coefficients": TAYLOR, "feature_dim": 5},
    ],
    ids=["rebased", "taylor_with_segments"],
)
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_spans_of_any_size_give_the_same(interpreted, sizes, chunk_size):
    inputs, options = make_inputs(**sizes)

    assert max(errors(interpreted, inputs, options | {"chunk_size": chunk_size})) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("spoilt", ["q", "k", "v", "grad_out"])
# The last is finite, its square is not.
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("chunk_size", [16, 32])
def test_bad_numbers_stay_in_their_packed_sequence(interpreted, spoilt, value, chunk_size):
    # The middle sequence shares blocks of 16 tokens with both others.
    segment_ids = torch.tensor([[0] * 13 + [1] * 11 + [2] * 13])
    tensors, options = make_inputs(seq_len=37, feature_dim=4, head_dim=4, with_state=True)
    results = []
    for bad in (False, True):
        q, k, v, state = inputs = [x.clone().requires_grad_() for x in tensors]
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(v.shape, generator=generator)
        if bad:
            {"q": q, "k": k, "v": v, "grad_out": grad_out}[spoilt].data[0, 18] = value
        out, final_state = interpreted.rebased_attention_triton(
            q, k, v, initial_state=state, return_state=True, segment_ids=segment_ids, chunk_size=chunk_size, **options
        )
        weights = torch.randn(final_state.shape, generator=generator)
        results.append((out, final_state, *torch.autograd.grad((out, final_state), inputs, (grad_out, weights))))
    for i, (expected, got) in enumerate(zip(*results)):
        # The final and the initial state, and every token of the first and the last sequence.
        others = slice(None) if i in (1, 5) else segment_ids != 1
        torch.testing.assert_close(got[others], expected[others], rtol=0, atol=0)
    reached = results[1][2] if spoilt in ("q", "grad_out") else results[1][0]
    assert value == 1e30 or not reached[0, 18].isfinite().any()


@pytest.mark.parametrize("dtype", HALF_TOLERANCES, ids=str)
def test_half_precision_differs_from_the_reference_by_its_rounding(interpreted, dtype):
    out, state, *gradients = errors(interpreted, *make_inputs(dtype=dtype, with_state=True))

    assert state < FLOAT32_TOLERANCE
    assert max(out, *gradients) < HALF_TOLERANCES[dtype]


def test_prefill_in_two_parts_equals_one(interpreted):
    (q, k, v), options = make_inputs(seq_len=23)
    whole, final_state = interpreted.rebased_attention_triton(q, k, v, return_state=True, **options)
    first, state = interpreted.rebased_attention_triton(*(x[:, :9] for x in (q, k, v)), return_state=True, **options)
    second, state = interpreted.rebased_attention_triton(
        *(x[:, 9:] for x in (q, k, v)), initial_state=state, return_state=True, **options
    )

    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(state, final_state, rtol=1e-5, atol=1e-5)


def test_layout_in_memory_and_chunk_size_change_nothing(interpreted):
    (q, k, v), options = make_inputs(num_heads=2, head_dim=8, seq_len=18, dtype=torch.float16)
    expected = interpreted.rebased_attention_triton(q, k, v, **options)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]

    assert not heads_first[0].is_contiguous()
    assert torch.equal(interpreted.rebased_attention_triton(*heads_first, **options), expected)
    # By default one span holds all tokens; in spans of 16 there are two.
    smaller = interpreted.rebased_attention_triton(q, k, v, chunk_size=5, **options)
    torch.testing.assert_close(smaller, expected, rtol=2**-9, atol=2**-10)


def test_a_sequence_that_is_not_finite_leaves_the_others_alone(interpreted):
    (q, k, v), options = make_inputs(batch_size=2)
    expected = interpreted.rebased_attention_triton(q, k, v, **options)
    k[0, 3], v[0, 5] = float("nan"), float("inf")
    out = interpreted.rebased_attention_triton(q, k, v, **options)

    assert torch.equal(out[1], expected[1])
    assert not out[0, 5:].isfinite().any()


def test_float64_is_refused_in_a_sentence(interpreted):
    inputs, options = make_inputs(dtype=torch.float64, seq_len=2)

    with pytest.raises(ValueError, match="takes float32, bfloat16 or float16, got torch.float64"):
        interpreted.rebased_attention_triton(*inputs, **options)


def test_operators_obey_the_rules_of_torch_library(interpreted):
    (q, k, v, state), options = make_inputs(seq_len=3, feature_dim=4, head_dim=4, with_state=True)
    inputs = [x.requires_grad_() for x in (q, k, v, state)]
    arguments = (*inputs, None, options["scale"], options["eps"], list(REBASED), 16, True)

    checks = torch.library.opcheck(interpreted._forward, arguments)

    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph_forward_and_backward(interpreted, backend):
    inputs, options = make_inputs(seq_len=3, feature_dim=4, head_dim=4, with_state=True, with_mask=True)
    dtypes = [torch.float32] * 4
    torch.compiler.reset()
    compiled = torch.compile(interpreted.rebased_attention_triton, backend=backend, fullgraph=True)

    for x, y in zip(
        run(compiled, inputs, options, dtypes), run(interpreted.rebased_attention_triton, inputs, options, dtypes)
    ):
        assert torch.equal(x, y)


def test_a_gradient_of_a_state_that_was_not_wanted_is_none(interpreted):
    (q, k, v), options = make_inputs(seq_len=3, feature_dim=4, head_dim=4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, _, state = interpreted._forward(
        *inputs, None, None, options["scale"], options["eps"], list(REBASED), None, False
    )

    with_empty = torch.autograd.grad((out, state), inputs, (torch.ones_like(out), state), retain_graph=True)

    assert all(map(torch.equal, with_empty, torch.autograd.grad(out.sum(), inputs)))


def test_two_copies_of_the_module_live_side_by_side(interpreted):
    """As the package and a checkpoint's remote code do; and one copy may be loaded again."""
    copies = [load_module(name, interpreted=True) for name in ("a-copy_of_it", "another_copy", "another_copy")]
    inputs, options = make_inputs(seq_len=2)
    expected = interpreted.rebased_attention_triton(*inputs, **options)

    for copy in copies[::2]:
        assert torch.equal(copy.rebased_attention_triton(*inputs, **options), expected)


PUBLIC_FORM = """
import torch
from hf_based_kernel import rebased_attention, taylor_attention

torch.manual_seed(0)
mask = torch.tensor([[False] + [True] * 6])
for attention in (rebased_attention, taylor_attention):
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 7, 2, 4, requires_grad=True) for _ in range(3))
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(q, k, v, attention_mask=mask, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_public_function_runs_it_under_the_interpreter_and_under_autocast(monkeypatch, run_isolated):
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    assert run_isolated(PUBLIC_FORM, visible=["hf_based_kernel"]).strip() == "equal"


# Compiling for a GPU without one. The launcher runs on fake tensors, so what is compiled is what it would launch.

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    int: "i32",
    float: "fp32",
}
OPTIONS = ("num_warps", "num_stages")


class Recorder:
    """Stands for a kernel and notes how it is launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((self.kernel, args, constants))

        return launch


def record_launches(monkeypatch, *, hip, spans, dtype, with_segments=True):
    """The launches of a forward and a backward pass, with an initial and a final state, on a GPU that is not there."""
    module, launches = load_module("rebased_attention_to_compile", interpreted=False), []
    for name, member in list(vars(module).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Recorder(member, launches))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.version, "hip", "7.0" if hip else None)
    with torch._subclasses.FakeTensorMode():
        (q, k, v, state), options = make_inputs(
            batch_size=2, seq_len=4096, num_heads=12, head_dim=64, with_state=True, dtype=dtype, device="cuda"
        )
        segments = torch.zeros(2, 4096, dtype=torch.int32, device="cuda") if with_segments else None
        kernel = list(options["coefficients"])
        span_tokens = 4096 // spans
        # The functions beneath the operators: called as an operator, a fake tensor stops at the fake implementation.
        forward, backward = module._forward._init_fn, module._backward._init_fn
        results = forward(q, k, v, state, segments, options["scale"], options["eps"], kernel, span_tokens, True)
        out, denominators, final_state = results
        saved = (q, k, v, state, segments, out, denominators)
        backward(out, final_state, *saved, options["scale"], kernel, span_tokens)
    return launches


def compile_launch(kernel, args, constants, target):
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    positional = dict(zip(kernel.arg_names, args))
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = positional.get(name)
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = TYPE_NAMES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def stack_bytes(compiled):
    """Bytes of a thread's registers that were spilled to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits_the_shared_memory(monkeypatch, target, dtype):
    gpu, shared_memory = TARGETS[target]
    launches = record_launches(monkeypatch, hip=gpu.backend == "hip", spans=4, dtype=dtype)
    compiled = {
        (kernel.fn.__name__, constants.get("OF_QUERIES")): compile_launch(kernel, args, constants, gpu)
        for kernel, args, constants in launches
    }

    assert {name for name, _ in compiled} == {
        name for name in vars(load_module("names", interpreted=False)) if name.endswith("_kernel")
    }
    assert {
        name: kernel.metadata.shared for name, kernel in compiled.items() if kernel.metadata.shared > shared_memory
    } == {}


@pytest.mark.slow
def test_registers_of_an_h100_hold_what_the_kernels_work_on(monkeypatch):
    gpu, _ = TARGETS["sm_90"]
    launches = record_launches(monkeypatch, hip=False, spans=16, dtype=torch.bfloat16, with_segments=False)

    # Sums, scan and forward; then deltas, sums and scan both ways, and the two kernels of gradients.
    assert len(launches) == 10
    assert [kernel.fn.__name__ for kernel, *rest in launches if stack_bytes(compile_launch(kernel, *rest, gpu))] == []


# On a GPU, at the sizes of the paper's models.

REAL_SIZES = {
    "many_heads": {"batch_size": 2, "seq_len": 4099, "num_heads": 12},
    "one_long_head": {"batch_size": 1, "seq_len": 16384, "num_heads": 1},
    "mask_and_segments": {"batch_size": 2, "seq_len": 2048, "num_heads": 4, "with_mask": True, "with_segments": True},
    "wide": {"batch_size": 2, "seq_len": 1025, "num_heads": 4, "feature_dim": 24, "head_dim": 128},
}
# TF32x3 keeps about 22 bits; sums have up to 16384 terms. Half precision: as on the CPU, and TF32 rounds to 11 bits.
REAL_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-7}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REAL_TOLERANCES, ids=str)
@pytest.mark.parametrize("attention", [rebased_attention, taylor_attention])
@pytest.mark.parametrize("sizes", REAL_SIZES.values(), ids=REAL_SIZES.keys())
def test_on_a_gpu_value_and_every_gradient_match_float64(sizes, attention, dtype):
    coefficients = REBASED if attention is rebased_attention else TAYLOR
    sizes = {"feature_dim": 16, "head_dim": 64} | sizes
    inputs, options = make_inputs(**sizes, with_state=True, dtype=dtype, device="cuda", coefficients=coefficients)
    # The state of another sequence like this one: of numbers that are no state, denominators come out near zero.
    earlier, _ = make_inputs(**sizes, dtype=torch.float64, device="cuda")
    inputs[3] = attention(*earlier, return_state=True, backend="torch")[1].float()
    # Denominators away from zero: else what is measured is how far a quotient by almost nothing magnifies rounding.
    options["eps"] = 0.1
    del options["coefficients"]

    def form(backend):
        return lambda q, k, v, **others: attention(q, k, v, backend=backend, **others)

    expected = run(form("torch"), inputs, options, [torch.float64] * 4)
    results = run(form("triton"), inputs, options, [x.dtype for x in inputs])
    for x, y in zip(results, expected):
        assert ((x - y).abs().max() / y.abs().max()).item() < REAL_TOLERANCES[dtype]


@pytest.mark.gpu
def test_on_a_gpu_a_compiled_call_equals_an_eager_one():
    (q, k, v), _ = make_inputs(
        batch_size=2, seq_len=1000, num_heads=4, head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    results = []
    for attention in (rebased_attention, torch.compile(rebased_attention, fullgraph=True)):
        out = attention(q, k, v, backend="triton")
        results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])

    for x, y in zip(*results):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
def test_on_a_gpu_memory_grows_linearly_with_length():
    peaks = []
    for seq_len in (8192, 16384):
        (q, k, v), _ = make_inputs(seq_len=seq_len, num_heads=4, head_dim=64, dtype=torch.bfloat16, device="cuda")
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rebased_attention(q, k, v).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)

    assert peaks[1] < 2.5 * peaks[0]
