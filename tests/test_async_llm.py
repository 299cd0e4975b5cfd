"""The asynchronous front: tokens, leaving early, errors, threads and loops. Never the clock."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from support import (
    BATCHING,
    GREEDY,
    ROOT,
    assert_cache_is_empty,
    load,
    new_engine,
    new_llm,
    random_prompts,
    tokens,
)

from common.async_llm import AsyncLLM
from common.metrics import RequestMetrics
from common.outputs import CompletionOutput, RequestOutput
from common.sampling_params import RequestOutputKind, SamplingParams

PROMPTS = random_prompts(3, [5, 1, 12, 7])
LONG = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
DELTA = SamplingParams(max_tokens=6, output_kind=RequestOutputKind.DELTA)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """In an event loop of its own; what hangs fails."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout=60))


async def last(stream: Any) -> RequestOutput:
    async for output in stream:
        final = output
    return final


async def until(condition: Any) -> None:
    """Wait for what another thread is about to do."""
    while not condition():
        await asyncio.sleep(0.001)


class FakeEngine:
    """Each step gives every request the next number; with a gate, one step for each opening."""

    def __init__(self, gated: bool = False) -> None:
        self.gate = threading.Semaphore(0) if gated else None
        self.requests: dict[str, tuple[SamplingParams, list[int], RequestMetrics]] = {}
        self.aborted: list[str] = []
        self.priorities: dict[str, int] = {}
        self.num_questions = 0
        self.num_begun = 0  # steps
        self.failure: BaseException | None = None

    def add_request(self, request_id, prompt, params, priority=0):
        if request_id in self.requests:
            raise ValueError(f"request id {request_id!r} is in use")
        self.requests[request_id] = params, [], RequestMetrics()
        self.priorities[request_id] = priority

    def abort_request(self, request_id):
        if request_id not in self.requests:
            return None
        self.aborted.append(request_id)
        return self._output(request_id, 0, "abort")

    def has_unfinished_requests(self):
        self.num_questions += 1
        return bool(self.requests)

    def step(self):
        self.num_begun += 1
        if self.gate is not None:
            assert self.gate.acquire(timeout=30)
        if self.failure is not None:
            raise self.failure
        outputs = []
        for request_id, (params, token_ids, _) in list(self.requests.items()):
            token_ids.append(len(token_ids))
            ended = len(token_ids) == params.max_tokens
            outputs.append(self._output(request_id, 1, "length" if ended else None))
        return outputs

    def stats(self):
        return {"num_steps": self.num_begun}

    def _output(self, request_id, num_new, reason):
        params, token_ids, metrics = self.requests[request_id]
        if params.output_kind is RequestOutputKind.DELTA:
            shown = token_ids[len(token_ids) - num_new :]
        else:
            shown = list(token_ids)
        if reason is not None:
            del self.requests[request_id]
        sample = CompletionOutput(0, "".join(map(str, shown)), shown, finish_reason=reason)
        return RequestOutput(request_id, None, [1], [sample], reason is not None, metrics)


# --- what comes out -----------------------------------------------------------------------------


def test_tokens_are_those_of_the_offline_face(milestone):
    offline = new_llm(milestone).generate(PROMPTS, GREEDY)
    engine = new_engine(milestone)

    async def serve():
        async with AsyncLLM(engine) as llm:
            streams = (last(llm.generate(prompt, GREEDY)) for prompt in PROMPTS)
            return await asyncio.gather(*streams)

    assert [tokens(output) for output in run(serve())] == [tokens(output) for output in offline]
    assert_cache_is_empty(engine)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_each_output_holds_what_was_asked_for(kind):
    params = SamplingParams(
        temperature=0.0, max_tokens=9, n=2, ignore_eos=True, logprobs=1, output_kind=kind
    )
    (offline,) = new_llm("m4_flash").generate([PROMPTS[0]], params)

    async def serve():
        async with AsyncLLM(new_engine("m4_flash")) as llm:
            return [output async for output in llm.generate(PROMPTS[0], params)]

    outputs = run(serve())
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for place, wanted in enumerate(offline.outputs):
        samples = [output.outputs[place] for output in outputs]
        if kind is RequestOutputKind.DELTA:
            assert "".join(sample.text for sample in samples) == wanted.text
            assert [t for sample in samples for t in sample.token_ids] == wanted.token_ids
            assert [entry for sample in samples for entry in sample.logprobs] == wanted.logprobs
        else:
            assert samples[-1].token_ids == wanted.token_ids
            lengths = [len(sample.token_ids) for sample in samples]
            assert lengths == sorted(set(lengths))
            assert len(outputs) == 1 or kind is RequestOutputKind.CUMULATIVE


