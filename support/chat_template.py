"""Conversations as token ids, by the chat template that a tokenizer carries.

A chat template is a small Jinja program that transformers, vLLM, TRL and llama.cpp all render in the same
way. Here one rendering serves training, evaluation and chat: `conversation_ids` gives the ids of a
conversation and marks those that the assistant says. So what a model is trained on is exactly what it is
asked later.
"""

import re

from tokenizer import CHAT_TEMPLATE

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

# The turn of ChatML as most models on the hub write it, and the same with the marks that TRL reads.
CHATML_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}"
    "{% else %}{{message['content'] + '<|im_end|>' + '\n'}}{% endif %}",
)

BREAK = "\ufdd0"  # a noncharacter, put into text that spells a special token, so that it stays text


class TemplateError(ValueError):
    """A template that does not take a conversation, such as one that knows no system turn."""


def with_generation_marks(template: str) -> str:
    """The template with `{% generation %}` around what the assistant says, where its form is known."""
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
        rendered = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=add_generation_prompt, **tokens
        )
    except Exception as error:  # whatever a template of somebody else's raises
        why = str(error).strip().splitlines()
        raise TemplateError(
            f"the model's chat template refuses this conversation: {(why or ['?'])[0]}"
        ) from None
    return rendered[0][0] if isinstance(rendered, tuple) else rendered[0]


def pieces(template: str, messages: list[dict], tokens: dict[str, str], special: re.Pattern) -> list[tuple]:
    """The rendered conversation, cut into [(text, whether the assistant says it)].

    An answer is what follows the prompt that the messages before it render to, up to and including the
    special token that ends it. A turn that the template renders in another way once others follow (some
    drop an earlier answer's reasoning) is not counted as the assistant's, since nobody would ever generate
    it like that. Behind a last turn that is not the assistant's stands the prompt for the next answer.
    """
    open_turn = not messages or messages[-1]["role"] != "assistant"
    text = render(template, messages, tokens, add_generation_prompt=open_turn)
    found, at = [], 0
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
            "the model's chat template opens an answer with other words than this conversation's answers have"
        )
    found.append((text[at:], False))
    return [piece for piece in found if piece[0]]


def conversation_ids(tokenizer, template: str, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them the assistant says, the token that ends its turn included.

    `tokenizer`: a `tokenizer.Tokenizer` or a `HubTokenizer`. What a message says never becomes a special
    token. Pieces are encoded together, as any other program does, as long as no token reaches across their
    border.
    """
    special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)) or r"(?!)")
    safe = [message | {"content": guarded(message["content"], special)} for message in messages]
    ids, said, text = [], [], ""
    for piece, assistant in pieces(template, safe, tokenizer.template_tokens, special):
        text += piece
        together = encoded(tokenizer, text, special)
        new = together[len(ids) :] if together[: len(ids)] == ids else encoded(tokenizer, piece, special)
        ids, said = ids + new, said + [assistant] * len(new)
    return ids, said


def guarded(content: str, special: re.Pattern) -> str:
    """Text in which no special token is spelled any more: a BREAK stands behind its first character."""
    content = content.replace(BREAK, "")
    return special.sub(lambda match: match[0][0] + BREAK + match[0][1:], content)


def encoded(tokenizer, text: str, special: re.Pattern) -> list[int]:
    """The ids of rendered text, special tokens included, except for those that are guarded."""
    if BREAK not in text:
        return tokenizer.encode(text, allowed_special="all")
    ids, at = [], 0
    for match in special.finditer(text):
        ids += tokenizer.encode(text[at : match.start()].replace(BREAK, ""), allowed_special=())
        ids += tokenizer.encode(match[0], allowed_special="all")
        at = match.end()
    return ids + tokenizer.encode(text[at:].replace(BREAK, ""), allowed_special=())


def reply_ids(tokenizer, template: str, answer: str) -> list[int]:
    """The ids of an answer as the template has it, the token that ends the turn included."""
    ids, said = conversation_ids(
        tokenizer, template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    )
    return [i for i, mine in zip(ids, said, strict=True) if mine]


def is_ours(template: str | None) -> bool:
    return template is not None and without_generation_marks(template) == without_generation_marks(
        CHAT_TEMPLATE
    )
