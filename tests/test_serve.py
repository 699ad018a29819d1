"""serve.py through its public addresses: what clients get, who is refused, and runs of the same bits."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = "Anna has 3 nuts. She buys 4 more nuts. How many nuts does she have now?"


@pytest.fixture(scope="module")
def client(lab_url):
    with httpx.Client(base_url=lab_url, timeout=60) as found:
        yield found


def events(response) -> list[dict]:
    """The data of a stream of server-sent events."""
    lines = (line for line in response.iter_lines() if line.startswith("data: {"))
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def streamed(client, path: str, **body) -> list[dict]:
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        return events(response)


def ask(client, **body):
    return client.post(
        "/v1/completions", json={"model": "base", "prompt": "Once upon", "max_tokens": 20} | body
    )


# -----------------------------------------------------------------------------
# Texts


def test_the_list_names_runs_checkpoints_and_given_models(client, lab_home):
    found = {model["id"]: model["meta"] for model in client.get("/v1/models").json()["data"]}
    assert {"base", "base/checkpoints/step-40", "sft", "verifier", f"{lab_home}/models/gpt2"} <= set(found)
    assert found["sft"]["chat"] and not found["base"]["chat"] and found["base"]["context_length"] == 160
    assert client.get("/v1/models/base/checkpoints/step-40").json()["id"] == "base/checkpoints/step-40"
    assert client.get("/v1/models").json()["verifiers"] == ["verifier"]


def test_a_seeded_completion_is_the_one_of_chat_py(client, lab_home, monkeypatch, capsys):
    import chat

    words = [
        f"{lab_home}/base",
        "--prompt=Once upon",
        "--max_new_tokens=20",
        "--seed=5",
        "--n=2",
        "--device=cpu",
    ]
    monkeypatch.setattr("sys.argv", ["chat.py", *words])
    chat.main()
    texts = capsys.readouterr().out.split("\n---\n")
    found = ask(client, seed=5, n=2, temperature=0.8, top_p=0.95).json()["choices"]
    assert ["Once upon" + choice["text"] for choice in found] == [texts[0], texts[1].removesuffix("\n")]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_whole(client, n):
    whole = ask(client, seed=3, n=n).json()
    texts, ends = [""] * n, {}
    body = {"model": "base", "prompt": "Once upon", "max_tokens": 20, "seed": 3, "n": n}
    for event in streamed(client, "/v1/completions", **body, stream_options={"include_usage": True}):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert ends == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}
    assert event["usage"] == whole["usage"]


def test_a_text_ends_before_a_stop_string_also_across_tokens(client):
    text = ask(client, seed=3, max_tokens=60).json()["choices"][0]["text"]
    stop = text[17:23]
    found = ask(client, seed=3, max_tokens=60, stop=[stop, "never"]).json()["choices"][0]
    assert found == found | {"text": text[: text.index(stop)], "finish_reason": "stop"}
    parts = streamed(
        client, "/v1/completions", model="base", prompt="Once upon", max_tokens=60, seed=3, stop=stop
    )
    assert "".join(event["choices"][0]["text"] for event in parts) == found["text"]


def test_echo_gives_the_exact_log_probabilities(client, lab_home):
    import torch

    from support.loading import load_model

    model = load_model(str(lab_home / "base"), torch.device("cpu"))
    ids = model.encode("Once upon a time there was a")
    expected = model.model(torch.tensor([ids]))[0].detach().log_softmax(-1)
    found = ask(client, prompt=ids, max_tokens=0, echo=True, logprobs=2).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None and len(found["tokens"]) == len(ids)
    for t, i in enumerate(ids[1:]):
        assert found["token_logprobs"][t + 1] == pytest.approx(float(expected[t, i]), abs=1e-4)
        best = float(expected[t].max())
        assert max(found["top_logprobs"][t + 1].values()) == pytest.approx(best, abs=1e-4)


def test_log_probabilities_of_what_is_generated_are_those_of_echo(client):
    for body in ({"temperature": 0}, {"temperature": 1, "seed": 4}):
        made = ask(client, logprobs=1, max_tokens=12, **body).json()["choices"][0]
        ids = client.post("/tokenize", json={"model": "base", "prompt": "Once upon"}).json()["tokens"]
        assert len(made["logprobs"]["tokens"]) == 12
        again = ask(client, prompt="Once upon" + made["text"], echo=True, max_tokens=0, logprobs=1).json()
        again = again["choices"][0]["logprobs"]["token_logprobs"][len(ids) :]
        if len(again) == 12:  # the text need not be cut into the same tokens again
            assert made["logprobs"]["token_logprobs"] == pytest.approx(again, abs=1e-3)


def test_bias_and_penalties_change_what_comes(client):
    free = ask(client, temperature=0).json()["choices"][0]["text"]
    first = client.post("/tokenize", json={"model": "base", "prompt": free}).json()["tokens"][0]
    banned = ask(client, temperature=0, logit_bias={str(first): -100}).json()["choices"][0]["text"]
    assert not banned.startswith(free[:1]) or banned != free
    never_twice = ask(client, temperature=0, presence_penalty=2, frequency_penalty=2, max_tokens=60).json()
    assert (
        never_twice["choices"][0]["text"]
        != ask(client, temperature=0, max_tokens=60).json()["choices"][0]["text"]
    )


def test_chat_follows_the_template_and_can_go_on_with_an_answer(client, lab_home):
    import torch

    from support.loading import load_model

    model = load_model(str(lab_home / "sft"), torch.device("cpu"))
    turns = [{"role": "user", "content": PROBLEM}]
    body = {"model": "sft", "messages": turns, "temperature": 0, "max_tokens": 40}
    found = client.post("/v1/chat/completions", json=body).json()
    ids = model.conversation(turns)[0]
    expected = model.continuations([ids], 40, temperature=0.0, stop_tokens=[model.end, model.eos])[0]
    text = found["choices"][0]["message"]["content"]
    assert text == model.decode(expected) and found["usage"]["prompt_tokens"] == len(ids)
    half = text[: text.index(" ", len(text) // 3)]
    body["messages"] = [*turns, {"role": "assistant", "content": half}]
    on = client.post("/v1/chat/completions", json=body | {"continue_final_message": True}).json()
    assert on["choices"][0]["message"]["content"]
    assert "last message" in client.post("/v1/chat/completions", json=body).json()["error"]["message"]


def test_what_the_calculator_wrote_is_marked(client):
    body = {"model": "sft", "prompt": "She has <<3+4=", "max_tokens": 4, "temperature": 0, "calculator": True}
    found = streamed(client, "/v1/completions", **body)
    marked = [c["text"] for event in found for c in event["choices"] if c.get("calculator")]
    assert "".join(marked).startswith("7")
    plain = streamed(client, "/v1/completions", **body | {"calculator": False})
    assert not any(c.get("calculator") for event in plain for c in event["choices"])


def test_best_of_n_is_sorted_by_the_verifier(client, lab_home):
    from verifier import Verifier

    turns = [{"role": "user", "content": PROBLEM}]
    body = {"model": "sft", "messages": turns, "n": 6, "verifier": "verifier", "seed": 1, "max_tokens": 60}
    found = client.post("/v1/chat/completions", json=body).json()
    verdict, judge = found["verdict"], Verifier.load(lab_home / "verifier", "cpu")
    scores = [answer["score"] for answer in verdict["answers"]]
    assert scores == sorted(scores, reverse=True)
    assert [choice["index"] for choice in found["choices"]] == [a["index"] for a in verdict["answers"]]
    for answer in verdict["answers"]:
        if answer["text"].strip():
            assert answer["probability"] == pytest.approx(judge.score(PROBLEM, answer["text"]), abs=2e-3)
    alone = client.post("/v1/chat/completions", json=body | {"n": 1, "verifier": "", "temperature": 0}).json()
    assert verdict["greedy"]["text"] == alone["choices"][0]["message"]["content"]
    assert streamed(client, "/v1/chat/completions", **body)[-1]["verdict"]["answers"] == verdict["answers"]


def test_the_verifier_judges_a_continued_answer_as_a_whole(client):
    turns = [{"role": "user", "content": PROBLEM}]
    answer = "She has <<3+4=7>>7 nuts.\n#### 7"
    body = {"model": "sft", "verifier": "verifier", "temperature": 0, "max_tokens": 1}
    body |= {"continue_final_message": True}
    found = []
    for begun in (answer, answer[:-1]):
        given = [*turns, {"role": "assistant", "content": begun}]
        found.append(client.post("/v1/chat/completions", json=body | {"messages": given}).json()["verdict"])
    texts = [verdict["answers"][0]["text"] for verdict in found]
    assert texts[0].startswith(answer) and texts[1].startswith(answer[:-1])
    for prompt in ([5, 6], ["a", "b"]):
        error = ask(client, model="sft", prompt=prompt, verifier="verifier").json()["error"]
        assert "one prompt as a text" in error["message"]


def test_chunks_name_the_role_once_and_echo_streams(client):
    body = {"model": "sft", "messages": [{"role": "user", "content": PROBLEM}], "n": 2, "max_tokens": 30}
    deltas = [event["choices"][0]["delta"] for event in streamed(client, "/v1/chat/completions", **body)]
    assert sum("role" in delta for delta in deltas) == 2
    body = {"model": "base", "prompt": "Once upon", "max_tokens": 120, "logit_bias": {"0": -100}}
    found = streamed(client, "/v1/completions", **body, echo=True)
    assert found[0]["choices"][0]["text"].startswith("Once upon") and len(found) > 3


def test_the_openai_client_understands_all_of_it(lab_url):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=lab_url + "v1", api_key="none")
    turns = [{"role": "user", "content": PROBLEM}]
    how = {"model": "sft", "messages": turns, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**how, logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0
    with client.chat.completions.stream(**how) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", whole.choices[0].message.content)
    assert client.models.retrieve("base/checkpoints/step-40").id == "base/checkpoints/step-40"
    with pytest.raises(openai.BadRequestError, match="context length") as caught:
        client.completions.create(model="base", prompt="a", max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="a")


def test_heads_that_are_off_change_the_text(client):
    everything = [[layer, head] for layer in range(2) for head in range(4)]
    on, off = (
        ask(client, temperature=0, heads_off=heads).json()["choices"][0]["text"] for heads in ([], everything)
    )
    assert on != off
    assert "no head" in ask(client, heads_off=[[7, 0]]).json()["error"]["message"]


def test_a_model_of_transformers_answers_as_ours_does(client, lab_home):
    name = f"{lab_home}/models/gpt2"
    found = ask(client, model=name, temperature=0, logprobs=1).json()["choices"][0]
    assert len(found["logprobs"]["tokens"]) <= 20 and found["finish_reason"] in ("length", "stop")


# -----------------------------------------------------------------------------
# What is refused

REFUSED = [
    (404, {"model": "nobody"}, "no model"),
    (404, {"model": "../base"}, "no model"),
    (400, {"max_tokens": 500}, "context length is 160 tokens; you asked for"),
    (400, {"n": 65}, "n:"),
    (400, {"prompt": ["a"] * 10, "n": 10}, "at most 64"),
    (400, {"prompt": [3, 4000]}, "token ids"),
    (400, {"prompt": []}, "prompt"),
    (400, {"prompt": [[]]}, "prompt"),
    (400, {"logit_bias": {"4000": 1}}, "token ids"),
    (400, {"temperature": -1}, "temperature"),
    (400, {"stop": [""]}, "stop"),
    (400, {"logprobs": 21}, "logprobs"),
    (400, {"verifier": "verifier", "prompt": ["a", "b"]}, "one prompt"),
    (404, {"verifier": "sft"}, "no verifier"),
    (400, {"model": "base", "prompt": {"a": 1}}, "prompt"),
]


@pytest.mark.parametrize("status, body, words", REFUSED)
def test_errors_have_openais_form_and_say_why(client, status, body, words):
    for more in ({}, {"stream": True}):
        response = ask(client, **body, **more)
        error = response.json()["error"]
        assert response.status_code == status and words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


def test_a_base_holds_no_conversation_and_a_full_context_is_no_answer(client):
    turns = [{"role": "user", "content": "Hello"}]
    error = client.post("/v1/chat/completions", json={"model": "base", "messages": turns}).json()["error"]
    assert "/v1/completions" in error["message"]
    turns = [{"role": "user", "content": "nuts " * 200}]
    error = client.post("/v1/chat/completions", json={"model": "sft", "messages": turns}).json()["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "["}, 400),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_other_sites_and_large_bodies_are_refused(client, headers, status):
    given = {"Content-Type": "application/json"} | headers
    body = json.dumps({"model": "base", "prompt": "a", "max_tokens": 1})
    assert client.post("/v1/completions", content=body, headers=given).status_code == status


def test_a_body_beyond_a_megabyte_is_not_read(client):
    body = json.dumps({"model": "base", "prompt": "a" * 2**20})
    given = {"Content-Type": "application/json"}
    assert client.post("/v1/completions", content=body, headers=given).status_code == 413
    in_parts = (
        body[i : i + 60_000].encode() for i in range(0, len(body), 60_000)
    )  # its length is not announced
    assert client.post("/v1/completions", content=in_parts, headers=given).status_code == 413


def test_pages_have_a_strict_policy_and_paths_do_not_lead_out(client):
    assert "default-src 'self'" in client.get("/v1/models").headers["content-security-policy"]
    for path in ("/../serve.py", "/%2e%2e/serve.py", "/..%2fserve.py", "//etc/passwd", "/lab/run?name=../.."):
        assert client.get(path).status_code in (403, 404, 405)


def test_another_host_needs_the_token_and_does_not_train():
    from starlette.testclient import TestClient

    from serve import ServeConfig, make_app

    app = make_app(ServeConfig(out="nothing-here", host="0.0.0.0", device="cpu", token="secret"))
    with TestClient(app, base_url="http://lab.example") as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer Secret"}).status_code == 401
        known = {"Authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=known).json()["data"] == []
        wish = {"stage": "train", "config": "cpu"}
        refused = client.post("/lab/start", json=wish, headers=known)
        assert refused.status_code == 403 and "--allow_training" in refused.json()["error"]["message"]


# -----------------------------------------------------------------------------
# Clients that leave, wait, or send nonsense


def test_a_client_that_leaves_stops_the_computation(client, lab_url):
    """A second request is answered soon, though the first would have taken much longer."""
    body = {"model": "base", "prompt": ["Once"] * 64, "max_tokens": 150, "temperature": 1.5}
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        next(response.iter_lines())
    deadline = time.time() + 5
    while client.get("/health").json()["streams"] and time.time() < deadline:
        time.sleep(0.02)
    assert client.get("/health").json()["streams"] == 0


def test_streams_take_turns(client):
    def first_and_last(seed: int) -> tuple[float, float]:
        times = []
        body = {"model": "base", "prompt": "Once", "max_tokens": 140, "seed": seed, "stream": True}
        with client.stream("POST", "/v1/completions", json=body | {"logit_bias": {"0": -100}}) as response:
            times += [time.time() for line in response.iter_lines() if line.startswith("data: {")]
        return times[0], times[-1]

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        spans = list(pool.map(first_and_last, range(3)))
    assert max(first for first, _ in spans) < min(last for _, last in spans)


def test_the_33rd_stream_is_refused_until_another_ends(client, lab_url):
    lines = []  # kept: a response is closed with its iterator
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            other = stack.enter_context(httpx.Client(base_url=lab_url, timeout=60))
            response = stack.enter_context(other.stream("GET", "/lab/watch"))
            lines.append(response.iter_lines())
            next(lines[-1])
        assert ask(client, stream=True).status_code == 429 and ask(client).status_code == 429
    deadline = time.time() + 5
    while ask(client).status_code == 429 and time.time() < deadline:
        time.sleep(0.05)
    assert ask(client).status_code == 200


def resident_mib(process) -> float:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4 / 1024


def test_a_thousand_hostile_requests_leave_it_serving(client, lab_server):
    import random

    lab_url, process = lab_server
    before = 0.0
    rng = random.Random(1)
    values = [
        None,
        -1,
        2**70,
        1e308,
        "",
        "\ud800",
        [],
        {},
        [[]],
        True,
        "a" * 5000,
        [1] * 5000,
        {"a": {"b": 1}},
    ]
    names = "model prompt messages max_tokens temperature top_p n stop seed stream logprobs heads_off".split()
    paths = ["/v1/completions", "/v1/chat/completions", "/lab/inside", "/lab/attention", "/lab/plan"]
    paths += ["/lab/pause", "/lab/resume", "/tokenize", "/nowhere"]
    texts = ["{", "NaN", '{"n": NaN}', "[" * 3000, "null", '{"model": 1', "\x00", '{"temperature": Infinity}']
    for i in range(600):
        path = rng.choice(paths)
        if i % 4 == 0:
            body = rng.choice(texts).encode()
        else:
            given = {"model": "base", "prompt": "a", "max_tokens": 2} | {
                rng.choice(names): rng.choice(values) for _ in range(rng.randrange(1, 4))
            }
            body = json.dumps(given).encode()
        before = before if i > 200 else resident_mib(process)  # by then all code has run once
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code < 500, (path, body[:200], response.text[:300])
    address = lab_url.removeprefix("http://").strip("/").split(":")
    raw = [b"GET /", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
           b"\x16\x03\x01", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked"
           b"\r\nContent-Type: application/json\r\n\r\nffffffff\r\n", b"GET / HTTP/9.9\r\n\r\n"]  # fmt: skip
    held = []
    for i in range(400):
        connection = socket.create_connection((address[0], int(address[1])), timeout=5)
        connection.sendall(rng.choice(raw))
        if i % 4:
            connection.close()
        else:
            held.append(connection)  # a slow client
    assert ask(client, max_tokens=2).status_code == 200
    assert resident_mib(process) < before + 50
    for connection in held:
        connection.close()


# -----------------------------------------------------------------------------
# Runs

TINY = dict(n_layers=1, d_model=32, n_heads=2, context_length=32, batch_size=4, device="cpu", dtype="float32")
TINY |= dict(max_steps=400, warmup_steps=3, log_every=5, eval_every=0, save_every=0, sample_tokens=0)


def state_of(client, name: str) -> dict:
    with client.stream("GET", "/lab/watch") as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                found = {run["name"]: run for run in json.loads(line.removeprefix("data: "))}
                return found.get(name, {"state": "", "step": 0})


def wait_for(client, name: str, done) -> dict:
    deadline = time.time() + 60
    while time.time() < deadline:
        found = state_of(client, name)
        if done(found):
            return found
        assert found["state"] != "failed", found
        time.sleep(0.05)
    raise AssertionError(f"{name}: {found}")


def test_a_run_that_the_page_pauses_and_resumes_ends_with_the_same_bits(client, lab_home):
    changes = TINY | {"tokens": str(lab_home / "tokens")}
    for name in ("whole", "paused"):
        response = client.post("/lab/start", json={"stage": "train", "name": name, "changes": changes})
        assert response.json() == {"name": name}
    wait_for(client, "paused", lambda run: run["state"] == "running" and run["step"] > 20)
    assert client.post("/lab/pause", json={"name": "paused"}).status_code == 200
    found = wait_for(client, "paused", lambda run: run["state"] == "interrupted")
    assert 0 < found["step"] < 400
    assert client.post("/lab/resume", json={"name": "paused"}).status_code == 200
    for name in ("whole", "paused"):
        wait_for(client, name, lambda run: run["state"] == "finished")
    weights = [(lab_home / name / "model.safetensors").read_bytes() for name in ("whole", "paused")]
    assert hashlib.sha256(weights[0]).digest() == hashlib.sha256(weights[1]).digest()
    again = client.post("/lab/pause", json={"name": "paused"})
    assert again.status_code == 400 and "not running" in again.json()["error"]["message"]


def test_a_run_outlives_the_server_that_started_it(lab_home):
    command = [sys.executable, str(ROOT / "serve.py"), f"--out={lab_home}", "--port=0", "--device=cpu"]
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    url = first.stdout.readline().strip()
    wish = {"stage": "train", "name": "orphan", "changes": TINY | {"tokens": str(lab_home / "tokens")}}
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/lab/start", json=wish).status_code == 200
        wait_for(client, "orphan", lambda run: run["state"] == "running")
    first.kill()
    first.wait()
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with httpx.Client(base_url=second.stdout.readline().strip(), timeout=60) as client:
        assert wait_for(client, "orphan", lambda run: run["state"] == "finished")["step"] == 400
    second.terminate()
    assert second.wait(20) in (0, -15, 143)


def test_one_damaged_run_does_not_hide_the_others(client, lab_home):
    for i, text in enumerate(['{"settings": [1]}', '{"step": "x"}', "[]", '{"results": {"last": 3}}', "{"]):
        folder = lab_home / f"bad-{i}"
        folder.mkdir()
        (folder / "run.json").write_text(text)
        (folder / "metrics.jsonl").write_text('{"step": [1]}\n' + "[" * 5000 + '\n{"step": 1, "loss": "x"}\n')
    assert state_of(client, "base")["state"] == "finished"
    assert client.get("/v1/models").status_code == 200
    for name in ("base", "bad-0", "bad-3"):
        assert client.get("/lab/run", params={"name": name}).status_code == 200
    for i in range(5):
        shutil.rmtree(lab_home / f"bad-{i}")


def test_only_listed_runs_are_watched(client, lab_home):
    with client.stream(
        "GET", "/lab/watch", params={"runs": ["../x", str(lab_home / "base"), "base"]}
    ) as response:
        for line in response.iter_lines():
            if '"run": ' in line:
                assert json.loads(line.removeprefix("data: "))["run"] == "base"
                break


def test_a_name_is_not_started_twice(client):
    for name, words in (("base", "already a run"), ("tokens", "other things")):
        response = client.post("/lab/start", json={"stage": "train", "name": name, "changes": TINY})
        assert response.status_code == 400 and words in response.json()["error"]["message"]
    resumed = client.post("/lab/resume", json={"name": "base"})
    assert resumed.status_code == 400 and "finished" in resumed.json()["error"]["message"]


def test_ctrl_c_ends_it_at_once_with_streams_open(lab_home):
    command = [sys.executable, str(ROOT / "serve.py"), f"--out={lab_home}", "--port=0", "--device=cpu"]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    url = server.stdout.readline().strip()
    with httpx.Client(base_url=url, timeout=60) as client, client.stream("GET", "/lab/watch") as response:
        next(response.iter_lines())
        server.send_signal(signal.SIGINT)
        assert server.wait(15) in (0, 130)  # 0 where a shell has SIGINT ignored
    assert server.stderr.read() == ""


def test_a_run_that_cannot_start_says_why(client, lab_home):
    wish = {"stage": "train", "name": "wrong", "changes": TINY | {"n_heads": 5}}
    assert client.post("/lab/start", json=wish).status_code == 200
    deadline = time.time() + 30
    while (found := state_of(client, "wrong"))["state"] != "failed" and time.time() < deadline:
        time.sleep(0.2)
    assert "n_heads" in found["error"]
    unknown = client.post("/lab/start", json=wish | {"changes": {"overwrite": True}})
    assert unknown.status_code == 400 and "overwrite" in unknown.json()["error"]["message"]
    for name in ("../up", "a/b", "-x", "a" * 100):
        assert client.post("/lab/start", json=wish | {"name": name}).status_code == 400


def test_the_watch_sends_curves_and_notices_a_log_that_was_replaced(lab_home):
    from support.watching import tail

    file = lab_home / "log.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = tail(file)
    assert next(log) == (True, [{"step": 1, "loss": 2.0}])
    with open(file, "a") as out:
        out.write('ss": 3.0}\n')
    assert next(log) == (False, [{"step": 2, "loss": 3.0}]) and next(log) is None
    other = lab_home / "other.jsonl"
    other.write_text("".join(f'{{"step": {i}}}\n' for i in range(9000)))
    other.replace(file)
    reset, lines = next(log)
    assert reset and len(lines) <= 2001 and lines[-1] == {"step": 8999}


def test_a_hundred_long_runs_are_listed_in_two_seconds(tmp_path):
    from support.watching import summaries

    line = json.dumps({"step": 1, "loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 9e3}) + "\n"
    for i in range(100):
        folder = tmp_path / f"run-{i}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(line * 10_000)
        (folder / "run.json").write_text(
            json.dumps({"status": "finished", "stage": "train", "started": f"{i:03}"})
        )
    begun = time.perf_counter()
    assert len(summaries(tmp_path)) == 100 and time.perf_counter() - begun < 2


def test_a_run_and_its_results_are_described(client):
    found = client.get("/lab/run", params={"name": "base"}).json()
    assert found["checkpoints"][-1] == "base/checkpoints/step-40" and found["settings"]["d_model"] == 64
    compared = client.get("/lab/compare", params={"runs": ["base", "sft"]}).json()
    assert any(row[0] == "learning_rate" for row in compared["differences"]["rows"])


def test_the_form_has_every_setting_and_its_help(client):
    found = client.get("/lab/forms").json()
    assert set(found["stages"]) == {"train", "finetune", "sft", "dpo", "verifier"} and found["allow_training"]
    settings = {f["name"]: f for group in found["stages"]["train"]["groups"] for f in group["fields"]}
    assert settings["n_layers"]["kind"] == "int" and "block" in settings["n_layers"]["help"]
    assert settings["norm"]["choices"] == ["rms", "layer", "none"]
    values = client.get("/lab/config", params={"stage": "train", "config": "cpu"}).json()
    assert values["corpus"] and values["d_model"]
    plan = client.post("/lab/plan", json={"stage": "train", "config": "nobody"})
    assert plan.status_code == 404


def test_look_inside_over_http(client):
    body = {"model": "base", "text": "Once upon a time", "heads_off": [[0, 1]]}
    found = client.post("/lab/inside", json=body).json()
    assert found["parts"]["sum"] == pytest.approx(found["parts"]["target"]["logit"], abs=1e-3)
    assert found["next"] != found["next_off"] and len(found["lens"]) == 3
    response = client.post("/lab/attention", json=body | {"layer": 1})
    heads, tokens = int(response.headers["x-heads"]), int(response.headers["x-tokens"])
    assert heads == 4 and len(response.content) == heads * tokens * tokens
    assert sum(response.content[:tokens]) == 255  # the first token sees itself alone
    assert client.post("/lab/attention", json=body | {"layer": 9}).status_code == 400
