"""serve.py through its public addresses: what clients get, who is refused, and runs of the same bits."""

import asyncio
import contextlib
import json
import random
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import start_server, wait_until

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

PROBLEM = "Anna has 3 nuts. She buys 4 more nuts. How many nuts does she have now?"
TURNS = [{"role": "user", "content": PROBLEM}]
TEXTS, CHAT = "/v1/completions", "/v1/chat/completions"
USUAL = {
    TEXTS: {"model": "base", "prompt": "Once upon", "max_tokens": 20},
    CHAT: {"model": "sft", "messages": TURNS},
}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(lab_url):
    with httpx.Client(base_url=lab_url, timeout=60) as found:
        yield found


def ask(client, path=TEXTS, **body):
    text = json.dumps(USUAL.get(path, {}) | body)  # in ASCII: httpx cannot write half an emoji
    return client.post(path, content=text, headers=JSON)


def one(client, path=TEXTS, **body) -> dict:
    return ask(client, path, **body).json()["choices"][0]


def complain(client, path=TEXTS, **body) -> str:
    return ask(client, path, **body).json()["error"]["message"]


def events(lines) -> list:
    """The data of server-sent events, without the last one, [DONE]."""
    return [json.loads(line[6:]) for line in lines if line.startswith(("data: {", "data: [{"))]


def streamed(client, path=TEXTS, **body) -> list[dict]:
    with client.stream("POST", path, json=USUAL[path] | body | {"stream": True}) as response:
        return events(response.iter_lines())


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
    assert found["verifiers"] == ["verifier"]
    assert one(client, model=f"{lab_home}/models/gpt2")["finish_reason"] in ("length", "stop")


def test_a_seeded_completion_is_the_one_of_chat_py(client, lab_home, monkeypatch, capsys):
    import chat

    flags = ["--prompt=Once upon", "--max_new_tokens=20", "--seed=5", "--n=2", "--device=cpu"]
    monkeypatch.setattr("sys.argv", ["chat.py", f"{lab_home}/base", *flags])
    chat.main()
    texts = capsys.readouterr().out.removesuffix("\n").split("\n---\n")
    found = ask(client, seed=5, n=2, temperature=0.8, top_p=0.95).json()["choices"]
    assert ["Once upon" + choice["text"] for choice in found] == texts


def test_a_stream_adds_up_to_the_whole_and_ends_before_a_stop_string(client):
    how = {"seed": 3, "n": 3, "echo": True, "max_tokens": 60}
    stop = ask(client, **how).json()["choices"][0]["text"][26:32]  # across tokens
    whole = ask(client, **how, stop=[stop, "never"]).json()
    parts = streamed(client, **how, stop=[stop, "never"], stream_options={"include_usage": True})
    rows = [{"text": "", "finish_reason": None} for _ in range(3)]
    for choice in sum((part["choices"] for part in parts), []):
        rows[choice["index"]]["text"] += choice["text"]
        rows[choice["index"]]["finish_reason"] = choice["finish_reason"]
    assert rows == [{key: choice[key] for key in rows[0]} for choice in whole["choices"]]
    assert parts[-1]["usage"] == whole["usage"] and rows[0]["finish_reason"] == "stop"
    assert all(row["text"].startswith("Once upon") and stop not in row["text"] for row in rows)


