"""tokenizer.json and tokenizer_config.json of a byte-level BPE, as transformers reads and writes them."""

import json
import os
from pathlib import Path

from support.files import write_json
from support.finding import data_folder
from support.runs import read_json, read_json_if_there

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}  # each word by itself, none left out
HUB_MARK = "hub-"  # begins the hash of a tokenizer that transformers reads
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (  # `marked_ids` of support/chat_template.py in Jinja, which transformers and others render
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATE = """{
"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
"post_processor": null,
"decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
"model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
"end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false}}"""


# GPT-2's spelling of bytes, in the order of its ids: Latin-1, or from U+0100 on if that is invisible.
VISIBLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
HIDDEN = [b for b in range(256) if b not in VISIBLE]
BYTE_LETTERS = {b: chr(b) for b in VISIBLE} | {b: chr(256 + n) for n, b in enumerate(HIDDEN)}
LETTER_BYTES = {letter: b for b, letter in BYTE_LETTERS.items()}


class ForeignTokenizer(ValueError):
    """tokenizer.json is not the one that the weights beside it were trained with."""


def spell(token: bytes) -> str:
    return "".join(BYTE_LETTERS[b] for b in token)


def unspell(text: str) -> bytes:
    return bytes(LETTER_BYTES[letter] for letter in text)


def write_tokenizer(folder: Path, tokenizer, pattern: str | None, config: dict) -> None:
    """Writes both files. `pattern`: None for GPT-2's, which the ByteLevel step has built in."""
    content = json.loads(TEMPLATE)
    if pattern:
        split = {"type": "Split", "pattern": {"Regex": pattern}} | SPLIT
        byte_level = content["pre_tokenizer"] | {"use_regex": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    special = {i: token for token, i in tokenizer.special_ids.items()}
    for i in sorted(special):
        content["added_tokens"].append({"id": i, "content": special[i]} | flags)
    tokens = sorted(tokenizer.vocab.items())
    content["model"]["vocab"] = {special.get(i) or spell(token): i for i, token in tokens}
    content["model"]["merges"] = [[spell(a), spell(b)] for a, b in tokenizer.merges]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "tokenizer.json", content)


def read_tokenizer(folder: Path) -> tuple[dict, dict]:
    """The contents of tokenizer.json and of tokenizer_config.json, with the chat template wherever it is."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f'there is no {path}; "python tokenizer.py" makes one')
    settings = read_json_if_there(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"  # where transformers 5 writes it
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return read_json(path), settings


def parse_tokenizer(content: dict) -> tuple[dict, list, dict, str | None]:
    """(vocab, merges, special ids, pattern or None for GPT-2's) of a tokenizer.json.

    Raises KeyError, TypeError, ValueError or AttributeError if it is of another kind.
    """
    special = {}
    for token in content["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not token["special"]:
            raise ValueError(f"it finds the added token {token['content']!r} in a way that we do not know")
        special[token["content"]] = token["id"]
    vocab = {i: token.encode() for token, i in special.items()}
    vocab |= {i: unspell(text) for text, i in content["model"]["vocab"].items() if text not in special}
    merges = []
    for pair in content["model"]["merges"]:
        a, b = pair.split(" ") if isinstance(pair, str) else pair  # older files have "a b"
        merges.append((unspell(a), unspell(b)))
    return vocab, merges, special, pattern_of(content)


def pattern_of(content: dict) -> str | None:
    pre_tokenizer = content["pre_tokenizer"] or {}
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if content["model"]["type"] != "BPE" or content["normalizer"] or last.get("type") != "ByteLevel":
        raise ValueError("it is of another kind")
    if last["add_prefix_space"]:
        raise ValueError("it adds spaces")
    use_regex = last.get("use_regex", True)
    if use_regex and not before:
        return None
    if use_regex or len(before) != 1 or not before[0].items() >= SPLIT.items():
        raise ValueError("it splits words in another way")
    return before[0]["pattern"]["Regex"]


def default_template(found: object) -> str | None:
    """The chat template; of several with names (one for tools, say) the default one."""
    if isinstance(found, list):  # the older form on the hub
        found = {template["name"]: template["template"] for template in found}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str | None):
        raise ValueError(f"chat_template in its tokenizer_config.json must be a text, not {found!r:.40}")
    return found


def check_tokenizer(folder: Path, found: str) -> None:
    """Compares the hash of a run folder's tokenizer with those in run.json and tokenizer_config.json.

    Weights read with another vocabulary give nonsense without an error. A folder without run.json is not
    checked: other programs add tokens to a tokenizer and leave our hash in tokenizer_config.json. Our hashes
    and those of HubTokenizer are computed differently and never compared.
    """
    run = read_json_if_there(folder / "run.json")
    if not run:
        return
    config = read_json_if_there(folder / "tokenizer_config.json")
    for expected in (run.get("tokenizer"), config.get("tokenizer_hash")):
        known = isinstance(expected, str)
        if known and expected != found and expected.startswith(HUB_MARK) == found.startswith(HUB_MARK):
            raise ForeignTokenizer(
                f"{folder / 'tokenizer.json'} is not the tokenizer of this run: its hash is {found[:8]}, the "
                f"weights were trained with {expected[:8]}. Copy tokenizer.json back from "
                f"{folder}/checkpoints, or train the run again"
            )


def gpt2_merges() -> list[tuple[bytes, bytes]]:
    """GPT-2's merges. tiktoken downloads them once and keeps them."""
    from tiktoken.load import read_file_cached

    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    sha256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    cache_of_data = os.path.join(data_folder(), "tiktoken_cache")
    if os.path.isdir(cache_of_data):
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", cache_of_data)
    try:
        lines = read_file_cached(url, sha256).decode().splitlines()
    except (OSError, ValueError) as error:
        raise OSError(
            f"cannot download GPT-2's merges: {type(error).__name__}: {error!s:.120}\n"
            "  Connect to the network once; or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept\n"
            "  them; or learn a vocabulary with --tokenizer=bpe"
        ) from None
    return [tuple(map(unspell, line.split(" "))) for line in lines[1:]]  # the first line is a version
