"""Prompts that begin alike in the bench: what is sent, what could be saved, what is counted."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from rich.console import Console

from dev.bench import cli
from dev.bench.load import FRONTS
from dev.bench.prefix import DEFAULT_WORKLOADS, PrefixPass
from dev.bench.prefix_workloads import WORKLOADS, Sizes, best_hits, prefix_requests
from dev.bench.report import FIELDS, show
from dev.bench.runner import EngineSubject, milestone_names
from dev.bench.serving_fields import CHUNK_FIELDS, HIT_FIELDS, PREFIX_FIELDS, PREFIX_LINES
from dev.bench.workloads import Lengths

SMALL = Sizes(users=5, system_len=64, few_shot_len=96, few_shot_question_len=24, conversations=3,
              turns=3, question_len=20, output_len=16, problem_len=40, depth=3, fan_out=2,
              thought_len=16, hit_len=130, cached_len=96)  # fmt: skip
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SMALL).items()]
PREFIX = ["prefix", "--model", "random:tiny-llama", "--device", "cpu", *OPTIONS, "--repeat", "1",
          "--warmup", "0"]
# Whole blocks of 16 that an earlier request had, by prompt tokens, of the sizes above.
BEST = {
    "shared-system": (4 * 64, 5 * 84),
    "few-shot": (4 * 96, 5 * 120),
    # The second turn finds 35 tokens, the third 71; their last ones are in no full block.
    "multi-turn": (3 * (32 + 64), 3 * (20 + 56 + 92)),
    # 42 tokens and 16 of a thought; 2 and 16 more; 2. All but the first have 32 of the problem, the
    # second level has 57 of what stands before, the third 75.
    "tree-of-thoughts": (1 * 32 + 4 * 48 + 8 * 64, 2 * 42 + 4 * 60 + 8 * 78),
    "hit": (96, 130 + 96 + 130),
    "none": (0, 5 * 84),
}


def bench(tmp_path, *options: str) -> dict:
    """Run the command line and read its JSON."""
    file = tmp_path / "bench.json"
    assert cli.main([*options, "--json", str(file)]) == cli.EXIT_OK
    return json.loads(file.read_text())


def small_pass(workload: str, front: str = "sync") -> PrefixPass:
    anything = Lengths(1, 1)
    return PrefixPass(workload, 0, anything, anything, workload=workload, sizes=SMALL, front=front)


# --- what is sent -------------------------------------------------------------------------------


def test_sizes_are_those_of_an_h200():
    lengths = {
        name: [(r.input_len, r.output_len) for r in prefix_requests(name, Sizes(), vocab_size=9)]
        for name in WORKLOADS
    }
    assert lengths["shared-system"] == lengths["none"] == [(2048 + 128, 128)] * 64
    assert lengths["few-shot"] == [(4096 + 256, 16)] * 64
    assert Counter(lengths["multi-turn"]) == {
        (128 + turn * 256, 128): 16 for turn in range(8)
    }
    assert Counter(lengths["tree-of-thoughts"]) == {
        (512 + 8 + level * 72, 64): 4 ** (level + 1) for level in range(4)
    }
    assert lengths["hit"] == [(8192, 1), (7936, 1), (8192, 1)]


def test_lengths_are_scaled_and_numbers_are_not():
    assert Sizes().scaled(1) == Sizes()
    small = Sizes().scaled(1 / 128)
    assert (small.system_len, small.hit_len, small.thought_len) == (16, 64, 1)
    assert (small.users, small.turns, small.depth) == (64, 8, 4)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_runs_and_workloads_have_nothing_in_common(workload):
    """And who waits for another one stands behind it, so that a warm-up can be a part."""
    firsts = [
        tuple(prefix_requests(name, SMALL, vocab_size=320, run=run)[0].prompt_token_ids[:16])
        for name in WORKLOADS
        for run in range(3)
    ]
    assert len(set(firsts)) == len(firsts)
    same = [prefix_requests(workload, SMALL, vocab_size=320, seed=4, run=1) for _ in range(2)]
    assert same[0] == same[1]
    for place, request in enumerate(same[0]):
        assert request.after is None or request.after < place


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_who_waits_goes_on_from_the_answer(workload, front):
    subject = EngineSubject("m6_prefix", {"model": "random:tiny-llama", "device": "cpu"})
    one = small_pass(workload, front)
    requests = one.requests(320, run=1)
    run = one.run(subject, requests)
    arrivals = [metrics.arrival_time for metrics in run.metrics]
    in_order = sorted(range(len(requests)), key=arrivals.__getitem__)
    served = dict(zip(in_order, run.served, strict=True))
    for place, request in enumerate(requests):
        prompt, answer = served[place]
        assert (len(prompt), len(answer)) == (request.input_len, request.output_len)
        assert prompt[request.context_len :] == request.prompt_token_ids
        if request.after is None:
            assert arrivals[place] == arrivals[0]
            continue
        assert arrivals[place] >= run.metrics[request.after].finished_time
        before = [token for part in served[request.after] for token in part]
        assert prompt[: request.context_len] == before[: request.context_len]


# --- what could be saved --------------------------------------------------------------------------


def test_the_best_are_whole_blocks_of_who_came_before():
    story = list(range(100, 130))
    assert best_hits([], 4).num_tokens == 0
    assert best_hits([(story, [1])], 4).num_requests == 0
    # The last token is computed: 7 blocks of 30 tokens, 7 of 29 and 6 of 28.
    for length, found in ((30, 28), (29, 28), (28, 24), (4, 0), (5, 4)):
        best = best_hits([(story, [1]), (story[:length], [1])], 4)
        assert (best.num_tokens, best.num_requests) == (found, int(found > 0))
    assert best_hits([(story[:9], [1]), (story, [1])], 4).num_tokens == 8
    assert best_hits([(story, [1]), (story[1:], [1])], 4).num_tokens == 0
    # Of an answer all but the last token are in the cache.
    for answer, found in (([7, 8], 28), ([7, 8, 9], 32)):
        turn = [*story, *answer, 1, 2, 3, 4]
        assert best_hits([(story, answer), (turn, [5])], 4).num_tokens == found


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict]:
    """All workloads with an index of each kind, and with the milestone that has none."""
    everything = [f"--workload={name}" for name in WORKLOADS]
    folder = tmp_path_factory.mktemp("reports")
    return {
        name: bench(folder, *PREFIX, *everything, *options, "--quiet")
        for name, options in (
            ("tree", ["--milestone", "m6"]),
            ("hash", ["--milestone", "m6", "--prefix-index", "hash", "--front", "sync"]),
            ("off", ["--milestone", "m5"]),
        )
    }


@pytest.mark.parametrize("place", range(len(WORKLOADS)))
def test_rows_count_requests_and_tokens(reports, place):
    workload = tuple(WORKLOADS)[place]
    requests = small_pass(workload).requests(320, run=1)
    for report in reports.values():
        row = report["rows"][place]
        assert (row["workload"], row["num_requests"]) == (workload, len(requests))
        assert row["prompt_tokens"] == sum(request.input_len for request in requests)
        assert row["output_tokens"] == sum(request.output_len for request in requests)
        assert row["ttft_p50_s"] <= row["ttft_p99_s"] <= row["seconds"]
        assert row["best_hit_token_share"] == BEST[workload][0] / BEST[workload][1]
        assert row["num_blocks_evicted"] == row["num_preemptions"] == 0


@pytest.mark.parametrize("place", range(len(WORKLOADS)))
def test_what_is_found_is_the_best_there_is(reports, place):
    """The table of hashes finds whole blocks and the tree parts of blocks besides."""
    workload = tuple(WORKLOADS)[place]
    hashed, tree, off = (reports[name]["rows"][place] for name in ("hash", "tree", "off"))
    assert (hashed["prefix_index"], tree["prefix_index"], off["prefix_index"]) == (
        "hash", "tree", "off")
    assert off["tokens_saved"] == off["hit_token_share"] == off["index_nodes"] == 0
    assert hashed["tokens_saved"] == BEST[workload][0]
    assert tree["tokens_saved"] >= hashed["tokens_saved"]
    for row in (hashed, tree):
        assert row["hit_request_share"] == row["best_hit_request_share"]
        assert row["hit_token_share"] == row["tokens_saved"] / row["prompt_tokens"]
        if workload != "none":
            assert row["share_of_best"] == pytest.approx(row["tokens_saved"] / BEST[workload][0])


def test_what_does_not_fit_is_evicted(tmp_path):
    """Five prompts of 84 tokens in room for three: 25 full blocks, of which 20 can stay."""
    report = bench(tmp_path, *PREFIX, "--milestone", "m6", "--workload", "none",
                   "--num-kv-blocks", "20")
    (row,) = report["rows"]
    assert row["num_blocks_evicted"] > 0 and row["index_blocks"] <= 20


def test_every_field_is_documented(reports):
    for report in reports.values():
        assert report["kind"] == "prefix" and report["ceilings"] is None
        for row in report["rows"]:
            own = set(PREFIX_FIELDS) - ({"share_of_best"} if row["workload"] == "none" else set())
            own |= set(HIT_FIELDS) if row["workload"] == "hit" else set()
            assert own <= set(row) <= {*own, *FIELDS, *CHUNK_FIELDS}
    shown = {field for _, field, _ in PREFIX_LINES}
    assert shown <= {*FIELDS, *PREFIX_FIELDS, *HIT_FIELDS, *CHUNK_FIELDS}


def test_workloads_are_shown_one_after_the_other(reports, capsys):
    both = reports["off"] | {"rows": reports["off"]["rows"] + reports["tree"]["rows"]}
    show(both, Console(width=200))
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line in WORKLOADS] == list(WORKLOADS)
    assert shown.count("speed against m5_chunked") == len(WORKLOADS)
    assert shown.count("uncached: TTFT") == 1


def test_four_workloads_unless_others_are_asked_for():
    args = cli.parse([*PREFIX, "--milestone", "m6", "--scale", "0.5"])
    (task,) = cli.tasks(args)
    assert task.work.workloads == DEFAULT_WORKLOADS
    assert task.work.sizes == SMALL.scaled(0.5)
    assert [one.workload for one in task.work.passes()] == list(DEFAULT_WORKLOADS)
    assert task.schedule.repeat == 1


@pytest.mark.parametrize("milestone", [name for name in milestone_names() if name < "m5"])
def test_milestones_before_can_do_the_same_work(tmp_path, milestone):
    report = bench(tmp_path, *PREFIX, "--milestone", milestone, "--workload", "tree-of-thoughts")
    (row,) = report["rows"]
    assert row["best_hit_token_share"] == pytest.approx(
        BEST["tree-of-thoughts"][0] / BEST["tree-of-thoughts"][1]
    )
    assert row["tokens_saved"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workload", "chat"], "invalid choice: 'chat'"),
        (["--cached-len", "130"], "--cached-len must be less than --hit-len (130)"),
        (["--scale", "0"], "a number above 0"),
        (["--turns", "0"], "at least 1"),
        (["--turns", "90"], "serves at most 2048"),
        (["--against", "hf"], "unrecognized arguments: --against"),
    ],
)
def test_misuse_is_a_clear_error(options, message, capsys):
    try:
        code = cli.main([*PREFIX, "--milestone", "m6", *options])
    except SystemExit as error:  # argparse's own way
        code = error.code
    assert code == cli.EXIT_USAGE
    assert message in capsys.readouterr().err.replace("\n", " ")
