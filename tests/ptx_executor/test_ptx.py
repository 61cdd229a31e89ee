"""The executor of PTX itself, on programs written by hand: threads, memory, arithmetic, and its complaints."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptx_executor import Fault
from ptx_executor.arithmetic import ERRORS, Perturbation, f32_to_bf16, f64_to_bf16, fma32, fma64
from ptx_executor.execute import Program
from ptx_executor.memory import Memory, region_of

MODULE = """
.visible .entry program(.param .u64 .ptr .global .align 16 in, .param .u64 .ptr .global .align 16 out)
.reqntid {threads}
{{
\t.reg .pred %p<9>;
\t.reg .b16 %rs<9>;
\t.reg .b32 %r<19>;
\t.reg .b64 %rd<9>;
\tld.param.b64 %rd1, [in];
\tld.param.b64 %rd2, [out];
\tmov.u32 %r1, %tid.x;
\tmov.u32 %r2, %ctaid.x;
\tmul.wide.u32 %rd5, %r1, 4;
\tadd.s64 %rd3, %rd1, %rd5;
\tadd.s64 %rd4, %rd2, %rd5;
{body}
\tret;
}}
"""
# Registers of a program: %r1 its thread, %r2 its CTA, %rd3 and %rd4 the addresses of the thread's own numbers.


def run(
    body: str, given: Tensor | None = None, *, threads: int = 64, ctas: int = 1, shared: int = 1024, seed: int = 0,
    races: bool = True, perturb: int | str | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The 32-bit numbers that a program leaves in `out`, one per thread of a CTA."""
    program = Program(MODULE.format(threads=threads, body=body))
    given = torch.arange(threads, dtype=torch.int32) if given is None else given
    out = torch.full((threads,), -1, dtype=torch.int32) if out is None else out
    memory = Memory("global", [region_of("in", given), region_of("out", out)])
    pointers = [np.array([x.data_ptr()], np.uint64) for x in (given, out)]
    perturbation = None if perturb is None else Perturbation(perturb)
    program.run((ctas, 1, 1), pointers, memory, shared, perturbation, np.random.default_rng(seed), races)
    return out


def shuffled(to: str, source: str) -> str:
    return f"shfl.sync.bfly.b32 {to}, {source}, 1, 31, -1;"


# The odd threads' way stands behind the point where both meet: who runs the lowest line first is there early.
FORK = """
    and.b32 %r3, %r1, 1;
    setp.eq.u32 %p1, %r3, 1;
    @%p1 bra $ODD;
    add.s32 %r4, %r1, 100;
$MEET:
    {at_the_meeting}
    st.global.b32 [%rd4], %r5;
    ret;
$ODD:
    add.s32 %r4, %r1, 200;
    {among_the_odd}
    bra $MEET;
"""


def test_threads_meet_at_the_post_dominator() -> None:
    out = run(FORK.format(at_the_meeting=shuffled("%r5", "%r4"), among_the_odd=""))
    assert out.tolist() == [(t ^ 1) + (200 if t % 2 == 0 else 100) for t in range(64)]


