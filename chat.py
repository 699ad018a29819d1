"""Talk to a run: complete a text, or hold a conversation with a model that has been instruction-tuned.

    python chat.py out/base                                   # a prompt, type the beginning of a text
    python chat.py out/base --prompt="Once upon a time" --n=3 --temperature=0.7
    python chat.py out/sft --chat                             # turns of user and assistant
    python chat.py gpt2 --prompt="The three laws are"         # a model of the hub, or an adapter's folder
    python chat.py out/base --checkpoints --prompt="One day"  # what each kept checkpoint makes of it

Words appear as they are sampled; Ctrl-C stops a text, a second one (or an empty line) ends the program.
"""

from support.terminal import run_script

import json
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs import parse_config

if TYPE_CHECKING:  # libraries are loaded when they are needed: --help answers at once
    from support.text_model import TextModel


@dataclass
class ChatConfig:
    model: str = "out/base"  # run folder or Hugging Face model; may also be given as a bare word
    prompt: str = ""  # continue this and stop; nothing: ask
    start: bool = False  # write whole texts from their start, asking nothing
    chat: bool = False  # a conversation in the chat template instead of a text to continue
    system: str = ""  # chat: what the assistant is told beforehand
    max_new_tokens: int = 300  # tokens of an answer at most
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # sample among this many likeliest tokens; 0: all
    top_p: float = 0.95  # sample among the likeliest tokens that hold this much probability; 1: all
    min_p: float = 0.0  # drop tokens less likely than this times the likeliest
    repetition_penalty: float = 1.0  # above 1 makes tokens that were there less likely
    window: int = 0  # look at the first tokens and this many of the newest (StreamingLLM); 0: the context
    n: int = 1  # samples a prompt
    seed: int = -1  # of the samples; -1: another one every time
    device: str = "auto"  # cuda, cpu, ...
    compile: bool = False  # compile the decoding step: a minute to start, then faster
    checkpoints: bool = False  # ask every kept checkpoint of the run; the report shows generations.jsonl


def main() -> None:
    cfg = parse_config(ChatConfig, __doc__, with_model(sys.argv[1:]))
    try:
        if cfg.checkpoints:
            return ask_checkpoints(cfg)
        model = load(cfg)
        messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
        if cfg.prompt or cfg.start:
            answer(model, cfg, cfg.prompt, messages)
        else:
            converse(model, cfg, messages)
    except (ValueError, OSError) as error:
        raise SystemExit(f"chat.py: {error}") from None
    except EOFError:
        print()
    except KeyboardInterrupt:
        print()
        raise


def with_model(words: list[str]) -> list[str]:
    """`out/base` becomes --model=out/base: a bare word that is no config file and no flag's value."""
    takes_value = {f"--{field.name}" for field in fields(ChatConfig) if field.type is not bool}
    return [
        word if word.startswith("-") or word.endswith(".py") or before in takes_value else f"--model={word}"
        for before, word in zip(["", *words], words, strict=False)
    ]


def load(cfg: ChatConfig) -> "TextModel":
    """The model on its device: a run, a folder, a hub id or an adapter."""
    from support.loading import load_model
    from support.machine import pick_device
    from support.runs import TrainError
    from support.text_model import TextModel

    device = pick_device(cfg.device)
    model = load_model(cfg.model, device)
    if model.kind != "causal":
        raise TrainError(f"{cfg.model} does not continue texts: it is of kind {model.kind}")
    if model.ours:
        model.model.to(model.dtype)
    elif cfg.window or cfg.compile:
        raise TrainError(f"--window and --compile are for models that model.py computes, not {cfg.model}")
    return TextModel(model.model, model.tokenizer, "causal", cfg.model, chat=cfg.chat)


def ask_checkpoints(cfg: ChatConfig) -> None:
    """The same prompts, with the same seed, for every kept checkpoint; generations.jsonl keeps the texts."""
    from support.files import write_atomically
    from support.runs import TrainError, checkpoints, step_of
    from support.tables import read_jsonl

    found = checkpoints(Path(cfg.model))
    if not found:
        raise TrainError(
            f"{cfg.model} holds no checkpoints: train with --save_every=N (steps from one to the next) "
            "and --keep_last=N (how many are kept)"
        )
    seed = cfg.seed if cfg.seed >= 0 else 1
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    file = Path(cfg.model) / "generations.jsonl"
    prompts = [cfg.prompt] if cfg.prompt or cfg.start else iter(lambda: input("> "), "")
    for prompt in prompts:
        lines = [line for line in read_jsonl(file) if line.get("prompt") != prompt]
        for path in found:
            print(f"step {step_of(path):,}:")
            asked = replace(cfg, model=str(path), seed=seed)
            text = answer(load(asked), asked, prompt, messages)
            lines.append({"step": step_of(path), "prompt": prompt, "text": text})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(file, lambda path, text=text: path.write_text(text))


def converse(model: "TextModel", cfg: ChatConfig, messages: list[dict]) -> None:
    """Asks for texts until an empty line."""
    size = sum(p.numel() for p in model.model.parameters()) / 1e6
    print(f"{cfg.model}: {size:.1f}M parameters. An empty line ends.")
    while text := input("you: " if cfg.chat else "> "):
        said = answer(model, cfg, text, messages)
        if cfg.chat:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]


def answer(model: "TextModel", cfg: ChatConfig, text: str, messages: list[dict]) -> str:
    """Streams the model's continuation of `text` (or its turn) to the screen; returns the last sample."""
    text = text.encode("utf-8", "replace").decode()  # half an emoji in the terminal's input is no text
    if cfg.chat:
        ids, _ = model.conversation([*messages, {"role": "user", "content": text}])
    else:
        ids = [*(model.bos or [model.eos]), *model.encode(text)]
    how = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p, "min_p": cfg.min_p}
    how |= {"repetition_penalty": cfg.repetition_penalty, "stop_tokens": [model.end, model.eos]}
    if model.ours:
        how |= {"window": cfg.window, "compile": cfg.compile}
    count, begun = 0, time.perf_counter()
    for i in range(cfg.n):
        print("" if cfg.chat else text, end="", flush=True)
        new, printed = [], ""

        def show(_row: int, token: int) -> None:
            nonlocal printed
            new.append(token)  # noqa: B023
            so_far = model.decode(new)  # noqa: B023
            if not so_far.endswith("\ufffd"):  # a character may be spread over several tokens
                print(so_far[len(printed) :], end="", flush=True)
                printed = so_far

        seed = time.time_ns() % 2**31 if cfg.seed < 0 else cfg.seed + i
        try:
            model.continuations([ids], cfg.max_new_tokens, seed=seed, stream=show, **how)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        said = model.decode(new)
        print(said[len(printed) :])
        count += len(new)
        if i + 1 < cfg.n:
            print("---")
    print(f"[{count} tokens, {count / (time.perf_counter() - begun):.0f} tokens/s]", file=sys.stderr)
    return said


if __name__ == "__main__":
    run_script(main)
