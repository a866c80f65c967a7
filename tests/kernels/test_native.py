"""The native CPU kernel against the loop over time in float64: every instruction set of this processor, outputs, final
state and all seven gradients."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkvinside import kernels
from rwkvinside.kernels.native import build, cache, load, op
from rwkvinside.modeling import wkv7 as door
from rwkvinside.modeling.wkv7 import wkv7

pytestmark = pytest.mark.skipif(
    kernels.why_unavailable("native") is not None, reason=f"no native kernel: {kernels.why_unavailable('native')}"
)


def instruction_sets() -> list[str]:
    """What this processor can run, the best first. The kernel is left with the best, as every other test finds it."""
    if kernels.why_unavailable("native") is not None:
        return ["none"]
    names = [name for name in ("avx512", "avx2", "portable") if load().wkv7_choose(name.encode())]
    load().wkv7_choose(names[0].encode())
    return names


INSTRUCTIONS = instruction_sets()
LIMIT = 5e-7  # relative L2 error against float64, of everything
MIN_DECAY = -0.6065


@pytest.fixture(autouse=True)
def best_instructions():
    yield
    load().wkv7_choose(INSTRUCTIONS[0].encode())


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    assert load().wkv7_choose(request.param.encode())
    return request.param


def inputs(B, T, H, N, G=None, sequences=None, seed=0):
    """r, log_decay, k, v, a, b, state as the mixer makes them, different decays for every head."""
    g = torch.Generator().manual_seed(seed)
    G = G or H

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    log_decay = MIN_DECAY * torch.sigmoid(2 * normal(B, T, H, N) - 3 * torch.arange(H)[:, None])
    kk = torch.nn.functional.normalize(normal(B, T, G, N), dim=-1)
    rate = torch.sigmoid(normal(B, T, G, N))
    state = normal(sequences or B, H, N, N)
    return [normal(B, T, H, N), log_decay, normal(B, T, G, N), normal(B, T, G, N), -kk, kk * rate, state]


def run(x, backend="native", **kwargs):
    """Outputs, final state and the gradients of a random function of both, with respect to all inputs."""
    x = [t.detach().clone().requires_grad_() for t in x]
    y, final = wkv7(*x, backend=backend, **kwargs)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return [y.detach(), final.detach(), *(t.grad for t in x)]


def exact(x, **kwargs):
    return run([t.double() for t in x], "reference", **kwargs)


def errors(got, expected):
    return [((p.double() - q).norm() / q.norm().clamp_min(1e-30)).item() for p, q in zip(got, expected, strict=True)]


@pytest.mark.parametrize("N", [8, 16, 40, 64, 128])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 100])
def test_equals_the_loop_in_float64(instructions, N, T):
    x = inputs(2, T, 3, N)
    assert max(errors(run(x), exact(x))) < LIMIT


def test_the_largest_head(instructions):
    x = inputs(1, 40, 1, 256)
    assert max(errors(run(x), exact(x))) < LIMIT


@pytest.mark.parametrize("value", [0.0, -1e-6, MIN_DECAY, -2.0, -5.0, -20.0, -200.0])
def test_extreme_decays(instructions, value):
    x = inputs(1, 70, 2, 32)
    x[1] = torch.full_like(x[1], value)
    x[1][..., ::3] = -0.01
    assert max(errors(run(x), exact(x))) < LIMIT


@pytest.mark.parametrize("alternate", [False, True], ids=["one key", "two keys"])
@pytest.mark.parametrize("rate", [0.5, 0.99, 1.0])
@pytest.mark.parametrize("decay", [0.0, -1e-3, MIN_DECAY])
def test_repeated_keys(decay, rate, alternate):
    T, N = 64, 64  # four segments
    x = inputs(1, T, 2, N)
    keys = torch.nn.functional.normalize(torch.randn(1, 2, 2, N, generator=torch.Generator().manual_seed(3)), dim=-1)
    kk = keys[:, torch.arange(T) % 2 if alternate else torch.zeros(T, dtype=torch.long)]
    x[1], x[4], x[5] = torch.full_like(x[1], decay), -kk, rate * kk
    y, final, r, w, k, v, a, b, state = errors(run(x), exact(x))
    assert max(y, final, r, w, k, v, state) < LIMIT
    # What a repeated key overwrites is small compared with the state that it is read from, so these two are differences
    # of larger numbers: fp32 states of any algorithm leave more.
    assert max(a, b) < 1e-6


def test_a_long_slow_memory_keeps_its_digits():
    x = inputs(1, 4096, 1, 16)
    x[1] = -1e-4 * torch.rand_like(x[1])
    x[5] = 0.01 * x[5]
    assert max(errors(run(x), exact(x))) < LIMIT


def test_threads_and_batches_change_no_bit():
    x = inputs(3, 50, 4, 64)
    one = run(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(p, q) for p, q in zip(one, run(x), strict=True))
    finally:
        torch.set_num_threads(threads)
    order = torch.tensor([2, 0, 1])
    y, final = wkv7(*(t[order] for t in x), backend="native")
    assert torch.equal(y, one[0][order]) and torch.equal(final, one[1][order])


@pytest.mark.parametrize("cut", [1, 15, 16, 32, 77])
def test_a_split_with_carried_state(cut):
    x = inputs(2, 90, 2, 32)
    parts = [t.clone().requires_grad_() for t in x]
    y1, middle = wkv7(*(t[:, :cut] for t in parts[:6]), parts[6], backend="native")
    y2, final = wkv7(*(t[:, cut:] for t in parts[:6]), middle, backend="native")
    y = torch.cat([y1, y2], 1)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).float() for t in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    assert max(errors([y.detach(), final.detach(), *(t.grad for t in parts)], exact(x))) < LIMIT


def test_token_by_token_and_in_place():
    x = inputs(2, 20, 4, 64, G=2)
    y, final = wkv7(*x, backend="native")
    state, steps = x[6].clone(), []
    for t in range(20):
        out, after = wkv7(*(i[:, t : t + 1] for i in x[:6]), state, backend="native", inplace=True)
        assert after.data_ptr() == state.data_ptr()
        steps.append(out)
    assert max(errors([torch.cat(steps, 1), state], [y.double(), final.double()])) < LIMIT
    before = x[6].clone()
    wkv7(*(i[:, :1] for i in x[:6]), x[6], backend="native")
    assert torch.equal(x[6], before), "without inplace the state is left alone"
    _, started = wkv7(*(i[:, :1] for i in x[:6]), None, backend="native", inplace=True)
    assert started.shape == final.shape


def test_masked_tokens_are_skipped():
    B, T, H, N = 2, 60, 2, 16
    x = inputs(B, T, H, N)
    where = torch.tensor([i for i in range(100) if i % 5 not in (0, 3)])
    mask = torch.zeros(B, 100, dtype=torch.bool)
    mask[:, where] = True
    garbage = [t * torch.nan for t in inputs(B, 100, H, N, seed=5)]
    padded = [p.index_copy(1, where, t) for p, t in zip(garbage[:6], x[:6], strict=True)] + [x[6]]
    got, alone = run(padded, mask=mask), run(x)
    assert all(t[:, ~mask[0]].abs().max() == 0 for t in (got[0], *got[2:8]))
    y, final = wkv7(*padded, mask=mask, backend="native")
    expected = wkv7(*x, backend="native")
    assert torch.equal(y[:, where], expected[0]) and torch.equal(final, expected[1]) and torch.equal(final, alone[1])


@pytest.mark.parametrize("masked", [False, True])
def test_packed_documents_equal_the_documents_alone(masked):
    lengths = [1, 2, 31, 0, 16, 33, 5, 70]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x = inputs(1, sum(lengths), 2, 32, sequences=len(lengths))
    mask = torch.rand(1, sum(lengths), generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    got = run(x, cu_seqlens=bounds, mask=mask)
    assert max(errors(got, exact(x, cu_seqlens=bounds, mask=mask))) < LIMIT


@pytest.mark.parametrize("G", [1, 2])
def test_shared_heads_equal_expanded_ones(G):
    x = inputs(2, 40, 4, 32, G=G)
    got, expected = run(x), exact(x)
    assert [g.shape for g in got[2:]] == [t.shape for t in x]
    assert max(errors(got, expected)) < LIMIT


def test_strided_inputs_are_read_where_they_are():
    x = inputs(2, 40, 4, 64)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[:6]] + [x[6].mT.contiguous().mT]
    assert all(torch.equal(p, q) for p, q in zip(run(strided), run(x), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    x = inputs(2, 40, 4, 64, G=2)
    low = [t if i in (1, 6) else t.to(dtype) for i, t in enumerate(x)]
    got, expected = run(low), exact(low)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32 and got[3].dtype == torch.float32
    rounding = torch.finfo(dtype).eps
    # what is stored in half precision is rounded once, or twice where fp16 is widened first; the rest is exact
    assert max(errors(got, expected)) < rounding and max(errors([got[1]], [expected[1]])) < LIMIT


def test_gradients_of_some_inputs_and_outputs():
    x = inputs(2, 40, 2, 16)
    everything = run(x)
    some = [t.clone().requires_grad_(i in (1, 6)) for i, t in enumerate(x)]
    y, final = wkv7(*some, backend="native")
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).float() for t in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    assert torch.equal(some[1].grad, everything[3]) and torch.equal(some[6].grad, everything[8])
    leaf = x[3].clone().requires_grad_()
    wkv7(*x[:3], leaf, *x[4:], backend="native")[1].sum().backward()  # the state alone
    state_alone = leaf.grad.clone()
    leaf.grad = None
    y, final = wkv7(*x[:3], leaf, *x[4:], backend="native")
    (final.sum() + 0 * y.sum()).backward()
    assert torch.equal(leaf.grad, state_alone)


def test_without_gradients_nothing_is_kept(monkeypatch):
    seen = []
    monkeypatch.setattr(op, "_run_forward", lambda *a, _run=op._run_forward: seen.append(_run(*a)) or seen[-1])
    x = inputs(1, 40, 2, 16)
    wkv7(*x, backend="native")
    assert seen[0][2].numel() == seen[0][3].numel() == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    x = inputs(2, 40, 2, 16)

    def loss(*t):
        y, final = wkv7(*t, backend="native")
        return y.square().sum() + final.square().sum()

    grads = []
    for wrapped in (loss, lambda *t: checkpoint(loss, *t, use_reentrant=reentrant)):
        leaves = [t.clone().requires_grad_() for t in x]
        wrapped(*leaves).backward()
        grads.append([t.grad for t in leaves])
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


@pytest.mark.integration
def test_is_one_operator_to_the_compiler():
    x = [t.requires_grad_() for t in inputs(2, 40, 4, 16, G=2)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op._forward, (*x, None, None, True), test_utils=checks)
    compiled = torch.compile(lambda *t: wkv7(*t), backend="aot_eager", fullgraph=True)
    for p, q in zip(compiled(*x), wkv7(*x), strict=True):
        assert torch.equal(p, q)


def test_auto_takes_it_and_says_when_it_cannot(monkeypatch):
    x = inputs(1, 20, 2, 16)
    assert torch.equal(wkv7(*x)[0], wkv7(*x, backend="native")[0])
    assert torch.equal(wkv7(*(t.double() for t in x))[0], wkv7(*(t.double() for t in x), backend="chunked")[0])
    monkeypatch.setattr(kernels, "why_unavailable", lambda backend: "no C++ compiler")
    with pytest.warns(UserWarning, match="slower chunked path: no C.. compiler"):
        y, _ = wkv7(*x)
    assert torch.equal(y, wkv7(*x, backend="chunked")[0])
    with pytest.raises(RuntimeError, match="'native' cannot run: no C.. compiler; use 'auto'"):
        wkv7(*x, backend="native")


@pytest.mark.parametrize(
    "change, message", [(torch.Tensor.double, "float64"), (lambda t: t[..., :4], "multiples of 8")]
)
def test_refusals(change, message):
    x = inputs(1, 5, 1, 8)
    x = [change(t) for t in x[:6]]
    with pytest.raises(RuntimeError, match=message):
        wkv7(*x, backend="native")
    wkv7(*x)  # auto has a path for it


def test_an_export_without_the_package_does_without(monkeypatch):
    monkeypatch.setattr(door, "kernels", None)
    x = inputs(1, 20, 2, 16)
    assert torch.equal(wkv7(*x)[0], wkv7(*x, backend="chunked")[0])
    with pytest.raises(RuntimeError, match="rwkvinside is not installed"):
        wkv7(*x, backend="native")


def test_no_compiler_and_a_broken_one(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    with monkeypatch.context() as without, pytest.raises(build.CompileError, match="apt install g"):
        without.setattr(build.shutil, "which", lambda name: None)
        build.compile_library(tmp_path / "kernel.so")
    monkeypatch.setenv("CXX", str(tmp_path / "fails"))
    (tmp_path / "fails").write_text("#!/bin/sh\necho 'x.cpp:1: error: no such luck' >&2\nexit 1\n")
    (tmp_path / "fails").chmod(0o755)
    with pytest.raises(build.CompileError, match="fails failed: .*no such luck"):
        build.compile_library(tmp_path / "kernel.so")
    assert not list(tmp_path.glob("*.so"))


def test_a_compiler_with_arguments(monkeypatch, tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", f"{launcher} g++")
    assert build.find_compiler() == [str(launcher), "g++"]
    monkeypatch.setattr(build, "X86", ())  # one set of instructions compiles fast
    build.compile_library(tmp_path / "kernel.so")
    assert (tmp_path / "kernel.so").stat().st_size > 10_000
    for value, said in (("no-such-compiler -O2", "no such program is found"), ('g++ "', "No closing quotation")):
        monkeypatch.setenv("CXX", value)
        with pytest.raises(build.CompileError, match=said):
            build.compile_library(tmp_path / "other.so")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A user without a cache, and a compiler that writes a few bytes; the folder of the cache and what was compiled."""
    compiled = []

    def compile_library(target):
        target.write_bytes(b"a library")
        compiled.append(target)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cache, "compile_library", compile_library)
    return tmp_path / ".cache" / "rwkvinside" / "native", compiled


