"""Rows of instruction and preference data sets: every form in use is read, any other is named."""

import json
import math

import pytest

from data import DataError, load_conversations, load_preferences, messages_of, preference_of, talk

QUESTIONS = [f"Is {i} above {i % 7}?" for i in range(200)]
USER, ANSWER = talk("q"), talk("q", "a")[1:]
GOOD, BAD = talk("q", "good"), talk("q", "bad")
SYSTEM = {"role": "system", "content": "Be brief."}
NAN = math.nan


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def says(content, role="assistant", **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize("row, messages", [
    ({"prompt": [SYSTEM, *USER], "completion": "a"}, [SYSTEM, *talk("q", "a")]),
    ({"prompt": "q", "completion": ANSWER}, talk("q", "a")),
    ({"messages": [says(parts("q", "r"), "User"), *ANSWER]}, talk("q\nr", "a")),
    ({"messages": [says("Be brief.", "developer"), *USER, *ANSWER]}, [SYSTEM, *talk("q", "a")]),
    ({"question": "q", "answer": 7}, talk("q", "7")),
    ({"instruction": "q", "input": NAN, "output": "a"}, talk("q", "a")),
    ({"instruction": "q", "instances": [{"input": "x", "output": "a"}]}, talk("q\n\nx", "a")),
    # the first column with a text counts, though another holds NaN or spaces
    ({"messages": NAN, "instruction": "q", "output": "  ", "response": "a"}, talk("q", "a")),
    # without its text, or without anything that the assistant says: left out
    ({"messages": USER}, []),
    ({"messages": [*USER, says(None, tool_calls=[])]}, []),
    ({"messages": [says([], "user"), *ANSWER]}, []),
    ({"instruction": "q", "output": None}, []),
    ({"prompt": "  \n", "completion": "a"}, []),
])  # fmt: skip
def test_a_row_becomes_messages_or_is_left_out(row, messages):
    assert messages_of(row) == messages


@pytest.mark.parametrize("row", [
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"prompt": USER, "chosen": GOOD[1:], "rejected": BAD[1:]},
    {"chosen": GOOD, "rejected": BAD},
    {"messages": USER, "chosen": says(parts("good")), "rejected": "bad"},
    {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
])  # fmt: skip
def test_a_row_becomes_a_pair(row):
    pair = preference_of(row)
    assert (pair.messages, pair.chosen, pair.rejected) == (USER, "good", "bad")


@pytest.mark.parametrize("row", [
    {"prompt": "q", "chosen": "good"},
    {"prompt": "q", "chosen": NAN, "rejected": "bad"},
    {"chosen": "good", "rejected": "bad"},
    {"chosen": GOOD, "rejected": talk("another", "bad")},
    {"chosen": talk("q"), "rejected": talk("q")},
    {"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
])  # fmt: skip
def test_a_row_that_is_no_pair_is_left_out(row):
    assert preference_of(row) is None


def written(tmp_path, rows, name="rows.jsonl") -> str:
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


@pytest.mark.parametrize("bad, message", [
    ("a string", 'should be an object.*"a string"'),
    ({"messages": [{"speaker": "user", "text": "q"}]}, 'needs "role" and "content"'),
    ({"messages": [says("q", "tool")]}, "unknown role 'tool'"),
    ({"messages": "q"}, "should be a list of messages"),
    ({"messages": [says([{"type": "image_url"}], "user")]}, "only text.*image_url"),
    ({"instruction": "q", "output": True}, "should be text, but is true"),
])  # fmt: skip
def test_a_row_of_another_form_is_named_with_its_file(tmp_path, bad, message):
    with pytest.raises(DataError, match=f"rows.jsonl.*row 2: .*{message}"):
        load_conversations(written(tmp_path, [{"messages": talk("q", "a")}, bad]), "train")


@pytest.mark.parametrize("rows, message", [
    ({"data": []}, 'should be an array of rows, but is {"data": \\[\\]}'),
    ([], "holds no rows"),
    ([{"title": "t", "body": "b"}] * 3, "columns are title, body"),
    ([{"instruction": "q", "output": "a"}] * 60, "none of its 60 rows falls into"),  # one question
])  # fmt: skip
def test_a_file_without_conversations_says_what_it_has(tmp_path, rows, message):
    with pytest.raises(DataError, match=f"rows.json.*{message}"):
        for split in ("train", "validation"):
            load_conversations(written(tmp_path, rows, "rows.json"), split)


@pytest.mark.parametrize("form", [
    lambda question: {"messages": [SYSTEM, *talk(question, "yes")]},
    lambda question: {"instruction": "Answer.", "input": question, "output": "yes"},
])  # fmt: skip
def test_the_split_is_by_the_first_question_though_all_rows_begin_alike(tmp_path, form):
    file = written(tmp_path, [form(question) for question in QUESTIONS + QUESTIONS[:50]])
    splits = [load_conversations(file, split)[0] for split in ("train", "validation", "test")]
    questions = [{chat[-2]["content"] for chat in chats} for chats in splits]
    assert sum(map(len, splits)) == 250 and all(questions)
    assert not questions[0] & questions[1] and not questions[0] & questions[2]


def test_rows_without_text_are_counted_in_the_record_and_in_the_source(tmp_path):
    rows = [{"instruction": q, "output": "yes"} for q in QUESTIONS]
    _, about = load_conversations(written(tmp_path, [*rows, {"instruction": "q", "output": NAN}]), "train")
    assert about["left_out"] == 1 and "1 without a question and an answer left out" in about["source"]
    pairs = [{"prompt": q, "chosen": 2, "rejected": 3.0} for q in [*QUESTIONS, ""]]  # numbers are texts
    kept, about = load_preferences(written(tmp_path, pairs), "train")
    assert len(kept) > 150 and about["left_out"] == 1 and "left out" in about["source"]
    assert (kept[0].chosen, kept[0].rejected) == ("2", "3")