def test_every_token_is_seen_as_it_comes():
    engine = FakeEngine(gated=True)

    async def serve():
        async with AsyncLLM(engine) as llm:
            seen = []
            engine.gate.release()
            async for output in llm.generate([1], DELTA):
                seen.append(output.outputs[0].token_ids)
                engine.gate.release()
            return seen

    assert run(serve()) == [[i] for i in range(6)]


def test_a_slow_consumer_gets_several_tokens_at_once():
    engine = FakeEngine(gated=True)

    async def serve():
        async with AsyncLLM(engine) as llm:
            stream = llm.generate([1], DELTA)
            engine.gate.release()
            seen = [(await anext(stream)).outputs[0]]
            engine.gate.release(5)
            await until(lambda: not engine.requests)
            await llm.stats()  # whatever was sent before has arrived
            return [*seen, *[output.outputs[0] async for output in stream]]

    first, second = run(serve())
    assert (first.token_ids, first.text, first.finish_reason) == ([0], "0", None)
    assert (second.token_ids, second.text, second.finish_reason) == (
        [1, 2, 3, 4, 5], "12345", "length")


def test_ids_and_priorities_are_handed_on():
    engine = FakeEngine()

    async def serve():
        async with AsyncLLM(engine) as llm:
            named = await last(llm.generate([1], DELTA, "mine", priority=-3))
            return named, await last(llm.generate([1])), await last(llm.generate([1]))

    outputs = run(serve())
    assert outputs[0].request_id == "mine" and engine.priorities["mine"] == -3
    assert len({output.request_id for output in outputs}) == 3


def test_a_request_arrives_when_its_user_asks():
    """And not at the end of the step that is running then."""
    engine = FakeEngine(gated=True)

    async def serve():
        async with AsyncLLM(engine) as llm:
            first = asyncio.create_task(last(llm.generate([1], DELTA)))
            await until(lambda: engine.num_begun)
            before = time.perf_counter()
            second = asyncio.create_task(last(llm.generate([1], DELTA)))
            await asyncio.sleep(0.01)  # it has asked by now, and the step has not ended
            after = time.perf_counter()
            engine.gate.release(100)
            await first
            return before, (await second).metrics.arrival_time, after

    before, arrival, after = run(serve())
    assert before <= arrival <= after


# --- leaving early ------------------------------------------------------------------------------


async def break_off(stream):
    async for _ in stream:
        break


async def close_it(stream):
    async with contextlib.aclosing(stream):
        await anext(stream)


async def be_cancelled(stream):
    task = asyncio.create_task(last(stream))
    await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def fail(stream):
    with contextlib.suppress(KeyError):
        async for _ in stream:
            raise KeyError


@pytest.mark.parametrize("leave", [break_off, close_it, be_cancelled, fail])
def test_who_leaves_early_takes_the_request_along(milestone, leave):
    engine = new_engine(milestone)

    async def serve():
        async with AsyncLLM(engine) as llm:
            other = asyncio.create_task(last(llm.generate(PROMPTS[2], GREEDY)))
            await leave(llm.generate(PROMPTS[0], LONG))
            outcome = tokens(await other)
            await until(lambda: not engine.has_unfinished_requests())
            return outcome

    assert run(serve()) == tokens(new_llm(milestone).generate([PROMPTS[2]], GREEDY)[0])
    assert engine.stats()["num_generated_tokens"] < 500
    assert_cache_is_empty(engine)


def test_an_id_is_free_again_once_its_user_has_left():
    engine = FakeEngine(gated=True)

    async def serve():
        async with AsyncLLM(engine) as llm:
            stream = llm.generate([1], DELTA, "same")
            engine.gate.release()
            await anext(stream)
            await stream.aclose()  # the abort waits for the step that is running
            engine.gate.release(100)
            return await last(llm.generate([1], SamplingParams(max_tokens=2), "same"))

    assert run(serve()).outputs[0].token_ids == [0, 1]
    assert engine.aborted == ["same"]