def test_the_cache_is_private_and_content_addressed(home, monkeypatch):
    folder, compiled = home
    first = cache.cached_library()
    assert cache.cached_library() == first and compiled == [first]
    assert folder.stat().st_mode & 0o777 == 0o700 and first.parent == folder
    folder.chmod(0o755)  # as an earlier version made it
    assert cache.cached_library() == first and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    assert cache.cached_library() != first, "other flags, another file"
    monkeypatch.setenv("CXX", "g++ -O1")
    assert len({*compiled, cache.cached_library()}) == 3, "another compiler, another file"


@pytest.mark.parametrize("fault", ["foreign", "emptied", "writable for others", "a link", "note", "no note"])
def test_a_library_that_was_not_compiled_here_is_not_loaded(home, fault, tmp_path, caplog):
    folder, compiled = home
    library = cache.cached_library()
    if fault == "writable for others":
        library.chmod(0o777)
    elif fault == "a link":
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")
    elif fault == "no note":
        library.with_suffix(".sha256").unlink()
    else:
        (library.with_suffix(".sha256") if fault == "note" else library).write_bytes(
            b"" if fault == "emptied" else b"x"
        )
    assert cache.cached_library() == library and len(compiled) == 2
    assert library.read_bytes() == b"a library" and not library.is_symlink()
    assert "is not what was compiled and is made again" in caplog.text


