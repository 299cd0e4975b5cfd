"""One run of the command line: submit all prompts, step until done, print what comes.

A prompt that cannot be served is reported with its place and does not keep the others from running.
Ctrl-C ends the run and keeps what is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.llm import Engine
from common.outputs import CompletionOutput, LogprobDict, RequestOutput
from common.processor import Prompt
from common.prompts import PromptLine
from common.sampling_params import RequestOutputKind, SamplingParams


class Printer:
    """Writes results to stdout (as text or as one JSON object) and to a JSONL file."""

    def __init__(
        self, lines: list[PromptLine], *, stream: bool, as_json: bool, output: TextIO | None
    ) -> None:
        self._lines = lines
        self.stream = stream and not as_json
        self._as_json = as_json
        self._output = output
        self._records: dict[int, list[dict[str, Any]]] = {}
        self._num_shown: dict[tuple[int, int], int] = {}  # characters, by place and sample
        self.num_failed = 0
        self.num_done = 0

    def failed(self, place: int, message: str) -> None:
        """Report a prompt that could not be served."""
        self.num_failed += 1
        source = self._lines[place].source
        print(f"error: {source}: {message}", file=sys.stderr)
        self._record(place, [{"index": place, "source": source, "error": message}])

    def streamed(self, place: int, output: RequestOutput) -> None:
        """Print new text: at once when there is one sequence, else line by line with its place."""
        alone = len(self._lines) == 1 and len(output.outputs) == 1
        for sample in output.outputs:
            shown = self._num_shown.get((place, sample.index), 0)
            end = len(sample.text) if alone or sample.finished else sample.text.rfind("\n") + 1
            if end <= shown:
                continue
            self._num_shown[place, sample.index] = end
            if alone:
                print(sample.text[shown:end], end="", flush=True)
            else:
                label = f"[{place}.{sample.index}]" if len(output.outputs) > 1 else f"[{place}]"
                for line in sample.text[shown:end].splitlines():
                    print(label, line, flush=True)
        if alone and output.finished:
            print()

    def finished(self, place: int, output: RequestOutput) -> None:
        """Take in a finished request."""
        self.num_done += 1
        records = [self._describe(place, output, sample) for sample in output.outputs]
        errors = [record["error"] for record in records if "error" in record]
        if errors:
            self.num_failed += 1
            print(f"error: {self._lines[place].source}: {errors[0]}", file=sys.stderr)
        self._record(place, records)

    def finish(self, stats: dict[str, Any]) -> None:
        """Print what was gathered, in the order of the prompts."""
        in_order = [record for place in sorted(self._records) for record in self._records[place]]
        if self._as_json:
            print(json.dumps({"outputs": in_order, "stats": stats}, ensure_ascii=False))
        elif self._output is None and not self.stream:
            served = [record for record in in_order if "text" in record]
            for record in served:
                if len(served) > 1:
                    print(f"--- {record['prompt']}")
                print(record["text"])

    def _record(self, place: int, records: list[dict[str, Any]]) -> None:
        self._records[place] = records
        if self._output is not None:
            for record in records:
                self._output.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._output.flush()

    def _describe(
        self, place: int, output: RequestOutput, sample: CompletionOutput
    ) -> dict[str, Any]:
        record = {
            "index": place,
            "sample": sample.index,
            "prompt": self._lines[place].prompt,
            "text": sample.text,
            "token_ids": sample.token_ids,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "ttft_s": output.metrics.ttft,
            "tpot_s": output.metrics.tpot,
        }
        if sample.logprobs is not None:
            record["cumulative_logprob"] = sample.cumulative_logprob
            record["logprobs"] = [_plain(entry) for entry in sample.logprobs]
        if output.prompt_logprobs is not None:
            record["prompt_logprobs"] = [_plain(entry) for entry in output.prompt_logprobs]
        if sample.finish_reason == "error":
            record["error"] = str(sample.stop_reason)
        return record


class Session:
    """Prompts on their way through an engine.

    Args:
        chat: wrap text prompts as a user's message; None: if the model has a chat template.
    """

    def __init__(
        self,
        engine: Engine,
        lines: list[PromptLine],
        params: SamplingParams,
        *,
        chat: bool | None,
        printer: Printer,
    ) -> None:
        self._engine = engine
        self._lines = lines
        self._params = params
        if chat is None:
            chat = engine.tokenizer is not None and engine.tokenizer.has_chat_template
        self._chat = chat
        self._printer = printer

    def run(self, console: Console) -> bool:
        """Submit everything and step until done; True when Ctrl-C cut it short."""
        places = self._submit()
        show_bar = len(self._lines) > 1 and not self._printer.stream
        try:
            with _progress_bar(console) if show_bar else nullcontext() as bar:
                task = bar.add_task("generating", total=len(places)) if bar else None
                for output in self._outputs():
                    place = places[output.request_id]
                    if self._printer.stream:
                        self._printer.streamed(place, output)
                    if output.finished:
                        self._printer.finished(place, output)
                        if bar:
                            bar.advance(task)
        except KeyboardInterrupt:
            done, total = self._printer.num_done, len(places)
            console.print(f"\ninterrupted: {done} of {total} prompts are done", style="yellow")
            return True
        return False

    def _submit(self) -> dict[str, int]:
        """Queue what can be served; returns the place of each request's prompt."""
        places: dict[str, int] = {}
        stream = self._printer.stream
        kind = RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
        for place, line in enumerate(self._lines):
            if line.error is not None:
                self._printer.failed(place, line.error)
                continue
            try:
                params = replace(self._params, **{**line.overrides, "output_kind": kind})
                self._engine.add_request(str(place), self._prompt(line), params)
            except (ValueError, TypeError) as error:
                self._printer.failed(place, str(error))
            else:
                places[str(place)] = place
        return places

    def _prompt(self, line: PromptLine) -> Prompt:
        if self._chat and isinstance(line.prompt, str):
            return [{"role": "user", "content": line.prompt}]
        return line.prompt

    def _outputs(self) -> Iterable[RequestOutput]:
        while self._engine.has_unfinished_requests():
            yield from self._engine.step()


def _plain(entry: LogprobDict | None) -> list[dict[str, Any]] | None:
    """Log-probabilities at one position, as JSON has them."""
    if entry is None:
        return None
    return [{"token_id": token_id, **asdict(logprob)} for token_id, logprob in entry.items()]


def _progress_bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    return Progress(*columns, console=console, transient=True)