def test_who_stays_to_the_end_aborts_nothing():
    engine = FakeEngine()

    async def serve():
        async with AsyncLLM(engine) as llm:
            async for output in llm.generate([1], DELTA):
                if output.finished:
                    break

    run(serve())
    assert engine.aborted == []


# --- errors -------------------------------------------------------------------------------------


def test_a_bad_request_is_its_callers_business_alone():
    engine = new_engine("m4_flash")
    (wanted,) = new_llm("m4_flash").generate([PROMPTS[0]], GREEDY)

    async def serve():
        async with AsyncLLM(engine) as llm:
            good = asyncio.create_task(last(llm.generate(PROMPTS[0], GREEDY, "good")))
            for prompt, params, message in (
                ([], GREEDY, "the prompt is empty"),
                ([99_999], GREEDY, "outside the vocabulary"),
                ([1], "greedy", "must be SamplingParams"),
            ):
                with pytest.raises(ValueError, match=message):
                    await last(llm.generate(prompt, params))
            return await good

    assert tokens(run(serve())) == tokens(wanted)


def test_an_id_in_use_is_refused_and_its_owner_goes_on():
    engine = FakeEngine(gated=True)

    async def serve():
        async with AsyncLLM(engine) as llm:
            owner = llm.generate([1], DELTA, "same")
            engine.gate.release()
            await anext(owner)
            other = asyncio.create_task(last(llm.generate([1], LONG, "same")))
            await asyncio.sleep(0.01)  # it has asked by now, and the owner has five tokens to go
            engine.gate.release(100)
            with pytest.raises(ValueError, match="'same' is in use"):
                await other
            return await last(owner)

    assert run(serve()).finished
    assert engine.aborted == []


def test_a_failing_step_reaches_everyone_and_whoever_comes_later():
    engine = FakeEngine(gated=True)

    async def serve():
        llm = AsyncLLM(engine)
        tasks = [asyncio.create_task(last(llm.generate([1], LONG))) for _ in range(3)]
        await until(lambda: engine.num_begun)
        engine.gate.release(2)
        await until(lambda: engine.num_begun == 3)
        engine.failure = ZeroDivisionError("no more")
        engine.gate.release()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"failed in a step .* no more"):
                await last(llm.generate([1], LONG))
        assert await llm.stats() == {"num_steps": 3}
        await llm.aclose()
        return errors

    errors = run(serve())
    assert len({id(error) for error in errors}) == 3  # a traceback each
    for error in errors:
        assert isinstance(error, RuntimeError) and "ZeroDivisionError: no more" in str(error)
        assert error.__cause__ is engine.failure
    assert len(engine.aborted) == 3  # whoever takes the engine over finds it empty


# --- the end ------------------------------------------------------------------------------------


def test_closing_aborts_what_is_left_and_says_so():
    engine = new_engine("m4_flash")

    async def serve():
        llm = AsyncLLM(engine)
        streams = [llm.generate(prompt, LONG) for prompt in PROMPTS]
        for stream in streams:
            await anext(stream)
        tasks = [asyncio.create_task(last(stream)) for stream in streams]
        await llm.aclose()
        await llm.aclose()
        with pytest.raises(RuntimeError, match="is closed"):
            await last(llm.generate(PROMPTS[0], GREEDY))
        assert (await llm.stats())["num_requests_finished"] == 4
        return await asyncio.gather(*tasks)

    for output in run(serve()):
        assert output.finished and output.outputs[0].finish_reason == "abort"
        assert len(output.outputs[0].token_ids) > 0
    assert_cache_is_empty(engine)
    assert all(thread.name != "engine" for thread in threading.enumerate())


def test_the_engine_can_be_taken_over():
    engine = new_engine("m4_flash")

    async def serve():
        async with AsyncLLM(engine) as llm:
            return tokens(await last(llm.generate(PROMPTS[0], GREEDY)))

    assert run(serve()) == run(serve())


def test_nobody_is_forgotten_when_it_closes():
    """Requests that come while the thread ends are served, aborted or refused: none hangs."""
    engine = FakeEngine()

    async def serve():
        llm = AsyncLLM(engine)
        tasks = [asyncio.create_task(last(llm.generate([1], LONG))) for _ in range(5)]
        closing = asyncio.create_task(llm.aclose())
        for _ in range(20):
            tasks.append(asyncio.create_task(last(llm.generate([1], LONG))))
            await asyncio.sleep(0)
        await closing
        return await asyncio.gather(*tasks, return_exceptions=True)

    for outcome in run(serve()):
        refused = isinstance(outcome, RuntimeError) and "is closed" in str(outcome)
        assert refused or outcome.finished


