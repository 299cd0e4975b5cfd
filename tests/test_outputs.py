"""What a user gets to see: text, stop conditions, streaming, finish reasons, times.

The first part drives the ``OutputProcessor`` with a script of tokens, so that any text can be had;
the second asks the same of every engine.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GREEDY, new_engine, new_llm, random_prompts, run_to_end, step_by_step, tokens
from tokenizers import decoders, models

from common.config import ModelConfig
from common.outputs import LogprobLists, ModelRunnerOutput
from common.presets import preset_config
from common.processor import InputProcessor, OutputProcessor
from common.sampling_params import RequestOutputKind, SamplingParams
from common.tokenizer import BYTE_OF_CHARACTER, Tokenizer

# ---------------------------------------------------------------- a script instead of a model

WORDS = ["Hello", " world", "STO", "P!", "xST", "ab", "abab", "OP"]
EOS = 256 + len(WORDS)


def _scripted_tokenizer() -> Tokenizer:
    """All bytes, a few tokens of several characters, and an end of sequence."""
    character_of = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
    spelled = ["".join(character_of[byte] for byte in word.encode()) for word in WORDS]
    vocabulary = {**BYTE_OF_CHARACTER, **{word: 256 + i for i, word in enumerate(spelled)}}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, eos_token="<end>")


TOKENIZER = _scripted_tokenizer()
CONFIG: ModelConfig = replace(
    preset_config("tiny-llama"),
    vocab_size=EOS + 1,
    eos_token_ids=(EOS,),
    max_position_embeddings=64,
)


def spell(*pieces: str) -> list[int]:
    """Token ids: a piece that is a token of several characters as that, else its bytes."""
    return [
        token
        for piece in pieces
        for token in ([256 + WORDS.index(piece)] if piece in WORDS else piece.encode())
    ]


def play(script: list[int], params: SamplingParams, prompt: str = "a") -> list:
    """All outputs of one request whose model says ``script``."""
    inputs = InputProcessor(TOKENIZER, CONFIG, CONFIG.max_model_len)
    outputs = OutputProcessor(TOKENIZER)
    (request,) = inputs.make_requests("r", prompt, params)
    outputs.add([request])
    seen = []
    for token in script:
        request.append_output(token)
        logprobs = None
        if params.logprobs is not None:
            logprobs = LogprobLists([[token]], [[-0.5]], [1])
        seen += outputs.process([request], ModelRunnerOutput([token], logprobs))
        if request.is_finished:
            assert "r" not in outputs
            return seen
    return seen


def only(output):
    (sample,) = output.outputs
    return sample


FREE = SamplingParams(temperature=0.0, max_tokens=None)


class TestStopStrings:
    @pytest.mark.parametrize(
        ("script", "stop", "text"),
        [
            (spell("Hello", "S", "T", "O", "P", "x"), "STOP", "Hello"),  # over many tokens
            (spell("Hello", "STO", "P!"), "STOP", "Hello"),  # ends inside a token
            (spell("Hello", "xST", "OP"), "STOP", "Hellox"),  # begins inside a token
            (spell("xST", "OP"), ["P", "STOP"], "x"),  # the earlier place wins, not the order
            (spell("a", "a", "b"), "ab", "a"),  # a false start just before
            (spell("STO", "STO", "P!"), "STOP", "STO"),
            (spell("Hello", " world"), "o w", "Hell"),
            (spell("é", "→", "€"), "→", "é"),  # characters of several tokens
            (spell("abab"), "b", "a"),
        ],
    )
    def test_the_text_ends_before_the_stop_string(self, script, stop, text):
        sample = only(play(script, replace(FREE, stop=stop))[-1])
        assert sample.text == text
        assert sample.finish_reason == "stop"
        assert sample.stop_reason in ([stop] if isinstance(stop, str) else stop)
        assert text + sample.stop_reason in TOKENIZER.decode(sample.token_ids)

    def test_it_can_be_kept(self):
        params = replace(FREE, stop="STOP", include_stop_str_in_output=True)
        sample = only(play(spell("Hello", "xST", "OP", "x"), params)[-1])
        assert sample.text == "HelloxSTOP"
        # What the last token says beyond the stop string is cut off even so.
        sample = only(play(spell("Hello", "STO", "P!"), params)[-1])
        assert sample.text == "HelloSTOP"

    def test_the_tokens_are_all_kept(self):
        script = spell("Hello", "STO", "P!")
        assert only(play(script, replace(FREE, stop="STOP"))[-1]).token_ids == script

    def test_the_prompt_does_not_count(self):
        outputs = play(spell("P", "x"), replace(FREE, stop="STOP", max_tokens=2), prompt="STO")
        assert only(outputs[-1]).finish_reason == "length"

    def test_a_stop_string_in_the_last_token_wins_over_the_length(self):
        sample = only(play(spell("a", "b"), replace(FREE, stop="b", max_tokens=2))[-1])
        assert (sample.finish_reason, sample.stop_reason, sample.text) == ("stop", "b", "a")

    def test_min_tokens_holds_it_off(self):
        """A stop string within the first tokens is text like any other, also afterwards."""
        params = replace(FREE, stop="b", min_tokens=2)
        assert only(play(spell("a", "b", "a", "b"), params)[-1]).text == "aba"

    def test_end_of_sequence_before_it(self):
        sample = only(play([*spell("STO"), EOS], replace(FREE, stop="STOP"))[-1])
        assert (sample.text, sample.finish_reason, sample.stop_reason) == ("STO", "stop", None)

    def test_what_may_be_its_beginning_is_held_back(self):
        """A user never sees a piece of the stop string that is taken back later."""
        outputs = play(spell("Hello", "S", "T", "O", "P"), replace(FREE, stop="STOP"))
        shown = [only(output).text for output in outputs]
        assert shown[-1] == "Hello"
        assert all("Hello".startswith(text) for text in shown)

    def test_what_turns_out_harmless_is_shown_at_the_end(self):
        outputs = play(spell("Hello", "STO"), replace(FREE, stop="STOP", max_tokens=2))
        assert only(outputs[0]).text == "He"
        assert only(outputs[-1]).text == "HelloSTO"

    @settings(max_examples=300)
    @given(
        script=st.lists(
            st.sampled_from([*range(256, EOS), *b"abSTOP\xc3\xa9"]), min_size=1, max_size=12
        ),
        stop=st.lists(st.text("abSTOPé!", min_size=1, max_size=4), max_size=3),
        include=st.booleans(),
        min_tokens=st.integers(0, 3),
    )
    def test_streamed_pieces_add_up_to_the_final_text(self, script, stop, include, min_tokens):
        min_tokens = min(min_tokens, len(script))
        params = replace(
            FREE,
            stop=stop,
            include_stop_str_in_output=include,
            min_tokens=min_tokens,
            max_tokens=len(script),
        )
        cumulative = play(script, params)
        deltas = play(script, replace(params, output_kind=RequestOutputKind.DELTA))
        (last,) = play(script, replace(params, output_kind=RequestOutputKind.FINAL_ONLY))
        final = only(last)

        assert only(cumulative[-1]) == final
        assert "".join(only(output).text for output in deltas) == final.text
        assert [id_ for output in deltas for id_ in only(output).token_ids] == final.token_ids
        shown = [only(output).text for output in cumulative]
        assert all(later.startswith(sooner) for sooner, later in pairwise(shown))

        # The same, said simply: the first token after which a stop string ends in new text.
        for count in range(min_tokens + 1, len(script) + 1):
            num_old = len(_complete(TOKENIZER.decode(script[: count - 1])))
            text = _complete(TOKENIZER.decode(script[:count]))
            places = [
                at
                for string in stop
                for at in range(len(text))
                if text.startswith(string, at) and at + len(string) > num_old
            ]
            if places:
                assert final.token_ids == script[:count]
                assert final.finish_reason == "stop"
                assert text.startswith(final.stop_reason, min(places))
                end = min(places) + (len(final.stop_reason) if include else 0)
                assert final.text == text[:end]
                return
        assert (final.finish_reason, final.stop_reason) == ("length", None)
        assert final.token_ids == script
        assert final.text == TOKENIZER.decode(script)


def _complete(text: str) -> str:
    """Without the mark of a character that is still unfinished (or will stay so)."""
    return text.rstrip("\ufffd")


class TestText:
    def test_a_character_of_several_tokens_appears_whole(self):
        shown = [only(output).text for output in play(list("a→b".encode()), FREE)]
        assert shown == ["a", "a", "a", "a→", "a→b"]

    def test_an_unfinished_character_at_the_end_is_marked(self):
        sample = only(play(list("a→".encode()[:-1]), replace(FREE, max_tokens=3))[-1])
        assert sample.text == "a\ufffd"

    def test_end_of_sequence_has_no_text_but_a_token(self):
        sample = only(play([*spell("Hello"), EOS], FREE)[-1])
        assert (sample.text, sample.token_ids[-1]) == ("Hello", EOS)

    def test_special_tokens_can_be_shown(self):
        params = replace(FREE, skip_special_tokens=False, ignore_eos=True, max_tokens=2)
        assert only(play([EOS, *spell("ab")], params)[-1]).text == "<end>ab"
        kept = replace(FREE, skip_special_tokens=False, include_stop_str_in_output=True)
        assert only(play([*spell("ab"), EOS], kept)[-1]).text == "ab<end>"

    def test_a_stop_token_is_not_in_the_text(self):
        params = replace(FREE, stop_token_ids=spell("STO"))
        sample = only(play(spell("Hello", "STO"), params)[-1])
        assert (sample.text, sample.stop_reason) == ("Hello", spell("STO")[0])
        kept = replace(params, include_stop_str_in_output=True)
        assert only(play(spell("Hello", "STO"), kept)[-1]).text == "HelloSTO"

    def test_without_detokenization_there_are_tokens_only(self):
        sample = only(play([*spell("Hello"), EOS], replace(FREE, detokenize=False))[-1])
        assert (sample.text, sample.token_ids) == ("", [*spell("Hello"), EOS])

    def test_a_token_without_a_meaning_is_an_error_of_its_request(self):
        sample = only(play([*spell("Hello"), -1], replace(FREE, logprobs=0))[-1])
        assert sample.finish_reason == "error"
        assert sample.token_ids == spell("Hello")
        assert len(sample.logprobs) == 1
        assert sample.text == "Hello"


# ---------------------------------------------------------------- every engine

END_OF_TURN, END_OF_TEXT = 258, 256  # of the tiny models: both end a sequence
PROMPT = random_prompts(3, [6])[0]
A, B = 97, 98


def always(*token_ids: int, **options) -> SamplingParams:
    """Parameters under which the likeliest token is the first of these, wherever it is allowed."""
    bias = {token: 1000.0 - 100.0 * place for place, token in enumerate(token_ids)}
    return replace(GREEDY, logit_bias=bias, **options)


class TestFinishReasons:
    @pytest.mark.parametrize(
        ("params", "token_ids", "finish_reason", "stop_reason"),
        [
            (always(A, max_tokens=3), [A] * 3, "length", None),
            (always(END_OF_TURN), [END_OF_TURN], "stop", None),
            (always(END_OF_TEXT), [END_OF_TEXT], "stop", None),
            (always(END_OF_TURN, max_tokens=2, ignore_eos=True), [END_OF_TURN] * 2, "length", None),
            (always(A, stop_token_ids=[B, A]), [A], "stop", A),
            # A token that is both ends the sequence as end of sequence.
            (always(END_OF_TEXT, stop_token_ids=[END_OF_TEXT]), [END_OF_TEXT], "stop", None),
            (
                always(END_OF_TEXT, stop_token_ids=[END_OF_TEXT], ignore_eos=True),
                [END_OF_TEXT],
                "stop",
                END_OF_TEXT,
            ),
            (always(END_OF_TURN, A, min_tokens=2), [A, A, END_OF_TURN], "stop", None),
            (always(B, A, min_tokens=2, stop_token_ids=[B]), [A, A, B], "stop", B),
            (always(END_OF_TURN, A, min_tokens=3, max_tokens=3), [A] * 3, "length", None),
            # min_tokens forbids the end of sequence even to those who would go past it.
            (
                always(END_OF_TURN, A, min_tokens=2, max_tokens=3, ignore_eos=True),
                [A, A, END_OF_TURN],
                "length",
                None,
            ),
            (always(A, stop="aaa"), [A] * 3, "stop", "aaa"),
        ],
    )
    def test_a_sequence_ends_for_the_right_reason(
        self, milestone, params, token_ids, finish_reason, stop_reason
    ):
        output = new_llm(milestone).generate(PROMPT, params)[0]
        sample = only(output)
        assert sample.token_ids == token_ids
        assert (sample.finish_reason, sample.stop_reason) == (finish_reason, stop_reason)
        assert output.finished and sample.finished

    def test_a_sequence_ends_where_the_model_does(self, milestone):
        llm = new_llm(milestone, max_model_len=16)
        for max_tokens in (None, 100):
            sample = only(llm.generate(PROMPT, always(A, max_tokens=max_tokens))[0])
            assert (len(sample.token_ids), sample.finish_reason) == (10, "length")

    def test_each_sample_ends_by_itself(self, milestone):
        """One of them draws the end of sequence early, and the others go on."""
        params = SamplingParams(n=6, seed=1, max_tokens=12, logit_bias={END_OF_TURN: 4.0})
        engine = new_engine(milestone)
        engine.add_request("r", PROMPT, params)
        finished_at = {}
        step = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                assert len(output.outputs) == 6
                assert output.finished is all(sample.finished for sample in output.outputs)
                for sample in output.outputs:
                    if sample.finished:
                        finished_at.setdefault(sample.index, step)
            step += 1
        lengths = {len(sample.token_ids) for sample in output.outputs}
        assert len(lengths) > 1
        assert len(finished_at) == 6
        for sample in output.outputs:
            is_end = sample.token_ids[-1] in (END_OF_TURN, END_OF_TEXT)
            assert sample.finish_reason == ("stop" if is_end else "length")
            assert is_end or len(sample.token_ids) == 12

    def test_an_aborted_request_returns_what_it_has(self, milestone):
        engine = new_engine(milestone, **step_by_step(milestone))
        engine.add_request("r", PROMPT, always(A, n=2, max_tokens=9, stop="zzz"))
        for _ in range(3):
            engine.step()
        output = engine.abort_request("r")
        assert output.finished
        assert {sample.finish_reason for sample in output.outputs} == {"abort"}
        first = output.outputs[0]
        assert first.token_ids == [A] * 3
        assert first.text == "aaa"  # nothing is held back any more
        assert engine.abort_request("r") is None
        assert engine.abort_request("never heard of") is None
        assert not engine.has_unfinished_requests()
        engine.add_request("r", PROMPT, always(A, max_tokens=1))  # the id is free again
        assert tokens(run_to_end(engine)["r"]) == [[A]]


class TestStreaming:
    PARAMS = always(A, max_tokens=5, logprobs=1)

    def outputs(self, milestone, kind, **options):
        engine = new_engine(milestone)
        engine.add_request("r", PROMPT, replace(self.PARAMS, output_kind=kind, **options))
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        return outputs

    def test_cumulative(self, milestone):
        outputs = self.outputs(milestone, RequestOutputKind.CUMULATIVE)
        assert [only(output).text for output in outputs] == ["a", "aa", "aaa", "aaaa", "aaaaa"]
        assert [len(only(output).logprobs) for output in outputs] == [1, 2, 3, 4, 5]
        assert [output.finished for output in outputs] == [False] * 4 + [True]

    def test_delta(self, milestone):
        outputs = self.outputs(milestone, RequestOutputKind.DELTA)
        assert [only(output).text for output in outputs] == ["a"] * 5
        assert [only(output).token_ids for output in outputs] == [[A]] * 5
        assert [len(only(output).logprobs) for output in outputs] == [1] * 5

    def test_final_only(self, milestone):
        (output,) = self.outputs(milestone, RequestOutputKind.FINAL_ONLY, n=2)
        assert [sample.text for sample in output.outputs] == ["aaaaa"] * 2

    def test_deltas_of_several_samples_add_up(self, milestone):
        params = {"n": 3, "temperature": 1.0, "seed": 5, "logit_bias": None}
        outputs = self.outputs(milestone, RequestOutputKind.DELTA, **params)
        (final,) = self.outputs(milestone, RequestOutputKind.FINAL_ONLY, **params)
        for index, sample in enumerate(final.outputs):
            assert "".join(output.outputs[index].text for output in outputs) == sample.text
            pieces = [output.outputs[index].token_ids for output in outputs]
            assert [token for piece in pieces for token in piece] == sample.token_ids

    def test_an_output_is_not_changed_by_later_steps(self, milestone):
        outputs = self.outputs(milestone, RequestOutputKind.CUMULATIVE)
        assert [len(only(output).token_ids) for output in outputs] == [1, 2, 3, 4, 5]

    def test_llm_stream_names_the_prompt_by_its_place(self, milestone):
        llm = new_llm(milestone)
        for _ in range(2):  # places, not a count of all requests so far
            last = {output.request_id: output for output in llm.stream([PROMPT, PROMPT], GREEDY)}
            assert sorted(last) == ["0", "1"]
            assert all(output.finished for output in last.values())

    def test_streams_may_take_turns(self, milestone):
        """With each other and with ``generate``; everyone gets all of their own outputs."""
        llm = new_llm(milestone)
        one, two = (llm.stream([PROMPT], always(token, max_tokens=4)) for token in (A, B))
        shown = [next(one), next(two), next(one)]
        assert [only(output).text for output in shown] == ["a", "b", "aa"]
        assert tokens(llm.generate(PROMPT, always(A, max_tokens=9))[0]) == [[A] * 9]
        assert [only(output).text for output in one] == ["aaa", "aaaa"]
        assert [only(output).text for output in two] == ["bb", "bbb", "bbbb"]
        assert not llm.engine.has_unfinished_requests()

    def test_leaving_the_stream_aborts_the_rest(self, milestone):
        llm = new_llm(milestone)
        for _ in llm.stream([PROMPT] * 3, GREEDY):
            break
        assert not llm.engine.has_unfinished_requests()
        assert len(llm.generate(PROMPT, GREEDY)) == 1


class TestMetrics:
    def test_times_are_in_order(self, milestone):
        prompts = random_prompts(4, (5, 40, 9))
        for output in new_llm(milestone).generate(prompts, replace(GREEDY, ignore_eos=True)):
            metrics = output.metrics
            assert len(metrics.token_times) == 8
            times = [
                metrics.arrival_time,
                metrics.first_scheduled_time,
                *metrics.token_times,
                metrics.finished_time,
            ]
            assert times == sorted(times)
            assert metrics.first_token_time == metrics.token_times[0]
            assert metrics.last_token_time == metrics.token_times[-1]
            assert metrics.ttft == pytest.approx(metrics.first_token_time - metrics.arrival_time)
            assert len(metrics.itl) == 7
            assert metrics.tpot == pytest.approx(sum(metrics.itl) / 7)
            assert 0.0 <= metrics.queue_time <= metrics.ttft

    def test_with_one_token_there_is_no_pace(self, milestone):
        metrics = new_llm(milestone).generate(PROMPT, replace(GREEDY, max_tokens=1))[0].metrics
        assert metrics.tpot is None and metrics.itl == []
        assert metrics.ttft > 0.0

    def test_counters_count(self, milestone):
        llm = new_llm(milestone)
        prompts = random_prompts(4, (5, 40, 9))
        llm.generate(prompts, replace(GREEDY, ignore_eos=True))
        stats = llm.stats()
        assert stats["num_requests_finished"] == 3
        assert stats["num_prompt_tokens"] == 54
        assert stats["num_generated_tokens"] == 24
        assert stats["num_preemptions"] == 0
        assert stats["flops"] > 0
        computed = stats["num_forward_tokens"] - stats["num_padding_tokens"]
        if milestone == "m0_init":
            assert computed == sum(length + i for length in (5, 40, 9) for i in range(8))
            assert stats["kv_utilization"] is None
        else:
            assert computed == 54 + 3 * 7  # the last token is sampled and never computed
            assert 0.0 < stats["kv_utilization"] <= 1.0
            assert stats["kv_slots_used_peak"] <= stats["kv_slots_allocated_peak"]
            assert stats["kv_slots_allocated_peak"] <= stats["kv_slots_total"]
        if milestone >= "m2":
            assert stats["num_running_peak"] == 3
            assert stats["kv_slots_used_peak"] == 54 + 3 * 7
