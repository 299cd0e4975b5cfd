"""The recorder against the engine that it watches: nothing is missing, changed or made up."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import (
    BATCHING,
    MILESTONES,
    new_engine,
    random_prompts,
    run_to_end,
    small_cache,
    tokens,
)

from common.sampling_params import SamplingParams
from common.trace import Trace
from common.trace_parts import ChunkReasons
from dev.bench import cli as bench_cli
from dev.trace.reader import read_trace
from dev.trace.story import Life, State, tell

CHUNKED = tuple(name for name in MILESTONES if name >= "m5")
PREFIXED = tuple(name for name in MILESTONES if name >= "m6")

# Prompts of which some begin alike, some are asked for more than one sample.
COMMON = random_prompts(1, [21])[0]
PROMPTS = [*random_prompts(2, [5, 30, 12]), [*COMMON, 1, 2, 3], [*COMMON, 1, 2, 9, 9], COMMON]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=17),
    SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
    SamplingParams(temperature=0.9, max_tokens=20, n=3, seed=5),
    SamplingParams(temperature=0.0, max_tokens=24),
    SamplingParams(temperature=0.7, max_tokens=9, n=2, seed=6, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True),
]


def options(milestone: str, **more) -> dict:
    """An engine that has to preempt, and to cut prompts where it can."""
    limits = small_cache(milestone, 128) | {"max_model_len": 64}
    if milestone >= "m5":
        limits |= {"max_num_batched_tokens": 16, "max_num_seqs": 12}
    return limits | more


class Watched:
    """An engine whose queues and tables are noted right after each schedule, beside the trace."""

    def __init__(self, milestone: str, path: Path | None, **more) -> None:
        self.engine = new_engine(milestone, **options(milestone, **more))
        self.tables: list[dict[tuple[str, int], list[int]]] = []
        self.queues: list[tuple[int, int]] = []
        self.trees: list[set[tuple]] = []
        self.trace = None
        if path is not None:
            self.trace = Trace(path)
            self.trace.attach(self.engine)
        if hasattr(self.engine, "scheduler"):
            self._schedule = self.engine.scheduler.schedule
            self.engine.scheduler.schedule = self.schedule

    def schedule(self):
        step = self._schedule()
        scheduler = self.engine.scheduler
        if step is not None:
            cache = scheduler.kv_cache
            of = cache.table if hasattr(cache, "table") else lambda r: [cache.slot(r)]
            self.tables.append({(r.request_id, r.index): list(of(r)) for r in scheduler.running})
            self.queues.append((len(scheduler.running), len(scheduler.waiting)))
        return step

    def serve(self):
        """Requests that come in two parts, one of which is given up."""
        outputs = {}
        for place in range(4):
            self.engine.add_request(str(place), PROMPTS[place], PARAMS[place])
        for _ in range(6):
            self.step(outputs)
        for place in range(4, 6):
            self.engine.add_request(str(place), PROMPTS[place], PARAMS[place], priority=-place)
        self.engine.add_request("given up", PROMPTS[0], PARAMS[3])
        for _ in range(3):
            self.step(outputs)
        outputs["given up"] = self.engine.abort_request("given up")
        while self.engine.has_unfinished_requests():
            self.step(outputs)
        self.step(outputs)  # nothing to do: leaves no line
        if self.trace is not None:
            self.trace.close()
        return {request_id: tokens(output) for request_id, output in outputs.items()}

    def step(self, outputs):
        outputs |= {output.request_id: output for output in self.engine.step()}
        index = getattr(getattr(self.engine, "scheduler", None), "kv_cache", None)
        index = getattr(index, "index", None)
        if index is not None:
            self.trees.append({(parent, *blocks) for parent, blocks in index.snapshot()})


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """``traced(milestone)``: the watched engine, what it answered, and its trace; run once."""
    runs = {}

    def run(milestone: str):
        if milestone not in runs:
            path = tmp_path_factory.mktemp("trace") / f"{milestone}.jsonl"
            watched = Watched(milestone, path)
            answers = watched.serve()
            trace = read_trace(path)
            runs[milestone] = watched, answers, trace, tell(trace)
        return runs[milestone]

    return run


def life_of(lives: list[Life], request_id: str, sample: int = 0) -> Life:
    return next(x for x in lives if (x.request.id, x.request.sample) == (request_id, sample))


# --- what it records --------------------------------------------------------------------------


def test_tokens_are_the_same_with_and_without_a_trace(milestone, traced):
    watched, answers, _, _ = traced(milestone)
    untraced = Watched(milestone, None)
    assert untraced.serve() == answers
    ours, theirs = watched.engine.stats(), untraced.engine.stats()
    for name in ("num_steps", "num_preemptions", "num_generated_tokens", "num_prompt_tokens"):
        assert ours[name] == theirs[name], name


def test_tokens_of_each_request_add_up(milestone, traced):
    """What was computed and sampled, by the trace, is what came out."""
    _, answers, trace, lives = traced(milestone)
    assert len(lives) == sum(len(samples) for samples in answers.values())
    for life in lives:
        output = answers[life.request.id][life.request.sample]
        assert life.ending is not None
        assert life.ending.num_output_tokens == len(output)
        overruns = sum(span.state is State.OVERRUN for span in life.spans)
        if life.request.id == "given up":
            assert life.ending.reason == "abort"
            assert life.num_sampled - len(output) in (0, 1)  # one may have been under way
        else:
            assert life.num_sampled - overruns == len(output)
            if not life.num_preemptions and milestone >= "m1" and output:
                # Every token but the last one has gone through the model, or was shared.
                cached = sum(num_tokens for _, num_tokens in life.hits)
                forked = any(span.state is State.FORKED for span in life.spans)
                shared = life.request.num_prompt_tokens if forked else cached
                needed = life.request.num_prompt_tokens + len(output) - 1
                assert life.num_computed + shared - overruns == needed
    assert trace.is_complete
    assert not trace.is_cut
    assert trace.notes == []


def test_counts_are_those_of_the_engine(milestone, traced):
    watched, _, trace, lives = traced(milestone)
    stats = watched.engine.stats()
    steps = [frame for frame in trace.frames if frame.step is not None]
    assert [frame.step for frame in steps] == list(range(stats["num_steps"]))
    assert sum(frame.num_sampled for frame in steps) == stats["num_generated_tokens"]
    if milestone >= "m1":
        chunks = sum(chunk.end - chunk.start for frame in steps for chunk in frame.chunks)
        assert chunks == stats["num_prompt_tokens"]
    assert sum(life.num_preemptions for life in lives) == stats["num_preemptions"]
    assert sum(len(frame.preempted) for frame in steps) == stats["num_preemptions"]
    if milestone >= "m2":
        assert stats["num_preemptions"] > 0, "nothing was preempted: the test shows too little"
    used = [frame.kv_used for frame in steps]
    assert max(used) == stats["kv_slots_used_peak"]
    assert max(frame.kv_allocated for frame in steps) == stats["kv_slots_allocated_peak"]
    assert [read for frame in trace.frames for read in frame.read] == list(range(len(steps)))


@pytest.mark.parametrize("milestone", BATCHING)
def test_every_block_is_owned_by_whom_the_tables_say(milestone, traced):
    """The differences, put together again, are the tables of the cache after each schedule."""
    watched, _, trace, _ = traced(milestone)
    names = {r.index: (r.id, r.sample) for r in trace.requests}
    steps = [frame for frame in trace.frames if frame.step is not None]
    assert len(steps) == len(watched.tables)
    tables: dict[int, list[int]] = {}
    scheduled = iter(zip(watched.tables, watched.queues, strict=True))
    for frame in trace.frames:
        for ending in frame.ended_before:
            tables.pop(ending.request, None)
        for request in frame.preempted:
            tables.pop(request, None)
        for request, num_kept, blocks in frame.tables:
            tables[request] = tables.get(request, [])[:num_kept] + blocks
        if frame.step is not None:
            expected, (num_running, num_waiting) = next(scheduled)
            assert {names[index]: table for index, table in tables.items()} == expected
            assert (frame.running, frame.waiting) == (num_running, num_waiting)
        for ending in frame.ended:
            tables.pop(ending.request, None)
    assert tables == {}
    assert any(frame.copies for frame in trace.frames) == (milestone >= "m3")


@pytest.mark.parametrize("index", ["tree", "hash"])
@pytest.mark.parametrize("milestone", PREFIXED)
def test_the_tree_grows_as_the_index_does(milestone, index, tmp_path):
    watched = Watched(milestone, tmp_path / "t.jsonl", prefix_index=index)
    watched.serve()
    trace = read_trace(tmp_path / "t.jsonl")
    nodes: dict[int, tuple] = {}
    trees = []
    for frame in trace.frames:
        for first in (frame.tree or {}).get("gone", ()):
            del nodes[first]
        for first, parent, blocks in (frame.tree or {}).get("nodes", ()):
            nodes[first] = (None if parent == -1 else parent, *blocks)
        trees.append(set(nodes.values()))
    assert trees == watched.trees[: len(trees)]
    assert any(len(tree) > 2 for tree in trees)
    counters = watched.engine.stats()["prefix_cache"]
    assert {name: counters[name] for name in trace.frames[-1].prefix} == trace.frames[-1].prefix
    assert counters["num_evicted"] > 0, "nothing was evicted: the test shows too little"


@pytest.mark.parametrize("milestone", PREFIXED)
def test_hits_are_those_that_the_index_counted(milestone, traced):
    watched, _, _, lives = traced(milestone)
    counters = watched.engine.stats()["prefix_cache"]
    hits = [num_tokens for life in lives for _, num_tokens in life.hits]
    assert sum(hits) == counters["num_hit_tokens"] > 0
    assert len(hits) == counters["num_hits"]


@pytest.mark.parametrize("milestone", CHUNKED)
def test_reasons_of_chunks_are_those_that_the_scheduler_counted(milestone, traced):
    watched, _, trace, _ = traced(milestone)
    reasons = [chunk.reason for frame in trace.frames for chunk in frame.chunks]
    counted = watched.engine.stats()["chunk_reasons"]
    assert {why: reasons.count(why) for why in counted} == counted
    assert {"prompt", "budget"} <= set(reasons)


def test_limits_end_the_last_chunk_and_blocks_the_others():
    scheduler = SimpleNamespace(chunk_reasons=Counter(prompt=3, itl=1))
    reasons = ChunkReasons(scheduler)
    cut, whole = (None, 0, 4, False), (None, 0, 4, True)
    scheduler.chunk_reasons = Counter(prompt=4, itl=1, blocks=2, budget=1)
    assert reasons.of([cut, whole, cut, cut]) == ["blocks", "prompt", "blocks", "budget"]
    scheduler.chunk_reasons = Counter(prompt=5, itl=2, blocks=2, budget=1)
    assert reasons.of([cut, whole]) == ["itl", "prompt"]
    scheduler.chunk_reasons = Counter(prompt=5, itl=2, blocks=3, budget=1)
    assert reasons.of([cut]) == ["blocks"]


@pytest.mark.parametrize("milestone", CHUNKED)
def test_steps_overlap_in_the_trace_as_they_do(milestone, traced, tmp_path):
    _, _, trace, _ = traced(milestone)
    assert all(frame.read == [frame.step - 1] for frame in trace.frames[1:6])
    assert [frame.step for frame in trace.frames].count(None) >= 1
    watched = Watched(milestone, tmp_path / "t.jsonl", overlap=False)
    watched.serve()
    frames = read_trace(tmp_path / "t.jsonl").frames
    assert all(frame.read == [frame.step] for frame in frames)


def test_times_are_in_order(milestone, traced):
    _, _, trace, lives = traced(milestone)
    last = 0
    for frame in trace.frames:
        times = [last, frame.start, frame.scheduled, frame.launched, frame.read_at, frame.end]
        known = [at for at in times if at is not None]
        assert known == sorted(known)
        last = frame.end
    for life in lives:
        assert life.request.added_at <= life.ending.at <= last + 1_000_000


def test_the_header_says_what_ran(milestone, traced):
    _, _, trace, _ = traced(milestone)
    assert trace.milestone == milestone
    assert trace.header["model"]["name"] == "random:tiny-llama"
    assert trace.header["config"]["max_model_len"] == 64
    assert trace.header["config"]["device"] == "cpu"
    assert trace.header["environment"]["torch"] == torch.__version__
    size, number = trace.frames[0].layout
    assert size * number == (0 if milestone < "m1" else 64 if milestone < "m2" else 128)


@pytest.mark.parametrize("milestone", CHUNKED)
def test_a_step_that_finds_no_memory_is_no_step(milestone, tmp_path, monkeypatch):
    watched = Watched(milestone, tmp_path / "t.jsonl", max_num_batched_tokens=32)
    launch, calls, failed = watched.engine.model_runner.launch, [], []

    def fail_once(step):
        calls.append(step)
        if len(calls) >= 2 and not step.is_decode and not failed:
            failed.append(step)
            raise torch.OutOfMemoryError("no memory")
        return launch(step)

    monkeypatch.setattr(watched.engine.model_runner, "launch", fail_once)
    for place in (1, 3, 5):
        watched.engine.add_request(str(place), PROMPTS[place], PARAMS[place])
    answers = {name: tokens(output) for name, output in run_to_end(watched.engine).items()}
    watched.trace.close()
    trace = read_trace(tmp_path / "t.jsonl")
    assert [f.step for f in trace.frames if f.step is not None] == list(range(len(calls) - 1))
    assert failed
    assert any(frame.requeued for frame in trace.frames)
    for life in tell(trace):
        assert life.ending.num_output_tokens == len(answers[life.request.id][0])


def test_an_id_may_be_used_again(milestone, tmp_path):
    with Trace(tmp_path / "t.jsonl") as trace:
        engine = new_engine(milestone)
        trace.attach(engine)
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        engine.add_request("a", [1, 2, 3], params)
        engine.step()
        engine.abort_request("a")
        engine.add_request("a", [4, 5], params)
        run_to_end(engine)
    first, second = tell(read_trace(tmp_path / "t.jsonl"))
    assert (first.ending.reason, second.ending.reason) == ("abort", "length")
    assert (first.request.num_prompt_tokens, second.request.num_prompt_tokens) == (3, 2)
    assert second.ending.num_output_tokens == 4


def test_text_is_kept_as_it_was_asked_and_said(tmp_path):
    with Trace(tmp_path / "t.jsonl") as trace:
        engine = new_engine("m3_paged")
        trace.attach(engine)
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        engine.add_request("a", "Hello " * 200, params)
        engine.add_request("b", [1, 2], SamplingParams(max_tokens=2, detokenize=False))
        run_to_end(engine)
    a, b = read_trace(tmp_path / "t.jsonl").requests
    assert a.prompt.startswith("Hello Hello") and len(a.prompt) < 410
    assert len(a.pieces) == 5
    assert b.prompt is None and b.pieces is None


# --- how it behaves -----------------------------------------------------------------------------


def test_the_file_is_readable_while_it_is_written(milestone, tmp_path):
    """Whatever happens next, what was done is there."""
    engine = new_engine(milestone)
    trace = Trace(tmp_path / "t.jsonl")
    trace.attach(engine)
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))
    for num_steps in range(1, 4):
        engine.step()
        so_far = read_trace(tmp_path / "t.jsonl")
        assert len(so_far.frames) == num_steps
        assert not so_far.is_complete
        assert "did not end in order" in so_far.notes[0]
    trace.close()


def test_memory_does_not_grow_with_the_requests(milestone, tmp_path):
    engine = new_engine(milestone)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with Trace(tmp_path / "t.jsonl") as trace:
        trace.attach(engine)
        engine.add_request("first", [1, 2, 3], params)
        (request,) = engine.output_processor.requests("first")
        request = weakref.ref(request)
        run_to_end(engine)
        engine.add_request("second", [1, 2, 4], params)
        run_to_end(engine)
        gc.collect()
        assert request() is None


def test_without_a_trace_there_is_none(milestone, tmp_path):
    engine = new_engine(milestone)
    assert engine.trace is None
    with Trace(tmp_path / "t.jsonl") as trace:
        trace.attach(engine)
        assert engine.trace is trace
    assert engine.trace is None


def test_a_trace_begins_in_an_idle_engine(tmp_path):
    engine = new_engine("m3_paged")
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=2))
    with Trace(tmp_path / "t.jsonl") as trace:
        with pytest.raises(ValueError, match="unfinished requests"):
            trace.attach(engine)
        run_to_end(engine)
        trace.attach(engine)
        with pytest.raises(ValueError, match="open another one"):
            trace.attach(engine)


def test_a_full_disk_ends_the_trace_and_not_the_engine(tmp_path, monkeypatch):
    engine = new_engine("m3_paged")
    trace = Trace(tmp_path / "t.jsonl")
    trace.attach(engine)
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))

    class Full:
        closed = False

        def write(self, _text):
            raise OSError("No space left on device")

        def close(self):
            self.closed = True

    monkeypatch.setattr(trace, "_file", Full())
    with pytest.warns(UserWarning, match="No space left"):
        engine.step()
    assert engine.trace is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tokens(run_to_end(engine)["a"])[0]) == 4
        trace.close()


# --- the command lines ---------------------------------------------------------------------------


def run(milestone: str, *argv: str) -> int:
    import importlib

    from common import cli

    module = importlib.import_module(f"{milestone}.run")
    tiny = ["--model", "random:tiny-llama", "--device", "cpu", "--max-tokens", "4"]
    return cli.main(
        module.LLMEngine, module.EngineConfig, module.demonstrate, "test", [*tiny, *argv]
    )


def test_every_run_takes_the_option(milestone, tmp_path, capsys):
    file = tmp_path / "t.jsonl"
    assert run(milestone, "--trace", str(file), "--prompt", "Hi", "--prompt", "Ho") == 0
    trace = read_trace(file)
    assert trace.is_complete
    assert [request.prompt for request in trace.requests] == ["Hi", "Ho"]
    assert all(life.ending for life in tell(trace))


def test_a_place_that_cannot_be_written_to_is_said_at_once(tmp_path, capsys):
    assert run("m3_paged", "--trace", str(tmp_path), "--prompt", "Hi") == 2
    assert str(tmp_path) in capsys.readouterr().err.replace("\n", "")


BENCHES = {
    "throughput": ["--num-requests", "4", "--input-len", "4:9", "--output-len", "3:5"],
    "latency": ["--batch-size", "2", "--input-len", "8", "--output-len", "3", "--repeat", "1"],
    "serve": ["--num-requests", "3", "--input-len", "4:9", "--output-len", "3:5"],
    "mixed": ["--decodes", "2", "--decode-input-len", "4", "--decode-output-len", "40",
              "--prompts", "1", "--prompt-len", "30", "--prompt-output-len", "2",
              "--warmup-tokens", "5", "--tail-tokens", "4", "--repeat", "1"],
    "prefix": ["--workload", "shared-system", "--users", "3", "--system-len", "20",
               "--question-len", "4", "--output-len", "3", "--repeat", "1", "--warmup", "2"],
}  # fmt: skip


@pytest.mark.parametrize("kind", BENCHES)
def test_every_bench_takes_the_option(kind, tmp_path):
    file = tmp_path / "t.jsonl"
    argv = [kind, "--milestone", "m3", "--model", "random:tiny-llama", "--device", "cpu",
            "--quiet", "--trace", str(file), *BENCHES[kind]]  # fmt: skip
    if kind in ("throughput", "latency"):
        argv += ["--ceilings", "skip"]
    assert bench_cli.main(argv) == 0
    trace = read_trace(file)
    assert trace.is_complete
    assert all(life.ending and life.ending.reason == "length" for life in tell(trace))
    assert any("warming up" in text for _, text in trace.marks)


def test_each_milestone_of_a_bench_has_its_own_file(tmp_path):
    args = bench_cli.parse(
        ["throughput", "--milestone", "m1", "--milestone", "m3", "--trace", str(tmp_path / "t.x")]
    )
    names = [task.trace.name for task in bench_cli.tasks(args)]
    assert names == ["t.m1_basic.x", "t.m3_paged.x"]


def test_lines_are_short(tmp_path):
    """A batch that decodes on costs the same line however large it is."""
    sizes = {}
    for batch in (2, 32):
        path = tmp_path / f"{batch}.jsonl"
        engine = new_engine("m3_paged")
        with Trace(path) as trace:
            trace.attach(engine)
            for i in range(batch):
                params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
                engine.add_request(str(i), [1, 2, 3], params)
            run_to_end(engine)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steady = [line for line in lines if line.get("decode") == "same"]
        assert len(steady) >= 8
        sizes[batch] = max(len(json.dumps({**line, "times": 0, "read": 0})) for line in steady[:9])
    assert sizes[32] <= sizes[2] + 8