def test_loops_of_different_lengths() -> None:
    """Each thread adds up 0 .. its own number, then all of them shuffle."""
    out = run(f"""
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
$NEXT:
    add.s32 %r4, %r4, %r3;
    add.s32 %r3, %r3, 1;
    setp.le.u32 %p1, %r3, %r1;
    @%p1 bra $NEXT;
    {shuffled("%r5", "%r4")}
    st.global.b32 [%rd4], %r5;
    """)
    assert out.tolist() == [(t ^ 1) * ((t ^ 1) + 1) // 2 for t in range(64)]


def test_a_shuffle_of_half_a_warp() -> None:
    with pytest.raises(Fault, match=r"shfl.* whose member mask is not the threads that run it: thread \d+ of CTA 0"):
        run(FORK.format(at_the_meeting="mov.b32 %r5, %r4;", among_the_odd=shuffled("%r6", "%r4")))


def test_a_barrier_that_some_threads_do_not_reach() -> None:
    with pytest.raises(Fault, match=r"bar\.sync 0 that not all threads of a CTA reach: thread 0 of CTA 0 does not"):
        run(FORK.format(at_the_meeting="mov.b32 %r5, %r4;", among_the_odd="bar.sync 0;"))
    run(FORK.format(at_the_meeting="bar.sync 0; mov.b32 %r5, %r4;", among_the_odd=""))


def test_permutations_of_bytes() -> None:
    """By hand: halves of two registers side by side, bytes in reverse, signs, and a selector that a thread computes."""
    given = torch.full((64,), 0x44332211, dtype=torch.int32)
    for selector, expected in (
        ("0x7632U", 0x88774433), ("0x5410", 0x66552211), ("0x0123", 0x11223344), ("0xffff", 0xFFFFFFFF),
        ("0x8888", 0), ("0xF7B0", 0xFF880011), ("%r1", 0x11111122),
    ):  # fmt: skip
        body = f"""
        ld.global.b32 %r3, [%rd3];
        mov.b32 %r4, 0x88776655;
        prmt.b32 %r5, %r3, %r4, {selector};
        st.global.b32 [%rd4], %r5;
        """
        assert run(body, given)[1].item() % 2**32 == expected, selector
    with pytest.raises(NotImplementedError, match="mode f4e"):
        run("prmt.b32.f4e %r5, %r1, %r1, 0;")


def test_shared_memory_by_its_longer_name() -> None:
    """`.shared` is `.shared::cta`; the memory of a cluster is unknown."""
    out = run("""
    shl.b32 %r3, %r1, 2;
    st.shared::cta.b32 [%r3], %r1;
    ld.shared::cta.b32 %r5, [%r3];
    st.global.b32 [%rd4], %r5;
    """)
    assert out.tolist() == list(range(64))
    with pytest.raises(NotImplementedError, match="shared::cluster"):
        run("st.shared::cluster.b32 [%r1], %r1;")


MIRROR = """
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [%r3], %r1;
    {first}
    sub.s32 %r4, 252, %r3;
    ld.shared.b32 %r5, [%r4];
    {second}
    st.shared.b32 [%r3], %r5;
    st.global.b32 [%rd4], %r5;
"""  # 64 threads read from each other what they wrote, and write over it


def test_races_between_barriers() -> None:
    barrier = "bar.sync 0;"
    assert run(MIRROR.format(first=barrier, second=barrier)).tolist() == list(reversed(range(64)))
    for first, second in (("", barrier), (barrier, ""), ("bar.warp.sync -1;", barrier)):
        with pytest.raises(Fault, match="shared memory race in program: two threads, with no barrier between them"):
            run(MIRROR.format(first=first, second=second))


def test_races_between_ctas() -> None:
    """One CTA stores what another reads: nothing orders them. Each to its own place is none."""
    body = "add.s32 %r3, %r1, %r2; ld.global.b32 %r4, [%rd{}]; st.global.b32 [%rd{}], %r3;"
    with pytest.raises(Fault, match=r"global memory race in program: two CTAs, which nothing orders,"):
        run(body.format(4, 4), ctas=2, threads=4096, seed=1)
    with pytest.raises(Fault, match=r"(?s)write different bits to one address at once.*st\.global"):
        run(body.format(3, 4), ctas=2)
    out = torch.zeros(128, dtype=torch.int32)
    own = "shl.b32 %r3, %r2, 8; cvt.u64.u32 %rd6, %r3; add.s64 %rd4, %rd4, %rd6; st.global.b32 [%rd4], %r1;"
    assert run(own, ctas=2, out=out).tolist() == [*range(64), *range(64)]


def test_replicas_are_no_race() -> None:
    """All threads load one number, and write the same bits to one address; in place, thread 0 alone stores."""
    same = "ld.global.b32 %r3, [%rd1]; add.s32 %r3, %r3, 7; st.global.b32 [%rd2], %r3;"
    assert run(same)[0] == 7
    in_place = "ld.global.b32 %r3, [%rd1]; setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], 9;"
    given = torch.zeros(64, dtype=torch.int32)
    run(in_place, given)
    assert given[0] == 9
    with pytest.raises(Fault, match="global memory race"):
        run(f"{in_place} ld.global.b32 %r3, [%rd1]; st.global.b32 [%rd4], %r3;", torch.zeros(64, dtype=torch.int32))


def test_ctas_run_in_any_order() -> None:
    """Who came last, without looking for the race that this is."""
    body = "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd2], %r2;"
    last = {run(body, ctas=5, threads=4096, seed=seed, races=False)[0].item() for seed in range(8)}
    assert len(last) > 1


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (
            "ld.global.b32 %r3, [%rd3 + 4];",
            r"load: outside of the memory that was passed, by thread 63 .* 256 bytes from",
        ),
        ("st.global.b32 [%rd3 + -4], 0;", "store: outside of the memory that was passed, by thread 0"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd3];", "load: address not a multiple of 8, by thread 1 "),
        (
            "ld.shared.b32 %r3, [global_smem + 1024];",
            "shared memory access of 4 bytes at 1024, outside of the 1024 bytes",
        ),
        ("add.s32 %r3, %r4, 1;", "a register is read before it is written"),
        ("@%p3 bra $END;\n$END:", "a predicate is read before it is written"),
    ],
)
def test_complaints(body: str, complaint: str) -> None:
    with pytest.raises(Fault, match=complaint):
        run(f"st.global.b32 [%rd4], 0; mov.b32 %r5, 0;\n{body}\n setp.eq.u32 %p3, %r5, 0; mov.b32 %r4, 0;")


