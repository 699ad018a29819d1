"""Chat: what is on the screen is what the model said, and nothing a user types ends in a traceback."""

import json
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
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

ROOT = Path(chat.__file__).parent
PROMPT = "Wörter, 日本語 and 🙂"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The folder of a model with random weights, and a vocabulary with few letters but all bytes."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the cat sat on the mat and saw the other cat\n" * 20)
    vocab, merges = train_bpe(folder / "text.txt", 275, SPECIAL_TOKENS)
    tokenizer = Tokenizer(vocab, merges, SPECIAL_TOKENS)
    tokenizer.save(folder)
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=320, context_length=96, n_layers=2, d_model=32, n_heads=2)
    model = ModernDecoderLM(config)
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
        while len(new) < n_tokens:
            new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
            if new[-1] == tokenizer.eot_id:
                return tokenizer.decode(new[:-1])
    return tokenizer.decode(new)


def test_greedy_text_is_the_plain_argmax(run, said):
    for text in ("the cat", PROMPT):
        out, err = said(run, f"--prompt={text}", "--temperature=0", "--max_new_tokens=30")
        assert out == text + greedy(run, text, 30) + "\n"
        assert re.fullmatch(r"\[\d+ tokens, \d+ tokens/s\]\n", err)


@pytest.mark.parametrize(
    "words",
    [
        "RUN --prompt cat --temperature 0 --max_new_tokens 9",
        "--temperature=0 --max_new_tokens=9 RUN --prompt cat",
        "--temperature=0 --max_new_tokens=9 --prompt cat RUN",
    ],
)
def test_the_model_may_be_a_bare_word_and_flags_may_stand_apart_from_their_values(run, said, words):
    usual = said(f"--model={run}", "--prompt=cat", "--temperature=0", "--max_new_tokens=9")
    assert said(*words.replace("RUN", run).split())[0] == usual[0]


def test_characters_spread_over_tokens_are_printed_whole(run, monkeypatch, capsys):
    tokenizer, text = Tokenizer.load(run), "é日🙂" * 3
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # this vocabulary has no token for any of them
    printed = []

    def generate(self, prompts, max_new_tokens, stream, **_):
        for token in (*ids, tokenizer.encode("日")[0]):  # the last one is cut off
            stream(0, token)
        return [ids]

    monkeypatch.setattr(ModernDecoderLM, "generate", generate)
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.extend(words))
    monkeypatch.setattr(sys, "argv", ["chat.py", run, "--prompt=x"])
    chat.main()
    *pieces, speed = printed
    assert pieces[0] == "x" and "".join(pieces[1:]) == text + "\N{REPLACEMENT CHARACTER}"
    assert set("".join(pieces[1:-1])) == set(text)  # never half a character
    assert "tokens/s" in speed


def test_n_samples_differ_and_a_seed_repeats_them(run, said):
    words = [run, "--prompt=the", "--n=2", "--seed=5", "--max_new_tokens=20", "--temperature=1.5"]
    first = said(*words)[0]
    one, two = first.split("---\n")
    assert one.startswith("the") and two.startswith("the") and one != two
    assert said(*words)[0] == first != said(*words, "--seed=77")[0]


def test_ids_that_no_text_uses_are_printed_as_replacement(run, said, monkeypatch):
    def generate(self, prompts, max_new_tokens, stream, **_):
        stream(0, 319)  # a padding row of the embedding
        return [[319]]

    monkeypatch.setattr(ModernDecoderLM, "generate", generate)
    assert said(run, "--prompt=x")[0] == "x\N{REPLACEMENT CHARACTER}\n"


def test_a_prompt_longer_than_the_context_is_answered(run, said):
    text = "the cat sat " * 60
    assert said(run, f"--prompt={text}", "--max_new_tokens=5", "--temperature=0")[0].startswith(text)


def chat_process(*words: str, stdin: str = "") -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "chat.py", *words]
    return subprocess.run(command, cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, timeout=60)


def test_a_piped_conversation_ends_with_its_input(run):
    done = chat_process(run, "--temperature=0", "--max_new_tokens=5", stdin="the cat\non the mat\n")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for text in ("the cat", "on the mat"):
        assert text + greedy(run, text, 5) in done.stdout
    assert done.stderr.count("tokens/s") == 2


def test_a_conversation_is_put_in_the_chat_template(run, said, monkeypatch):
    prompts, tokenizer = [], Tokenizer.load(run)

    def generate(self, ids, max_new_tokens, stream, stop_tokens, **_):
        prompts.append(ids[0])
        reply = [*tokenizer.encode("a mat"), tokenizer.special_id("<|end|>")]
        assert reply[-1] in stop_tokens
        for token in reply:
            stream(0, token)
        return [reply]

    lines = iter(["cat?", "and then <|end|>?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(ModernDecoderLM, "generate", generate)
    out = said(run, "--chat", "--system=Be brief")[0]
    turns = [("system", "Be brief"), ("user", "cat?"), ("assistant", "a mat"), ("user", "and then <|end|>?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert prompts == [tokenizer.chat(messages[:2]), tokenizer.chat(messages)]
    assert "a mat\n" in out and "<|end|>" not in out


def test_what_is_missing_or_damaged_is_a_message_and_not_a_traceback(run, tmp_path, said, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError("asked the hub")  # for what is the name of a run

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    (tmp_path / "empty").mkdir()
    shape = ModelConfig(n_layers=1, d_model=32, n_heads=2, vocab_size=64)
    ModernDecoderLM(shape).save_pretrained(tmp_path / "half")
    for words, message in [
        (["out/nothing-there"], "there is no folder out/nothing-there"),
        ([str(tmp_path / "empty")], "holds neither config.json"),
        ([str(tmp_path / "half")], "tokenizer.json"),
        ([run, "--device=banana"], "--device=banana"),
        *([] if torch.cuda.is_available() else [([run, "--device=cuda"], "sees no CUDA")]),
    ]:
        with pytest.raises(SystemExit, match=message):
            said(*words, "--prompt=x")
    done = chat_process("out/nothing-there", "--prompt=x")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout


def test_all_checkpoints_are_asked_the_same(run, said, tmp_path):
    folder = tmp_path / "run"
    for step, scale in ((5, 1.0), (10, -1.0)):
        model = ModernDecoderLM.from_pretrained(run)
        with torch.no_grad():
            model.model["layers"][0].self_attn.o_proj.weight.mul_(30 * scale)
        model.save_pretrained(folder / "checkpoints" / f"step-{step}")
        Tokenizer.load(run).save(folder / "checkpoints" / f"step-{step}")
    words = [str(folder), "--checkpoints", "--max_new_tokens=8", "--temperature=0", "--device=cpu"]
    for prompt in ("the cat", "the mat", "the cat"):
        out, _ = said(*words, f"--prompt={prompt}")
        assert re.findall(r"^step (\d+):$", out, re.M) == ["5", "10"]
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    asked = [(line["prompt"], line["step"]) for line in lines]
    assert asked == [("the mat", 5), ("the mat", 10), ("the cat", 5), ("the cat", 10)]
    for line in lines:
        checkpoint = folder / "checkpoints" / f"step-{line['step']}"
        assert line["text"] == greedy(str(checkpoint), line["prompt"], 8)
    with pytest.raises(SystemExit, match="holds no checkpoints: train with --save_every=N"):
        said(run, "--checkpoints", "--prompt=x")
