"""The rules that sort mistakes, on cases made by hand."""

import pytest

from data import load_task
from tasks.mistakes import KINDS, kinds_of

QUESTION = (
    "Mia has 3 boxes of 4 pens. Tom is 9 years old. Mia buys 2 pens and gives 5 away. How many are left?"
)
TRUTH = "3*4=<<3*4=12>>12\n12+2=<<12+2=14>>14\n14-5=<<14-5=9>>9\n#### 9"


def solution_kind(output: str, truth: str = TRUTH, question: str = QUESTION) -> str:
    record = {"text": question, "target": truth, "output": output, "correct": False}
    (kind,) = kinds_of("exact_match", record)
    return kind


@pytest.mark.parametrize("output, kind", [
    ("3*4=<<3*4=13>>13\n13+2=<<13+2=15>>15\n15-5=<<15-5=10>>10\n#### 10", "slip"),
    ("4*3=<<4*3=12>>12\n12+2=<<12+2=14>>14\n14-5=<<14-5=9>>9\n#### 8", "answer"),
    ("3*4=<<3*4=12>>12\n12+2=<<12+2=14>>14\n5-14=<<5-14=-9>>-9\n#### -9", "operation"),  # the other way round
    ("3*6=<<3*6=18>>18\n18+2=<<18+2=20>>20\n#### 20", "made up"),  # 6 is nowhere
    ("3*1,004=<<3*1,004=3012>>3012\n#### 3012", "made up"),
    ("3*4=<<3*4=12>>12\n12-5=<<12-5=7>>7\n#### 7", "missed"),  # the true third step, too soon
    ("3*4=<<3*4=12>>12\n12+2=<<12+2=14>>14\n#### 14", "missed"),  # stops too soon
    ("3*9=<<3*9=27>>27\n27+2=<<27+2=29>>29\n#### 29", "distractor"),  # Tom's age
    ("3*4=<<3*4=12>>12\n12+4=<<12+4=16>>16\n16-5=<<16-5=11>>11\n#### 11", "plan"),
    (TRUTH.replace("#### 9", "9-5=<<9-5=4>>4\n#### 4"), "plan"),
    ("3*4=<<3*4=12>>12\n12-5=<<12-5=7>>7\n12+2=<<12+2=14>>14\n#### 14", "plan"),  # in another order
    ("3*4=<<3*4=12>>12\n12+2=<<12+2=14", "unfinished"),
    ("They have 12 pens, so the answer is 12.", "bare"),
    ("I do not know.", "none"),
])  # fmt: skip
def test_what_is_wrong_with_a_wrong_solution(output, kind):
    assert solution_kind(output) == kind and kind in KINDS


def test_numbers_that_the_true_solution_uses_are_not_made_up():
    """ "A week" is 7 in nobody's question."""
    question, truth = "Ann runs 3 miles a day. How many a week?", "3*7=<<3*7=21>>21\n#### 21"
    assert solution_kind("3+7=<<3+7=10>>10\n#### 10", truth, question) == "operation"
    assert solution_kind("7+7=<<7+7=14>>14\n#### 14", truth, question) == "plan"


@pytest.mark.parametrize("said, number", [
    ("twice as many", "2"), ("half a dozen", "12"), ("3 hours", "60"), ("20% off", "0.8"),
    ("5 percent more", "1.05"),
])  # fmt: skip
def test_numbers_can_be_told_in_words_and_shares(said, number):
    question, truth = f"There are 8 pens. Ann has {said}.", "8+3=<<8+3=11>>11\n#### 11"
    assert solution_kind(f"8*{number}=<<8*{number}=1>>1\n#### 1", truth, question) != "made up"
    assert solution_kind("8*13=<<8*13=104>>104\n#### 104", truth, question) == "made up"


@pytest.mark.parametrize("text, kinds", [
    ("it does n't work", ["negation", "short"]),
    ("Although the music is dull , I found the film charming .", ["contrast", "mixed"]),
    ("the butter scene goes on and on in this nothingness of a film", ["other"]),  # no "but", no "nothing"
])  # fmt: skip
def test_what_makes_a_review_hard(text, kinds):
    assert kinds_of("accuracy", {"text": text, "correct": True}) == kinds


CHAT = """Anna: Are you coming to the lake on Monday with the other children?
Ben: Yes! How about noon?
Anna: Ok."""
SUMMARY = "Anna and Ben are going to the lake on Monday at noon."


@pytest.mark.parametrize("said, kinds", [
    ("Ben is going to Anna's party at the lake on Monday at noon.", ["other"]),
    ("Anna asks: are you coming to the lake on Monday, Ben?", ["copied"]),
    ("Anna will be going to the lake with ben on Monday at noon.", ["speaker"]),
    ("", ["speaker", "too short"]),
    ("Anna and Ben " + "go there " * 20, ["too long"]),
])  # fmt: skip
def test_flaws_of_a_summary(said, kinds):
    assert kinds_of("rouge", {"text": CHAT, "target": SUMMARY, "output": said}) == kinds


def test_true_answers_have_no_flaws():
    for example in load_task("arithmetic", "validation")[0][:200]:
        truth = example.target.strip()
        assert solution_kind(truth, truth, example.text) == "answer"  # nothing but the final number is left
    for example in load_task("dialogue", "validation")[0][:200]:
        record = {"text": example.text, "output": example.target, "target": example.target}
        assert set(kinds_of("rouge", record)) <= {"other", "copied"}
