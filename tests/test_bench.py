"""The bench: the work it draws, what it counts, the roofline's arithmetic. Never the clock."""

from __future__ import annotations

import json

import pytest
import torch

from common.checkpoint import open_checkpoint
from common.presets import preset_config
from dev.bench import cli
from dev.bench.latency import LatencyWork
from dev.bench.report import FIELDS, add_roofline
from dev.bench.roofline import (
    Ceilings,
    Cost,
    decode_step_cost,
    kv_bytes,
    measure_ceilings,
    weight_bytes,
    work_cost,
)
from dev.bench.runner import EngineSubject, find_milestone, milestone_names
from dev.bench.workloads import BenchRequest, Lengths, check_fits, random_requests

TINY = ["--model", "random:tiny-llama", "--device", "cpu", "--ceilings", "10,0.1"]
SMALL_WORK = ["--num-requests", "5", "--input-len", "4:20", "--output-len", "2:9"]


def bench(tmp_path, *options: str, model: str = "random:tiny-llama") -> dict:
    """Run the command line and read its JSON."""
    file = tmp_path / "reports" / "bench.json"
    options = [*options, *TINY, "--model", model, "--json", str(file)]
    assert cli.main(options) == cli.EXIT_OK
    return json.loads(file.read_text())


# --- the work ---------------------------------------------------------------------------------


def test_the_reference_work_has_133966_output_tokens():
    requests = random_requests(256, Lengths(100, 1024), Lengths(100, 1024), vocab_size=151_936)
    assert sum(request.output_len for request in requests) == 133_966
    assert sum(request.input_len for request in requests) == 142_827


def test_lengths_depend_on_neither_the_vocabulary_nor_the_run():
    def draw(**options) -> list[BenchRequest]:
        return random_requests(9, Lengths(3, 30), Lengths(1, 50), seed=7, **options)

    base = draw(vocab_size=50_000)
    assert base == draw(vocab_size=50_000)
    for other in (draw(vocab_size=7), draw(vocab_size=50_000, run=1)):
        assert [r.input_len for r in other] == [r.input_len for r in base]
        assert [r.output_len for r in other] == [r.output_len for r in base]
        assert all(a.prompt_token_ids != b.prompt_token_ids
                   for a, b in zip(base, other, strict=True))
    assert max(token for r in draw(vocab_size=7) for token in r.prompt_token_ids) == 6


def test_other_seeds_give_other_work():
    one, two = (random_requests(20, Lengths(1, 99), Lengths(1, 99), vocab_size=9, seed=seed)
                for seed in (0, 1))
    assert [r.output_len for r in one] != [r.output_len for r in two]


def test_lengths_are_read_from_text():
    assert Lengths.parse("100:1024") == Lengths(100, 1024)
    assert Lengths.parse("128") == Lengths(128, 128)
    assert str(Lengths(3, 4)) == "3:4" and str(Lengths(3, 3)) == "3"


@pytest.mark.parametrize("text", ["", "a", "5:", ":5", "9:3", "0:4", "-1", "1:2:3", "1.5"])
def test_senseless_lengths_are_refused(text):
    with pytest.raises(ValueError, match="length"):
        Lengths.parse(text)


def test_work_that_does_not_fit_names_the_longest_request():
    requests = [BenchRequest([1] * 4, 3), BenchRequest([1] * 6, 5)]
    check_fits(requests, 11, "m")
    with pytest.raises(ValueError, match=r"m serves at most 10 .* prompt of 6 with 5 output"):
        check_fits(requests, 10, "m")


# --- the roofline -----------------------------------------------------------------------------

# tiny-llama: H 64, I 160, L 2, Hq 4, Hkv 2, D 16, V 320, tied embeddings.
LAYER_WEIGHTS = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 160
WEIGHTS = 2 * (LAYER_WEIGHTS + 2 * 64) + 64 + 320 * 64
KV_PER_TOKEN = 2 * 2 * 2 * 16  # keys and values, layers, heads, head size: elements


