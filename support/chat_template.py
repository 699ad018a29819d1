"""Conversations as token ids, by the chat template that a tokenizer carries.

A chat template is a small Jinja program that transformers, vLLM, TRL and llama.cpp all render in the same
way. Training, evaluation and chat all use `conversation_ids`, or `marked_ids` for our own template: it gives
the ids of a conversation and marks those of the assistant. So a model meets in use exactly the format of its
training.
"""

import re

from support.cutting import special_regex
from support.runs import first_line
from support.tokenizer_json import CHAT_TEMPLATE

# For a model that has no special tokens for turns. An assistant's turn ends with the end-of-text token.
WORDS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ message['role'] | capitalize + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] | trim + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# A ChatML turn as most models on the hub write it, and the same with the generation marks that TRL needs.
CHATML_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}"
    "{% else %}{{message['content'] + '<|im_end|>' + '\n'}}{% endif %}",
)

BREAK = "\ufdd0"  # a Unicode noncharacter; inside a spelled special token it keeps that token plain text


class TemplateError(ValueError):
    """A template rejects a conversation, for example because it has no system turn."""


def with_generation_marks(template: str) -> str:
    """The template with `{% generation %}` around assistant turns, if it is one of the known forms."""
    if "generation %}" in template:
        return template
    return template.replace(*CHATML_TURN).replace(*(part.replace("\n", "\\n") for part in CHATML_TURN))


def without_generation_marks(template: str) -> str:
    """For programs whose Jinja does not know the tag."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def render(template: str, messages: list[dict], tokens: dict[str, str], add_generation_prompt: bool) -> str:
    """The text of a conversation. `tokens`: {"bos_token": ..., "eos_token": ...}, which templates may use."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=add_generation_prompt, **tokens
        )
    except Exception as error:  # a template from the hub may raise anything
        raise TemplateError(
            f"the model's chat template refuses this conversation: {first_line(error)}"
        ) from None
    return texts[0]


def pieces(template: str, messages: list[dict], tokens: dict[str, str], special: re.Pattern) -> list[tuple]:
    """The rendered conversation, cut into [(text, is it the assistant's?)].

    An answer starts where the rendered prompt (all messages before it) ends, and includes the special token
    that ends the turn. Some templates render an earlier turn differently once others follow (for example
    without its reasoning). Such a turn is not marked as the assistant's: generation never produces it. If the
    last message is not the assistant's, the prompt for the next answer is appended.
    """
    open_turn = not messages or messages[-1]["role"] != "assistant"
    text = render(template, messages, tokens, add_generation_prompt=open_turn)
    found = []
    at = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(template, messages[:i], tokens, add_generation_prompt=True)
        until = render(template, messages[: i + 1], tokens, add_generation_prompt=False)
        if not (text.startswith(prompt) and text.startswith(until) and len(until) > len(prompt) >= at):
            continue
        end_token = special.search(until, len(prompt))
        end = end_token.end() if end_token else len(until)
        found += [(text[at : len(prompt)], False), (text[len(prompt) : end], True)]
        at = end
    if not found and not open_turn:
        raise TemplateError(
            "the model's chat template renders this conversation's answers differently from the prompt for a "
            "new answer, so they cannot be trained on"
        )
    found.append((text[at:], False))
    return [piece for piece in found if piece[0]]


def conversation_ids(tokenizer, template: str, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and for each id whether it is the assistant's (its end-of-turn token is).

    `tokenizer`: a `tokenizer.Tokenizer` or a `HubTokenizer`. The text of a message never becomes a special
    token. Pieces are encoded together, as other programs do, unless a token would cross their border.
    """
    special = special_regex(tokenizer.special_tokens)
    safe = [message | {"content": guarded(message["content"], special)} for message in messages]
    ids = []
    is_answer = []
    text = ""
    for piece, assistant in pieces(template, safe, tokenizer.template_tokens, special):
        text += piece
        together = encoded(tokenizer, text, special)
        new = together[len(ids) :]
        if together[: len(ids)] != ids:
            new = encoded(tokenizer, piece, special)
        ids += new
        is_answer += [assistant] * len(new)
    return ids, is_answer


def marked_ids(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """`conversation_ids` by our own template, without Jinja: every turn begins and ends with a token."""
    ids = []
    is_answer = []
    special = tokenizer.special_id
    for message in messages:
        turn = [*tokenizer.encode(message["content"].strip(), allowed_special=()), special("<|end|>")]
        ids += [special(f"<|{message['role']}|>"), *turn]
        is_answer += [False] + [message["role"] == "assistant"] * len(turn)
    if not messages or messages[-1]["role"] != "assistant":
        ids.append(special("<|assistant|>"))
        is_answer.append(False)
    return ids, is_answer


def guarded(content: str, special: re.Pattern) -> str:
    """The text with a BREAK after the first character of every spelled special token."""
    content = content.replace(BREAK, "")
    return special.sub(lambda match: match[0][0] + BREAK + match[0][1:], content)


def encoded(tokenizer, text: str, special: re.Pattern) -> list[int]:
    """The ids of rendered text. Special tokens are encoded as such, except where `guarded` put a BREAK."""
    if BREAK not in text:
        return tokenizer.encode(text, allowed_special="all")
    ids = []
    for i, part in enumerate(special.split(text)):  # every second one: a special token
        ids += tokenizer.encode(part.replace(BREAK, ""), allowed_special="all" if i % 2 else ())
    return ids


def is_ours(template: str | None) -> bool:
    """Whether this is CHAT_TEMPLATE of support/tokenizer_json.py, with or without generation marks."""
    return without_generation_marks(template or "") == without_generation_marks(CHAT_TEMPLATE)
