"""The torch side: gradients, operators, compile, reports, errors."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shoestring.core.errors import UsageError
from shoestring.kernels import loader, ops, reference


@pytest.fixture
def layer():
    packed, scales = ops.quantize(torch.randn(12, 100), 4, 32)
    return packed, scales, 4, 32, 100


def test_gradient_is_that_of_the_unpacked_weight(level, layer, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 500)
    x = torch.randn(2, 3, 100, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    grad = torch.randn(2, 3, 12)
    ops.quantized_linear(x, *layer, bias).backward(grad)
    twin, twin_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    torch.nn.functional.linear(twin, ops.dequantize(*layer), twin_bias).backward(grad)
    assert torch.allclose(x.grad, twin.grad, atol=1e-5)
    assert torch.allclose(bias.grad, twin_bias.grad, atol=1e-5)


def test_gradients_of_one_vector_and_without_bias(layer):
    x = torch.randn(100, requires_grad=True)
    ops.quantized_linear(x, *layer).sum().backward()
    assert torch.allclose(x.grad, ops.dequantize(*layer).sum(0), atol=1e-5)


def test_recorded_and_direct_calls_agree(level, layer):
    x = torch.randn(5, 100)
    direct = ops.quantized_linear(x, *layer)
    assert not direct.requires_grad
    assert torch.equal(direct, ops.quantized_linear(x.requires_grad_(), *layer).detach())
    with torch.no_grad():
        assert not ops.quantized_linear(x, *layer).requires_grad


@pytest.mark.parametrize("with_bias", (False, True))
def test_opcheck(layer, with_bias):
    bias = torch.randn(12) if with_bias else None
    for x in (torch.randn(3, 100), torch.randn(2, 3, 100, requires_grad=True)):
        torch.library.opcheck(torch.ops.shoestring.quantized_linear, (x, *layer, bias))
    torch.library.opcheck(torch.ops.shoestring.input_grad, (torch.randn(3, 12), *layer))


def test_compiled_equals_eager(level, layer):
    ids = torch.tensor([1, 5, 2])

    def step(x):
        return torch.relu(ops.quantized_linear(x, *layer)) + ops.embedding(ids, *layer)[:, :12].sum()

    x = torch.randn(3, 100)
    assert torch.allclose(torch.compile(step, backend="aot_eager", fullgraph=True)(x), step(x), atol=1e-5)
    torch.compiler.reset()


def test_flops_are_counted(layer):
    with FlopCounterMode(display=False) as counter:
        ops.quantized_linear(torch.randn(2, 5, 100), *layer)
    assert counter.get_total_flops() == 2 * 10 * 12 * 100


def test_backend_names_what_computes():
    report = ops.backend()
    assert report["isa"] == report["levels"][0]
    assert report["native"] == (report["isa"] != "reference")
    assert ops.set_isa("reference") == "reference"
    report = ops.backend()
    assert report["native"] is False and report["isa"] == "reference" and report["reason"]


def test_level_that_the_cpu_lacks_falls_to_one_below():
    if not ops.backend()["native"]:
        pytest.skip("no native library in this installation")
    levels = ops.backend()["levels"]
    for name in ("avx512vnni", "avx2", "neondot"):
        if name not in levels:
            assert ops.set_isa(name) in levels


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_environment_caps_the_level():
    name = ops.backend()["levels"][-2] if ops.backend()["native"] else "reference"
    shown = run_python("from shoestring.kernels import ops; print(ops.backend()['isa'])", SHOESTRING_ISA=name)
    assert shown.stdout.strip() == name, shown.stderr


def test_environment_with_an_unknown_level():
    shown = run_python("from shoestring.kernels import ops", SHOESTRING_ISA="avx512vni")
    assert shown.returncode != 0
    assert "SHOESTRING_ISA=avx512vni names no instruction set. Did you mean avx512vnni" in shown.stderr


def test_works_after_a_fork():
    code = """
import os, torch
from shoestring.kernels import ops
torch.set_num_threads(1)  # the thread pool of torch does not survive a fork
ops.set_threads(3)
packed, scales = ops.quantize(torch.randn(4000, 1024), 8, 64)
x = torch.randn(4, 1024)
before = ops.quantized_linear(x, packed, scales, 8, 64, 1024)
child = os.fork()
same = all(torch.equal(before, ops.quantized_linear(x, packed, scales, 8, 64, 1024)) for _ in range(20))
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
print("fine")
"""
    shown = run_python(code)
    assert shown.stdout.strip() == "fine", shown.stderr


def test_idle_threads_use_no_processor():
    code = """
