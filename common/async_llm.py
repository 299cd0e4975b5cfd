"""``AsyncLLM``: requests from coroutines, at any time, for the engine of any milestone.

    async with AsyncLLM(LLMEngine(EngineConfig("Qwen/Qwen3-0.6B"))) as llm:
        async for output in llm.generate("The sky is", SamplingParams(max_tokens=16)):
            print(output.outputs[0].text)

One thread has the engine to itself. Orders (take this request, drop that one) go in through a queue
and are carried out between two steps; what a step has to say goes out in one callback for each
event loop. The thread waits at the queue while there is nothing to do, and holds no lock ever.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Self

import torch

from common.llm import Engine
from common.outputs import RequestOutput
from common.processor import Prompt
from common.sampling_params import RequestOutputKind, SamplingParams


class AsyncLLM:
    """An engine that any number of coroutines, in any event loop, ask at the same time.

    The engine belongs to this object until ``aclose`` has returned: nobody else may use it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = _EngineThread(engine)
        self._numbers = itertools.count()
        # Who forgets to close it leaves no thread behind.
        weakref.finalize(self, self._thread.stop).atexit = False

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield an output whenever the request has new tokens, as ``params.output_kind`` says.

        A consumer that is slower than the engine gets several steps' tokens in one output. The
        request is submitted when the first output is asked for. To leave early (break, a
        cancelled task, ``aclose`` of the generator) aborts it; the break of a loop does so once
        nobody refers to the generator any more, ``contextlib.aclosing`` does at once.

        Args:
            request_id: comes back in the outputs; by default a new one.
            priority: lower runs earlier.

        Raises:
            ValueError: the request cannot be served, or its id is in use; the others go on.
            RuntimeError: the engine failed in a step, or this object has been closed.
        """
        params = SamplingParams() if params is None else params
        if request_id is None:
            request_id = f"async-{next(self._numbers)}"
        stream = _Stream(request_id, params)
        self._thread.order(partial(self._thread.add, stream, prompt, priority))
        self._thread.check()
        try:
            while not stream.is_drained:
                yield await stream.get()
        finally:
            if not stream.has_ended:
                self._thread.order(partial(self._thread.abort, stream))

    async def stats(self) -> dict[str, Any]:
        """The engine's counters between two steps; see ``common.metrics.EngineStats``."""
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._thread.order(partial(self._thread.report_stats, answer))
        if self._thread.has_ended:  # perhaps too early to see the order; the engine is free now
            return self._engine.stats()
        return await answer

    async def aclose(self) -> None:
        """Abort what is left (its consumers get a last output that says so), stop the thread."""
        self._thread.stop()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


class _Stream:
    """The outputs of one request on their way to the consumer, who is a coroutine of ``loop``.

    The engine's thread reads the public attributes; all else happens in the loop, so there is
    nothing to lock.
    """

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self.loop = asyncio.get_running_loop()
        self.request_id = request_id
        self.params = params
        self.arrival_time = time.perf_counter()  # the engine hears of it after the step it is in
        self.has_ended = False  # the engine has nothing more to say
        self._output: RequestOutput | None = None  # what the consumer has not seen yet
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_drained(self) -> bool:
        """Whether the consumer has seen everything."""
        return self.has_ended and self._output is None and self._error is None

    def put(self, item: RequestOutput | Exception) -> None:
        if isinstance(item, Exception):
            self._error = item
            self.has_ended = True
        else:
            if self._output and self.params.output_kind is RequestOutputKind.DELTA:
                _put_before(self._output, item)
            self._output = item
            self.has_ended = item.finished
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> RequestOutput:
        """The next output, as soon as there is one."""
        while self._output is None:
            if self._error is not None:
                raise self._error
            self._waiter = self.loop.create_future()
            await self._waiter
        output, self._output = self._output, None
        return output


_Mail = tuple[_Stream, RequestOutput | Exception]
_Order = Callable[[], None]