def test_matrices_in_shared_memory() -> None:
    """Thread t's 4 bytes lie in row t // 4, whose address another thread has: here rows from the last to the first."""
    row = "and.b32 %r4, %r1, 7; sub.s32 %r4, 7, %r4; shl.b32 %r4, %r4, 5;"
    row += "mov.b32 %r5, global_smem; add.s32 %r5, %r5, %r4;"
    own = "shr.u32 %r6, %r1, 2; shl.b32 %r6, %r6, 5; and.b32 %r7, %r1, 3; shl.b32 %r7, %r7, 2; or.b32 %r6, %r6, %r7;"
    there = f"{own} mov.b32 %r8, global_smem; add.s32 %r8, %r8, %r6;"
    stored = "ld.global.b32 %r3, [%rd3]; stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r5], {%r3}; bar.sync 0;"
    loaded = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r5]; st.global.b32 [%rd4], %r9;"
    threads = torch.arange(32, dtype=torch.int32)
    reversed_rows = threads.view(8, 4).flip(0).flatten()
    found = run(f"{row} {there} {stored} ld.shared.b32 %r9, [%r8]; st.global.b32 [%rd4], %r9;", threads=32)
    assert torch.equal(found, reversed_rows)
    assert torch.equal(run(f"{row} {stored} {loaded}", threads=32), threads)
    with pytest.raises(Fault, match="a row's address is not a multiple of 16"):
        run(f"{row} add.s32 %r5, %r5, 4; {stored} st.global.b32 [%rd4], 0;", threads=32)


def test_uninitialised_shared_memory_is_nan() -> None:
    assert run("ld.shared.b32 %r3, [global_smem]; st.global.b32 [%rd4], %r3;").view(torch.float32).isnan().all()


@pytest.mark.parametrize(
    "instruction",
    [
        "vote.sync.any.pred %p1, %p2, -1;", "add.rz.f32 %r3, %r1, %r1;", "atom.global.add.u32 %r3, [%rd3], 1;",
        "ld.global.relaxed.gpu.b32 %r3, [%rd3];", "mul.hi.u32 %r3, %r1, %r1;", "ex2.approx.f16 %rs1, %rs1;",
        "bar.sync 1;", "mov.u32 %r3, %clock;",
    ],
)  # fmt: skip
def test_an_unknown_instruction_is_no_guess(instruction: str) -> None:
    with pytest.raises(NotImplementedError):
        run(instruction)


def nearest(exact: Fraction, dtype: type[np.floating]) -> np.floating:
    """Correctly rounded, ties to even: the best of a first guess and its neighbours."""
    guess = dtype(float(exact))
    around = [np.nextafter(guess, dtype(-np.inf)), guess, np.nextafter(guess, dtype(np.inf))]
    bits = np.uint32 if dtype is np.float32 else np.uint64
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(bits)) & 1))


