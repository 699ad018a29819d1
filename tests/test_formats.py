"""Rows of instruction and preference data sets: every form in use is read, any other is named."""

import json
import math

import pytest

from data import DataError, load_conversations, load_preferences, messages_of, preference_of, talk

QUESTIONS = [f"Is {i} above {i % 7}?" for i in range(200)]
USER, ANSWER = talk("q"), talk("q", "a")[1:]
SYSTEM = {"role": "system", "content": "Be brief."}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"prompt": USER, "completion": ANSWER}, talk("q", "a")),
        ({"prompt": [SYSTEM, *USER], "completion": "a"}, [SYSTEM, *talk("q", "a")]),
        ({"prompt": "q", "completion": ANSWER}, talk("q", "a")),
        ({"messages": [{"role": "user", "content": parts("q")}, *ANSWER]}, talk("q", "a")),
        ({"messages": [{"role": "User", "content": parts("q", "r")}, *ANSWER]}, talk("q\nr", "a")),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, *USER, *ANSWER]},
            [SYSTEM, *talk("q", "a")],
        ),
        ({"question": "q", "answer": 7}, talk("q", "7")),
        ({"instruction": "q", "input": math.nan, "output": "a"}, talk("q", "a")),
        ({"instruction": "q", "instances": [{"input": "x", "output": "a"}]}, talk("q\n\nx", "a")),
        # without its text, or without anything that the assistant says: left out
        ({"messages": USER}, []),
        ({"messages": []}, []),
        ({"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": []}]}, []),
        ({"messages": [{"role": "user", "content": []}, *ANSWER]}, []),
        ({"instruction": "q"}, []),
        ({"instruction": "q", "output": None}, []),
        ({"prompt": "  \n", "completion": "a"}, []),
        ({"prompt": "q", "completion": math.nan}, []),
    ],
)
def test_a_row_becomes_messages_or_is_left_out(row, messages):
    assert messages_of(row) == messages


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": USER, "chosen": "good", "rejected": "bad"},
        {"prompt": USER, "chosen": talk("q", "good")[1:], "rejected": talk("q", "bad")[1:]},
        {"prompt": USER, "chosen": talk("q", "good"), "rejected": talk("q", "bad")},
        {"chosen": talk("q", "good"), "rejected": talk("q", "bad")},
        {"prompt": "q", "chosen": parts("good"), "rejected": parts("bad")},
        {"messages": USER, "chosen": {"role": "assistant", "content": parts("good")}, "rejected": "bad"},
    ],
)
def test_a_row_becomes_a_pair(row):
    if isinstance(row["chosen"], list) and "type" in row["chosen"][0]:
        row = row | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    pair = preference_of(row)
    assert (pair.messages, pair.chosen, pair.rejected) == (USER, "good", "bad")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good"},
        {"prompt": "q", "chosen": "good", "rejected": None},
        {"prompt": "q", "chosen": math.nan, "rejected": "bad"},
        {"chosen": "good", "rejected": "bad"},
        {"chosen": talk("q", "good"), "rejected": talk("another", "bad")},
        {"chosen": talk("q"), "rejected": talk("q")},
    ],
)
def test_a_row_that_is_no_pair_is_left_out(row):
    assert preference_of(row) is None


def test_numbers_as_answers_are_their_text():
    pair = preference_of({"prompt": "1+1?", "chosen": 2, "rejected": 3.0})
    assert (pair.chosen, pair.rejected) == ("2", "3")


def written(tmp_path, rows, name="rows.jsonl") -> str:
    file = tmp_path / name
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    file.write_text(text)
    return str(file)


GOOD = {"messages": talk("q", "a")}


@pytest.mark.parametrize(
    "bad, message",
    [
        (talk("q", "a"), "row 2: should be an object"),
        ("a string", 'row 2: should be an object.*"a string"'),
        (5, "row 2: should be an object"),
        ({"messages": [{"speaker": "user", "text": "q"}]}, 'row 2: a message needs "role" and "content"'),
        ({"messages": [{"role": "tool", "content": "q"}]}, "row 2: unknown role 'tool'"),
        ({"messages": [7]}, "row 2: a message needs"),
        ({"messages": "q"}, "row 2: should be a list of messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "row 2: only text is.*image_url",
        ),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "row 2: should be text"),
        ({"instruction": "q", "output": True}, "row 2: should be text, but is true"),
    ],
)
def test_a_row_of_another_form_is_named_with_its_file(tmp_path, bad, message):
    with pytest.raises(DataError, match=message) as error:
        load_conversations(written(tmp_path, [GOOD, bad]), "train")
    assert "rows.jsonl" in str(error.value)


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"data": []}, 'should be an array of rows, but is {"data": \\[\\]}'),
        ([], "holds no rows"),
        ([{"title": "t", "body": "b"}] * 3, "no row has a question and.*columns are title, body"),
        ("text", "should be an array of rows"),
    ],
)
def test_a_file_without_conversations_says_what_it_has(tmp_path, rows, message):
    with pytest.raises(DataError, match=message) as error:
        load_conversations(written(tmp_path, rows, "rows.json"), "train")
    assert "rows.json" in str(error.value)


def test_a_json_file_may_hold_an_object_a_line(tmp_path):
    rows = [json.dumps({"instruction": q, "output": "yes"}) for q in QUESTIONS]
    (tmp_path / "rows.json").write_text("\n".join(rows))
    assert len(load_conversations(str(tmp_path / "rows.json"), "train")[0]) > 150


@pytest.mark.parametrize("form", ["system", "instruction", "prompt"])
def test_the_split_is_by_the_first_question_though_all_rows_begin_alike(tmp_path, form):
    rows = {
        "system": [{"messages": [SYSTEM, *talk(q, "yes")]} for q in QUESTIONS],
        "instruction": [{"instruction": "Answer.", "input": q, "output": "yes"} for q in QUESTIONS],
        "prompt": [{"prompt": [SYSTEM, *talk(q)], "completion": "yes"} for q in QUESTIONS],
    }[form]
    file = written(tmp_path, rows + rows[:50])
    splits = [load_conversations(file, split)[0] for split in ("train", "validation", "test")]
    questions = [{chat[-2]["content"] for chat in chats} for chats in splits]
    assert sum(map(len, splits)) == 250 and all(questions)
    assert not questions[0] & questions[1] and not questions[0] & questions[2]


def test_one_question_alone_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match="rows.jsonl: none of its 60 rows falls into the"):
        for split in ("train", "validation"):
            load_conversations(written(tmp_path, [GOOD] * 60), split)


def test_rows_without_text_are_counted_in_the_record_and_in_the_source(tmp_path):
    empty = [{"instruction": "q", "output": value} for value in (None, math.nan, "", " \n")]
    empty.append({"instruction": "q"})
    rows = [{"instruction": q, "output": "yes"} for q in QUESTIONS]
    chats, about = load_conversations(written(tmp_path, empty + rows), "train")
    assert about["left_out"] == 5 and "5 without a question and an answer left out" in about["source"]
    pairs = [{"prompt": q, "chosen": "yes", "rejected": "no"} for q in QUESTIONS]
    pairs += [{"prompt": "q", "chosen": None, "rejected": "no"}]
    kept, about = load_preferences(written(tmp_path, pairs), "train")
    assert len(kept) > 150 and about["left_out"] == 1 and "left out" in about["source"]


def test_the_first_column_with_a_text_counts_though_another_holds_nan_or_spaces():
    row = {"messages": float("nan"), "instruction": "a", "output": "  ", "response": "b"}
    assert [m["content"] for m in messages_of(row)] == ["a", "b"]