class _EngineThread:
    """Steps the engine while there is work, and carries out orders in between."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Put and get may interrupt each other, also where garbage collection calls ``stop``.
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()  # None: stop
        self._streams: dict[str, _Stream] = {}  # by request id: everyone the engine works for
        self._failure: BaseException | None = None
        self.has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        _threads.add(self)

    # --- for everyone -----------------------------------------------------------------------------

    def order(self, order: _Order) -> None:
        """Have something done between two steps."""
        self._orders.put(order)

    def stop(self) -> None:
        """Abort what is left and end, after the orders given so far."""
        self._orders.put(None)

    def join(self) -> None:
        self._thread.join()

    def check(self) -> None:
        """RuntimeError if the thread has ended. Called after an order: whoever passes knows that
        it was given early enough to be carried out."""
        if self.has_ended:
            raise self._farewell()

    # --- orders, carried out in the thread --------------------------------------------------------

    def add(self, stream: _Stream, prompt: Prompt, priority: int) -> None:
        """Submit a request; what is wrong with it is its consumer's business alone."""
        if self.has_ended:
            self._send([(stream, self._farewell())])
            return
        try:
            self._engine.add_request(stream.request_id, prompt, stream.params, priority)
        except Exception as error:
            self._send([(stream, error)])
        else:
            self._streams[stream.request_id] = stream

    def abort(self, stream: _Stream) -> None:
        """Drop the request of a consumer who has left; its id may have a new owner since."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self._engine.abort_request(stream.request_id)

    def report_stats(self, answer: asyncio.Future[dict[str, Any]]) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits
            answer.get_loop().call_soon_threadsafe(_settle, answer, self._engine.stats())

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._failure = error
            self._let_go()
        self.has_ended = True
        streams, self._streams = self._streams, {}
        self._send([(stream, self._farewell()) for stream in streams.values()])
        with contextlib.suppress(Empty):
            while True:  # orders that came too late
                if order := self._orders.get(block=False):
                    order()

    def _serve(self) -> None:
        engine = self._engine
        device = getattr(engine, "device", None)
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # each thread begins at device 0
        while self._carry_out_orders():
            if engine.has_unfinished_requests():
                self._hand_out(engine.step())
        for request_id in list(self._streams):
            output = engine.abort_request(request_id)
            self._hand_out([] if output is None else [output])

    def _carry_out_orders(self) -> bool:
        """Do what has been ordered, waiting for it if there is nothing to step; False: stop."""
        wait = not self._engine.has_unfinished_requests()
        with contextlib.suppress(Empty):
            while order := self._orders.get(block=wait):
                order()
                wait = False
            return False
        return True

    def _let_go(self) -> None:
        """After a failure: leave no request behind, if the engine is up to that."""
        for request_id in self._streams:
            with contextlib.suppress(Exception):
                self._engine.abort_request(request_id)

    def _hand_out(self, outputs: Iterable[RequestOutput]) -> None:
        mails: list[_Mail] = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # the engine's from before
                continue
            if output.finished:
                del self._streams[output.request_id]
            output.metrics.arrival_time = stream.arrival_time
            mails.append((stream, output))
        self._send(mails)

    def _send(self, mails: list[_Mail]) -> None:
        """One callback for each event loop: waking a loop costs a system call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Mail]] = {}
        for mail in mails:
            by_loop.setdefault(mail[0].loop, []).append(mail)
        for loop, its_mails in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, its_mails)
            except RuntimeError:  # the loop is closed, and all its consumers with it
                for stream, _ in its_mails:
                    self.abort(stream)

    def _farewell(self) -> RuntimeError:
        """What everyone is told who wants something of a thread that has ended."""
        if self._failure is None:
            return RuntimeError("this AsyncLLM is closed: make another one for the engine")
        what = f"{type(self._failure).__name__}: {self._failure}"
        error = RuntimeError(f"the engine failed in a step and serves no one any more: {what}")
        error.__cause__ = self._failure
        return error


_threads: weakref.WeakSet[_EngineThread] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that is in the model when the interpreter goes would take the process down."""
    threads = list(_threads)
    for thread in threads:
        thread.stop()
    for thread in threads:
        thread.join()


def _deliver(mails: list[_Mail]) -> None:
    for stream, item in mails:
        stream.put(item)


def _settle(answer: asyncio.Future[Any], value: object) -> None:
    if not answer.done():
        answer.set_result(value)


def _put_before(earlier: RequestOutput, later: RequestOutput) -> None:
    """Make ``later`` hold what is new in both (of kind DELTA)."""
    for old, new in zip(earlier.outputs, later.outputs, strict=True):
        new.text = old.text + new.text
        new.token_ids = old.token_ids + new.token_ids
        if new.logprobs is not None:
            new.logprobs = (old.logprobs or []) + new.logprobs