def test_echo_gives_the_exact_log_probabilities_and_generation_the_same(client, ours):
    model = ours("base")
    ids = ask(client, "/tokenize", model="base", prompt="Once upon a time there was a").json()["tokens"]
    expected = model.model(torch.tensor([ids]))[0].detach().log_softmax(-1)
    found = one(client, prompt=ids, max_tokens=0, echo=True, logprobs=2)["logprobs"]
    values, best = found["token_logprobs"], [max(top.values()) for top in found["top_logprobs"][1:]]
    assert values[0] is None and len(found["tokens"]) == len(ids)
    assert values[1:] == pytest.approx(expected[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)
    assert best == pytest.approx(expected.amax(-1)[:-1].tolist(), abs=1e-4)
    whole = one(client, prompt=ids[:4], max_tokens=6, temperature=0, echo=True, logprobs=1)["logprobs"]
    made = one(client, prompt=ids[:4], max_tokens=6, temperature=0, logprobs=1)["logprobs"]
    assert whole["token_logprobs"][4:] == made["token_logprobs"] and len(made["tokens"]) == 6
    best = [max(top.values()) for top in made["top_logprobs"]]
    assert made["token_logprobs"] == pytest.approx(best)  # greedy


def test_heads_that_are_off_change_what_comes(client):
    every_head = [[layer, head] for layer in range(2) for head in range(4)]
    texts = [one(client, temperature=0, heads_off=heads)["text"] for heads in ([], every_head)]
    assert texts[0] != texts[1]
    assert "no head" in complain(client, heads_off=[[7, 0]])


def test_penalties_are_those_of_openai(client, ours):
    """Presence counts once, frequency each time, and only of what was generated."""
    model, penalties = ours("base"), {"presence_penalty": 0.7, "frequency_penalty": 1.3}
    ids = ask(client, "/tokenize", model="base", prompt="Once upon a time").json()["tokens"]
    expected = []
    for _ in range(12):
        logits = model.model(torch.tensor([ids + expected]))[0, -1].detach()
        for i in set(expected):
            logits[i] -= 0.7 + 1.3 * expected.count(i)
        expected.append(int(logits.argmax()))
    found = one(client, prompt=ids, max_tokens=12, temperature=0, **penalties)["text"]
    assert found == model.decode(expected)


def test_ids_become_text_and_tokens_know_where_they_stand(client):
    text = "Once upon a time 🦊 was there"
    ids = ask(client, "/tokenize", model="base", prompt=text).json()["tokens"]
    assert ask(client, "/detokenize", model="base", tokens=ids).json() == {"prompt": text}
    how = {"temperature": 0, "max_tokens": 9, "logprobs": 0, "stop": ["never comes"]}
    for more in ({}, {"echo": True}):
        whole = one(client, **how, **more)
        tokens, offsets = whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"]
        for token, begin in zip(tokens, offsets, strict=True):
            assert whole["text"].startswith(token, begin)
        parts = streamed(client, **how, **more)
        pieces = [c["logprobs"]["text_offset"] for part in parts for c in part["choices"]]
        assert sum(pieces, []) == offsets


def test_a_special_token_takes_no_room_in_the_text(client, ours):
    user = ours("sft").tokenizer.special_id("<|user|>")  # it does not end the text
    how = {"logit_bias": {user: 100}, "logprobs": 0, "temperature": 0, "max_tokens": 3}
    found = one(client, model="sft", **how)
    assert found["text"] == "" and found["logprobs"]["text_offset"] == [0, 0, 0]


def test_chat_follows_the_template_and_can_go_on_with_an_answer(client, ours):
    model, how = ours("sft"), {"temperature": 0, "max_tokens": 40}
    found = ask(client, CHAT, **how).json()
    ids = model.conversation(TURNS)[0]
    expected = model.continuations([ids], 40, temperature=0.0, stop_tokens=[model.end, model.eos])[0]
    text = found["choices"][0]["message"]["content"]
    assert text == model.decode(expected) and found["usage"]["prompt_tokens"] == len(ids)
    begun = [*TURNS, {"role": "assistant", "content": text[: text.index(" ", len(text) // 3)]}]
    assert one(client, CHAT, **how, messages=begun, continue_final_message=True)["message"]["content"]


def test_what_the_calculator_wrote_is_marked_also_behind_a_stop_string(client):
    body = {"model": "sft", "prompt": "She has <<3+4=", "max_tokens": 4, "temperature": 0, "stop": ["never"]}
    for calculator in (True, False):
        parts = streamed(client, **body, calculator=calculator)
        marked = "".join(c["text"] for part in parts for c in part["choices"] if c.get("calculator"))
        assert marked.startswith("7") if calculator else not marked


def test_a_character_of_two_tokens_comes_whole():
    from support.serving import Row

    row = Row([])
    for part in (b"c", b"\xc3", b"\xa9"):
        row.add(part, [])
    assert [piece.text for piece in row.take()] == ["cé"]


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
    alone = one(client, CHAT, max_tokens=60, temperature=0)
    assert verdict["greedy"]["text"] == alone["message"]["content"]
    assert streamed(client, CHAT, **how)[-1]["verdict"]["answers"] == verdict["answers"]
    begun = "She has <<3+4=7>>7 nuts.\n#### 7"
    messages = [*TURNS, {"role": "assistant", "content": begun}]
    how |= {"n": 1, "max_tokens": 1, "continue_final_message": True}
    verdict = ask(client, CHAT, **how, messages=messages).json()["verdict"]
    assert verdict["answers"][0]["text"].startswith(begun)


def test_the_openai_client_understands_all_of_it(lab_url):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=lab_url + "v1", api_key="none")
    how = USUAL[CHAT] | {"temperature": 0, "max_tokens": 40}
    [whole] = client.chat.completions.create(**how, logprobs=True, top_logprobs=2).choices
    assert whole.logprobs.content[0].top_logprobs[0].logprob <= 0
    with client.chat.completions.stream(**how, n=2) as stream:
        choices = stream.until_done().get_final_completion().choices
    for choice in choices:
        assert (choice.message.role, choice.message.content) == ("assistant", whole.message.content)
    assert client.models.retrieve("base/checkpoints/step-40").id == "base/checkpoints/step-40"
    with pytest.raises(openai.BadRequestError, match="context length") as caught:
        client.completions.create(model="base", prompt="a", max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="a")


# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("status, body, word", [
    (404, {"model": "../base"}, "no model"),
    (400, {"max_tokens": 500}, "context length"),
    (400, {"n": 65}, "n:"),
    (400, {"prompt": ["a"] * 10, "n": 10}, "at most 64"),
    (400, {"prompt": [3, 4000]}, "token ids"),
    (400, {"logit_bias": {"4000": 1}}, "token ids"),
    (404, {"verifier": "sft"}, "no verifier"),
    (400, {"verifier": "verifier", "model": "sft", "prompt": [5, 6]}, "one prompt"),
    (400, {"best_of": 2}, "best_of"),
    (400, {"messages": TURNS, "model": "base"}, "/v1/completions"),
    (400, {"messages": [*TURNS, {"role": "assistant", "content": "a"}]}, "last message"),
    (400, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
    (400, {"messages": [{"role": "user", "content": 0}]}, "content"),
    (400, {"messages": [*TURNS, {"role": "assistant", "tool_calls": [{}]}]}, "tool_calls"),
    (400, {"messages": TURNS, "tools": [{}]}, "tools"),
    (400, {"messages": TURNS, "tool_choice": "required"}, "tool_choice"),
])  # fmt: skip
def test_errors_have_openais_form_and_say_why(client, status, body, word):
    for more in ({}, {"stream": True}):
        response = ask(client, CHAT if "messages" in body else TEXTS, **body, **more)
        error = response.json()["error"]
        assert response.status_code == status and word in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


def test_other_paths_are_not_there_other_ids_are_no_tokens_and_half_an_emoji_is_text(client):
    assert ask(client, "/v1/embeddings", input="a").status_code == 404
    assert "token ids" in complain(client, "/detokenize", model="base", tokens=[5, 10**30])
    half = "a \ud83d"
    assert ask(client, prompt=half, stop=half).status_code == 200
    assert ask(client, "/lab/inside", model="base", text=half).status_code == 200


def test_other_sites_large_bodies_and_paths_out_are_refused(client):
    body = json.dumps(USUAL[TEXTS])
    for name, value, status in (
        ("Host", "127.0.0.1.evil.example:80", 403),
        ("Host", "[", 400),
        ("Origin", "http://evil.example", 403),
        ("Origin", "null", 403),
        ("Sec-Fetch-Site", "same-site", 403),
        ("Content-Type", "text/plain", 415),
        ("Sec-Fetch-Site", "same-origin", 200),
    ):
        assert client.post(TEXTS, content=body, headers=JSON | {name: value}).status_code == status
    body = json.dumps({"model": "base", "prompt": "a" * 2**20})
    in_parts = (body[i : i + 60_000].encode() for i in range(0, len(body), 60_000))  # no length is announced
    for content in (body, in_parts):
        assert client.post(TEXTS, content=content, headers=JSON).status_code == 413
    assert "default-src 'self'" in client.get("/v1/models").headers["content-security-policy"]
    for path in ("/../serve.py", "/%2e%2e/serve.py", "/..%2fserve.py", "//etc/passwd", "/lab/run?name=../.."):
        assert client.get(path).status_code in (403, 404, 405)


def test_another_host_needs_the_token_and_does_not_train():
    from starlette.testclient import TestClient

    from serve import ServeConfig, make_app

    app = make_app(ServeConfig(out="nothing-here", host="0.0.0.0", device="cpu", token="secret"))
    with TestClient(app, base_url="http://lab.example") as client:
        for token, status in (("", 401), ("Bearer Secret", 401), ("Bearer secret", 200)):
            headers = {"Authorization": token}
            assert client.get("/v1/models", headers=headers).status_code == status
        refused = client.post("/lab/start", json={"stage": "train", "config": "cpu"}, headers=headers)
        assert refused.status_code == 403 and "--allow_training" in refused.json()["error"]["message"]
    for token in ("geheimniß", "two words"):  # no header can hold them
        with pytest.raises(ValueError, match="--token"):
            ServeConfig(token=token)


# -----------------------------------------------------------------------------
# Clients that leave, wait, or send nonsense


def test_a_client_that_leaves_stops_the_computation_at_the_next_token(ours, monkeypatch):
    from support.openai_api import Completion
    from support.serving import Row, Turns, generate

    gone, row = threading.Event(), Row([])
    monkeypatch.setattr(row, "add", lambda *_: gone.set() if len(row.ids) == 3 else None)
    how = Completion(model="base", prompt="a", max_tokens=100, logit_bias={0: -100})
    generate(ours("base"), [[5, 6]], how, [row], gone, Turns())
    assert len(row.ids) == 3


def test_streams_take_turns():
    from support.serving import Turns

    turns, order, threads = Turns(), [], []

    def work(name):
        with turns:
            for _ in range(3):
                order.append(name)
                turns.hand_on()

    with turns:
        for name in "ab":
            threads.append(threading.Thread(target=work, args=name))
            threads[-1].start()
            wait_until(lambda: len(turns.queue) == 1 + len(threads))
    for thread in threads:
        thread.join()
    assert order == list("ababab")


def test_the_33rd_stream_is_refused_until_another_ends(client, lab_url):
    lines = []  # kept: a response is closed with its iterator
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            other = stack.enter_context(httpx.Client(base_url=lab_url, timeout=60))
            lines.append(stack.enter_context(other.stream("GET", "/lab/watch")).iter_lines())
            next(lines[-1])
        assert ask(client, stream=True).status_code == 429 and ask(client).status_code == 429
    wait_until(lambda: ask(client).status_code == 200)


def test_what_is_computed_while_a_client_reads_is_seen_too():
    """At the last tick the computation has ended, also if that was while the reader was busy."""
    from support.openai_api import Job

    begun, threads = threading.Event(), ThreadPoolExecutor(1)
    lab = SimpleNamespace(stream=contextlib.nullcontext, threads=threads)
    job = SimpleNamespace(lab=lab, gone=threading.Event(), compute=begun.wait, ended=[])

    async def read() -> None:
        async for _ in Job.ticks(job):
            job.ended.append(begun.is_set())
            begun.set()
            threads.shutdown()  # waits for the computation
            await asyncio.sleep(0.1)

    asyncio.run(read())
    assert job.ended[0] is False and job.ended[-1] is True


def resident_mib(process) -> float:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4 / 1024


def test_a_thousand_hostile_requests_leave_it_serving(client, lab_server):
    lab_url, process = lab_server
    rng, before, held = random.Random(1), 0.0, []
    values = [None, -1, 2**70, 1e308, "", "\ud800", [], {}, [[]], True, "a" * 5000, [1] * 5000, {"a": {}}]
    names = "model prompt messages max_tokens temperature top_p n stop seed stream logprobs heads_off".split()
    paths = [TEXTS, CHAT, "/tokenize", "/nowhere"]
    paths += [f"/lab/{name}" for name in ("inside", "attention", "plan", "pause", "resume")]
    texts = ["{", "NaN", '{"n": NaN}', "[" * 3000, "null", '{"model": 1', "\x00"]
    for i in range(600):
        body = {"model": "base", "prompt": "a", "max_tokens": 2}
        body |= {rng.choice(names): rng.choice(values) for _ in range(rng.randrange(1, 4))}
        text = rng.choice(texts) if i % 4 == 0 else json.dumps(body)
        if i == 200:
            before = resident_mib(process)  # by then all code has run once
        response = client.post(rng.choice(paths), content=text.encode(), headers=JSON)
        assert response.status_code < 500, (text[:200], response.text[:300])
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw = [b"GET /", post + b"Content-Length: 50\r\n\r\n{", b"\x16\x03\x01",
           post + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n"]  # fmt: skip
    for i in range(400):
        connection = socket.create_connection(("127.0.0.1", httpx.URL(lab_url).port), timeout=60)
        connection.sendall(rng.choice(raw))
        connection.close() if i % 4 else held.append(connection)  # a slow client
    assert ask(client, max_tokens=2).status_code == 200
    assert resident_mib(process) < before + 50
    for connection in held:
        connection.close()


# -----------------------------------------------------------------------------
# Runs

TINY = dict(n_layers=1, d_model=32, n_heads=2, context_length=32, batch_size=4, device="cpu", dtype="float32")
TINY |= dict(max_steps=800, warmup_steps=3, log_every=5, eval_every=0, save_every=0, sample_tokens=0)


def state_of(client, name: str) -> dict:
    with client.stream("GET", "/lab/watch") as response:
        runs = events([next(line for line in response.iter_lines() if line.startswith("data: "))])[0]
    return next((run for run in runs if run["name"] == name), {"state": "", "step": 0})


def wait_for(client, name: str, state: str, step: int = 0) -> dict:
    def reached():
        found = state_of(client, name)
        assert found["state"] == state or found["state"] not in ("failed", "lost"), found
        return found if found["state"] == state and found.get("step", 0) >= step else None

    return wait_until(reached, 300)


def test_a_run_outlives_its_server_and_pauses_and_resumes_to_the_same_bits(client, lab_home):
    """Ctrl-C ends the server that started it, though a stream is open; another one goes on with the run."""
    from train import TrainConfig, pretrain

    changes = TINY | {"tokens": str(lab_home / "tokens")}
    url, first = start_server(lab_home)
    with httpx.Client(base_url=url, timeout=60) as other:
        wish = {"stage": "train", "name": "paused", "changes": changes}
        assert other.post("/lab/start", json=wish).json() == {"name": "paused"}
        assert "already" in complain(other, "/lab/start", **wish)
        with other.stream("GET", "/lab/watch") as response:
            next(response.iter_lines())
            first.send_signal(signal.SIGINT)
            assert first.wait(60) in (0, 130)  # 0 where a shell has SIGINT ignored
    wait_for(client, "paused", "running", 5)
    assert ask(client, "/lab/pause", name="paused").status_code == 200
    assert 0 < wait_for(client, "paused", "interrupted")["step"] < 800
    assert "not running" in complain(client, "/lab/pause", name="paused")
    assert ask(client, "/lab/resume", name="paused").status_code == 200
    torch.set_num_threads(1)
    pretrain(TrainConfig(name="whole", out=str(lab_home), **changes))
    wait_for(client, "paused", "finished")
    whole, paused = ((lab_home / name / "model.safetensors").read_bytes() for name in ("whole", "paused"))
    assert whole == paused


def test_one_damaged_run_does_not_hide_the_others(client, lab_home):
    bad = []
    for text in ('{"settings": [1]}', '{"step": "x"}', "[]", '{"results": {"last": 3}}', "{"):
        bad.append(lab_home / f"bad-{len(bad)}")
        bad[-1].mkdir()
        (bad[-1] / "run.json").write_text(text)
        (bad[-1] / "metrics.jsonl").write_text(
            '{"step": [1]}\n' + "[" * 5000 + '\n{"step": 1, "loss": "x"}\n'
        )
    assert state_of(client, "base")["state"] == "finished"
    assert client.get("/v1/models").status_code == 200
    for name in ("base", "bad-0", "bad-3"):
        assert client.get("/lab/run", params={"name": name}).status_code == 200
    for folder in bad:
        shutil.rmtree(folder)


def test_a_run_that_cannot_start_says_why(client):
    wish = {"stage": "train", "name": "wrong", "changes": TINY | {"n_heads": 5}}
    assert ask(client, "/lab/start", **wish).status_code == 200
    assert "n_heads" in wait_for(client, "wrong", "failed")["error"]
    assert "overwrite" in complain(client, "/lab/start", **wish | {"changes": {"overwrite": True}})
    for name in ("../up", "-x", "a" * 100, "base", "tokens"):
        assert ask(client, "/lab/start", **wish | {"name": name}).status_code == 400
    assert "finished" in complain(client, "/lab/resume", name="base")
    for corpus, word in (("a\0b", "--corpus"), ("a" * 200_000, "too long")):  # no process can be started
        changes = TINY | {"corpus": corpus}
        assert word in complain(client, "/lab/start", stage="train", name="ghost", changes=changes)
        assert client.get("/lab/run", params={"name": "ghost"}).status_code == 404


def test_the_watch_sends_curves_of_listed_runs_alone(client, lab_home):
    names = ["../x", str(lab_home / "base"), "base"]
    with client.stream("GET", "/lab/watch", params={"runs": names}) as response:
        first = next(line for line in response.iter_lines() if '"run": ' in line)
    assert events([first])[0]["run"] == "base"


def test_a_log_is_followed_line_by_line_and_begins_again_when_it_was_replaced(tmp_path):
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
    assert reset and len(lines) <= 2000 and lines[-1] == {"step": 8999}


def test_no_two_runs_share_a_file_of_the_page(tmp_path):
    from support.watching import page_file

    assert len({page_file(tmp_path, name, "log") for name in ("a/b", "a--b", "a%2Fb", "a-b")}) == 4


def test_a_hundred_long_runs_are_listed_in_two_seconds(tmp_path):
    from support.watching import summaries

    line = '{"step": 1, "loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 9e3}\n'
    for i in range(100):
        folder = tmp_path / f"run-{i}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(line * 10_000)
        (folder / "run.json").write_text('{"status": "finished", "started": "1"}')
    begun = time.process_time()  # not that of other programs
    assert len(summaries(tmp_path)) == 100 and time.process_time() - begun < 2


def test_runs_are_described_compared_and_made_by_a_form(client):
    found = client.get("/lab/run", params={"name": "base"}).json()
    assert found["checkpoints"][-1] == "base/checkpoints/step-40" and found["settings"]["d_model"] == 64
    compared = client.get("/lab/compare", params={"runs": ["base", "sft"]}).json()
    assert "learning_rate" in [row[0] for row in compared["differences"]["rows"]]
    found = client.get("/lab/forms").json()["stages"]
    assert set(found) == {"train", "finetune", "sft", "dpo", "verifier"}
    settings = {f["name"]: f for group in found["train"]["groups"].values() for f in group}
    assert settings["n_layers"]["kind"] == "int" and settings["norm"]["choices"] == ["rms", "layer", "none"]
    assert found["train"]["configs"]["cpu"]["d_model"] == 128
    assert ask(client, "/lab/plan", stage="train", config="../serve").status_code == 400
