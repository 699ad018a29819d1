"""Chat: what is on the screen is what the model said, and nothing a user types ends in a traceback."""

import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import chat
from model import ModelConfig, ModernDecoderLM
from support.chat_template import marked_ids
from support.tables import read_jsonl
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

ROOT = Path(chat.__file__).parent
USUAL = ["--temperature=0", "--max_new_tokens=9", "--device=cpu"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The folder of a model with random weights, and a vocabulary with few letters but all bytes."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the cat sat on the mat and saw the other cat\n" * 20)
    vocab, merges = train_bpe(folder / "text.txt", 275, SPECIAL_TOKENS)
    Tokenizer(vocab, merges, SPECIAL_TOKENS).save(folder)
    torch.manual_seed(0)
    model = ModernDecoderLM(ModelConfig(vocab_size=320, context_length=96, n_layers=2, d_model=32, n_heads=2))
    with torch.no_grad():  # opinionated enough that greedy and sampled texts differ
        model.model["embed_tokens"].weight.mul_(20)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def said(monkeypatch, capsys):
    """said(*words): what `python chat.py words` prints, on stdout and on stderr."""

    def run(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["chat.py", *words])
        capsys.readouterr()
        chat.main()
        return capsys.readouterr()

    return run


def greedy(run: str, text: str, n_tokens: int) -> str:
    """The continuation, by the plainest way there is: no cache, no streaming."""
    model, tokenizer = ModernDecoderLM.from_pretrained(run), Tokenizer.load(run)
    ids, new = [tokenizer.eot_id, *tokenizer.encode(text)], []
    with torch.no_grad():
        while len(new) < n_tokens and tokenizer.eot_id not in new:
            new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("words", ["RUN USUAL --prompt TEXT", "USUAL --model=RUN --prompt TEXT"])
def test_greedy_text_is_the_plain_argmax_wherever_the_model_stands(run, said, words):
    for text in ("the cat", "Wörter, 日本語 and 🙂", "the cat sat " * 60):  # the last: beyond the context
        line = []
        for word in words.split():
            line += USUAL if word == "USUAL" else [word.replace("RUN", run).replace("TEXT", text)]
        out, err = said(*line)
        if len(text) < 100:
            assert out == text + greedy(run, text, 9) + "\n"
        assert out.startswith(text) and re.fullmatch(r"\[\d+ tokens, \d+ tokens/s\]\n", err)


@pytest.mark.parametrize("flag", ["--temperature=1e-300", "--int8"])
def test_a_temperature_next_to_0_is_greedy_and_8_bit_weights_say_the_same_where_the_model_is_sure(
    run, said, flag
):
    assert said(run, *USUAL, flag, "--prompt=the cat")[0] == "the cat" + greedy(run, "the cat", 9) + "\n"


def answering(monkeypatch, new: list[int]) -> list:
    """A model that always writes `new`; the list of the prompts it gets."""
    prompts = []

    def generate(self, ids, max_new_tokens, stream, stop_tokens, **_):
        prompts.append(ids[0])
        for token in new:
            stream(0, token)
        return [new]

    monkeypatch.setattr(ModernDecoderLM, "generate", generate)
    return prompts


def test_characters_spread_over_tokens_are_printed_whole(run, monkeypatch, capsys):
    tokenizer, text = Tokenizer.load(run), "é日🙂" * 3
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # this vocabulary has no token for any of them
    answering(monkeypatch, [*ids, 319, tokenizer.encode("日")[0]])  # no text has 319; the last is cut off
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.extend(words))
    monkeypatch.setattr(sys, "argv", ["chat.py", run, "--prompt=x"])
    chat.main()
    assert printed[0] == "x" and "".join(printed[1:-1]) == text + 2 * "\N{REPLACEMENT CHARACTER}" + "\n"
    assert all(set(piece) <= set(text) for piece in printed[1 : 1 + len(text)])  # never half a character


def chat_process(*words: str, stdin: str = "") -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "chat.py", *words]
    return subprocess.run(command, cwd=ROOT, env=env, input=stdin, capture_output=True, text=True)


def test_a_piped_conversation_ends_with_its_input(run):
    done = chat_process(run, *USUAL, stdin="the cat\non the mat\n")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for text in ("the cat", "on the mat"):
        assert text + greedy(run, text, 9) in done.stdout
    assert done.stderr.count("tokens/s") == 2


def test_a_conversation_is_put_in_the_chat_template(run, said, monkeypatch):
    tokenizer = Tokenizer.load(run)
    prompts = answering(monkeypatch, [*tokenizer.encode("a mat"), tokenizer.special_id("<|end|>")])
    lines = iter(["cat?", "and then <|end|>?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    out = said(run, "--chat", "--system=Be brief")[0]
    turns = [("system", "Be brief"), ("user", "cat?"), ("assistant", "a mat"), ("user", "and then <|end|>?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert prompts == [marked_ids(tokenizer, some)[0] for some in (messages[:2], messages)]
    assert "a mat\n" in out and "<|end|>" not in out


def test_what_is_missing_or_damaged_is_a_message_and_not_a_traceback(run, tmp_path, said):
    (tmp_path / "empty").mkdir()
    shape = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=64)
    ModernDecoderLM(shape).save_pretrained(tmp_path / "half")
    for words, message in [
        ([str(tmp_path / "empty")], "config.json"),
        ([str(tmp_path / "half")], "tokenizer.json"),
        ([run, "--device=banana"], "--device=banana"),
        ([run, "--device=meta"], "none that torch can use"),
        ([run, "--int8", "--compile"], "choose one"),
        ([run, "--checkpoints"], "--save_every=N"),
        ([run, "out/sft"], "one model at a time"),
        ([run, f"--max_new_tokens={10**12}"], "out of memory"),
    ]:
        with pytest.raises(SystemExit, match=message):
            said(*words, "--prompt=x")
    done = chat_process("out/nothing-there", "--prompt=x")  # the hub is not asked for it
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout


def test_all_checkpoints_are_asked_the_same(run, said, tmp_path):
    for step, scale in ((5, 1.0), (10, -1.0)):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        model = ModernDecoderLM.from_pretrained(run)
        with torch.no_grad():
            model.model["layers"][0].self_attn.o_proj.weight.mul_(30 * scale)
        model.save_pretrained(folder)
        Tokenizer.load(run).save(folder)
    for prompt in ("the cat", "the mat", "the cat"):
        out, _ = said(str(tmp_path), "--checkpoints", *USUAL, f"--prompt={prompt}")
        assert re.findall(r"^step (\d+):$", out, re.M) == ["5", "10"]
    lines = read_jsonl(tmp_path / "generations.jsonl")
    asked = [(line["prompt"], line["step"]) for line in lines]
    assert asked == [("the mat", 5), ("the mat", 10), ("the cat", 5), ("the cat", 10)]
    for line in lines:
        assert line["text"] == greedy(str(tmp_path / f"checkpoints/step-{line['step']}"), line["prompt"], 9)
