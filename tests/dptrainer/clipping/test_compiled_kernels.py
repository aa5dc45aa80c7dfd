"""Every compiled function against its definition in float64, on odd shapes, extreme values and several threads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from clipping_oracle import assert_equal_to_the_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dptrainer.clipping import BookKeeping, native
from dptrainer.clipping.native import Kernels, Plane
from dptrainer.clipping.per_example import Dense, Outer, TableRows, over_positions
from dptrainer.native import Native

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(scope="module", params=[1, 2, 3])
def kernels(request):
    """The library, with so many threads however little there is to do."""
    made = native.LIBRARY.get()
    if made is None:
        pytest.skip(native.LIBRARY.status)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads", lambda work, each: request.param)
        yield made


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 1000])
class TestRows:
    def test_squares_are_those_of_float64(self, kernels, count, width):
        rows = torch.randn(count, width)
        torch.testing.assert_close(kernels.row_squares(rows), rows.double().square().sum(1), rtol=1e-14, atol=0)

    def test_sums_are_those_of_float64_rounded_once(self, kernels, count, width):
        rows = torch.randn(count, width)
        torch.testing.assert_close(kernels.row_sums(rows), rows.double().sum(1).float(), rtol=2e-7, atol=1e-12)

    def test_weighted_sums_in_place_of_what_was_there_or_added_to_it(self, kernels, count, width):
        rows, weights, total = torch.randn(count, width), torch.rand(count), torch.full((width,), float("nan"))
        expected = weights.double() @ rows.double()
        kernels.weighted_sum(rows, weights, total, add=False)
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
        kernels.weighted_sum(rows, weights, total, add=True)
        torch.testing.assert_close(total.double(), 2 * expected, rtol=1e-5, atol=1e-5)

    def test_scaled_rows(self, kernels, count, width):
        rows, weights = torch.randn(count, width), torch.rand(count)
        assert torch.equal(kernels.scaled(rows, weights), rows * weights.unsqueeze(1))
        assert torch.equal(kernels.scaled(rows, None), rows)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 15, 40, 128, 130])
def test_what_is_not_finite_shows_in_the_norm_and_nowhere_else(kernels, bad, place):
    rows, weights, total = torch.randn(4, 131), torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.zeros(131)
    clean = rows.clone()
    clean[1] = 0.0
    rows[1, place] = bad
    squares = kernels.row_squares(rows)
    assert not squares[1].isfinite()
    assert squares[[0, 2, 3]].isfinite().all()
    kernels.weighted_sum(rows, weights, total, add=True)
    torch.testing.assert_close(total, weights @ clean)
    scaled = kernels.scaled(rows, None)
    assert scaled.isfinite().all()
    assert scaled[1, place] == 0.0
    assert torch.equal(scaled[0], rows[0])


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e38])
def test_squares_of_extreme_numbers_neither_vanish_nor_overflow(kernels, size):
    rows = torch.full((2, 40), size)
    torch.testing.assert_close(kernels.row_squares(rows), rows.double().square().sum(1), rtol=1e-14, atol=0)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=60),
    st.sampled_from([1, 3, 16, 33]),
    st.integers(0, 2**63 - 1),
)
@settings(deadline=None)
def test_equal_lookups_are_added_once_each(pairs, width, base):
    made = native.LIBRARY.get()
    if made is None:
        pytest.skip(native.LIBRARY.status)
    offset = base % (1 << 40)  # indices far beyond a table's, to move places in the hash
    example = torch.tensor([e for e, _ in pairs], dtype=torch.int64)
    index = torch.tensor([i + offset for _, i in pairs], dtype=torch.int64)
    rows = torch.randn(len(pairs), width)
    examples, indices, values = made.add_equal(example, index, rows)
    found = {(int(e), int(i)): v for e, i, v in zip(examples, indices, values, strict=True)}
    assert list(found) == list(dict.fromkeys((e, i + offset) for e, i in pairs))
    for (e, i), value in found.items():
        mine = (example == e) & (index == i)
        torch.testing.assert_close(value.double(), rows[mine].double().sum(0), rtol=1e-5, atol=1e-5)


def test_thousands_of_lookups_find_their_place(kernels):
    example, index = torch.arange(5000) % 7, torch.arange(5000) % 613
    rows = torch.ones(5000, 2)
    examples, indices, values = kernels.add_equal(example, index, rows)
    assert len(examples) == 7 * 613
    assert values.sum() == 10_000
    assert len(set(zip(examples.tolist(), indices.tolist(), strict=True))) == len(examples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_of_lookups_is_the_dense_gradient(kernels, dtype):
    example, index = torch.randint(0, 5, (90,)), torch.randint(0, 11, (90,))
    rows = torch.randn(90, 6, dtype=dtype)
    dense = torch.zeros(5, 11, 6, dtype=torch.float64).index_put_((example, index), rows.double(), accumulate=True)
    form = TableRows.accumulate(5, torch.Size((11, 6)), (example, index), rows)
    weights = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(form.squared_norms(), dense.square().flatten(1).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(form.dense(slice(1, 4)).double(), dense[1:4], rtol=1e-5, atol=1e-5)
    total = form.weighted_sum(weights)
    assert total.dtype == dtype
    torch.testing.assert_close(total.double(), torch.tensordot(weights, dense, 1), rtol=1e-5, atol=1e-5)


PLANES = {
    "plain": (Plane(1, (3, 3), (1, 1), (0, 0), (1, 1)), 4, 5, (9, 8)),
    "strided, padded": (Plane(1, (3, 3), (2, 2), (1, 1), (1, 1)), 3, 8, (9, 8)),
    "one output": (Plane(1, (5, 5), (1, 1), (2, 2), (1, 1)), 2, 1, (7, 6)),
    "many outputs": (Plane(1, (3, 3), (1, 1), (1, 1), (1, 1)), 16, 37, (6, 5)),
    "pointwise": (Plane(1, (1, 1), (2, 2), (0, 0), (1, 1)), 33, 9, (6, 5)),
    "uneven": (Plane(1, (2, 3), (2, 1), (0, 2), (1, 2)), 2, 3, (9, 8)),
    "dilated": (Plane(1, (4, 4), (1, 1), (3, 3), (2, 2)), 2, 6, (9, 8)),
    "groups": (Plane(3, (3, 3), (1, 1), (1, 1), (1, 1)), 6, 12, (6, 5)),
    "depthwise": (Plane(4, (3, 3), (1, 2), (1, 0), (1, 1)), 4, 4, (7, 8)),
    "one dimension": (Plane(1, (1, 7), (1, 2), (0, 3), (1, 1)), 3, 10, (1, 40)),
    "large kernel": (Plane(1, (8, 8), (2, 2), (3, 3), (1, 1)), 1, 16, (28, 28)),
    "several blocks": (Plane(1, (8, 8), (1, 1), (3, 3), (1, 1)), 30, 3, (13, 12)),
}


def single_gradients(plane, a, g):
    """[B, *weight] in float64 by autograd, one example at a time."""
    rows = []
    for i in range(len(a)):
        weight = torch.zeros(
            g.shape[1], a.shape[1] // plane.groups, *plane.kernel, dtype=torch.float64, requires_grad=True
        )
        out = F.conv2d(a[i : i + 1].double(), weight, None, plane.stride, plane.padding, plane.dilation, plane.groups)
        rows.append(torch.autograd.grad(out, weight, g[i : i + 1].double())[0])
    return torch.stack(rows)


@pytest.fixture(params=PLANES)
def convolution(request):
    plane, inputs, outputs, size = PLANES[request.param]
    a = torch.randn(5, inputs, *size)
    weight = torch.zeros(outputs, inputs // plane.groups, *plane.kernel)
    out = F.conv2d(a, weight, None, plane.stride, plane.padding, plane.dilation, plane.groups)
    return plane, a, torch.randn_like(out)


class TestConvolutions:
    def test_rows_and_norms_are_those_of_single_examples(self, kernels, convolution):
        plane, a, g = convolution
        expected = single_gradients(plane, a, g)
        rows, squares = kernels.convolution_rows(plane, a, g)
        torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(squares, rows.double().square().flatten(1).sum(1), rtol=1e-12, atol=0)

    def test_norms_alone_are_those_of_the_rows(self, kernels, convolution):
        plane, a, g = convolution
        rows, squares = kernels.convolution_rows(plane, a, g)
        norms, sizes = kernels.convolution_norms(plane, a, g)
        torch.testing.assert_close(norms, squares, rtol=1e-12, atol=0)
        patches = F.unfold(a.double(), plane.kernel, plane.dilation, plane.padding, plane.stride)
        parts = zip(patches.chunk(plane.groups, 1), g.double().flatten(2).chunk(plane.groups, 1), strict=True)
        expected = sum(p.norm(dim=1) * q.norm(dim=1) for p, q in parts)
        torch.testing.assert_close(sizes, expected, rtol=1e-10, atol=0)
        assert (norms.sqrt() <= sizes.sum(1) * (1 + 1e-6)).all()
        assert rows.isfinite().all()

    @pytest.mark.parametrize("bad", BAD)
    def test_the_weighted_sum_leaves_out_what_is_not_finite(self, kernels, convolution, bad):
        plane, a, g = convolution
        expected = torch.tensordot(torch.tensor([1.0, 0.0, 0.25, 0.0, 2.0]).double(), single_gradients(plane, a, g), 1)
        a[1, 0, 0, -1], g[3, -1, 0, 0] = bad, bad
        _, squares = kernels.convolution_rows(plane, a, g)
        assert squares[[0, 2, 4]].isfinite().all()
        assert not squares[3].isfinite()
        total = torch.ones(expected.shape)
        kernels.add_convolutions(plane, a, g, torch.tensor([1.0, 0.0, 0.25, 0.0, 2.0]), total)
        torch.testing.assert_close(total.double(), 1.0 + expected, rtol=1e-4, atol=1e-4)

    def test_the_same_bits_every_time(self, kernels, convolution):
        plane, a, g = convolution
        totals = []
        for _ in range(5):
            totals.append(torch.zeros(g.shape[1], a.shape[1] // plane.groups, *plane.kernel))
            kernels.add_convolutions(plane, a, g, torch.rand(5, generator=torch.Generator().manual_seed(0)), totals[-1])
        assert all(torch.equal(totals[0], other) for other in totals[1:])

    def test_an_empty_batch(self, kernels, convolution):
        plane, a, g = convolution
        rows, squares = kernels.convolution_rows(plane, a[:0], g[:0])
        assert (len(rows), len(squares)) == (0, 0)
        total = torch.ones(rows.shape[1:])
        kernels.add_convolutions(plane, a[:0], g[:0], torch.ones(0), total)
        assert torch.equal(total, torch.ones_like(total))


def test_only_contiguous_float32_on_the_cpu_is_given_to_compiled_code():
    assert native.kernels(torch.zeros(2, 2)) is native.LIBRARY.get()
    for other in (
        torch.zeros(2, 2, dtype=torch.float64),
        torch.zeros(2, 2, dtype=torch.bfloat16),
        torch.zeros(2, 4)[:, ::2],
        torch.zeros(2, 2, device="meta"),
    ):
        assert native.kernels(torch.zeros(2), other) is None


class OnlyOutputs(nn.Module):
    """An LSTM as a layer that gives one tensor."""

    def __init__(self, **options):
        super().__init__()
        self.lstm = nn.LSTM(5, 7, batch_first=True, **options)

    def forward(self, x):
        output, (h, c) = self.lstm(x)
        return torch.cat([output.flatten(1), h.transpose(0, 1).flatten(1), c.transpose(0, 1).flatten(1)], 1)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 0.6, 1.0, 10.0, 88.0, 1e30])
class TestLSTM:
    def test_a_step_is_that_of_float64(self, kernels, count, size):
        gates, c = torch.randn(4, 1, count) * size, torch.randn(1, count)
        found, given = [torch.full_like(c, float("nan")) for _ in range(3)], gates.double()
        kernels.lstm_forward(gates, c, *found)
        expected = torch.cat([given[:3].sigmoid(), given[3:].tanh()])
        torch.testing.assert_close(gates.double(), expected, rtol=4e-7, atol=1e-37)
        after = gates[1].double() * c.double() + gates[0].double() * gates[3].double()
        torch.testing.assert_close(found[0].double(), after, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found[1].double(), found[0].double().tanh(), rtol=4e-7, atol=1e-37)
        torch.testing.assert_close(found[2], gates[2] * found[1], rtol=1e-6, atol=1e-37)

    @pytest.mark.parametrize("bad", BAD)
    def test_what_is_not_finite_stays_with_its_element(self, kernels, count, size, bad):
        gates, c = torch.randn(4, 1, count) * size, torch.randn(1, count)
        expected, clean = [torch.empty_like(c) for _ in range(3)], gates.clone()
        kernels.lstm_forward(clean, c, *expected)
        gates[:, 0, count // 2] = bad
        found = [torch.empty_like(c) for _ in range(3)]
        kernels.lstm_forward(gates, c, *found)
        theirs = torch.cat([torch.full((3,), bad).sigmoid(), torch.full((1,), bad).tanh()])
        torch.testing.assert_close(gates[:, 0, count // 2], theirs, equal_nan=True)
        for mine, other in zip([*found, *gates], [*expected, *clean], strict=True):
            mine[0, count // 2] = other[0, count // 2]
            assert torch.equal(mine, other)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False}, {"proj_size": 3}])
def test_lstms_answer_alike_with_and_without_compiled_code(options, monkeypatch):
    model, x = OnlyOutputs(**options), torch.randn(6, 9, 5)

    def gradients():
        engine = BookKeeping(model, clip_norm=0.3)
        with engine.record(6):
            losses = model(x).square().sum(1)
        found = engine.backward(losses).grads
        engine.detach()
        return found

    expected = gradients()
    monkeypatch.setattr(native, "LIBRARY", Native("none", str, (), Kernels, lambda _: False))
    monkeypatch.setenv("DPTRAINER_NATIVE", "0")
    for name, value in gradients().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def models():
    return {
        "convolutions": (nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 2), nn.Flatten()), (4, 2, 7, 7)),
        "lookups": (nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(30, 3)), (4, 6)),
        "recurrence": (OnlyOutputs(bidirectional=True), (4, 6, 5)),
        "layers": (nn.Sequential(nn.Linear(9, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 3)), (4, 9)),
    }


@pytest.mark.parametrize("name", models())
def test_without_compiled_code_every_gradient_is_the_same(monkeypatch, name):
    monkeypatch.setattr(native, "LIBRARY", Native("none", str, (), Kernels, lambda _: False))
    monkeypatch.setenv("DPTRAINER_NATIVE", "0")
    model, shape = models()[name]
    inputs = torch.randint(0, 7, shape) if name == "lookups" else torch.randn(shape)
    assert_equal_to_the_oracle(model, [inputs], single=2e-4)
    assert native.LIBRARY.status == "not compiled (DPTRAINER_NATIVE=0)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forms_answer_alike_with_and_without_compiled_code(monkeypatch, dtype):
    rows, weights = torch.randn(6, 3, 50, dtype=dtype), torch.rand(6, dtype=torch.float64)
    a, g = torch.randn(6, 20, dtype=dtype), torch.randn(6, 30, dtype=dtype)

    def answers():
        forms = [Dense(rows.clone()), Dense([rows[:2], rows[2:]]), Outer(g, a)]
        return [over_positions(rows), *(x for f in forms for x in (f.squared_norms(), f.weighted_sum(weights)))]

    compiled = answers()
    monkeypatch.setattr(native, "LIBRARY", Native("none", str, (), Kernels, lambda _: False))
    monkeypatch.setenv("DPTRAINER_NATIVE", "0")
    for mine, other in zip(compiled, answers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


CHANGES = [
    "total += sums[0][k] -> total += sums[1][k]",
    "(v - v) == 0 -> (v - v) != 0",
    "out[i] = (float)total -> out[i] = (float)total + 1",
    "slots[place] = found -> slots[place] = 0",
    "out[example[t]] += -> out[0] +=",
    "float weight = weights[example[t]] -> float weight = weights[0]",
    "sums[r][1] += factor * right -> sums[r][1] += factor * left",
    "c->dilation_y) * columns -> c->stride_y) * columns",
    "fresh && start == 0 -> 0",
    "total[o * w.patch + k] += -> total[o * w.patch + k] =",
    "sqrt(room[t] -> (room[t]",
    "return x - x == 0 ? x : 0 -> return x",
    "i = c->batch * share / threads; -> i = c->batch * share / (threads + 1);",
    "out[i] = squares(rows -> if (i < 256) out[i] = squares(rows",
    "return (floats)((ints)v & keep) -> (void)keep; return v",
    "v[0] * v[3], squashed -> v[0] * v[2], squashed",
    "dc[j] = s * f[j] -> dc[j] = s * i[j]",
    "a < 0.625f -> a < 2.5f",
    "to[2 * width + j] = s * (i[j] -> to[2 * width + j] = s * (f[j]",
    "p = p * r + 1.0f / 6; -> p = p * r + 1.0f / 7;",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_library_with_other_results_is_not_used(change, monkeypatch, tmp_path: Path):
    if native.LIBRARY.get() is None:
        pytest.skip(native.LIBRARY.status)
    before, after = change.split(" -> ")
    text = "".join(path.read_text(encoding="utf-8") for path in native._SOURCES)
    assert before in text
    (tmp_path / "wrong.c").write_text(text.replace(before, after), encoding="utf-8")
    monkeypatch.setattr(native, "_SOURCES", (tmp_path / "wrong.c",))
    monkeypatch.setattr("dptrainer.native._TUNINGS", (["-fopenmp"],))  # once each
    made, status = native.library().build()
    assert made is None
    assert "other results" in status


@pytest.mark.parametrize("tuning", [[], ["-mavx2"]])
def test_code_for_older_processors_gives_the_same_results(tuning):
    if native.LIBRARY.get() is None:
        pytest.skip(native.LIBRARY.status)
    if tuning and not (Path("/proc/cpuinfo").exists() and "avx2" in Path("/proc/cpuinfo").read_text()):
        pytest.skip("this processor has no AVX2")
    assert native._agrees(native.LIBRARY.compiled(["cc", *tuning]))


def test_one_share_without_memory_is_an_error_however_many_follow():
    made = native.LIBRARY.get()
    if made is None:
        pytest.skip(native.LIBRARY.status)
    before, after = "*clean = malloc((size_t)elements * sizeof(float))", "*clean = share ? malloc(99) : NULL"
    assert before in native._text()
    short = Native("short", lambda: native._text().replace(before, after), native._FLAGS, Kernels, lambda _: True)
    kernels = short.compiled(["cc"])  # without threads: one takes all shares
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads", lambda work, each: 3)
        plane, a, g = Plane(1, (1, 1), (1, 1), (0, 0), (1, 1)), torch.zeros(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
        with pytest.raises(MemoryError, match="convolution"):
            kernels.add_convolutions(plane, a, g, torch.ones(3), torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(("example", "index"), [(0, 3), (0, -1), (2, 0), (-1, 0)])
def test_a_lookup_that_is_none_is_an_error_and_writes_nothing(kernels, example, index):
    rows, table, total = torch.ones(1, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.float64)
    entries = (torch.tensor([example]), torch.tensor([index]), rows)
    with pytest.raises(IndexError):
        kernels.add_rows(entries, torch.ones(2), table)
    assert not table.any()
    if not 0 <= example < 2:
        with pytest.raises(IndexError):
            kernels.add_squares(entries[0], rows, total)
        assert not total.any()


@pytest.mark.parametrize("asked", ["-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only"])
def test_a_compiler_that_is_told_to_be_careless_is_careful_and_changes_no_arithmetic_of_the_process(monkeypatch, asked):
    if native.LIBRARY.get() is None:
        pytest.skip(native.LIBRARY.status)
    monkeypatch.setenv("CC", f"cc {asked}")
    try:
        made, status = native.library().build()
        assert made is not None, status
        assert native._leaves_out(made)
        assert float(torch.tensor([1e-40]) * 0.5) > 0.0  # with fast-math the linker adds code that turns denormals off
    finally:
        torch.set_flush_denormal(False)


def test_a_compiler_that_hangs_is_waited_for_once(monkeypatch):
    calls = []

    def hang(command, timeout, **_):
        calls.append(command)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("dptrainer.native.subprocess.run", hang)
    made, status = native.library().build()
    assert made is None
    assert "TimeoutExpired" in status
    assert len(calls) == 1


def test_a_tensor_whose_memory_holds_the_opposite_is_not_given_to_compiled_code():
    assert native.kernels(torch._neg_view(torch.ones(3))) is None


def test_memory_that_cannot_be_had_is_an_error(monkeypatch):
    made = native.LIBRARY.get()
    if made is None:
        pytest.skip(native.LIBRARY.status)
    plane, a, g = Plane(1, (1, 1), (1, 1), (0, 0), (1, 1)), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)

    class Short:
        def __getattr__(self, name):
            return lambda *_: 0

    monkeypatch.setattr(made, "_library", Short())
    for action in (
        lambda: made.convolution_rows(plane, a, g),
        lambda: made.convolution_norms(plane, a, g),
        lambda: made.add_convolutions(plane, a, g, torch.ones(1), torch.zeros(1, 1, 1, 1)),
    ):
        with pytest.raises(MemoryError, match="convolution"):
            action()


def test_defaults_of_the_program_do_not_reach_compiled_code(monkeypatch):
    """Memory of another type or device than the code writes to would be overrun."""
    plane, a, g = Plane(1, (2, 2), (1, 1), (0, 0), (1, 1)), torch.randn(3, 2, 4, 4), torch.randn(3, 5, 3, 3)
    example, index, rows = torch.tensor([0, 0, 1]), torch.tensor([2, 2, 1]), torch.randn(3, 9)
    made = native.LIBRARY.get()
    if made is None:
        pytest.skip(native.LIBRARY.status)

    def answers(kernels):
        return [
            kernels.row_squares(rows), kernels.row_sums(rows), kernels.scaled(rows, None),
            *kernels.add_equal(example, index, rows), *kernels.convolution_rows(plane, a, g),
            *kernels.convolution_norms(plane, a, g),
        ]  # fmt: skip

    expected = answers(made)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again, status = native.library().build()
            assert again is not None, status
            found = answers(again)
    finally:
        torch.set_default_dtype(before)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
        assert mine.dtype == other.dtype
