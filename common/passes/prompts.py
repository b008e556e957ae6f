"""From prompts to token ids: the one place that decides about BOS and applies chat templates.

Everything that reads a prompt comes here: training, sampling, sweeps, metrics, activation
additions, checks.
"""

from collections.abc import Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Prompt = str | Sequence[Message]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], prepend_bos: bool | None = None
) -> list[list[int]]:
    """Return the token ids of prompts, by one rule for all of this library.

    A prompt is a text, or a list of messages such as `[{"role": "user", "content": "Hi"}]`. What
    comes before a text:

    - `prepend_bos=None`: what the tokenizer puts there by itself, as in `tokenizer(text)`. Llama's
      and Gemma's put BOS, GPT-2's does not, Qwen's has none.
    - `True`: exactly one BOS where the tokenizer has one, else nothing. It is the default of what
      needs a BOS: activation additions, losses, the published experiments. Without a BOS, additions
      begin at the first token of a text, and nothing predicts that token: its loss does not count.
    - `False`: nothing.

    An end of text that the tokenizer puts after a text by itself is left out: what is read, or
    continued, is the text.

    Ids are joined, never strings: many tokenizers read another first word where BOS is glued to the
    text. A text that begins with BOS, as one from a chat template does, keeps its own and never
    gets a second one.

    Messages go through the tokenizer's chat template once, and the template alone decides about
    BOS and other special tokens, whatever `prepend_bos` says. They end where the answer of the
    assistant begins; if the last message is the assistant's, they end with its text, for the model
    to continue.

    Returns:
        One list of ids for each prompt; that of an empty text without BOS is empty.

    Raises:
        ValueError: not a list of prompts; a prompt that begins with two BOS or is not UTF-8;
            messages that the chat template refuses, or a tokenizer without one.
    """
    check_prompts(prompts)
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise ValueError(
            "expected True, False or None (the tokenizer's own way) as prepend_bos, got "
            f"{prepend_bos!r}"
        )
    texts = list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
    try:
        rows = (
            tokenizer(texts, add_special_tokens=prepend_bos is None)["input_ids"] if texts else []
        )
    except TypeError:  # half of a surrogate pair: no tokenizer takes it
        raise ValueError(f"expected texts that can be written as UTF-8, got {texts!a}") from None
    by_text = {
        text: _with_one_bos(tokenizer, text, row, prepend_bos) for text, row in zip(texts, rows)
    }
    found = [
        list(by_text[prompt] if isinstance(prompt, str) else _templated(tokenizer, prompt, True))
        for prompt in prompts
    ]
    bos = tokenizer.bos_token_id
    for prompt, row in zip(prompts, found):
        if bos is not None and row[:2] == [bos, bos]:
            raise ValueError(f"the prompt {prompt!r} begins with two BOS: expected one at most")
    return found


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return a prompt as tables show it: a text as it is, messages as the chat template's text.

    As a prompt this text gives the same ids as the messages, where the template writes BOS, or the
    tokenizer has none.

    Raises:
        ValueError: messages that the chat template refuses, or a tokenizer without one.
    """
    return prompt if isinstance(prompt, str) else _templated(tokenizer, prompt, False)


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse what is not a list of prompts.

    Raises:
        ValueError: no prompts, messages that are not in a list of prompts, or something that is
            neither text nor messages.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"expected a list of prompts, got {prompts!r}")
    if _is_messages(prompts):
        raise ValueError(
            "expected a list of prompts, got the messages of one: write [messages]; got"
            f" {prompts!r}"
        )
    if bad := [prompt for prompt in prompts if not is_prompt(prompt)]:
        example = "{'role': 'user', 'content': 'Hi'}"
        raise ValueError(
            f"expected texts, or lists of messages such as {example}, as prompts, got {bad[0]!r}"
        )


def is_prompt(prompt: Any) -> bool:
    """Say whether something is a text or a list of messages, each with a role and a text."""
    return isinstance(prompt, str) or _is_messages(prompt)


def _is_messages(prompt: Any) -> bool:
    if not isinstance(prompt, list | tuple) or not all(isinstance(one, dict) for one in prompt):
        return False
    return bool(prompt) and all(
        isinstance(one.get(key), str) for one in prompt for key in ("role", "content")
    )


def _with_one_bos(
    tokenizer: PreTrainedTokenizerBase, text: str, row: list[int], prepend_bos: bool | None
) -> list[int]:
    """Return the ids of a text with one BOS where wanted, and no end of text after it."""
    bos, eos = cast(int | None, tokenizer.bos_token_id), tokenizer.eos_token_id
    if prepend_bos and bos is not None and row[:1] != [bos]:
        return [bos, *row]
    if prepend_bos is not None or not (
        row[-1:] == [eos] or (bos is not None and row[:2] == [bos] * 2)
    ):
        return row
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    front = len(row) - len(own) - 1
    if row[-1:] == [eos] and row[front:-1] == own and (front > 0 or row[:1] != [bos]):
        row = row[:-1]
    if (
        bos is not None
        and row[:2] == [bos, bos]
        and own[:1] == [bos]
        and row[1 : len(own) + 1] == own
    ):
        row = row[1:]
    return row


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tokenize: bool
) -> Any:
    """Return messages as the chat template writes them: token ids, or the text."""
    goes_on = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=tokenize,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            return_dict=False,
        )
    except (ValueError, TypeError, TemplateError) as error:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no chat template, and messages need one: set "
                f"tokenizer.chat_template, or give a text instead of {list(messages)!r}"
            ) from None
        raise ValueError(f"the chat template does not take {list(messages)!r}: {error}") from error
