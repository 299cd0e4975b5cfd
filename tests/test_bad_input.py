"""What cannot be served is refused with a clear word, and everyone else gets an answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    GREEDY,
    VOCAB_SIZE,
    assert_cache_is_empty,
    load,
    new_engine,
    new_llm,
    random_prompts,
    run_to_end,
    small_cache,
    tokens,
)

from common.sampling_params import SamplingParams

POISON = 7


@pytest.fixture(scope="module")
def poisoned(saved, tmp_path_factory):
    """A model in which one token's embedding is not a number."""
    folder = tmp_path_factory.mktemp("poisoned")
    for file in saved("random:tiny-qwen3").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class TestNotANumber:
    """Logits without a meaning end the request they belong to, and only that."""

    @pytest.mark.parametrize("place", [0, 1, 2, 3])
    def test_the_other_requests_go_on(self, milestone, poisoned, place):
        prompts = [
            [token for token in prompt if token != POISON]
            for prompt in random_prompts(1, (9, 30, 4, 14))
        ]
        params = replace(GREEDY, max_tokens=20, ignore_eos=True, logit_bias={POISON: -100.0})
        expected = [tokens(output) for output in new_llm(milestone, poisoned).generate(prompts, params)]
        bad = list(prompts)
        bad[place] = [5] * 12 + [POISON] + [5] * 20
        engine = new_engine(milestone, poisoned, **small_cache(milestone, 256))
        for i, prompt in enumerate([*bad, *prompts]):
            engine.add_request(str(i), prompt, params)
        outputs = run_to_end(engine)
        for i, output in outputs.items():
            if int(i) == place:
                sample = output.outputs[0]
                assert sample.finish_reason == "error"
                assert "NaN" in sample.stop_reason
                assert sample.token_ids == []
                assert output.finished
            else:
                assert tokens(output) == expected[int(i) % 4]
        assert_cache_is_empty(engine)
