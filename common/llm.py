"""``LLM``: the offline face of an engine, the same in every milestone.

    from m3_paged import LLM, SamplingParams
    llm = LLM("Qwen/Qwen3-0.6B", max_num_seqs=64)
    for output in llm.generate(["The sky is", "One, two,"], SamplingParams(max_tokens=16)):
        print(output.outputs[0].text)

A milestone sets ``engine_class`` and ``config_class``; everything here goes through the engine's
public methods, so an ``LLM`` knows nothing that a user of ``LLMEngine`` could not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from common.config import ModelConfig
from common.engine_config import BaseEngineConfig
from common.outputs import RequestOutput
from common.processor import ChatMessage, Prompt, is_chat
from common.sampling_params import RequestOutputKind, SamplingParams
from common.tokenizer import Tokenizer

if TYPE_CHECKING:
    from common.trace import Trace


class Engine(Protocol):
    """What every milestone's ``LLMEngine`` can do."""

    config: BaseEngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    trace: Trace | None

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> None: ...
    def abort_request(self, request_id: str) -> RequestOutput | None: ...
    def has_unfinished_requests(self) -> bool: ...
    def step(self) -> list[RequestOutput]: ...
    def stats(self) -> dict[str, Any]: ...


class LLM:
    """A model ready to generate.

    Args:
        model: what to load; see ``common.checkpoint``. None takes the default model.
        **options: fields of the milestone's ``EngineConfig``, by name.

    Raises:
        ValueError: unknown model, unknown option, or a value this machine cannot serve.
    """

    engine_class: ClassVar[type]
    config_class: ClassVar[type[BaseEngineConfig]]

    def __init__(self, model: str | None = None, **options: Any) -> None:
        if model is not None:
            options["model"] = model
        self.engine: Engine = self.engine_class(self.config_class.from_options(**options))
        self._num_submitted = 0
        self._undelivered: list[RequestOutput] = []  # of streams that wait for their users

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Generate for all prompts; results come in the order of the prompts.

        Args:
            prompts: one prompt or a list of them. A prompt is a str, a list of token ids or a list
                of chat messages (to which the model's chat template is applied).
            sampling_params: one for all, or one per prompt; the default is ``SamplingParams()``.
            priority: one integer per prompt, lower runs earlier.
            progress: show a progress bar.

        Raises:
            ValueError: a prompt or its parameters cannot be served. The message names its place
                in the list; nothing has been started then, and the engine stays usable.
        """
        batch = _as_prompts(prompts)
        params = _per_prompt(sampling_params, len(batch))
        if priority is not None and len(priority) != len(batch):
            raise ValueError(f"{len(batch)} prompts but {len(priority)} priorities: give one each")
        request_ids = self._submit(batch, params, priority, RequestOutputKind.FINAL_ONLY)
        outputs = self._outputs(request_ids)
        if progress:
            outputs = _with_progress(outputs, len(batch))
        try:
            finished = {output.request_id: output for output in outputs}
        finally:  # Ctrl-C or an error: leave no request behind in the engine
            self._abort(request_ids)
        return [finished[request_id] for request_id in request_ids]

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """``generate`` for one conversation or a list of them."""
        return self.generate(messages, sampling_params, **options)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Yield a ``RequestOutput`` whenever a request has new tokens (cumulative, as in vLLM,
        unless ``SamplingParams.output_kind`` says otherwise).

        ``request_id`` is the prompt's place in the list, as a str. Leaving the loop early aborts
        what is still running.
        """
        batch = _as_prompts(prompts)
        request_ids = self._submit(batch, _per_prompt(sampling_params, len(batch)), None, None)
        places = {request_id: str(place) for place, request_id in enumerate(request_ids)}
        try:
            for output in self._outputs(request_ids):
                yield replace(output, request_id=places[output.request_id])
        finally:
            self._abort(request_ids)

    def stats(self) -> dict[str, Any]:
        """The engine's counters; see ``common.metrics.EngineStats``."""
        return self.engine.stats()

    def _submit(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priority: Sequence[int] | None,
        output_kind: RequestOutputKind | None,
    ) -> list[str]:
        request_ids: list[str] = []
        for place, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            request_id = str(self._num_submitted)
            self._num_submitted += 1
            if output_kind is not None:
                own = replace(own, output_kind=output_kind)
            try:
                self.engine.add_request(
                    request_id, prompt, own, 0 if priority is None else priority[place]
                )
            except BaseException as error:
                self._abort(request_ids)
                if not isinstance(error, ValueError):
                    raise
                where = f"prompt {place}: " if len(prompts) > 1 else ""
                raise ValueError(f"{where}{error}") from error
            request_ids.append(request_id)
        return request_ids

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.engine.abort_request(request_id)  # no effect on one that has finished
        self._deliver(request_ids)

    def _outputs(self, request_ids: list[str]) -> Iterator[RequestOutput]:
        """Step until these requests have finished, and yield their outputs.

        A stream whose user pauses to call ``generate`` has requests in the same engine; what a
        step says about these is kept for it.
        """
        unfinished = set(request_ids)
        while unfinished and (self._undelivered or self.engine.has_unfinished_requests()):
            for output in self._deliver(request_ids):
                if output.finished:
                    unfinished.discard(output.request_id)
                yield output
            if unfinished:
                self._undelivered += self.engine.step()

    def _deliver(self, request_ids: list[str]) -> list[RequestOutput]:
        """Take the outputs of these requests out of those that nobody has seen yet."""
        if not self._undelivered:  # as after most steps
            return []
        wanted = set(request_ids)
        ours = [output for output in self._undelivered if output.request_id in wanted]
        self._undelivered = [each for each in self._undelivered if each.request_id not in wanted]
        return ours


def _with_progress(outputs: Iterator[RequestOutput], total: int) -> Iterator[RequestOutput]:
    """The same outputs, each of a finished request, beside a progress bar of ``total``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("generating", total=total)
        num_tokens = 0
        for output in outputs:
            num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
            bar.update(task, advance=1, description=f"generating ({num_tokens} tokens)")
            yield output


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whatever was given: a str, a list of ids, a conversation, or many."""
    if isinstance(prompts, str) or is_chat(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError("prompts: a str, a list of token ids, chat messages, or a list of these")
    if prompts and isinstance(prompts[0], int):
        return [prompts]
    return list(prompts)


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise ValueError("sampling_params must be a SamplingParams, or a list with one each")
    if len(params) != num_prompts:
        raise ValueError(
            f"{num_prompts} prompts but {len(params)} sampling_params: give one, or one each"
        )
    return list(params)