def numbers(dtype: type[np.floating], count: int) -> list[NDArray[np.floating]]:
    """Of all sizes; every second sum cancels, or is a tie but for a bit far below."""
    generator = np.random.default_rng(0)
    a, b, c = (
        (generator.standard_normal(count) * 2.0 ** generator.integers(-30, 30, count)).astype(dtype) for _ in range(3)
    )
    c[::2] = -(a[::2] * b[::2])
    a[::4], b[::4], c[::4] = 1 + np.finfo(dtype).eps, 1 + np.finfo(dtype).eps * 2.0 ** generator.integers(0, 9), 1
    a[1::8] = 2.0**-70 if dtype is np.float32 else 2.0**-530  # a product below the normal numbers
    b[1::8], c[1::8] = a[1::8] * dtype(1.7), np.finfo(dtype).tiny * dtype(3.3)
    return [a, b, c]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fma_is_rounded_once(dtype: type[np.floating]) -> None:
    a, b, c = numbers(dtype, 400)
    result = (fma32 if dtype is np.float32 else fma64)(a, b, c)
    for x, y, z, actual in zip(a, b, c, result, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert actual == nearest(exact, dtype), (x, y, z)
    assert (result != a * b + c).any()  # which is rounded twice


def test_fma_of_zeros_infinities_and_extremes() -> None:
    """Lanes that are off hold NaN; beside them the others' results are their own."""
    inf, nan, large = np.inf, np.nan, 2.0**1000
    cases = (
        (0.0, 3.0, -0.0, 0.0), (-0.0, 3.0, -0.0, -0.0), (0.0, 3.0, 1.5, 1.5), (nan, 0.0, 1.0, nan),
        (0.0, inf, 1.0, nan), (inf, 2.0, -inf, nan), (inf, -2.0, 1.0, -inf), (2.0, 3.0, inf, inf),
        (large * (1 + 2.0**-52), 1 / large, -1.0, 2.0**-52), (large, large, 1.0, inf),
        (2.0**-600, 2.0**-600, 1.0, 1.0), (2.0**-540, 2.0**-534, 2.0**-1074, 2.0**-1073),
        (1 + 2.0**-52, 1 + 2.0**-52, -(1 + 2.0**-51), 2.0**-104), (1 + 2.0**-52, 1.0, 2.0**53, 2.0**53 + 2),
    )  # fmt: skip
    *operands, expected = (np.array(column) for column in zip(*cases, strict=True))
    with np.errstate(all="ignore"):
        result = fma64(*operands)
    np.testing.assert_array_equal(result, expected)
    assert (np.signbit(result) == np.signbit(expected))[~np.isnan(expected)].all()


def test_narrow_conversions_are_rounded_once() -> None:
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-40, -(1 + 2.0**-8 + 2.0**-40), np.nan, 1e300])
    expected = torch.tensor([1.0, 1 + 2.0**-6, 1 + 2.0**-7, -1 - 2.0**-7, torch.nan, torch.inf], dtype=torch.bfloat16)
    result = torch.from_numpy(f64_to_bf16(x).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())
    y = torch.randn(1000)
    bits = torch.from_numpy(f32_to_bf16(y.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bits, y.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh"])
def test_approximate_functions(name: str) -> None:
    """Correctly rounded, or off by no more than is documented and somewhere by most of it, alike in equal threads."""
    functions = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
        "tanh": np.tanh,
    }  # fmt: skip
    given = torch.cat([torch.rand(511) * 4 + 0.01, torch.tensor([1.5])]).repeat(2)
    exact = functions[name](given.double().numpy())
    body = f"ld.global.b32 %r3, [%rd3]; {name}.approx.f32 %r4, %r3; st.global.b32 [%rd4], %r4;"
    result = run(body, given, threads=1024).view(torch.float32).numpy()
    assert (result == exact.astype(np.float32)).all()
    scale = np.where((given.numpy() > 0.5) & (given.numpy() < 2), 1, np.abs(exact)) if name == "lg2" else np.abs(exact)
    for perturb in (1, 2, "up", "down"):
        result = run(body, given, threads=1024, perturb=perturb).view(torch.float32).numpy()
        error = np.abs(result - exact) / scale
        assert 0.7 * ERRORS[name] < error.max() <= ERRORS[name] * (1 + 1e-9), perturb
        assert (result[:512] == result[512:]).all()


def test_packed_comparisons_and_conversions() -> None:
    """`setp` of two halves at once, with a NaN, and a widening from 16 bits to 64."""
    pairs = torch.tensor([[1.0, 2.0], [2.0, torch.nan], [-0.0, 0.0], [3.0, 3.0]])
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        given = pairs.to(dtype).view(torch.int32).flatten().repeat(8)
        swapped = "shr.b32 %r4, %r3, 16; shl.b32 %r5, %r3, 16; or.b32 %r4, %r4, %r5;"
        out = run(
            f"""ld.global.b32 %r3, [%rd3]; {swapped}
            setp.lt.{kind}x2 %p1|%p2, %r3, %r4;
            selp.b32 %r6, 1, 0, %p1; selp.b32 %r7, 2, 0, %p2; or.b32 %r6, %r6, %r7; st.global.b32 [%rd4], %r6;""",
            given, threads=32,
        )  # fmt: skip
        assert out[:4].tolist() == [1, 0, 0, 0]
        out = run(
            f"""ld.global.b32 %r3, [%rd3]; mov.b32 {{%rs1, %rs2}}, %r3; cvt.f64.{kind} %rd6, %rs2;
            cvt.rn.f32.f64 %r4, %rd6; st.global.b32 [%rd4], %r4;""",
            given, threads=32,
        )  # fmt: skip
        assert torch.equal(out[:4].view(torch.float32).nan_to_num(), pairs[:, 1].nan_to_num())
