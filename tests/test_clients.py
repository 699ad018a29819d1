"""Other people's clients of serve.py's API, each where it is installed:

pip install "lm-eval[api]" langchain-openai llm && python -m pytest tests/test_clients.py
"""

import math
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


def test_lm_eval_ends_an_answer_where_chat_py_does(lab_home, expected):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=f"{lab_home}/sft", device="cpu", dtype="float32")
    prompt = model.apply_chat_template([{"role": "user", "content": PROBLEM}])
    how = {"until": [], "max_gen_toks": 60, "do_sample": False}
    assert model.generate_until([Instance("generate_until", {}, (prompt, how), 0)]) == [expected]


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


def test_trl_trains_a_chat_run_and_its_answers_end_by_themselves(tuned, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    how = dict(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to=[], bf16=False, logging_steps=1)
    how |= dict(per_device_train_batch_size=4, save_strategy="no")
    turns = [{"role": "user", "content": PROBLEM}]
    good, bad = ({"role": "assistant", "content": f"#### {n}"} for n in (7, 3))
    asked = Dataset.from_list([{"prompt": turns}] * 4)
    grpo = trl.GRPOTrainer(
        model=tuned,
        reward_funcs=lambda completions, **_: [float(len(c[0]["content"])) for c in completions],
        args=trl.GRPOConfig(**how, num_generations=4, max_completion_length=100),
        train_dataset=asked,
    )
    grpo.train()
    assert grpo.state.log_history[0]["completions/clipped_ratio"] < 0.5
    pairs = Dataset.from_list([{"prompt": turns, "chosen": [good], "rejected": [bad]}] * 4)
    dpo = trl.DPOTrainer(model=tuned, args=trl.DPOConfig(**how), train_dataset=pairs)
    dpo.train()
    assert dpo.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    talks = Dataset.from_list([{"messages": [*turns, good]}] * 4)
    sft = trl.SFTTrainer(
        model=tuned, args=trl.SFTConfig(**how, assistant_only_loss=True), train_dataset=talks
    )
    sft.train()
    assert sft.state.log_history[0]["loss"] > 0
