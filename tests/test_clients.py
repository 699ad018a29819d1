"""Other people's clients of serve.py's API, each where it is installed:

pip install "lm-eval[api]" langchain-openai llm && python -m pytest tests/test_clients.py
"""

import os
import subprocess
import sys

import pytest

import chat
from data import load_task

PROBLEM = "Anna has 3 nuts. She buys 4 more nuts. How many nuts does she have now?"


@pytest.fixture
def expected(lab_home, monkeypatch, capsys) -> str:
    """The greedy answer of the chat run by chat.py."""
    flags = ["--chat", f"--prompt={PROBLEM}", "--temperature=0", "--max_new_tokens=60", "--device=cpu"]
    monkeypatch.setattr("sys.argv", ["chat.py", f"{lab_home}/sft", *flags])
    chat.main()
    return capsys.readouterr().out.strip()


def test_lm_eval_gets_the_log_likelihoods_that_it_computes_itself(lab_url, lab_home):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = f"{lab_home}/base"
    here = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4)
    url = f"{lab_url}v1/completions"
    served = LocalCompletionsAPI(model="base", base_url=url, tokenizer=folder, batch_size=4)
    reviews, _ = load_task("sentiment", "test", count=40)
    ends = (" good", " bad, or so he says.")
    pairs = [(review.text, end) for review in reviews for end in ends]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for a, b in zip(here.loglikelihood(asked), served.loglikelihood(asked), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]


def test_langchain_asks_a_chat_run_whole_and_streamed(lab_url, expected):
    langchain_openai = pytest.importorskip("langchain_openai")
    how = {"model": "sft", "temperature": 0, "max_tokens": 60}
    model = langchain_openai.ChatOpenAI(base_url=f"{lab_url}v1", api_key="none", **how)
    found = model.invoke(PROBLEM)
    assert found.content == expected and found.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream(PROBLEM)) == expected


@pytest.mark.parametrize("more", [[], ["--no-stream"]])
def test_llm_asks_a_chat_run(lab_url, expected, tmp_path, more):
    pytest.importorskip("llm")
    about = f"- model_id: ours\n  model_name: sft\n  api_base: {lab_url}v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(about)
    words = ["-m", "ours", "-o", "temperature", "0", "-o", "max_tokens", "60", *more, PROBLEM]
    done = subprocess.run(
        [sys.executable, "-m", "llm", *words],
        env=os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == expected, done.stderr