def test_weight_bytes_count_the_head_once():
    config = preset_config("tiny-llama")
    assert weight_bytes(config, 4) == 4 * WEIGHTS
    # Untied: the embedding's rows are looked up, not read, so the same parts remain.
    qwen3 = preset_config("tiny-qwen3")
    assert not qwen3.tie_word_embeddings
    parts = qwen3.num_parameters()
    assert weight_bytes(qwen3, 2) == 2 * (sum(parts.values()) - parts["embed"])


def test_quantized_weights_count_as_they_are_stored():
    config = preset_config("tiny-llama")
    assert weight_bytes(config, 4, saved_bytes=1000) == 4 * WEIGHTS - 1000
    lengths = [(10, 4), (3, 6)]
    plain, quantized = (work_cost(config, 4, lengths, saved_bytes=n) for n in (0, 1000))
    assert plain.bytes - quantized.bytes == 6 * 1000
    assert plain.flops == quantized.flops


def test_kv_bytes_count_every_read_of_every_token():
    config = preset_config("tiny-llama")
    # Prompt of 10, 4 output tokens: three decode steps that see 11, 12 and 13 tokens.
    assert kv_bytes(config, 2, [(10, 4)]) == 2 * KV_PER_TOKEN * (11 + 12 + 13)
    assert kv_bytes(config, 2, [(10, 1)]) == 0
    assert kv_bytes(config, 4, [(10, 4), (1, 2)]) == 4 * KV_PER_TOKEN * (11 + 12 + 13 + 2)


def test_work_cost_is_the_sum_of_all_steps():
    config = preset_config("tiny-llama")
    lengths = [(10, 4), (3, 6)]
    cost = work_cost(config, 4, lengths)
    assert cost.bytes == 6 * 4 * WEIGHTS + kv_bytes(config, 4, lengths)
    by_step = sum(
        config.flops(p, p, 1) + sum(config.flops(1, p + i, 1) for i in range(1, n))
        for p, n in lengths
    )
    assert cost.flops == by_step


def test_decode_step_cost_is_at_the_mean_context():
    config = preset_config("tiny-llama")
    cost = decode_step_cost(config, 4, batch_size=3, input_len=128, output_len=129)
    mean = sum(range(129, 257)) / 128
    assert cost.bytes == 4 * (WEIGHTS + 3 * KV_PER_TOKEN * int(mean))
    assert cost.flops == 3 * config.flops(1, int(mean), 1)


def test_a_cost_is_bound_by_the_slower_of_its_parts():
    ceilings = Ceilings(read_bytes_per_s=100.0, flops_per_s=1000.0)
    assert Cost(200, 1000).seconds(ceilings) == 2.0
    assert Cost(200, 1000).bound(ceilings) == "bytes"
    assert Cost(200, 5000).seconds(ceilings) == 5.0
    assert Cost(200, 5000).bound(ceilings) == "flops"


def test_shares_are_of_the_time_taken():
    row = {"seconds": 8.0, "work_bytes": 200, "work_flops": 10, "steps_bytes": 400,
           "steps_flops": 10}
    add_roofline([row], Ceilings(100.0, 1000.0))
    assert row["work_roofline_s"] == 2.0 and row["work_roofline_share"] == 0.25
    assert row["steps_roofline_share"] == 0.5 and row["steps_bound"] == "bytes"


def test_the_reference_work_reads_its_kv_cache():
    """On an H200, which reads 4.41 TB/s, that alone allows 42,600 tokens/s in Qwen3-0.6B."""
    requests = random_requests(256, Lengths(100, 1024), Lengths(100, 1024), vocab_size=9)
    lengths = [(r.input_len, r.output_len) for r in requests]
    seconds = kv_bytes(preset_config("qwen3-0.6b"), 2, lengths) / 4.41e12
    assert 133_966 / seconds == pytest.approx(42_600, rel=0.002)