@pytest.mark.parametrize("fault", ["writable for others", "of another user", "a link", "home is a file"])
def test_a_cache_of_others_is_refused(home, fault, tmp_path, monkeypatch):
    folder, compiled = home
    if fault == "home is a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    elif fault == "a link":
        (tmp_path / "theirs").mkdir()
        folder.parent.mkdir(parents=True)
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir(parents=True, mode=0o700)
        if fault == "of another user":
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        else:
            folder.chmod(0o777)
    with pytest.raises(
        build.CompileError, match="alone can write to" if fault != "home is a file" else "cannot be kept"
    ):
        cache.cached_library()
    assert not compiled


@pytest.mark.integration
@pytest.mark.parametrize("fault", ["none", "junk", "home"])
def test_compiled_into_the_users_cache_once(tmp_path, fault):
    """In processes of their own, with nothing built at installation; whatever is wrong, the recurrence runs."""
    code = (
        "import warnings, torch; from pathlib import Path; from rwkvinside.kernels.native import build, library\n"
        "build.FLAGS += '-O0',  # compiles fast\n"
        "Path.glob = lambda self, pattern: iter(())\n"
        "from rwkvinside.modeling.wkv7 import wkv7\n"
        "x = [torch.zeros(1, 2, 1, 8) for _ in range(6)]\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always'); wkv7(*x); wkv7(*x)\n"
        "print(library.why_unavailable() is None, len(caught), *[w.message for w in caught])"
    )
    if fault == "home":
        (tmp_path / "file").touch()
    home = os.environ | {"HOME": str(tmp_path / "file" if fault == "home" else tmp_path)}
    for turn in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, check=True)
        if fault == "home":
            assert done.stdout.startswith(
                "False 1 WKV-7 runs on the slower chunked path: the compiled kernel cannot be"
            )
        else:
            assert done.stdout == "True 0\n"
            (library,) = (tmp_path / ".cache/rwkvinside/native").glob("*.so")
            if fault == "junk" and turn == 0:
                library.write_bytes(b"junk")
