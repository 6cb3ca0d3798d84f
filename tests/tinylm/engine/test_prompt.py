"""A caller's prompt means the same as a text and as token ids."""

import pytest

from tinylm.engine.prompt import prompt_ids


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_text_has_as_much_room_as_its_ids(stories, max_tokens):
    tokenizer, config = stories.tokenizer, stories.config
    for n_tokens in (config.context - 2, config.context - 1, config.context):
        text = " dog" * n_tokens
        ids = tokenizer.encode(text)
        assert len(ids) == n_tokens
        fits = n_tokens + 1 + max_tokens <= config.context
        for prompt in (text, ids, [tokenizer.boundary_id, *ids]):
            if fits:
                assert prompt_ids(prompt, max_tokens, tokenizer, config) == [tokenizer.boundary_id, *ids]
            else:
                with pytest.raises(ValueError, match=f"prompt has {n_tokens + 1} tokens"):
                    prompt_ids(prompt, max_tokens, tokenizer, config)