def test_ceilings_are_measured():
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32, seconds=0.0)
    assert ceilings.source == "measured"
    assert ceilings.read_bytes_per_s > 0 and ceilings.flops_per_s > 0


# --- the milestones ---------------------------------------------------------------------------


def test_milestones_are_found_by_name_or_number():
    assert find_milestone("m3_paged") == find_milestone("m3") == "m3_paged"
    with pytest.raises(ValueError, match="did you mean m3_paged"):
        find_milestone("m3_page")


@pytest.mark.parametrize("milestone", milestone_names())
def test_throughput_counts_tokens_and_steps(tmp_path, milestone):
    report = bench(tmp_path, "throughput", "--milestone", milestone, *SMALL_WORK, "--repeat", "2")
    requests = random_requests(5, Lengths(4, 20), Lengths(2, 9), vocab_size=320)
    (row,) = report["rows"]
    assert row["name"] == milestone and row["measure"] == "throughput"
    assert row["num_requests"] == 5
    assert row["prompt_tokens"] == sum(r.input_len for r in requests)
    assert row["output_tokens"] == sum(r.output_len for r in requests)
    alone = milestone in ("m0_init", "m1_basic")
    longest = max(r.output_len for r in requests)
    assert row["num_steps"] == (row["output_tokens"] if alone else longest)
    assert row["num_preemptions"] == 0
    assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
    assert row["output_tokens_per_s"] == pytest.approx(row["output_tokens"] / row["seconds"])
    assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"] and row["itl_max_s"] > 0
    assert row["peak_memory_bytes"] > 2**20
    assert row["work_bytes"] <= row["steps_bytes"] or milestone == "m0_init"
    if milestone != "m0_init":
        assert row["steps_flops"] >= row["work_flops"] and 0 < row["kv_utilization"] <= 1


def test_preemptions_are_counted(tmp_path):
    report = bench(tmp_path, "throughput", "--milestone", "m3", "--num-requests", "4",
                   "--input-len", "20", "--output-len", "40", "--num-kv-blocks", "8",
                   "--warmup", "0")
    (row,) = report["rows"]
    assert row["num_preemptions"] > 0
    assert row["kv_slots_total"] == 8 * 16
    assert row["steps_flops"] > row["work_flops"]  # what was preempted was computed again


def test_no_two_prompts_of_latency_begin_alike():
    """Else a prefix cache would spare a part of the work, and figures would not compare."""
    passes = LatencyWork((1, 4), 32, 9, (32, 64), seed=3).passes()
    prompts = [
        request.prompt_token_ids
        for one in passes
        for run in range(3)
        for request in one.requests(50_000, run)
    ]
    assert len({tuple(prompt[:8]) for prompt in prompts}) == len(prompts) == 3 * (2 + 8 + 2)


def test_latency_has_a_row_for_each_batch_and_prompt(tmp_path):
    report = bench(tmp_path, "latency", "--milestone", "m2", "--batch-size", "1,3",
                   "--input-len", "6", "--output-len", "5", "--ttft-input-len", "9,30",
                   "--repeat", "1", "--warmup", "0")
    cases = [(r["measure"], r["num_requests"], r["input_len"], r["output_len"])
             for r in report["rows"]]
    assert cases == [("tpot", 1, 6, 5), ("tpot", 3, 6, 5), ("ttft", 1, 9, 1), ("ttft", 1, 30, 1)]
    config = preset_config("tiny-llama")
    step = decode_step_cost(config, 4, batch_size=3, input_len=6, output_len=5)
    assert (report["rows"][1]["work_bytes"], report["rows"][1]["work_flops"]) == (
        step.bytes, step.flops)


