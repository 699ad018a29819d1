"""serve.py through its public addresses: what clients get, who is refused, and runs of the same bits."""

import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = "Anna has 3 nuts. She buys 4 more nuts. How many nuts does she have now?"
TURNS = [{"role": "user", "content": PROBLEM}]
TEXTS, CHAT = "/v1/completions", "/v1/chat/completions"
USUAL = {
    TEXTS: {"model": "base", "prompt": "Once upon", "max_tokens": 20},
    CHAT: {"model": "sft", "messages": TURNS},
}


@pytest.fixture(scope="module")
def client(lab_url):
    with httpx.Client(base_url=lab_url, timeout=60) as found:
        yield found


def ask(client, path=TEXTS, **body):
    return client.post(path, json=USUAL.get(path, {}) | body)


def one(client, path=TEXTS, **body) -> dict:
    return ask(client, path, **body).json()["choices"][0]


def complain(client, path=TEXTS, **body) -> dict:
    return ask(client, path, **body).json()["error"]


def events(lines) -> list:
    """The data of server-sent events, without the last one, [DONE]."""
    return [json.loads(line[6:]) for line in lines if line.startswith(("data: {", "data: [{"))]


def streamed(client, path=TEXTS, **body) -> list[dict]:
    with client.stream("POST", path, json=USUAL[path] | body | {"stream": True}) as response:
        return events(response.iter_lines())


def wait_until(done, seconds: float = 60):
    deadline = time.time() + seconds
    while not (found := done()):
        assert time.time() < deadline
        time.sleep(0.05)
    return found


@pytest.fixture
def ours(lab_home):
    """The model of a run, as the lesson loads it."""
    from support.loading import load_model

    return lambda name: load_model(str(lab_home / name), torch.device("cpu"))


# -----------------------------------------------------------------------------
# Texts


def test_the_list_names_runs_checkpoints_and_given_models(client, lab_home):
    found = client.get("/v1/models").json()
    models, checkpoint = {model["id"]: model["meta"] for model in found["data"]}, "base/checkpoints/step-40"
    assert {"base", checkpoint, "sft", "verifier", f"{lab_home}/models/gpt2"} <= set(models)
    assert models["sft"]["chat"] and not models["base"]["chat"] and models["base"]["context_length"] == 160
    assert client.get(f"/v1/models/{checkpoint}").json()["id"] == checkpoint
    assert found["verifiers"] == ["verifier"]


def test_a_seeded_completion_is_the_one_of_chat_py(client, lab_home, monkeypatch, capsys):
    import chat

    flags = ["--prompt=Once upon", "--max_new_tokens=20", "--seed=5", "--n=2", "--device=cpu"]
    monkeypatch.setattr("sys.argv", ["chat.py", f"{lab_home}/base", *flags])
    chat.main()
    texts = capsys.readouterr().out.removesuffix("\n").split("\n---\n")
    found = ask(client, seed=5, n=2, temperature=0.8, top_p=0.95).json()["choices"]
    assert ["Once upon" + choice["text"] for choice in found] == texts


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_whole(client, n):
    whole = ask(client, seed=3, n=n, echo=True).json()
    texts, ends = [""] * n, [None] * n
    parts = streamed(client, seed=3, n=n, echo=True, stream_options={"include_usage": True})
    for choice in (choice for part in parts for choice in part["choices"]):
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]] and texts[0].startswith("Once upon")
    assert ends == [choice["finish_reason"] for choice in whole["choices"]]
    assert parts[-1]["usage"] == whole["usage"]


def test_a_text_ends_before_a_stop_string_also_across_tokens(client):
    text = one(client, seed=3, max_tokens=60)["text"]
    stop = text[17:23]
    found = one(client, seed=3, max_tokens=60, stop=[stop, "never"])
    assert (found["text"], found["finish_reason"]) == (text[: text.index(stop)], "stop")
    parts = streamed(client, seed=3, max_tokens=60, stop=stop)
    assert "".join(part["choices"][0]["text"] for part in parts) == found["text"]


def test_echo_gives_the_exact_log_probabilities(client, ours):
    model = ours("base")
    ids = model.encode("Once upon a time there was a")
    expected = model.model(torch.tensor([ids]))[0].detach().log_softmax(-1)
    found = one(client, prompt=ids, max_tokens=0, echo=True, logprobs=2)["logprobs"]
    values, best = found["token_logprobs"], [max(top.values()) for top in found["top_logprobs"][1:]]
    assert values[0] is None and len(found["tokens"]) == len(ids)
    assert values[1:] == pytest.approx(expected[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)
    assert best == pytest.approx(expected.amax(-1)[:-1].tolist(), abs=1e-4)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1, "seed": 4}])