def test_a_forgotten_front_leaves_no_thread():
    llm = AsyncLLM(FakeEngine())
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "engine"]
    del llm
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_the_process_ends_in_peace():
    """Also in the midst of an answer that nobody waits for any more."""
    program = """
import asyncio
from common.async_llm import AsyncLLM
from m4_flash import EngineConfig, LLMEngine, SamplingParams

llm = AsyncLLM(LLMEngine(EngineConfig("random:tiny-llama", device="cpu")))
stream = llm.generate([1, 2], SamplingParams(max_tokens=2000, ignore_eos=True))
loop = asyncio.new_event_loop()
loop.run_until_complete(anext(stream))
"""
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr


def test_the_thread_sleeps_while_there_is_nothing_to_do():
    engine = FakeEngine()

    async def serve():
        async with AsyncLLM(engine) as llm:
            await last(llm.generate([1], DELTA))
            await llm.stats()
            before = engine.num_questions, engine.num_begun
            await asyncio.sleep(0.05)
            return before

    num_questions, num_begun = run(serve())
    # It may still have been on its way to the queue, and it is asked once more to stop.
    assert engine.num_questions <= num_questions + 2 and engine.num_begun == num_begun == 6


# --- loops and threads ----------------------------------------------------------------------------


def test_one_event_loop_after_another():
    engine = new_engine("m4_flash")
    llm = AsyncLLM(engine)
    first = run(last(llm.generate(PROMPTS[0], GREEDY)))
    second = run(last(llm.generate(PROMPTS[0], GREEDY)))
    assert tokens(first) == tokens(second)
    run(llm.aclose())
    assert_cache_is_empty(engine)


def test_several_event_loops_at_the_same_time():
    llm = AsyncLLM(new_engine("m4_flash"))
    wanted = [tokens(output) for output in new_llm("m4_flash").generate(PROMPTS, GREEDY)]
    results: dict[int, Any] = {}

    def user(place):
        results[place] = tokens(run(last(llm.generate(PROMPTS[place], GREEDY))))

    threads = [threading.Thread(target=user, args=(place,)) for place in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(llm.aclose())
    assert [results[place] for place in range(len(PROMPTS))] == wanted


def test_requests_of_a_loop_that_was_closed_are_dropped():
    engine = FakeEngine()
    llm = AsyncLLM(engine)
    loop = asyncio.new_event_loop()
    stream = llm.generate([1], SamplingParams(max_tokens=10**9))
    loop.run_until_complete(anext(stream))
    loop.close()  # without a word to the stream, as no good program does

    async def serve():
        await until(lambda: not engine.requests)
        output = await last(llm.generate([1], SamplingParams(max_tokens=3)))
        await llm.aclose()
        return output

    assert run(serve()).outputs[0].token_ids == [0, 1, 2]
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("milestone", BATCHING)
def test_many_users_who_come_and_go(milestone):
    """Whatever the others do, who stays gets the tokens that were due."""
    engine = new_engine(milestone, max_num_seqs=4)
    draw = random.Random(7)
    prompts = random_prompts(11, [draw.randint(1, 30) for _ in range(30)])
    wanted = [tokens(output) for output in new_llm(milestone).generate(prompts, GREEDY)]
    patience = [draw.choice([1, 2, 5, None, None]) for _ in prompts]

    async def user(llm, place):
        await asyncio.sleep(draw.random() * 0.05)
        async with contextlib.aclosing(llm.generate(prompts[place], GREEDY)) as stream:
            num_seen = 0
            async for output in stream:
                num_seen += 1
                if output.finished:
                    return tokens(output)
                if num_seen == patience[place]:
                    return None

    async def serve():
        async with AsyncLLM(engine) as llm:
            return await asyncio.gather(*(user(llm, place) for place in range(len(prompts))))

    for place, outcome in enumerate(run(serve())):
        assert outcome in ((wanted[place], None) if patience[place] else (wanted[place],))
    assert_cache_is_empty(engine)


def test_sampling_params_are_the_milestones_own():
    assert load("m4_flash").SamplingParams is SamplingParams