@pytest.mark.parametrize("against", [[], ["--against", "hf"]])
def test_quantized_models(tmp_path, against):
    """In 4 bits, groups of 32: 4.625 bits a weight. Transformers get the same, dequantized."""
    work = ["--input-len", "6", "--output-len", "5", "--repeat", "1"]
    report = bench(tmp_path, "latency", "--milestone", "m7", *work, *against,
                   "--ttft-input-len", "9", model="random:tiny-llama-gptq")
    saved = 2 * LAYER_WEIGHTS * 4 * (32 - 4.625) / 32
    config = preset_config("tiny-llama")
    for row in report["rows"]:
        cost = decode_step_cost(config, 4, batch_size=1, input_len=6, output_len=5)
        if row["measure"] == "ttft":
            cost = work_cost(config, 4, [(9, 1)])
        assert row["work_bytes"] == cost.bytes - (saved if row["name"] == "m7_gptq" else 0)
    report = bench(tmp_path, "throughput", "--milestone", "m7", *SMALL_WORK, *against,
                   model="random:tiny-llama-gptq")
    requests = random_requests(5, Lengths(4, 20), Lengths(2, 9), vocab_size=320)
    cost = work_cost(config, 4, [(r.input_len, r.output_len) for r in requests])
    steps = max(request.output_len for request in requests)
    assert report["rows"][0]["work_bytes"] == cost.bytes - steps * saved


def test_the_report_says_where_it_comes_from(tmp_path):
    report = bench(tmp_path, "throughput", "--milestone", "m3", *SMALL_WORK, "--block-size", "32")
    assert list(report) == ["schema", "kind", "command", "work", "options", "rows",
                            "environment", "ceilings"]
    assert report["schema"] == 1 and report["kind"] == "throughput"
    assert "--block-size 32" in report["command"]
    assert report["options"]["m3_paged"]["block_size"] == 32
    assert report["options"]["m3_paged"]["dtype"] == "float32"
    assert report["ceilings"] == {
        "read_bytes_per_s": 10e9, "flops_per_s": 0.1e12, "source": "given"}
    environment = report["environment"]
    assert environment["torch"] == torch.__version__
    for name in ("date", "commit", "uncommitted_changes", "platform", "cpu", "num_cpus", "gpu",
                 "num_threads", "load_average", "python", "triton", "transformers"):
        assert name in environment


def test_every_field_is_documented(tmp_path):
    used = set()
    for kind in ("throughput", "latency"):
        work = SMALL_WORK if kind == "throughput" else ["--output-len", "3", "--repeat", "1"]
        report = bench(tmp_path, kind, "--milestone", "m3", *work, "--warmup", "0")
        used |= {name for row in report["rows"] for name in row}
    assert used == set(FIELDS)