def test_log_probabilities_of_what_is_generated_are_those_of_echo(client, how):
    made = one(client, logprobs=1, max_tokens=12, **how)
    tokens = ask(client, "/tokenize", model="base", prompt="Once upon").json()["tokens"]
    n = len(tokens)
    assert ask(client, "/detokenize", model="base", tokens=tokens).json() == {"prompt": "Once upon"}
    again = one(client, prompt="Once upon" + made["text"], echo=True, max_tokens=0, logprobs=1)
    again = again["logprobs"]["token_logprobs"][n:]
    assert len(made["logprobs"]["tokens"]) == 12
    if len(again) == 12:  # the text need not be cut into the same tokens again
        assert made["logprobs"]["token_logprobs"] == pytest.approx(again, abs=1e-3)


def test_bias_penalties_and_heads_that_are_off_change_what_comes(client):
    how = {"temperature": 0, "max_tokens": 60}
    free = one(client, **how)["text"]
    first = ask(client, "/tokenize", model="base", prompt=free).json()["tokens"][0]
    every_head = [[layer, head] for layer in range(2) for head in range(4)]
    for change in ({"logit_bias": {first: -100}}, {"presence_penalty": 2, "frequency_penalty": 2},
                   {"heads_off": every_head}):  # fmt: skip
        assert one(client, **how, **change)["text"] != free
    assert "no head" in complain(client, heads_off=[[7, 0]])["message"]


