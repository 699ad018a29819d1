"""Talk to a run: complete a text, or hold a conversation with a model that has been instruction-tuned.

    python chat.py out/base                                   # a prompt, type the beginning of a text
    python chat.py out/base --prompt="Once upon a time" --n=3 --temperature=0.7
    python chat.py out/sft --chat                             # turns of user and assistant
    python chat.py gpt2 --prompt="The three laws are"         # a model of the hub, or an adapter's folder
    python chat.py out/base --checkpoints --prompt="One day"  # what each kept checkpoint makes of it

Words appear as they are sampled; Ctrl-C stops a text, a second one (or an empty line) ends the program.
"""

from support.terminal import bare_words, run_script

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs import parse_config
from support.runs import errors_for_users
from support.tables import read_jsonl, valid

if TYPE_CHECKING:  # libraries are loaded when they are needed: --help answers at once
    from support.text_model import TextModel


@dataclass
class ChatConfig:
    model: str = "out/base"  # run folder or Hugging Face model; may also be given as a bare word
    prompt: str = ""  # continue this and stop; nothing: ask
    chat: bool = False  # a conversation in the chat template instead of a text to continue
    system: str = ""  # chat: what the assistant is told beforehand
    max_new_tokens: int = 300  # tokens of an answer at most
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # sample among this many likeliest tokens; 0: all
    top_p: float = 0.95  # sample among the likeliest tokens that hold this much probability; 1: all
    min_p: float = 0.0  # drop tokens less likely than this times the likeliest
    repetition_penalty: float = 1.0  # above 1 makes tokens that were there less likely
    n: int = 1  # samples a prompt
    seed: int = -1  # of the samples; -1: another one every time
    device: str = "auto"  # cuda, cpu, ...
    compile: bool = False  # compile the decoding step: a minute to start, then faster
    int8: bool = False  # weights in 8 bits, on a CPU: a model of 135M parameters talks 1.8 times as fast
    checkpoints: bool = False  # ask every kept checkpoint of the run; the report shows generations.jsonl


def main() -> None:
    flags, models = bare_words(sys.argv[1:], ChatConfig)
    cfg = parse_config(ChatConfig, __doc__, flags + [f"--model={name}" for name in models])
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    try:
        with errors_for_users():
            if len(models) > 1:
                raise ValueError(f"one model at a time, not {len(models)}: {', '.join(models)}")
            if cfg.checkpoints:
                ask_checkpoints(cfg, messages)
            elif cfg.prompt:
                answer(load(cfg), cfg, cfg.prompt, messages)
            else:
                converse(load(cfg), cfg, messages)
    except RuntimeError as error:
        from support.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise SystemExit("chat.py: out of memory: --max_new_tokens or the model is too large") from None
    except EOFError:
        print()
    except KeyboardInterrupt:
        print()
        raise


def load(cfg: ChatConfig) -> "TextModel":
    """The model on its device: a run, a folder, a hub id or an adapter."""
    from support.kernels import to_int8
    from support.loading import load_model
    from support.machine import pick_device
    from support.text_model import TextModel

    model = load_model(cfg.model, pick_device(cfg.device))
    if model.kind != "causal":
        raise ValueError(f"{cfg.model} does not continue texts: it is of kind {model.kind}")
    if cfg.compile and cfg.int8:
        raise ValueError("choose one of --compile and --int8")
    if (cfg.compile or cfg.int8) and not model.ours:
        raise ValueError(f"--compile and --int8 are for models that model.py computes, not {cfg.model}")
    model = TextModel(model.model, model.tokenizer, "causal", cfg.model, chat=cfg.chat)
    if cfg.int8:
        to_int8(model.model)
    if model.ours and (cfg.int8 or model.device.type == "cuda"):
        model.model.to(model.dtype)
    return model


def ask_checkpoints(cfg: ChatConfig, messages: list[dict]) -> None:
    """The same prompt, with the same seed, for every kept checkpoint; generations.jsonl keeps the texts."""
    from support.files import write_jsonl
    from support.runs import checkpoints, step_of

    found = checkpoints(Path(cfg.model))
    file = Path(cfg.model) / "generations.jsonl"
    if not found:
        raise ValueError(f"{cfg.model} holds no checkpoints: train with --save_every=N and --keep_last=N")
    seed = cfg.seed if cfg.seed >= 0 else 1
    prompt = cfg.prompt or input("> ")
    lines = [line for line in read_jsonl(file) if line.get("prompt") != prompt]
    for path in found:
        print(f"step {step_of(path):,}:")
        asked = replace(cfg, model=str(path), seed=seed)
        text = answer(load(asked), asked, prompt, messages)
        lines.append({"step": step_of(path), "prompt": prompt, "text": text})
    write_jsonl(file, lines)


def converse(model: "TextModel", cfg: ChatConfig, messages: list[dict]) -> None:
    """Asks for texts until an empty line."""
    print(f"{cfg.model}: {model.n_parameters / 1e6:.1f}M parameters. An empty line ends.")
    while text := input("you: " if cfg.chat else "> "):
        reply = answer(model, cfg, text, messages)
        if cfg.chat:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


class Screen:
    """Prints tokens as they come; a character that is spread over several tokens, when it is complete."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        self.ids = []
        self.text = ""

    def add(self, row: int, token: int) -> None:
        self.ids.append(token)
        text = self.decode(self.ids)
        if not text.endswith("\ufffd"):
            self.show(text)

    def show(self, text: str) -> None:
        print(text[len(self.text) :], end="", flush=True)
        self.text = text


def answer(model: "TextModel", cfg: ChatConfig, text: str, messages: list[dict]) -> str:
    """Prints cfg.n continuations of `text`, or answers to it, as they are sampled; returns the last one."""
    text = valid(text)  # the terminal's input may hold half an emoji
    ids = [*model.start, *model.encode(text)]
    if cfg.chat:
        ids, _ = model.conversation([*messages, {"role": "user", "content": text}])
    names = "temperature top_k top_p min_p repetition_penalty".split() + ["compile"] * cfg.compile
    how = {name: getattr(cfg, name) for name in names}
    how["stop_tokens"] = [model.end, model.eos]
    count = 0
    begun = time.perf_counter()
    for i in range(cfg.n):
        print("---\n" * (i > 0) + text * (not cfg.chat), end="", flush=True)
        screen = Screen(model.decode)
        seed = time.time_ns() % 2**31 if cfg.seed < 0 else cfg.seed + i
        try:
            model.continuations([ids], cfg.max_new_tokens, seed=seed, stream=screen.add, **how)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        screen.show(screen.decode(screen.ids) + "\n")
        count += len(screen.ids)
    print(f"[{count} tokens, {count / (time.perf_counter() - begun):.0f} tokens/s]", file=sys.stderr)
    return screen.text[:-1]


if __name__ == "__main__":
    run_script(main)