def test_ceilings_can_be_skipped(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert cli.main(["throughput", *SMALL_WORK, *TINY[:4], "--ceilings", "skip",
                     "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["ceilings"] is None
    assert "work_bytes" in report["rows"][0] and "work_roofline_s" not in report["rows"][0]
    assert "ceilings were skipped" in capsys.readouterr().out


def test_milestones_side_by_side_run_in_fresh_processes(tmp_path, capsys):
    report = bench(tmp_path, "throughput", "--milestone", "m1", "--milestone", "m3", *SMALL_WORK,
                   "--block-size", "8")
    assert [row["name"] for row in report["rows"]] == ["m1_basic", "m3_paged"]
    assert report["options"]["m3_paged"]["block_size"] == 8
    assert "block_size" not in report["options"]["m1_basic"]
    assert "speed against m1_basic" in capsys.readouterr().out


# --- against transformers ---------------------------------------------------------------------


def test_against_hf_is_the_same_work(tmp_path, capsys):
    report = bench(tmp_path, "throughput", "--milestone", "m3", *SMALL_WORK, "--against", "hf",
                   "--batch-size", "2")
    ours, theirs = report["rows"]
    assert theirs["name"] == "hf"
    for name in ("prompt_tokens", "output_tokens", "work_bytes", "work_flops"):
        assert theirs[name] == ours[name]
    assert theirs["peak_memory_bytes"] is None
    assert ours["num_running_peak"] == 2  # the engine may run as many at once as a batch of hf has
    assert "speed against m3_paged" in capsys.readouterr().out


def test_latency_against_hf(tmp_path):
    report = bench(tmp_path, "latency", "--milestone", "m1", "--against", "hf", "--batch-size",
                   "1,2", "--input-len", "5", "--output-len", "3", "--ttft-input-len", "7",
                   "--repeat", "1")
    assert [(r["name"], r["measure"]) for r in report["rows"]] == [
        (name, measure) for name in ("m1_basic", "hf") for measure in ("tpot", "tpot", "ttft")]


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
def test_hf_has_the_same_weights_and_generates_what_it_should(model):
    from dev.bench.hf import TransformersSubject, left_padded

    engine = EngineSubject("m1_basic", {"model": f"random:{model}", "device": "cpu"})
    hf = TransformersSubject.beside(engine, batch_size=2)
    config = open_checkpoint(f"random:{model}").config
    requests = random_requests(2, Lengths(5, 20), Lengths(6, 12), vocab_size=config.vocab_size)
    generated = hf._generate(requests, temperature=0.0)
    padded, mask = left_padded([r.prompt_token_ids for r in requests], torch.device("cpu"))
    assert torch.equal(generated[:, : padded.shape[1]], padded)
    assert mask.sum(1).tolist() == [r.input_len for r in requests]
    assert generated.shape[1] == padded.shape[1] + max(r.output_len for r in requests)

    from m1_basic import LLM, SamplingParams

    llm = LLM(f"random:{model}", device="cpu")
    for row, request in zip(generated[:, padded.shape[1] :].tolist(), requests, strict=True):
        params = SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=True)
        (output,) = llm.generate(request.prompt_token_ids, params)
        assert output.outputs[0].token_ids == row[: request.output_len]


# --- misuse -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--milestone", "m9_magic"], "there is no milestone 'm9_magic'"),
        (["--input-len", "5:2"], "a range of lengths goes up"),
        (["--input-len", "2000", "--output-len", "100"], "m3_paged serves at most 2048"),
        (["--num-kv-blocks", "2", *SMALL_WORK, "--output-len", "60"], "serves at most 32"),
        (["--num-requests", "0"], "at least 1"),
        (["--batch-sze", "4"], "unrecognized arguments: --batch-sze"),
        (["--milestone", "m1", "--block-size", "16"], "unrecognized arguments: --block-size"),
        (["--ceilings", "fast"], "give measure, skip, or GB/s"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--temperature", "-1", *SMALL_WORK], "temperature must be"),
        (["--against", "vllm"], "invalid choice: 'vllm'"),
        (["--json", "."], "is a folder"),
        (["--model", "random:tiny-lama"], "did you mean random:tiny-llama"),
    ],
)
def test_misuse_is_a_clear_error(options, message, capsys):
    try:
        code = cli.main(["throughput", *TINY, *options])
    except SystemExit as error:  # argparse's own way
        code = error.code
    assert code == cli.EXIT_USAGE
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_latency_needs_a_second_token(capsys):
    assert cli.main(["latency", *TINY, "--output-len", "1"]) == cli.EXIT_USAGE
    assert "--output-len must be at least 2" in capsys.readouterr().err.replace("\n", " ")


def test_a_milestone_that_cannot_is_found_before_any_runs(capsys, monkeypatch):
    monkeypatch.setattr("dev.bench.session.run_task", lambda task: pytest.fail("it ran"))
    code = cli.main(["throughput", *TINY, *SMALL_WORK, "--milestone", "m1", "--milestone", "m3",
                     "--block-size", "4"])
    assert code == cli.EXIT_USAGE
    assert "block_size must be 8 to 256" in capsys.readouterr().err.replace("\n", " ")