import time, torch
from shoestring.kernels import ops
torch.set_num_threads(1)
ops.set_threads(2)
packed, scales = ops.quantize(torch.randn(4000, 1024), 8, 64)
ops.quantized_linear(torch.randn(1, 1024), packed, scales, 8, 64, 1024)
time.sleep(0.1)
start = time.process_time()
time.sleep(0.5)
print(time.process_time() - start)
"""
    shown = run_python(code)
    assert float(shown.stdout) < 0.05, shown.stderr


def test_callers_on_several_threads():
    ops.set_threads(2)
    packed, scales = ops.quantize(torch.randn(2000, 512), 4, 64)
    inputs = [torch.randn(3, 512) for _ in range(4)]
    expected = [ops.quantized_linear(x, packed, scales, 4, 64, 512) for x in inputs]
    wrong = []

    def call(x, y):
        wrong.extend(1 for _ in range(30) if not torch.equal(y, ops.quantized_linear(x, packed, scales, 4, 64, 512)))

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_shapes_that_do_not_belong_together(layer):
    packed, scales, *rest = layer
    codes48, scales48 = torch.zeros(3, 96, dtype=torch.int8), torch.ones(3, 2, dtype=torch.bfloat16)
    for bad, what in (
        (lambda: ops.quantized_linear(torch.randn(2, 99), *layer), "does not end in the layer's 100 features"),
        (lambda: ops.quantized_linear(torch.randn(2, 100), packed[:, :-1], scales, *rest), "is not a 4-bit weight"),
        (lambda: ops.quantized_linear(torch.randn(2, 100), packed, scales.float(), *rest), "is not a 4-bit weight"),
        (lambda: ops.quantized_linear(torch.randn(2, 100), *layer, torch.randn(13)), "bias"),
        (lambda: ops.quantized_linear(torch.ones(2, 100, dtype=torch.int64), *layer), "not floating point"),
        (lambda: ops.quantized_linear(torch.randn(2, 100), packed, scales, 5, 32, 100), "5-bit"),
        (lambda: ops.quantized_linear(torch.randn(2, 96), codes48, scales48, 8, 48, 96), "48"),
        (lambda: ops.set_isa("sse9"), "names no instruction set"),
        (lambda: ops.set_threads(0), "0 threads"),
    ):
        with pytest.raises(UsageError, match=what):
            bad()


def test_ids_outside_the_table(level, layer):
    for ids in (torch.tensor([0, 12]), torch.tensor([-1])):
        with pytest.raises(UsageError, match="do not fit a table of 12 rows"):
            ops.embedding(ids, *layer)


def test_packed_weights_that_are_not_contiguous(level, layer):
    packed, scales, *rest = layer
    spread = torch.stack((packed, packed), -1)[..., 0]
    x = torch.randn(2, 100)
    assert torch.equal(ops.quantized_linear(x, spread, scales, *rest), ops.quantized_linear(x, *layer))
    assert torch.equal(ops.dequantize(spread, scales, *rest), ops.dequantize(*layer))


@pytest.mark.parametrize("with_bias", (False, True))
def test_remembered_layer_follows_its_tensors(level, layer, with_bias):
    packed, scales, *rest = layer
    bias = torch.randn(12) if with_bias else None
    product = ops.Product(*rest)
    x = torch.randn(2, 100)
    first = ops.quantized_linear(x, *layer, bias)
    for _ in range(3):
        assert torch.equal(product(x, packed, scales, bias), first)
    assert torch.equal(product(x.bfloat16(), packed, scales, bias), ops.quantized_linear(x.bfloat16(), *layer, bias))
    assert torch.equal(product(x.t().contiguous().t(), packed, scales, bias), first)
    scales.mul_(2)  # in place, as loading a state does
    assert torch.equal(product(x, packed, scales, bias), ops.quantized_linear(x, *layer, bias))
    packed.data, scales.data = packed.data.flip(0), scales.data.flip(0)
    moved = ops.quantized_linear(x, packed, scales, *rest, bias)
    assert not torch.equal(moved, first) and torch.equal(product(x, packed, scales, bias), moved)
    twin = pickle.loads(pickle.dumps(product))
    assert torch.equal(twin(x, packed.clone(), scales.clone(), bias), moved)


def test_remembered_layer_still_refuses_what_does_not_fit(layer):
    packed, scales, *rest = layer
    product = ops.Product(*rest)
    product(torch.randn(2, 100), packed, scales, None)
    for x in (torch.randn(2, 99), torch.ones(2, 100, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(UsageError):
            product(x, packed, scales, None)
    with pytest.raises(UsageError, match="bias"):
        product(torch.randn(2, 100), packed, scales, torch.randn(13))


def test_missing_or_old_library_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_folders", lambda: [tmp_path])
    assert str(tmp_path) in loader.load().reason
    (tmp_path / loader.HEADER).write_text("")
    (tmp_path / loader.LIBRARY).write_text("not a library")
    assert "does not load" in loader.load().reason
    if ops.backend()["native"]:
        monkeypatch.undo()
        monkeypatch.setattr(loader, "VERSION", loader.VERSION + 1)
        assert "another version" in loader.load().reason
