"""``python -m dev.bench kernels``: what it counts, on any machine. Never the clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import numpy
import pytest
import torch

from dev.bench import cli, kernels
from dev.bench.kernels import setting, suite, timing
from dev.bench.kernels.decode import DecodeCase, DecodeSuite
from dev.bench.kernels.int4 import Int4Suite
from dev.bench.kernels.layer_ops import OpsSuite
from dev.bench.kernels.matmul import MatmulSuite
from dev.bench.kernels.named import NamedCase
from dev.bench.kernels.peers import FlashAttention3
from dev.bench.kernels.prefill import PrefillCase, PrefillSuite
from dev.bench.kernels.sampling import SamplingSuite
from dev.bench.kernels.suite import Subject, add_rates, measure
from dev.bench.report import KERNEL_FIELDS
from dev.bench.roofline import Ceilings, Cost

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_interpreter")
CPU = torch.device("cpu")
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "hidden_size": 64,
         "intermediate_size": 96, "vocab_size": 100}
SMALL = ["--device", "cpu", "--ceilings", "10,0.1"]
for name, size in SIZES.items():
    SMALL += ["--" + name.replace("_", "-"), str(size)]
# Hq 4, Hkv 2, D 64 in float32
KV_TOKEN = 2 * 2 * 64 * 4
QUERY = 4 * 64 * 4


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(setting.POOL_BYTES, "cpu", 8 << 20)
    monkeypatch.setitem(setting.ROTATED_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(timing, "REPEATS", 1)


@pytest.fixture
def here() -> setting.Setting:
    return setting.Setting(block_size=16, dtype=torch.float32, device=CPU, **SIZES)


def run(tmp_path, *options: str) -> dict:
    """Run the command line and read its JSON."""
    file = tmp_path / "kernels.json"
    assert cli.main(["kernels", *SMALL, *options, "--json", str(file)]) == cli.EXIT_OK
    return json.loads(file.read_text())


# --- cases ------------------------------------------------------------------------------------


def test_a_decode_case_is_groups_of_sequences():
    assert sorted(DecodeCase.parse("4x10:100").lens()) == [10, 40, 70, 100]
    assert DecodeCase.parse("2x64").lens() == [64, 64]
    ragged = DecodeCase.parse("1x900+3x20")
    assert sorted(ragged.lens()) == [20, 20, 20, 900] and str(ragged) == "1x900+3x20"
    for text in ("64", "x", "4x", "4x9:3", "ax3", "2x4+", "1x5+3"):
        with pytest.raises(ValueError, match="BxS"):
            DecodeCase.parse(text)


def test_a_prefill_case_counts_the_pairs_that_see_each_other():
    assert PrefillCase.parse("8x2048") == PrefillCase(8, 2048)
    assert PrefillCase.parse("256+7936") == PrefillCase(1, 256, 7936)
    for text in ("8x2048", "256+7936", "3x16+64"):
        assert str(PrefillCase.parse(text)) == text
    case = PrefillCase(2, 5, 7)
    seen = sum(7 + position + 1 for position in range(5))
    assert case.num_pairs == 2 * seen
    for text in ("", "x", "0x5", "3x", "4+x", "5+-1", "axb"):
        with pytest.raises(ValueError, match=r"S\+C"):
            PrefillCase.parse(text)


def test_a_named_case_has_its_number_of_sizes():
    names = ("linear", "other")
    assert NamedCase.parse("linear:1x2x3", names, "MNK") == NamedCase("linear", (1, 2, 3))
    for text in ("linear", "linear:1x2", "linear:1x2x0", "none:1x2x3", "linear:1x2xa"):
        with pytest.raises(ValueError, match="MxNxK behind linear:, other:"):
            NamedCase.parse(text, names, "MNK")


# --- what is counted --------------------------------------------------------------------------


def test_costs_count_every_byte_and_operation_once(here):
    decode = DecodeSuite(here).cost(DecodeCase.parse("4x10:100"))
    assert decode == Cost(220 * KV_TOKEN, 220 * 4 * 4 * 64)

    prefill = PrefillSuite(here).cost(PrefillCase(2, 8, 24))
    pairs = 2 * sum(24 + i for i in range(1, 9))
    assert prefill == Cost(2 * 2 * 8 * QUERY + 2 * 32 * KV_TOKEN, pairs * 4 * 4 * 64)

    ops = OpsSuite(here)
    assert ops.cost(NamedCase("add_rms_norm", (3,))) == Cost(4 * 3 * 64 * 4, 0)
    assert ops.cost(NamedCase("silu_mul", (3,))) == Cost(3 * 3 * 96 * 4, 0)
    # q in and out; k in, out and cached; v in and cached; a row of cos and of sin
    heads = 2 * 4 + 3 * 2 + 2 * 2 + 2
    assert ops.cost(NamedCase("qk_norm_rope", (3,))) == Cost(3 * heads * 64 * 4, 0)

    matmul = MatmulSuite(here)
    weight, x, y = 32 * 16, 4 * 16, 4 * 32
    flops = 2 * 4 * 32 * 16
    assert matmul.cost(NamedCase("linear", (4, 32, 16))) == Cost((weight + x + y) * 4, flops)
    # the residual is read and written
    norm = (weight + 3 * x + y) * 4
    assert matmul.cost(NamedCase("norm_linear", (4, 32, 16))) == Cost(norm, flops)
    gated = (weight + 3 * x + y // 2) * 4
    assert matmul.cost(NamedCase("norm_gate_up", (4, 32, 16))) == Cost(gated, flops)

    int4 = Int4Suite(here)
    weight, scales, zeros = 32 * 128 // 2, 32 * 4 * 2, 32 * 4 * 4
    numbers = (4 * 128 + 4 * 32) * 4
    cost = int4.cost(NamedCase("int4", (4, 32, 128, 32)))
    assert cost == Cost(weight + scales + numbers, 2 * 4 * 32 * 128)
    cost = int4.cost(NamedCase("int4_asymmetric", (4, 32, 128, 32)))
    assert cost == Cost(weight + scales + zeros + numbers, 2 * 4 * 32 * 128)

    assert SamplingSuite(here).cost(NamedCase("greedy", (5,))) == Cost(5 * 100 * 4, 0)


def test_rates_are_shares_of_the_ceilings():
    row = {"us": 2.0, "bytes": 600, "flops": 8000}
    failed = {"us": None, "bytes": 600, "flops": 8000}
    add_rates([row, failed], Ceilings(read_bytes_per_s=1e9, flops_per_s=5e9))
    assert row["bytes_per_s"] == 300e6 and row["read_share"] == 0.3
    assert row["flops_per_s"] == 4e9 and row["flops_share"] == 0.8 and row["bound"] == "flops"
    assert "bytes_per_s" not in failed


def test_batches_read_blocks_of_their_own(here):
    lens = [64, 0, 33]
    tables = here.pool.tables(lens)
    used = [tables[i][row, :blocks].tolist() for i in range(len(tables))
            for row, blocks in ((0, 4), (2, 3))]
    blocks = [block for part in used for block in part]
    assert len(blocks) == len(set(blocks)) == 7 * len(tables) and len(tables) > 4
    assert max(blocks) < here.pool.num_blocks
    assert len(here.pool.tables(lens, at_most=2)) == 2
    positions = torch.tensor([[0, 16, 63], [0, 0, 0], [15, 16, 17]])
    slots = here.pool.slots(tables[0], positions)
    first, second = tables[0][2, :2].tolist()
    assert slots[2].tolist() == [first * 16 + 15, second * 16, second * 16 + 1]


def test_inputs_are_more_than_a_cache_holds(here):
    assert here.copies(1) == setting.MAX_COPIES
    assert here.copies(1 << 30) == 2
    assert here.copies(20_000) == 4  # of 65,536 bytes


# --- measuring --------------------------------------------------------------------------------


class FakeSuite:
    """Subjects that add up, one of which is wrong and one of which fails."""

    def inputs(self, case):
        return [torch.ones(4), torch.ones(4)]

    def cost(self, case):
        return Cost(16, 4)

    def subjects(self, case):
        def subject(name, work, **options):
            return Subject(name, lambda inputs: [lambda: work(inputs[0])] * 2, **options)

        def fail(x):
            raise RuntimeError("out of memory\nand a long explanation")

        return [
            subject("fails", fail),
            subject("first", lambda x: x + 1),
            subject("pair", lambda x: (x[:2] + 1, x[2:] + 1)),
            subject("wrong", lambda x: x + 2),
            subject("draws", lambda x: x * 9, compared=False),
        ]


def test_a_failure_stays_in_its_row_and_results_are_compared(here):
    case = NamedCase("sum", (4,))
    rows = {row["name"]: row for row in measure(FakeSuite(), [case], here, lambda text: None)}
    assert rows["fails"]["us"] is None and rows["fails"]["error"] == "out of memory"
    assert rows["first"]["difference"] == rows["pair"]["difference"] == 0.0
    assert rows["wrong"]["difference"] == pytest.approx(0.5)
    assert "difference" not in rows["draws"]
    assert all(row["us"] > 0 for name, row in rows.items() if name != "fails")


@pytest.mark.parametrize(
    ("name", "cases", "subjects"),
    [
        ("decode", ["2x64", "4x10:100"], ["m3_paged torch", "m4_flash torch"]),
        ("ragged", ["1x200+3x20"], ["m3_paged torch", "m4_flash torch"]),
        ("prefill", ["2x32"], ["m3_paged torch", "m4_flash torch", "SDPA"]),
        ("prefill", ["16+48", "2x8+24"], ["m4_flash torch", "SDPA"]),
        ("ops", ["add_rms_norm:3", "qk_norm_rope:3", "silu_mul:3"], ["torch"]),
        ("matmul", ["linear:2x48x32", "norm_linear:2x48x32", "norm_gate_up:2x48x32"], ["torch"]),
        ("int4", ["int4:2x48x64x32", "int4_asymmetric:2x20x72x32"], ["torch", "int4"]),
        ("sampling", ["greedy:3", "temperature:3", "top_k_top_p:3"], ["torch", "textbook"]),
    ],
)
def test_every_suite_runs_on_the_cpu(name, cases, subjects, tmp_path):
    options = [part for case in cases for part in ("--case", case)]
    report = run(tmp_path, "--suite", name, *options, "--quiet")
    rows = report["rows"]
    assert [row["name"] for row in rows] == subjects * len(cases)
    assert not any("error" in row for row in rows)
    texts = [f"{row['measure']}:{row['case']}" for row in rows]
    assert all(any(text.endswith(case) for case in cases) for text in texts)
    for row in rows:
        assert row["us"] > 0 and row["bytes_per_s"] == pytest.approx(row["bytes"] / row["us"] * 1e6)
        assert row.get("difference", 0.0) < 1e-5
        assert set(row) <= set(KERNEL_FIELDS)


def test_default_cases_belong_to_their_suites(here):
    for make in (DecodeSuite, PrefillSuite, OpsSuite, MatmulSuite, Int4Suite, SamplingSuite):
        one = make(here)
        for texts in one.default_cases.values():
            for text in texts:
                case = one.parse(text)
                assert text in (str(case), f"{case.measure}:{case}")
                assert one.cost(case).bytes > 0


def test_without_a_suite_a_case_is_one_of_decode(tmp_path, capsys):
    report = run(tmp_path, "--case", "2x64", "--milestone", "m3")
    assert report["kind"] == "kernels" and "2x64" in capsys.readouterr().out
    (row,) = report["rows"]
    assert row["measure"] == "paged_attention" and row["bytes"] == 128 * KV_TOKEN
    assert set(KERNEL_FIELDS) - set(row) == {"error"}
    assert report["ceilings"]["source"] == "given" and report["work"]["num_heads"] == "4"


def test_without_ceilings_there_are_no_shares(tmp_path, capsys):
    report = run(tmp_path, "--case", "2x64", "--ceilings", "skip")
    assert report["ceilings"] is None
    assert all("bytes_per_s" in row and "read_share" not in row for row in report["rows"])
    assert "GB/s" in capsys.readouterr().out


# --- what needs a GPU, as far as it goes without ----------------------------------------------


class OnGpu(setting.Setting):
    """Has the kernels' subjects measured, though by Triton's interpreter."""

    on_gpu = True
    num_multiprocessors = 2

    def starts_early(self, rows: int) -> bool:
        return False


@in_interpreter
@pytest.mark.parametrize(
    ("make", "cases", "subjects"),
    [
        (
            lambda here: DecodeSuite(here, ["m3_paged", "m4_flash"], ["triton"]),
            ["2x40"],
            ["m3_paged triton", "m4_flash flash", "m4_flash torch", "m4_flash flash, fused"],
        ),
        (
            lambda here: PrefillSuite(here, ["m4_flash"]),
            ["16+40"],
            ["m4_flash flash", "m4_flash torch", "SDPA"],
        ),
        (OpsSuite, ["add_rms_norm:3", "qk_norm_rope:3", "silu_mul:3"], ["torch", "fused"]),
        (MatmulSuite, ["linear:2x48x64"], ["torch", "skinny"]),
        (
            MatmulSuite,
            ["norm_linear:2x48x64", "norm_gate_up:2x48x64", "norm_gate_up:20x48x64"],
            ["torch", "fused", "skinny"],
        ),
        (Int4Suite, ["int4:2x48x64x32", "int4_asymmetric:20x16x64x64"], ["torch", "int4"]),
        (Int4Suite, ["int4_asymmetric:64x16x64x64"], ["torch", "int4", "dequantized"]),
        (SamplingSuite, ["greedy:2", "top_k_top_p:2"], ["torch", "fused", "textbook"]),
    ],
)
def test_interpreted_kernels_agree_with_their_twins(
    make: Callable, cases: list[str], subjects: list[str], monkeypatch
):
    monkeypatch.setattr(suite, "_timed", lambda *_: {})  # only what they compute is of interest
    here = OnGpu(block_size=16, dtype=torch.float32, device=CPU, **SIZES)
    measured = make(here)
    rows = list(measure(measured, [measured.parse(text) for text in cases], here, lambda _: None))
    assert [row["name"] for row in rows] == subjects * len(cases)
    for row in rows:
        assert "error" not in row, row
        assert row.get("difference", 0.0) < 1e-5, row


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_kernels_in_interpreter():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("this Triton's interpreter cannot loop with this NumPy")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        [*command, "-k", "interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " skipped" not in child.stdout, child.stdout


def test_flash_attention_3_gets_what_it_asks_for(here):
    """The operator takes 37 arguments by position; these are the places of those in use."""
    seen = []

    def operator(q, *rest):
        seen.append((q, *rest))
        return [q]

    library = FlashAttention3.__new__(FlashAttention3)
    library._operator = operator
    prefill = PrefillSuite(here)
    fresh, cached = (prefill.inputs(PrefillCase(2, 8, context))[0] for context in (0, 24))
    for prompts in (fresh, cached):
        assert library.prefill(prompts)().shape == (16, 4, 64)
    decode = DecodeSuite(here).inputs(DecodeCase.parse("3x20"))[0]
    pool = here.pool
    out = library(decode.q, pool.keys, pool.values, decode.table, decode.lens, here.scale)
    assert out.shape == (3, 4, 64)

    of_fresh, of_cached, of_decode = seen
    assert {len(call) for call in seen} == {37}
    assert of_fresh[1] is fresh.k and of_fresh[7].tolist() == of_fresh[8].tolist() == [0, 8, 16]
    assert of_fresh[11] is None and of_fresh[12:15] == (8, 8, None)
    assert of_cached[1] is pool.keys and of_cached[7].tolist() == [0, 8, 16]
    assert of_cached[8] is None and of_cached[11].tolist() == [32, 32]
    assert of_cached[12:14] == (8, 32) and of_cached[14] is cached.table
    assert of_decode[0].shape == (3, 1, 4, 64) and of_decode[7] is of_decode[8] is None
    assert of_decode[11] is decode.lens and of_decode[12:14] == (1, 32)
    assert all(call[23:25] == (here.scale, True) for call in seen)


def test_flash_attention_3_that_cannot_be_loaded_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="cannot load"):
        kernels.flash_attention_3(tmp_path / "no_such.so")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--case", "64x100000"], "memory"),
        (["--case", "1x16", "--num-heads", "5"], "multiple"),
        (["--case", "1x16", "--backend", "triton"], "CUDA device"),
        (["--case", "1x16", "--flash-attn-3", "no/such.so"], "no/such.so"),
        (["--case", "1x16", "--suite", "matmul"], "MxNxK"),
        (["--case", "1x16", "--milestone", "m1"], "no kernels of its own"),
        (["--case", "1x16", "--milestone", "m99"], "there is no milestone"),
    ],
)
def test_wrong_use_is_a_clear_error(argv, message, capsys):
    assert cli.main(["kernels", *SMALL, *argv]) == cli.EXIT_USAGE
    assert message in capsys.readouterr().err.replace("\n", " ")