def test_chat_follows_the_template_and_can_go_on_with_an_answer(client, ours):
    model, how = ours("sft"), {"temperature": 0, "max_tokens": 40}
    found = ask(client, CHAT, **how).json()
    ids = model.conversation(TURNS)[0]
    expected = model.continuations([ids], 40, temperature=0.0, stop_tokens=[model.end, model.eos])[0]
    text = found["choices"][0]["message"]["content"]
    assert text == model.decode(expected) and found["usage"]["prompt_tokens"] == len(ids)
    begun = [*TURNS, {"role": "assistant", "content": text[: text.index(" ", len(text) // 3)]}]
    assert one(client, CHAT, **how, messages=begun, continue_final_message=True)["message"]["content"]
    assert "last message" in complain(client, CHAT, **how, messages=begun)["message"]


def test_what_the_calculator_wrote_is_marked(client):
    body = {"model": "sft", "prompt": "She has <<3+4=", "max_tokens": 4, "temperature": 0}
    for calculator in (True, False):
        parts = streamed(client, **body, calculator=calculator)
        marked = "".join(c["text"] for part in parts for c in part["choices"] if c.get("calculator"))
        assert marked.startswith("7") if calculator else not marked


def test_text_that_waits_for_a_stop_string_keeps_its_author():
    from support.serving import Row

    pieces = []
    row = Row(0, ["ab7!"], pieces.append)
    for text, computed in ((b"ab", 0), (b"7", 1), (b"c", 0), (b"\xc3", 0), (b"\xa9", 0)):
        row.computed = computed
        row.add(text, [])
    found = [(piece.text, piece.calculator) for piece in pieces if piece.text]
    assert found == [("ab", False), ("7", True), ("c", False), ("é", False)]  # é: of two tokens


def test_best_of_n_is_sorted_by_the_verifier(client, lab_home):
    from verifier import Verifier

    how = {"n": 6, "verifier": "verifier", "seed": 1, "max_tokens": 60}
    found, judge = ask(client, CHAT, **how).json(), Verifier.load(lab_home / "verifier", "cpu")
    verdict = found["verdict"]
    scores = [answer["score"] for answer in verdict["answers"]]
    assert scores == sorted(scores, reverse=True)
    assert [choice["index"] for choice in found["choices"]] == [a["index"] for a in verdict["answers"]]
    for answer in verdict["answers"]:
        expected = judge.score(PROBLEM, answer["text"]) if answer["text"].strip() else 0
        assert answer["probability"] == pytest.approx(expected, abs=2e-3)
    alone = one(client, CHAT, **how | {"n": 1, "verifier": "", "temperature": 0})
    assert verdict["greedy"]["text"] == alone["message"]["content"]
    parts = streamed(client, CHAT, **how)
    assert parts[-1]["verdict"]["answers"] == verdict["answers"]
    assert sum("role" in c["delta"] for part in parts for c in part["choices"]) == 6  # once a row


def test_the_verifier_judges_a_continued_answer_as_a_whole(client):
    how = {"verifier": "verifier", "temperature": 0, "max_tokens": 1, "continue_final_message": True}
    for begun in ("She has <<3+4=7>>7 nuts.\n#### 7", "She has <<3+4=7>>7 nuts.\n####"):
        messages = [*TURNS, {"role": "assistant", "content": begun}]
        verdict = ask(client, CHAT, **how, messages=messages).json()["verdict"]
        assert verdict["answers"][0]["text"].startswith(begun)


def test_the_openai_client_understands_all_of_it(lab_url):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=lab_url + "v1", api_key="none")
    how = USUAL[CHAT] | {"temperature": 0, "max_tokens": 40}
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


def test_a_model_of_transformers_answers_as_ours_does(client, lab_home):
    found = one(client, model=f"{lab_home}/models/gpt2", temperature=0, logprobs=1)
    assert len(found["logprobs"]["tokens"]) <= 20 and found["finish_reason"] in ("length", "stop")


# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "status, body, words",
    [
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
        (400, {"verifier": "verifier", "model": "sft", "prompt": ["a", "b"]}, "one prompt"),
        (400, {"verifier": "verifier", "model": "sft", "prompt": [5, 6]}, "one prompt"),
        (404, {"verifier": "sft"}, "no verifier"),
        (400, {"prompt": {"a": 1}}, "prompt"),
        (400, {"messages": TURNS, "model": "base"}, "/v1/completions"),
        (400, {"messages": [{"role": "user", "content": "nuts " * 200}]}, "context length"),
        (400, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
    ],
)
def test_errors_have_openais_form_and_say_why(client, status, body, words):
    for more in ({}, {"stream": True}):
        response = ask(client, CHAT if "messages" in body else TEXTS, **body, **more)
        error = response.json()["error"]
        assert response.status_code == status and words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


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
def test_other_sites_are_refused(client, headers, status):
    body, usual = json.dumps(USUAL[TEXTS]), {"Content-Type": "application/json"}
    assert client.post(TEXTS, content=body, headers=usual | headers).status_code == status


def test_a_body_beyond_a_megabyte_is_not_read(client):
    body, usual = json.dumps({"model": "base", "prompt": "a" * 2**20}), {"Content-Type": "application/json"}
    in_parts = (body[i : i + 60_000].encode() for i in range(0, len(body), 60_000))  # no length is announced
    for content in (body, in_parts):
        assert client.post(TEXTS, content=content, headers=usual).status_code == 413


def test_pages_have_a_strict_policy_and_paths_do_not_lead_out(client):
    assert "default-src 'self'" in client.get("/v1/models").headers["content-security-policy"]
    for path in ("/../serve.py", "/%2e%2e/serve.py", "/..%2fserve.py", "//etc/passwd", "/lab/run?name=../.."):
        assert client.get(path).status_code in (403, 404, 405)


def test_another_host_needs_the_token_and_does_not_train():
    from starlette.testclient import TestClient

    from serve import ServeConfig, make_app

    app = make_app(ServeConfig(out="nothing-here", host="0.0.0.0", device="cpu", token="secret"))
    with TestClient(app, base_url="http://lab.example") as client:
        for token, status in ((None, 401), ("Bearer Secret", 401), ("Bearer secret", 200)):
            headers = {"Authorization": token} if token else {}
            assert client.get("/v1/models", headers=headers).status_code == status
        refused = client.post("/lab/start", json={"stage": "train", "config": "cpu"}, headers=headers)
        assert refused.status_code == 403 and "--allow_training" in refused.json()["error"]["message"]


# -----------------------------------------------------------------------------
# Clients that leave, wait, or send nonsense


def test_a_client_that_leaves_stops_the_computation(client):
    """No stream is left soon, though all texts would have taken much longer."""
    body = {"model": "base", "prompt": ["Once"] * 64, "max_tokens": 150, "temperature": 1.5, "stream": True}
    with client.stream("POST", TEXTS, json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: client.get("/health").json()["streams"] == 0, 5)


def test_streams_take_turns(client):
    def first_and_last(seed: int) -> tuple[float, float]:
        body = {"model": "base", "prompt": "Once", "max_tokens": 140, "seed": seed, "stream": True}
        with client.stream("POST", TEXTS, json=body | {"logit_bias": {"0": -100}}) as response:
            times = [time.time() for line in response.iter_lines() if line.startswith("data: {")]
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
    wait_until(lambda: ask(client).status_code == 200, 5)


def resident_mib(process) -> float:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4 / 1024


def test_a_thousand_hostile_requests_leave_it_serving(client, lab_server):
    lab_url, process = lab_server
    rng, before, held = random.Random(1), 0.0, []
    values = [None, -1, 2**70, 1e308, "", "\ud800", [], {}, [[]], True, "a" * 5000, [1] * 5000, {"a": {}}]
    names = "model prompt messages max_tokens temperature top_p n stop seed stream logprobs heads_off".split()
    paths = [TEXTS, CHAT, "/tokenize", "/nowhere"]
    paths += [f"/lab/{name}" for name in ("inside", "attention", "plan", "pause", "resume")]
    texts = ["{", "NaN", '{"n": NaN}', "[" * 3000, "null", '{"model": 1', "\x00", '{"temperature": Infinity}']
    for i in range(600):
        path, body = rng.choice(paths), {"model": "base", "prompt": "a", "max_tokens": 2}
        body |= {rng.choice(names): rng.choice(values) for _ in range(rng.randrange(1, 4))}
        text = rng.choice(texts) if i % 4 == 0 else json.dumps(body)
        before = before if i > 200 else resident_mib(process)  # by then all code has run once
        response = client.post(path, content=text.encode(), headers={"content-type": "application/json"})
        assert response.status_code < 500, (path, text[:200], response.text[:300])
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw = [b"GET /", post + b"Content-Length: 50\r\n\r\n{", b"\x16\x03\x01", b"GET / HTTP/9.9\r\n\r\n",
           post + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n"]  # fmt: skip
    for i in range(400):
        connection = socket.create_connection(("127.0.0.1", httpx.URL(lab_url).port), timeout=5)
        connection.sendall(rng.choice(raw))
        connection.close() if i % 4 else held.append(connection)  # a slow client
    assert ask(client, max_tokens=2).status_code == 200
    assert resident_mib(process) < before + 50
    for connection in held:
        connection.close()


# -----------------------------------------------------------------------------
# Runs

TINY = dict(n_layers=1, d_model=32, n_heads=2, context_length=32, batch_size=4, device="cpu", dtype="float32")
TINY |= dict(max_steps=300, warmup_steps=3, log_every=5, eval_every=0, save_every=0, sample_tokens=0)


def state_of(client, name: str) -> dict:
    with client.stream("GET", "/lab/watch") as response:
        runs = events([next(line for line in response.iter_lines() if line.startswith("data: "))])[0]
    return next((run for run in runs if run["name"] == name), {"state": "", "step": 0})


def wait_for(client, name: str, state: str, step: int = 0) -> dict:
    def reached():
        found = state_of(client, name)
        assert found["state"] == state or found["state"] not in ("failed", "lost"), found
        return found if found["state"] == state and found.get("step", 0) >= step else None

    return wait_until(reached)


def test_a_run_outlives_its_server_and_pauses_and_resumes_to_the_same_bits(client, lab_home):
    """Ctrl-C ends the server that started it, though a stream is open; another one goes on with the run."""
    from train import TrainConfig, pretrain

    changes, pipe = TINY | {"tokens": str(lab_home / "tokens")}, subprocess.PIPE
    command = [sys.executable, str(ROOT / "serve.py"), f"--out={lab_home}", "--port=0", "--device=cpu"]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=one_core)
    with httpx.Client(base_url=first.stdout.readline().strip(), timeout=60) as other:
        wish = {"stage": "train", "name": "paused", "changes": changes}
        assert other.post("/lab/start", json=wish).json() == {"name": "paused"}
        assert "being started" in other.post("/lab/start", json=wish).json()["error"]["message"]
        with other.stream("GET", "/lab/watch") as response:
            next(response.iter_lines())
            first.send_signal(signal.SIGINT)
            assert first.wait(15) in (0, 130)  # 0 where a shell has SIGINT ignored
    assert first.stderr.read() == ""
    wait_for(client, "paused", "running", 20)
    assert ask(client, "/lab/pause", name="paused").status_code == 200
    assert 0 < wait_for(client, "paused", "interrupted")["step"] < 300
    assert "not running" in complain(client, "/lab/pause", name="paused")["message"]
    assert ask(client, "/lab/resume", name="paused").status_code == 200
    torch.set_num_threads(1)
    pretrain(TrainConfig(name="whole", out=str(lab_home), **changes))
    wait_for(client, "paused", "finished", 300)
    whole, paused = ((lab_home / name / "model.safetensors").read_bytes() for name in ("whole", "paused"))
    assert whole == paused


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
    names = ["../x", str(lab_home / "base"), "base"]
    with client.stream("GET", "/lab/watch", params={"runs": names}) as response:
        first = next(line for line in response.iter_lines() if '"run": ' in line)
    assert events([first])[0]["run"] == "base"


def test_a_name_is_not_started_twice(client):
    for name, words in (("base", "already a run"), ("tokens", "other things")):
        error = complain(client, "/lab/start", stage="train", name=name, changes=TINY)
        assert words in error["message"]
    assert "finished" in complain(client, "/lab/resume", name="base")["message"]


def test_a_run_that_cannot_start_says_why(client):
    wish = {"stage": "train", "name": "wrong", "changes": TINY | {"n_heads": 5}}
    assert ask(client, "/lab/start", **wish).status_code == 200
    assert "n_heads" in wait_for(client, "wrong", "failed")["error"]
    assert "overwrite" in complain(client, "/lab/start", **wish | {"changes": {"overwrite": True}})["message"]
    for name in ("../up", "a/b", "-x", "a" * 100):
        assert ask(client, "/lab/start", **wish | {"name": name}).status_code == 400


def test_the_watch_sends_curves_and_notices_a_log_that_was_replaced(tmp_path):
    from support.guard import to_json
    from support.watching import tail

    file, other = tmp_path / "log.jsonl", tmp_path / "other.jsonl"
    log = tail(file)
    assert next(log) == (True, []) and next(log) is None  # not there yet
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert next(log) == (True, [{"step": 1, "loss": 2.0}])
    with open(file, "a") as handle:
        handle.write('ss": NaN}\n')
    assert to_json(next(log)) == '[false, [{"step": 2, "loss": null}]]' and next(log) is None
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
        (folder / "run.json").write_text(json.dumps({"status": "finished", "started": f"{i:03}"}))
    begun = time.perf_counter()
    assert len(summaries(tmp_path)) == 100 and time.perf_counter() - begun < 2


def test_a_run_and_its_results_are_described(client):
    found = client.get("/lab/run", params={"name": "base"}).json()
    assert found["checkpoints"][-1] == "base/checkpoints/step-40" and found["settings"]["d_model"] == 64
    compared = client.get("/lab/compare", params={"runs": ["base", "sft"]}).json()
    assert "learning_rate" in [row[0] for row in compared["differences"]["rows"]]


def test_the_form_has_every_setting_and_its_help(client):
    found = client.get("/lab/forms").json()
    assert set(found["stages"]) == {"train", "finetune", "sft", "dpo", "verifier"} and found["allow_training"]
    settings = {f["name"]: f for group in found["stages"]["train"]["groups"] for f in group["fields"]}
    assert settings["n_layers"]["kind"] == "int" and "block" in settings["n_layers"]["help"]
    assert settings["norm"]["choices"] == ["rms", "layer", "none"]
    values = client.get("/lab/config", params={"stage": "train", "config": "cpu"}).json()
    assert values["corpus"] and values["d_model"] == 128
    assert ask(client, "/lab/plan", stage="train", config="nobody").status_code == 404


def test_look_inside_over_http(client):
    body = {"model": "base", "text": "Once upon a time", "heads_off": [[0, 1]]}
    found = ask(client, "/lab/inside", **body).json()
    assert found["parts"]["sum"] == pytest.approx(found["parts"]["target"]["logit"], abs=1e-3)
    assert found["next"] != found["next_off"] and len(found["lens"]) == 3
    response = ask(client, "/lab/attention", **body, layer=1)
    heads, tokens = int(response.headers["x-heads"]), int(response.headers["x-tokens"])
    assert heads == 4 and len(response.content) == heads * tokens * tokens
    assert sum(response.content[:tokens]) == 255  # the first token sees itself alone
    assert ask(client, "/lab/attention", **body, layer=9).status_code == 400
