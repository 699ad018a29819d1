"""Where text and tasks come from, and how an answer is judged: generators, real data sets, metrics.

`storyworld` tells short stories in a vocabulary of 960 words; `arithmetic` sets word problems in GSM8K's
format; `sentiment` and `dialogue` stand in for SST-2 and SAMSum. They are programs, not files: as many
examples as you want, the same on every machine and in every Python, and none in two splits. Real corpora and
tasks are read from $DATA_DIR (default `data/`), or downloaded.

    python data.py                                               # five stories
    python data.py --corpus=arithmetic --show=3
    python data.py --corpus="my/notes/*.txt" --split=validation  # your own .txt, .jsonl or .parquet, also .gz
    python data.py --corpus=tinystories:0.9,arithmetic:0.1       # a mix; the shares are shares of bytes
    python data.py --task=gsm8k --split=test                     # questions as a model sees them, [answers]

Reads $DATA_DIR, and what is not there from Hugging Face's hub, through its cache in $HF_HOME. The other files
use `documents` and `corpus_info`, `load_task`, `judge`, `calculate` and the metrics; a new story plot is a
paragraph of text in PLOTS, and a new task an entry in TASKS.
"""

from support.terminal import run_script

import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from glob import escape, glob
from itertools import count, islice

from support.formats import first_question, messages_of, pair_of, talk
from support.hub import hub_file, hub_rows
from support.tables import TABLE, DataError, columns_of, read_rows, shortened, text_lines, text_of

SPLITS = ("train", "validation", "test")
SEED = 1  # of both generators: another seed is another corpus
END_OF_TEXT = "<|endoftext|>"


# -----------------------------------------------------------------------------
# a little grammar, which both generators use


def pick(rng: random.Random, options):
    """One of `options`. Of all of `random`, only random() is promised to stay the same in every Python."""
    return options[int(rng.random() * len(options))]


@cache
def parse(template: str) -> list:
    """`a (b|c) {d}` → its alternatives, each a list of str, (slot, capital?) or, again, alternatives."""
    stack = [[[]]]
    for token in re.findall(r"[(|)]|\{\w+\}|[^(|){]+", template.replace("“", '"').replace("”", '"')):
        if token == "(":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token == ")":
            alternatives = stack.pop()
            stack[-1][-1].append(alternatives)
        elif token[0] == "{":
            stack[-1][-1].append((token[1:-1].lower(), token[1].isupper()))
        else:
            stack[-1][-1].append(token)
    return stack[0]


def fill(rng: random.Random, alternatives: list, slots: dict) -> str:
    """One of the alternatives, with its choices made and its slots filled; {He} is {he} with a capital."""
    out = []
    for part in pick(rng, alternatives):
        if type(part) is str:
            out.append(part)
        elif type(part) is list:
            out.append(fill(rng, part, slots))
        else:
            text = slots[part[0]]
            out.append(text[:1].upper() + text[1:] if part[1] else text)
    return "".join(out)


class Slots(dict):
    def __missing__(self, name: str) -> str:  # {a_cup} is {cup} with its article
        noun = self[name.removeprefix("a_")]
        return ("an " if noun[0] in "aeiou" else "a ") + noun


def split_of(signature: str) -> str:
    """The split where everything with this signature lives: 90 % train, 5 % validation, 5 % test."""
    bucket = zlib.crc32(signature.encode()) % 20
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


# -----------------------------------------------------------------------------
# storyworld: first the words and the plots, then the teller

GIRLS = "Anna Clara Daisy Ella Emma Hanna Ivy Lena Lily Lucy Maya Mia Molly Nora Rosa Ruby Sara Zoe".split()
BOYS = "Adam Anton Ben Emil Finn Hugo Jack Leo Luke Max Nico Noah Omar Oscar Otto Sam Theo Tom".split()
ELDERS = dict.fromkeys(("Mama", "Grandma", "Aunt Rose"), "she")
ELDERS |= dict.fromkeys(("Papa", "Grandpa", "Uncle Ned"), "he")
PRONOUNS = {"she": ("she", "her", "her", "herself"), "he": ("he", "him", "his", "himself")}
CHARACTER = ("little", "small", "young", "cheerful", "brave", "clever")
HOUSES = ("a small white house", "a yellow house", "a little stone house", "a house with a green door")
DENS = {  # where an animal lives
    "rabbit": "a warm burrow", "mouse": "a snug little hole", "bear": "a dry cave", "fox": "a deep den",
    "hedgehog": "a nest of leaves", "squirrel": "a hollow tree", "badger": "a wide burrow",
    "otter": "a den of roots",
}  # fmt: skip
NEAR = (
    "by the sea", "near the old mill", "at the edge of the wood", "on top of a hill", "beside a stream",
    "at the end of a long road", "behind the market", "near a little bridge",
)  # fmt: skip
HABITS = (  # what the hero is like, and how that comes back at the end
    ("loved to sing", "sang about it until {he} fell asleep"),
    ("loved to draw", "drew a picture of it all and hung it over the bed"),
    ("loved to dance", "danced three times around the kitchen table"),
    ("loved soup", "ate two bowls of soup and asked for a third"),
    ("loved pancakes", "ate five pancakes and could not say a word"),
    ("loved stories", "made a story out of it and told it to the moon"),
    ("counted everything", "counted the stars until {his} eyes closed"),
    ("asked a hundred questions a day", "asked one last question and fell asleep before the answer"),
    ("liked to hum", "sat at the window and hummed to the moon"),
    ("could never sit still", "was so tired that {he} sat still at last"),
    ("kept all {his} treasures in a tin box", "put a small stone in the tin box, to remember the day"),
    ("laughed at almost everything", "laughed about it so much that the bed shook"),
)

# A line is a sentence or two. After a "|", there or on the next line, stands another way to say it (or
# nothing: leave it out). An indented line goes on with the one above. (a|b) is a choice, {he} a slot.
# `name = x | y` draws the slot {name}; `a, b = 1 / 2 | 3 / 4` draws two that belong together. What was drawn
# is a fact, and `fact: ...` is told only where it holds: so the hole in the pocket of the first paragraph
# decides what shines on the path in the second. An empty line starts a paragraph.
PLOTS = """
# opening
(Once upon a time there was|Once there was|Long ago there was|Far away there lived) {a_hero_kind} named {hero}
    who {habit}.
| {Hero} was {a_hero_kind} who {habit}. | In {house} {near} lived {a_hero_kind} named {hero}, who {habit}.
| {Hero}, {a_hero_kind}, lived in {house} {near}. {He} {habit}.
| {Hero} lived with {elder} {near}. {He} was {a_hero_kind} who {habit}.

# ending
not night: (That evening|Before bed|At bedtime|At the end of the day), {hero} {callback}.

# a lost thing
way = rolled | pocket | wind | left
rolled: thing = red ball | blue ball | yellow ball | glass marble
pocket: thing = silver bell | brass button | tin whistle | lucky coin
wind: thing = straw hat | blue cap | yellow scarf | red ribbon
left: thing = wooden horse | rag doll | toy train | picture book
{Elder} had given {him} {a_thing}, and {he} took it everywhere.
| Of all the things {he} had, {he} loved {his} {thing} (best|most).
| For {his} birthday {he} got {a_thing}, and {he} would not go anywhere without it.
One (sunny|bright|cold) (morning|day) {he} took it (to the meadow|along the river|to the top of the hill).
rolled: {He} threw it up and caught it, again and again, and did not see how steep the ground was.
| {He} played with it (for hours|all morning), although the ground was (steep|not flat at all).
pocket: {He} kept it in {his} pocket. There was a small hole in that pocket, but {hero} did not know it.
| It was safe in {his} pocket, or so {he} thought, for nobody had told {him} about the hole in it.
wind: The wind was strong, so {he} hung it on a fence while {he} (picked flowers|ate a pear|climbed a tree).
left: seat = bench | flat stone | old log | low wall
left: (At noon|Soon) {he} was hungry, so {he} sat down on {a_seat} to eat (an apple|a bun|some nuts).
But when {he} came home, the {thing} was gone! | Back home, {he} (looked|felt) for the {thing}. It was gone!
| But at supper, when {he} wanted to show it to {elder}, the {thing} was not there.

{He} looked under the bed, and then behind the door. Nothing.
| {He} looked in every corner of the house and found only an old sock. | |
“I have lost my {thing},” {he} told {friend_the}(, and a tear ran down {his} nose|).
| “What is wrong?” asked {friend_the}. “My {thing} is lost,” said {hero} in a small voice.
“Where did you have it last?” asked {friend}. | “Then we will look for it together,” said {friend}.
| “Come,” said {friend}. “Let us walk back the way you came.”
left: rain = dry | wet
wet: On the way it began to rain, and they ran. | Dark clouds came, and soon they were both wet.
rolled: They went back together, and {friend} pointed down the slope.
    There, (in the tall grass|under a bush), lay the {thing}. It had rolled all the way!
pocket: They walked along the path with their noses close to the ground.
    All at once something shone in the (dust|grass). It was the {thing}!
wind: The fence was empty. Then {friend} looked up.
    High in an apple tree hung the {thing}, where the wind had (put|left) it.
dry: They ran to the {seat}, and there lay the {thing}, just where {hero} had left it.
wet: They came to the {seat}, and there lay the {thing}, (cold and wet but safe|in the middle of a puddle).

rolled: “Next time I will play where it is flat,” said {hero}(, and {friend} laughed|).
| {Hero} picked it up and held it tight. “No more hills for you,” {he} told the {thing}.
pocket: {Elder} sewed up the hole with (red|green|strong) thread, and nothing ever fell out again.
wind: {Friend} climbed up and threw it down. “On windy days,” said {hero}, “I will hold it with both {hands}.”
dry: “I am sorry that I forgot you,” {he} told the {thing}, and {he} carried it home with both {hands}.
wet: “I am sorry that I forgot you,” {he} told the {thing}, and {he} dried it by the fire.

# sharing
food = apple cake | honey bun | cherry pie | plum cake | cheese pie | nut cake
weather = sunny | windy | cold
One {weather} (day|morning) {elder} gave {him} {a_food} for the way.
| One {weather} morning {he} helped {elder} in the kitchen and got {a_food} as a thank-you.
| On a {weather} market day {hero} bought {a_food} with {his} own three coins.
It was still warm. | It smelled so good that (a bee|a small dog) came to look. |
(On the bridge|By the gate|On the steps of the mill) sat {friend_the}, (all alone|with a long face).
| Then {he} met {friend_the}, who was (looking into|holding) an empty basket.
“My lunch fell (into the river|into a puddle|off the bridge),” said {friend},
    and {f_his} stomach made a loud noise.
| “A (goat|dog|cow) ate my lunch,” said {friend}, “and then it ate the (paper|box), too.”
| “I was in such a hurry that I left my lunch at home,” said {friend}.

heart = open | shut
shut: {Hero} held the {food} behind {his} back. It was so small, and {he} was so hungry!
| {Hero} did not want to share. {He} said goodbye and walked on, but {his} feet grew slower and slower.
shut: {He} took one bite. It did not taste good at all, because {he} kept thinking of {friend}.
    So {he} (went|turned) back.
open: {Hero} did not have to think about it. {He} sat down beside {f_him}.
“Half of this is yours,” said {hero}, and {he} broke the {food} in two.
| {Hero} broke the {food} in two and gave away the bigger half. “It tastes better together,” {he} said.
They ate every crumb and (watched the boats|looked at the clouds|told each other jokes).
| They ate slowly and swung their legs, and a duck got the last crumb. |

later = umbrella | boot | kite
umbrella: On the way home it began to (rain|snow).
    {Friend} opened a (big|red|blue) umbrella and held it over them both.
boot: A week later {hero} lost {his} left boot. It was {friend} who looked until dark and found it (in the
    barn|under the bridge).
kite: The next day there was a knock at the door. There stood {friend} with a new kite and two balls of
    string.
“You shared with me,” {f_he} said, “so now I share with you.”
| “That is for the {food},” {f_he} said and smiled.

# a storm
(There was only one thing that {he} was afraid of|Only one thing made {him} afraid),
    and (that|it) was thunder.
| {He} was not afraid of (spiders|big dogs|deep water) or of (the dark|wolves|high trees),
    but {he} was afraid of thunder.
One night a storm came (over the hill|from the sea).
    The wind (shook the door|howled around the house), and the rain beat on the (roof|windows).
| One (summer|autumn) evening the sky turned (black|dark), and the first big drops hit the (window|roof).
(Boom|Crash)! {Hero} pulled the blanket over {his} (ears|head).
| A flash lit up the (whole room|sky). Boom! {Hero} (hid|crept) under the (bed|table).

way = count | pet | tent
count: {Elder} (came in|came) with a (candle|lamp|cup of tea) and sat down (beside|next to) {him}.
    “Count with me,” said {elder}, “from the flash to the boom.”
count: They counted to (two|three). The next time they counted to (four|five), and then to (eight|nine|ten).
| At first they only came to two. Then they came to four, and then all the way to ten.
count: “Do you hear it?” said {elder}. “(The storm|It) is walking away.”
| “It is (going away|far away now)!” cried {hero}.
pet: animal = puppy | kitten | lamb | chick
pet: Then {he} heard somebody cry. In the corner sat (the|a) little {animal}, shaking from nose to tail.
| Something soft pushed against {his} foot. It was the little {animal}, and it was shaking.
pet: “You are even more afraid than I am,” {he} said and took it into {his} arms.
    “It is only noise, little one.”
pet: {He} (hummed|sang) a (slow|soft) song until the {animal} slept. By then {he} had forgotten to be afraid.
| {He} told it about (the sun|warm milk) and (the summer|tall grass), and by the time it slept,
    {he} was not afraid any more.
tent: “May I come in?” asked {elder}. “I do not like (to be alone in a storm|storms very much).”
tent: (Together they|They) put a (blanket|big cloth) over the table and crept under it with a lamp and (some
    nuts|two buns).
tent: {Elder} told a story about a giant who (dropped his pots and pans|rolled his barrels) down the stairs,
    and now {hero} laughed at every boom.

In the morning the (yard|garden|road) was full of puddles.
    {Hero} (put on {his} boots|ran out) and jumped into (every one|them all).
| When {he} woke up, the sky was (blue|clear) and the (grass|wood) was shining. “Was that all?”
    (asked|said) {hero}.
| The next time it thundered, {hero} (went to the window|looked up) and only said, “Oh, it is you again.”

# a broken thing
thing = blue cup | big plate | tall vase | green bowl | clay jug
One (rainy|long|cold) afternoon {he} (threw|kicked) a ball in the kitchen, which was not allowed.
| One (rainy|snowy|windy) day {he} played (pirates|knights) in the kitchen and (waved|swung) a wooden sword.
| One (fine|sunny) morning {he} ran through the house as fast as (the wind|a horse).
Crash! {Elder}'s {thing} fell from the (shelf|table) and broke (in two|into three pieces|into many pieces).
| (There was a crash|Something went crash), and {elder}'s {thing} lay on the floor in (pieces|three pieces).
way = brave | night
brave: {Hero} wanted to (hide the pieces|run away). But {he} took a deep breath and went to find {elder}.
| {His} (heart beat fast|knees shook), but {he} picked up the pieces and (carried|took) them to {elder}.
night: Nobody had seen it. Quickly {hero} hid the pieces (under the bed|behind the stove|in an old boot|under
    a rug).

night: At supper {elder} asked, “Has anyone seen my {thing}?” {Hero} looked down at {his} (plate|soup).
    (The food tasted like sand|{He} could not eat any more).
| All evening {elder} looked for the {thing}. {Hero} said nothing, but {his} (stomach|head) hurt.
night: In bed {he} could not sleep. (At last|In the end) {he} got up, took the pieces and went to {elder}.
| When the moon came up, {he} was still awake. So {he} carried the pieces to {elder} on {his} toes.
“It was me,” {he} said. “I am (so|very) sorry.” | “I broke it,” {he} whispered, “and I am sorry.”

{Elder} (was quiet|said nothing) for a while. “I liked that {thing},”
    {e_he} said, “but I like it (more|better) that you told me.”
| {Elder} (sighed|shook {e_his} head) and then took {him} into {e_his} arms. “To tell me was the hard part,”
    {e_he} said.
(They|Together they) mended it with glue, (piece by piece|and it took an hour).
| The next (morning|day) they sat down with a pot of glue and put it together again.
It could not hold (soup|water) any more, so they (kept pencils in it|filled it with shells|put a candle in
    it).
| You could still see the cracks, but {elder} put it back (in the middle of the shelf|in its old place).
| It looked a little (crooked|funny) now, and they both liked it even more.
night: And {hero} slept very well. |

# learning
skill, place, fail, hint, success =
| to swim / the pond / {He} kicked and splashed and swallowed half the pond / Kick like a frog
    / {he} swam all the way to the other side
| to whistle / the garden / {He} blew until {his} face was red, but only air came out
    / Make a very small mouth / a high, clear note came out, and a bird answered
| to skate / the frozen lake / One foot went left and one went right, and {he} sat down hard on the ice
    / Bend your knees and look ahead / {he} flew over the ice like a bird
| to fly a kite / the hill / The kite went up, turned over and fell on {his} head / Run into the wind
    / the kite rose and rose until it was as small as a leaf
| to row a boat / the lake / The boat turned in circles like a dog after its tail
    / Pull with both arms at once / the boat went as straight as an arrow
| to climb the tall pine / the wood / {He} came as far as the first branch and slid down again
    / Hold on with three and move with one / {he} sat at the top and saw the whole valley
| to skip stones / the river / Plop! Every stone sank like a stone / Take a flat one and throw it low
    / the stone jumped five times
“This is the year that I learn {skill},” {he} said. | More than anything, {he} wanted to learn {skill}.
| All {his} friends knew how {skill}, but {hero} did not. | “I am big enough to learn {skill},” said {hero}.
So one (fine|clear|cold) morning {he} went to {place} to try. | {He} got up early and went to {place} to try.
{fail}. “I will never learn it,” {he} said. | {fail}. {He} tried again, and it was even worse.
| {fail}. {Hero} looked around. Had anybody seen it?

{Friend_the} had seen it, but {f_he} did not laugh. “I could not do it at first,” {f_he} said. “{hint}.”
| Just then {friend_the} came by. “Shall I tell you a secret?” {f_he} asked. “{hint}.”
{Hero} tried it that way, and it went a (little|bit) better. | {Hero} nodded and tried it that way.
{He} came back the next day, and the day after that.
| Every day that week {he} tried again, even (in the rain|on Sunday).
| {He} tried until the sun went down, and the next day {he} tried again.

Then, on the (fifth|sixth|seventh) day, {success}! | And one morning, (suddenly|at last), {success}.
“Did you see that?” cried {hero}. “I saw it!” said {friend} and jumped for joy.
| {Friend} clapped {f_his} {hands}. “Now you can teach somebody else,” {f_he} said.
| “How did you do that?” asked a small frog. “It is easy,” said {hero} with a smile. “You only need a week.”

# a rescue
baby, cry, where, trouble, tool, done =
| kitten / a thin meow / high up in an oak tree, holding on with all its claws
    / {He} held out {his} arms, but the kitten did not dare to jump / a basket and a long rope
    / {He} threw the rope over a branch and pulled the basket up.
    The kitten climbed in and rode down like a king
| bird / a weak peep / in the grass under a tree, far below its nest
    / {He} jumped, but the nest was much too high / a ladder and a woolly cap
    / {He} laid the little bird in the cap, climbed the ladder and put it back in the nest
| duckling / a lonely quack / at the bottom of a deep hole, walking round and round
    / {He} reached down, but {his} arm was too short / a basket of straw on a rope
    / {He} let the basket down, and when the duckling (sat in it|was in), {he} pulled it up
| lamb / a sad bleat / in the middle of a bush, with thorns in its wool
    / {He} pulled, but the thorns held on / a pair of scissors
    / Snip, snip! Out came the lamb, (a little less woolly than before|with one bare spot on its back)
| frog / a tiny croak / at the bottom of a dry well, jumping and falling back
    / {He} called, but the frog could not jump so high / a long plank
    / {He} let the plank down, and the frog came up, (hop by hop|one hop at a time)
One (day|morning|afternoon) {he} was on the way to (the market|the river|the mill|a friend) when {he} heard
    {cry}.
| One evening, on the way home, {hero} heard {cry}. {He} (stopped|stood still). There it was again!
There was a (little|small|very young) {baby}, {where}.
| {He} followed the sound and found a (small|very young) {baby}. It was {where}.
“(Do not be afraid|Do not cry),” said {hero}. “I will help you.”
| “(Poor thing|Oh dear)! How did you get there?” {he} asked. |

{trouble}. {He} thought (for a moment|about it). Then {he} (ran|hurried) home and (came back with|brought)
    {tool}.
| {trouble}. So {he} ran to the nearest (farm|house|barn) and (asked for|came back with) {tool}.
{done}.

(Soon|A moment later|Just then) the mother came, and she looked at {hero} as if to say thank you.
| And who came then? It was the mother! She looked at her little {baby} from head to foot. |
After that, the {baby} came to visit {hero} every (Sunday|spring|week|evening).
| Since then, {hero} always stops and listens when something small (calls for help|cries).
| {Hero} walked home with (mud on {his} nose|grass on {his} hat|wet feet) and a warm heart.

# a new neighbour
One (spring|summer|autumn) day a cart full of (chairs|boxes|beds and tables) stopped (at|in front of) the
    empty house next door.
| For a long time the house next door was empty. Then, one day, there was smoke over the roof.
“Somebody new lives there,” said {elder}. {Hero} saw a face at the (window|door), but it was gone at once.
| (At the window|In the yard) stood somebody new. {Hero} waved, but (nobody waved back|the door closed).
{He} knocked at the door and called, “Do you want to play?” But (all was quiet|nobody came).
| {He} threw a ball over the (hedge|wall). A moment later it came back, but nobody said a word. |
“Maybe (they do not like me|I am too loud|nobody likes to play there),” said {hero}.
    “Maybe somebody is shy,” said {elder}. “What do you do with a shy (bird|cat)? You wait.”

gift = warm bun | paper star | jar of honey | bunch of flowers | red apple | pretty shell
answer = little drawing | smooth white stone | wooden spoon with a face | blue feather | ripe plum
So {hero} put {a_gift} on the (doorstep|garden wall) and went away again.
| That gave {hero} an idea. {He} laid {a_gift} in front of the door,
    and then {he} (waited|hid) behind (the hedge|a tree).
(The next morning|In the morning) the {gift} was gone. (In its place|Where it had been) lay {a_answer}.
For (five|six|seven) days they gave each other things and (never said|did not say) a word. |

Then, on (Sunday|a rainy day|the next day), the door opened, only a little.
    “I am {friend},” said a small voice. “I (do not know anybody|know nobody) here.”
    (“Now you know me,” said {hero}.|“You know me,” said {hero}.)
By evening they had built a (boat out of boxes|dam in the stream|house of branches|bridge of stones),
    and {friend} talked even more than {hero}.
| They played until the moon was up, and nobody was shy any more.

# a present
It was the day before {elder}'s birthday, and {hero} had no (money for a present|present yet).
| “Tomorrow is {elder}'s birthday,” said {hero}, “and I (have only one coin|do not have a present).”
way = cake | picture | flowers
cake: {He} mixed flour, eggs and honey, and put a cake into the oven.
    Then a (bird|bee) flew past the window, and {he} ran out to look.
    When {he} came back, there was smoke(| everywhere). The cake was as black as (coal|night).
picture: So {he} painted a picture of the two of them in a (boat|garden) and put it out on the grass to dry.
    Then it began to rain. (When {he} came running|By noon), all the colours had run together.
flowers: {He} picked (yellow|blue|white) flowers in the meadow, one for every year,
    and left them by the gate. But a (goat|cow|sheep) came by.
    When {hero} came back with a ribbon, there was only one flower left.
{He} sat down (on the ground|in the grass) and cried a little.
| “Now I have nothing at all,” {he} said and hid {his} face. |

“What (is the matter|has happened)?” asked {friend_the}, and {hero} told {f_him} everything.
| Then {friend_the} came, and {hero} told {f_him} what had happened.
cake: “Is there any dough left in the bowl?” asked {friend}. There was. It was enough for one very small cake.
picture: {Friend} turned the picture around. “Look! It is a sunset now,” {f_he} said.
    “It only needs a frame.” So they made one out of (sticks|shells|acorns).
flowers: {Friend} took the ribbon. “Then we will plant this one in a pot,”
    {f_he} said, “and it will last longer.”

The next morning {hero} held it behind {his} back. “It is not what I wanted,”
    {he} said(, and {his} ears were red|).
cake: {Elder} ate the little cake in one bite. “It is just (right|the right size),” {e_he} said.
    “Nobody has to wash a plate.”
picture: {Elder} looked at it for a (long time|while). “I have never had a sunset of my own,” {e_he} said.
flowers: {Elder} put the pot in the window. By (summer|June|autumn) it held (nine|twelve|seven) flowers.
| “I like it more than a big bunch,” said {elder}, and {e_he} put the pot in the window.
And then {elder} (gave {him} a kiss on the nose|took {him} into {e_his} arms). |

# a seed
plant = sunflower | pumpkin | bean | strawberry
{Elder} gave {him} a {plant} seed. “Be good to it,” {e_he} said, “and (do not be in a hurry|give it time).”
| One day in spring {hero} found a {plant} seed in {his} pocket, and nobody knew how it had got there.
{Hero} made a hole in the ground with (one finger|a stick), put the seed in and covered it up.
Then {he} sat down beside it and waited. | The next morning {he} ran out to look. Nothing! |
{He} watered it every day. {He} even (sang to it|told it a joke). | {He} gave it water every day. |
“Maybe it is (asleep|tired|shy),” said {friend_the}. “Seeds do that.”
| “Shall we dig it up and see?” asked {friend_the}. “No,” said {hero}. “I would not like that, either.”

Then, (after (nine|ten) days|one warm morning|after a warm rain), a (tiny|small) green leaf looked out.
way = dry | snail | crow
dry: But summer came, and it did not rain. Every evening {hero} and {friend} carried water from the
    (well|river|stream) until their arms (hurt|were tired).
snail: One night a snail came to eat it. {Hero} did not hurt the snail.
    {He} carried it to (a heap of old leaves|the hedge|the wet meadow), and it was happy there.
crow: But a crow kept coming to pull at it. So {hero} and {friend} built a scarecrow with (an old hat|a funny
    hat). The crow liked it so much that it sat on the hat and forgot about the {plant}.
sunflower bean: The {plant} grew. It grew up to {his} knee, and then to {his} (nose|chin).
| Week after week the {plant} grew, and {hero} measured it with a string. |
pumpkin strawberry: The {plant} (grew and grew|got one leaf after another), and (then|at last) it flowered. |

sunflower: By August the sunflower was taller than {elder}, and it turned its yellow face to the sun.
    In autumn it gave a hundred new seeds. {Hero} put one into the pocket of every friend {he} had.
pumpkin: In autumn the pumpkin was so big that two of them had to roll it home.
    They made soup for everybody, and {hero} kept one seed for next year.
bean: In July {hero} picked the beans, one by one, into {elder}'s hat.
    They ate beans all week, and {hero} kept one for next year.
strawberry: In June the first berry turned red. {Hero} cut it into three parts, for {friend},
    for {elder} and for {himself}. It was the sweetest berry in the world, because they had waited for it.

# a castle
way = wave | sled
wave: One (hot|warm|summer) day {hero} and {friend_the} built a castle of sand,
    (close to|right beside) the water.
sled: One (winter|cold|snowy) day {hero} built a castle of snow. It took {him} the whole (morning|day).
It had (two|three|four) (tall|round) towers, (a gate made of sticks|a long wall|six windows) and a flag made
    of (a leaf|a feather|an old sock). |
wave: “Nothing can (break it|hurt it),” said {friend}.
    But the (sea|water) came nearer, and one big wave took it all away.
sled: Then {friend_the} came down the hill on a (fast|new|big) sled. “Look out!”
    {f_he} (cried|called), but it was too late. The sled went right through the (wall|middle).

wave: {Hero} (stamped {his} foot|shouted) at the sea, but the sea did not (care|mind).
| They looked at the (wet|flat) sand. There was nothing left(| at all).
wave: “It (only |)stood in the wrong place,” said {friend}.
| “The sea only wanted to play, too,” said {friend}.
sled: “My castle!” cried {hero}. “I could not stop,” said {friend},
    but {hero} did not listen and (ran|went) home.
sled: {He} sat by the (stove|fire) and was angry, until {he} was only sad.
    Then {he} looked out of the window. There was {friend}, all alone, pushing snow into a heap.
    {F_his} {hands} were (wet and cold|red with cold).
sled: {Hero} took {his} second pair of gloves and went out again. “Here,” {he} said.
    “I am sorry that I shouted.” “And I am sorry about the wall,” said {friend}.

wave: So they went (higher|farther) up the beach and began again,
    this time with a (deep|wide) ditch around it. The next wave (filled the ditch|came as far as the ditch)
    and went back. “Thank you for the water!” called {hero}.
sled: (They|Together they) built it up again, with a gate that was (wide|big) enough for a sled.
The new castle was (bigger|taller) than the old one, because (four {hands} had built it|now they knew how).
| “It is better than the first one,” said {friend}, and {hero} thought so, too. |

# a noise
what, noise = branch / Tap, tap, tap | kitten / Scratch, scratch | frog / Plip, plop | door / Bang, bang
when = night
(In the middle of the night|Late at night|One night) {he} woke up. {noise}!
| It was (late|dark), and {hero} was almost asleep. {noise}!
Was it (a wolf|a giant|a monster with seven teeth|a dragon|a witch)? | Something was (out there|moving). |
{He} pulled the blanket (up to {his} nose|over {his} head). {noise}! There it was again.
| {Hero} did not dare to (breathe|move). {noise}! It did not stop. | {His} (ears|toes) turned cold. {noise}!
light = lamp | candle
who = alone | both
alone: “If I look, (then I will know|it will go away),” {he} whispered, and {he} lit the {light}.
| But {he} was (curious|brave), too, and at last that was stronger. {He} got out of bed.
both: {He} ran to wake {elder}. “Let us look at it,” said {elder}.
    “(Most noises|Monsters) get smaller when you come closer.”

With {a_light} in one {hand} and a (spoon|broom|wooden sword) in the other, {he} went to look(,
    step by step|).
| (Step by step|Slowly, very slowly,) {he} went (closer|to the door),
    and {his} (heart beat like a drum|knees shook).
branch: It was the (cherry|apple|old) tree! The wind moved one long branch,
    and it knocked at the (window|roof|wall) like a finger.
kitten: On the doorstep sat a (thin|wet) (grey|black|white) kitten.
    It scratched at the door because it was (cold|hungry).
frog: In the (bucket|barrel) under the roof sat a (green|fat) frog,
    jumping up and falling back into the water.
door: It was only the (door of the shed|garden gate).
    Somebody had (forgotten to close|not closed) it, and the wind was playing with it.

branch: “Do you want to come in?” laughed {hero}. (In the morning|The next day) they tied the branch back with
    (a string|an old belt).
kitten: {Hero} gave it (warm milk|some fish) and a place by the (stove|fire).
    By morning it had a name, and the name was (Button|Pepper|Star|Smoke|Moon).
frog: {Hero} carried it to the (pond|stream) in both {hands}.
    It (said one loud thank-you|made one long jump) and was gone.
door: {Hero} (put a big stone in front of it|closed it with a string), and (the night|everything) was still.
“So that was my monster,” {he} said. | “Good night, monster,” said {hero} and (went back to bed|yawned).
| Since that night {he} (reaches for the lamp and not for the blanket|is not so easy to frighten).

# lost in the wood
way, clue, sign =
| stream / follow the stream, for it runs past our house / Somewhere, not far away, water was running
| bell / listen for the bell / Far away a bell rang, once, twice, three times
| smoke / look for our smoke / Over the trees stood a thin line of smoke
| song / stay where you are and sing / {He} sat down under a tree and sang as loudly as {he} could
“If you are ever lost in the wood,” {elder} always said, “{clue}.”
    {Hero} (only listened|listened only) with one ear.
One (day|afternoon) {he} ran after a (blue|golden|green) (butterfly|beetle|dragonfly), (deeper and deeper|far,
    far) into the wood.
Then it flew away over the (trees|bushes). When {he} (looked around|turned around),
    there was no path any more.
| When it was gone, {he} looked around. The path was gone, too.
It (grew|was getting) dark, and every tree looked like the next one. | All the trees looked the same. |

“Who?” called an owl. “It is only me,” said {hero}. “(I am lost|I do not know the way).”
| {He} walked to the left, and then to the right, and came back to the same (stone|fallen tree|bush).
| {He} ate the last (nut|apple|berry) from {his} pocket and tried not to cry. |
Then {he} remembered what {elder} always said. {sign}.
stream: {Hero} found it and (walked|ran) along it, over (stones|roots) and under branches.
bell: {Hero} (followed|ran after) the sound, and when it stopped,
    {he} (waited|stood still) until it rang again.
smoke: {Hero} kept {his} eyes on it and (walked|ran), straight through (bushes|grass) and leaves.
song: {He} sang every song {he} knew, and (some of them|the best ones) twice.
    At last a light (moved|came) between the trees.

song: It was {elder} with a lamp. “I heard you from (over the hill|the bridge|our house),” {e_he} said.
    “You missed a verse.”
stream bell smoke: And there (was|at last was) (a light in the window|the house)!
    {Elder} was at the door, putting on {e_his} boots. “I was (just coming|about) to look for you,”
    {e_he} said.
“(Next time|From now on) I will listen with both ears,” said {hero}.
| {Hero} said nothing, but {he} held {elder}'s {hand} (very tight|all evening).
| They (had hot soup|ate soup), and {hero} told {elder} about the (owl|dark|trees) until the soup was cold.
"""


@cache
def _plots() -> dict[str, list]:
    """PLOTS as {name: beats}. A beat: (facts needed, slots drawn, alternatives); None starts a paragraph."""
    plots = {}
    for block in re.split(r"^# ", PLOTS, flags=re.M)[1:]:
        name, *lines = re.sub(r"\n(    |(?=\|))", " ", block).strip().split("\n")
        plots[name] = [_beat(line) if line else None for line in lines]
    return plots


def _beat(line: str) -> tuple:
    facts, slots, text = re.fullmatch(r"(?:([a-z ]+): )?(?:([a-z, ]+) = ?)?(.*)", line).groups()
    if slots is None:
        return (facts or "").split(), None, parse(text)
    rows = [row.split(" / ") for row in re.split(r"\|(?![^(]*\))", text) if row.strip()]
    return (facts or "").split(), slots.split(", "), [[parse(cell.strip()) for cell in row] for row in rows]


def _cast(rng: random.Random) -> Slots:
    """Who is in the story. Hero and friend are a girl and a boy, so that no "she" can mean the other."""
    girl, boy = (pick(rng, GIRLS), "she", "girl"), (pick(rng, BOYS), "he", "boy")
    (hero, he, kind), (friend, f_he, f_kind) = pick(rng, ((girl, boy), (boy, girl)))
    elder = pick(rng, list(ELDERS))
    animals = rng.random() < 0.4
    if animals:
        kind, f_kind = pick(rng, list(DENS)), pick(rng, list(DENS))
    slots = Slots(
        hero=hero,
        hero_kind=f"{pick(rng, CHARACTER)} {kind}",
        friend=friend,
        friend_the=f"{friend} the {f_kind}" if animals else f"{friend} from next door",
        elder=elder,
        house=DENS[kind] if animals else pick(rng, HOUSES),
        near=pick(rng, NEAR),
        hand="paw" if animals else "hand",
        hands="paws" if animals else "hands",
    )
    for prefix, pronoun in (("", he), ("f_", f_he), ("e_", ELDERS[elder])):
        for slot, word in zip(("he", "him", "his", "himself"), PRONOUNS[pronoun], strict=True):
            slots[prefix + slot] = word
    habit, callback = pick(rng, HABITS)
    slots.update(habit=fill(rng, parse(habit), slots), callback=fill(rng, parse(callback), slots))
    return slots


def _tell(rng: random.Random, beats: list, slots: Slots, facts: set[str]) -> str:
    """The beats as text: sentences joined by spaces, paragraphs by line breaks. Fills `slots` and `facts`."""
    paragraphs = [[]]
    for beat in beats:
        if beat is None:
            paragraphs.append([])
            continue
        needed, drawn, alternatives = beat
        if needed and (needed[-1] in facts if needed[0] == "not" else facts.isdisjoint(needed)):
            continue
        if drawn:
            values = [fill(rng, cell, slots) for cell in pick(rng, alternatives)]
            slots.update(zip(drawn, values, strict=True))
            facts.update(values)
        else:
            paragraphs[-1].append(fill(rng, alternatives, slots).strip())
    return "\n".join(" ".join(filter(None, sentences)) for sentences in paragraphs)


def story(index: int, seed: int = SEED) -> tuple[str, str]:
    """Story number `index`, and its signature: the plot, the three names, and all that was drawn.

    How many there are: no two of the first 3,000,000 are alike, so more than 10^12 (birthday bound, 95 %);
    the median story has probability 2^-53. Learning by heart does not help: of all runs of 48 words (a third
    of a story) in the validation text, 9 % occur in the training text.
    """
    rng = random.Random((seed << 40) + index)
    slots, facts = _cast(rng), set()
    opening, ending, *plots = _plots()
    plot = pick(rng, plots)
    text = _tell(rng, _plots()[opening], slots, facts) + " " + _tell(rng, _plots()[plot], slots, facts)
    if rng.random() < 0.35:
        text = f"{text} {_tell(rng, _plots()[ending], slots, facts)}".rstrip()
    return text, " ".join([plot, slots["hero"], slots["friend"], slots["elder"], *sorted(facts)])


def storyworld(split: str, n: int | None = None, seed: int = SEED) -> Iterator[str]:
    """The stories of one split, forever or the first `n`.

    All stories with one signature are in one split, so a test story is never a training story in other words.
    """
    told = (story(index, seed) for index in count())
    return islice((text for text, signature in told if split_of(signature) == split), n)


# -----------------------------------------------------------------------------
# arithmetic: word problems of one to four steps with traps, and their worked solutions

ITEMS = """apples:bags pears:bags nuts:bags plums:bowls eggs:baskets cookies:boxes muffins:trays candies:jars
beads:jars marbles:jars coins:bags stickers:sheets stamps:sheets cards:packs balloons:packs pencils:boxes
crayons:boxes books:boxes blocks:boxes flowers:bunches roses:bunches shells:buckets buttons:tins"""
ITEMS = [item.split(":") for item in ITEMS.split()]  # what is counted, and what it comes in
THINGS = [*GIRLS, *BOYS, *(word for pair in ITEMS for word in pair)]
STEPS = {  # what is told, and what the solution says
    "start": ("{name} has {k} {item}.|{name} found {k} {item}.|There are {k} {item} in {name}'s bag.", ""),
    "boxes": ("{name} has {n} {box} (of {k} {item} each|with {k} {item} in each).", "That is {sum} {item}."),
    "buy": ("{He} (buys|finds) {k} more {item}.|{He} gets {k} more {item} from {other}.|{other} gives "
            "{name} {k} more {item}.", "{He} has {sum} {item}."),
    "buy boxes": ("{He} (buys|gets) {n} {box} (of {k} {item} each|with {k} {item} in each).",
                  "{He} has {sum} {item}."),
    "give": ("{He} gives {k} {item} (to {other}|away).|{He} loses {k} {item}.|Then {he} sells {k} {item}.",
             "{He} has {sum} {item} left."),
    "double": ("(A week later|By evening) {he} has twice as many {item}.", "{He} has {sum} {item}."),
    "times": ("{other} has {k} times as many {item} as {name}.", "{other} has {sum} {item}."),
    "more": ("{other} has {k} more {item} than {name}.", "{other} has {sum} {item}."),
    "fewer": ("{other} has {k} fewer {item} than {name}.", "{other} has {sum} {item}."),
    "together": ("{other} has {k} {item}.", "Together they have {sum} {item}."),
}  # fmt: skip
SIGNS = {"buy": "+", "give": "-", "double": "*", "times": "*", "more": "+", "fewer": "-", "together": "+"}
LARGEST = {"start": 24, "boxes": 9, "buy boxes": 9, "times": 5}
OF_OTHER = "How many {item} does {other} have?"
QUESTIONS = {
    **dict.fromkeys(("times", "more", "fewer"), OF_OTHER),
    "together": "How many {item} do {name} and {other} have (together|in all)?",
    "": "How many {item} does {name} have (now|in the end)?|How many {item} does {he} have now?",
}
TRAPS = (  # numbers that play no part
    "{name} is {age} years old.|The shop also sells {m} {thing}.|{He} also has {m} {thing}.|"
    "{He} buys {m} {thing}.|{He} gives {m} {thing} (to {other}|away).|{other} has {m} {thing}.|"
    "{third} (has|buys|finds) {m} {item}.|{third} gives {m} {item} away."
)
TRAPS_OF_OTHER = (  # if nobody asks about {other}
    "{other} (has|buys|finds) {m} {item}.|{other} has {m} (more|fewer) {item} than {name}.|"
    "{other} has {n} times as many {item} as {name}."
)
LIMIT = 40  # no number in a problem or its solution is greater


def number(rng: random.Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def arithmetic_problem(rng: random.Random, steps: int | None = None, traps: int | None = None) -> dict:
    """A word problem, {"question", "answer"}, annotated as GSM8K's are; every number is from 1 to 40.

    It is a running count and what happens to it: buy, give away, double, boxes of n, times as many as
    somebody, more or fewer, together. One or two sentences (`traps`) have a number that plays no part, or
    would if something else were asked. `steps`: 1 to 4.
    """
    steps = steps or pick(rng, (1, 2, 2, 3, 3, 4))
    traps = pick(rng, (1, 2)) if traps is None else traps
    while True:
        problem = _attempt(rng, steps, traps)
        if problem:
            return problem


def _attempt(rng: random.Random, steps: int, traps: int) -> dict | None:
    """None if a number left the range: the caller tries again."""
    he, names, others = pick(rng, (("she", GIRLS, BOYS), ("he", BOYS, GIRLS)))  # neither is ever in doubt
    name, other, third = pick(rng, names), pick(rng, others), pick(rng, others)
    (item, box), (thing, _) = pick(rng, ITEMS), pick(rng, ITEMS)
    if item == thing or other == third:
        return None
    slots = Slots(name=name, other=other, third=third, he=he, item=item, box=box, thing=thing)
    told, worked, total, kind = [], [], 0, pick(rng, ("start", "start", "start", "boxes"))

    def work(kind: str, a: int, sign: str, b: int) -> int:
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        slots["sum"] = f"<<{a}{sign}{b}={result}>>{result}"
        worked.append(fill(rng, parse(STEPS[kind][1]), slots))
        return result

    while True:
        n, k = number(rng, 2, 6), number(rng, 2, LARGEST.get(kind, 16))
        slots.update(n=str(n), k=str(k))
        told.append(fill(rng, parse(STEPS[kind][0]), slots))
        if kind == "start":
            total = k
        elif kind == "boxes":
            total = work(kind, n, "*", k)
        elif kind == "buy boxes":
            total = work(kind, total, "+", work("boxes", n, "*", k))
        else:
            total = work(kind, total, SIGNS[kind], 2 if kind == "double" else k)
        if not 1 <= total <= LIMIT:
            return None
        left = steps - len(worked)
        if left == 0:
            break
        last = ["times", "more", "fewer", "together"] if left == 1 else ["buy boxes"]  # of others at the end
        kind = pick(rng, ["buy", "buy", "give", "give", "double", *last])
    question = QUESTIONS.get(kind, QUESTIONS[""])
    possible = list(parse(TRAPS if "{other}" in question else f"{TRAPS}|{TRAPS_OF_OTHER}"))
    for _ in range(traps):
        slots.update(m=str(number(rng, 2, 24)), n=str(number(rng, 2, 5)), age=str(number(rng, 5, 12)))
        trap = fill(rng, [possible.pop(number(rng, 0, len(possible) - 1))], slots)  # nobody has two ages
        told.insert(number(rng, 1, len(told)), trap)
    question = fill(rng, parse(question), slots)
    return {"question": " ".join([*told, question]), "answer": "\n".join([*worked, f"#### {total}"])}


def arithmetic(split: str, n: int | None = None, seed: int = SEED) -> Iterator[dict]:
    """The word problems of one split, forever or the first `n`; none comes twice.

    The calculation (`9*3=27 27+5=32`) decides the split: a test problem is never a training problem with
    other names in it.
    """

    def problems() -> Iterator[dict]:
        rng, seen = random.Random(f"arithmetic {split} {seed}"), set()
        while True:
            problem = arithmetic_problem(rng)
            calculation = " ".join(re.findall("<<(.*?)>>", problem["answer"]))
            if split_of(calculation) == split and problem["question"] not in seen:
                seen.add(problem["question"])
                yield problem

    return islice(problems(), n)


def arithmetic_text(split: str) -> Iterator[str]:
    """Text to pretrain on, by turns a worked problem and a few plain equations.

    A base model that never saw digits copied and equations solved cannot be taught the word problems later:
    at 0.8M parameters fine-tuning alone reached 4 %, and 70 % with text like this in pretraining. Equations
    are facts, which all splits share; the problems are not.
    """
    rng = random.Random(f"equations {split} {SEED}")
    for problem in arithmetic(split):
        yield f"{problem['question']}\n{problem['answer']}"
        yield "\n".join(_equation(rng) for _ in range(8))


def numbers_text(split: str) -> Iterator[str]:
    """Text with everything that word problems need except how to solve one: problems told, equations solved,
    and lists told again.

    For a base that shall be taught to solve them afterwards: what it can do then, it learnt then. Solving
    begins with looking numbers up, which is the work of induction heads: find where the last words stood
    before, and say what came next (Olsson et al., 2022). A model comes by them all at once or not at all.
    Short lists of random things, each told four times, bring that about within 2M tokens; then the parts of
    problems that are told again are copied as well, and names in stories. Without lists none of our bases
    could copy, and SFT, which had to teach it, failed with one in four (report/alignment.md). Half of the
    equations have the annotated form that solutions use.
    """
    rng = random.Random(f"numbers {split} {SEED}")
    for problem in arithmetic(split):
        yield "\n".join([problem["question"], told_again(rng, problem["question"], 0.5)]).strip()
        yield "\n".join(_equation(rng, annotated=rng.random() < 0.5) for _ in range(10))
        yield from ("\n".join([things(rng)] * 4) for _ in range(2))


def told_again(rng: random.Random, question: str, share: float = 1.0) -> str:
    """Some of a problem's sentences in another order, without what is asked."""
    *told, _ = re.split(r"(?<=[.?]) ", question)
    some = [sentence for sentence in told if rng.random() < share]
    return " ".join(sorted(some, key=lambda _: rng.random()))


def things(rng: random.Random) -> str:
    """A list of eight random things, a quarter of them numbers."""
    return " ".join(
        pick(rng, THINGS) if rng.random() < 0.75 else str(number(rng, 1, LIMIT)) for _ in range(8)
    )


def _equation(rng: random.Random, annotated: bool = False) -> str:
    sign = pick(rng, "++-*")
    if sign == "*":
        b = number(rng, 2, 12)
        a = number(rng, 2, min(12, LIMIT // b))
    else:
        a = number(rng, 2, LIMIT - 1)
        b = number(rng, 1, LIMIT - a if sign == "+" else a - 1)
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"<<{a}{sign}{b}={result}>>{result}" if annotated else f"{a}{sign}{b}={result}"


# -----------------------------------------------------------------------------
# sentiment and dialogue: small stand-ins for SST-2 and SAMSum, so that every stage runs without a network

GOOD = "warm funny clever charming touching gripping graceful lively bright fresh moving tender".split()
BAD = "dull clumsy slow shallow noisy stale tiresome pointless cold flat messy lifeless".split()
WORKS = "film story play book song show".split()
ASPECTS = "music:is ending:is cast:is plot:is camera:is jokes:are songs:are pictures:are words:are".split()
# {g} and {h} have the label's polarity, {b} the other one: not the words decide, but the sentence.
REVIEWS = (
    "{A_g} {work} whose {aspect} {is} {h}.|{A_g}, {h} {work}.",
    "The {work} is {g}(, and so {is} the {aspect}|).|(From start to end|All in all) {a_g} {work}.",
    "The {aspect} {is} {g} and the {aspect2} {is2} {h}.",
    "The {work} is not {b} (at all|for a minute).|Nobody could call this {work} {b}.|It is anything but {b}.",
    "The {aspect} {is} {b}, but the {work} (itself|as a whole) is {g}.|{B} {aspect}, yet {a_g} {work}.",
    "Although the {aspect} {is} {b}, (I|we) found the {work} {g}(, even {h}|).",
    "(I|We) expected {a_b} {work} and got {a_g} one.",
    "{A_g} {work}, (whatever they say about|for all) its {b} {aspect}.",
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "the lake|the market|the old mill|the library|the beach|the bridge|the school".split("|")
TIMES = "nine|ten|noon|two|three|four|five|six".split("|")
BELONGINGS = "ladder|tent|drum|kite|lamp|bike|camera|umbrella|sled|hammer|basket|guitar".split("|")
CHORES = "paint the fence|clean the shed|carry the boxes|bake a cake|fix the roof|dig the garden".split("|")
DUTIES = "visit {elder}|look after my brother|go to the dentist|practise for a concert|finish a report".split(
    "|"
)
SPOTS = "under the bench|behind the shed|on the bus|in the hall|next to the stove|at the bakery".split("|")
# What is said, a line a turn, and what a summary says of it. A and B are the speakers.
CHATS = (
    "A: (Are you coming|Shall we go) to {place} on {day}?\n"
    "B: (Yes|Sure|Gladly)(!|, at {time2}?) (How about {time}?|Let us say {time}.)\n"
    "A: {Time} it is.\n"
    "B: I will bring (the|my) {thing}.",
    "{A} and {B} are going to {place} on {day} at {time}. {B} will bring the {thing}.",
    "A: (Can|Could) you help me {chore} on {day}?\n"
    "B: (Sorry|I am sorry), I have to {duty}.\n"
    "A: (Never mind|No problem), I will ask {elder2}.",
    "{B} cannot help {A} {chore} on {day}. {A} will ask {elder2}.",
    "A: Have you seen my {thing}(| anywhere)?\n"
    "B: (Yes, it is|I saw it|There is one) {spot}.\n"
    "A: (Thank you|Oh, thanks)! I looked everywhere.",
    "{A} has lost {a_his} {thing}. {B} saw it {spot}.",
    "A: (May|Can) I borrow your {thing}?\n"
    "B: (Yes|Of course), but I need it (back |)on {day}.\n"
    "A: You will have it (then|by {time}), I promise.",
    "{B} lends {A} {b_his} {thing} until {day}.",
)  # fmt: skip
SMALL_TALK = (
    "Lovely weather today.|I am so tired.|How is {elder3}?|I had soup for lunch.|My {thing2} is broken again."
)


def sentiment(split: str, n: int | None = None, seed: int = SEED) -> Iterator[dict]:
    """Reviews of one sentence, {"sentence", "label"} (1: positive). Half of them need more than their words.

    The words that were drawn decide the split: a test review is never a training review turned around.
    """

    def make(rng: random.Random) -> tuple[dict, str]:
        label = int(rng.random() * 2)
        own, other = (GOOD, BAD) if label else (BAD, GOOD)
        (aspect, is_), (aspect2, is2) = (pick(rng, ASPECTS).split(":") for _ in range(2))
        slots = Slots(g=pick(rng, own), h=pick(rng, own), b=pick(rng, other), work=pick(rng, WORKS))
        slots |= {"aspect": aspect, "is": is_, "aspect2": aspect2, "is2": is2}
        if slots["g"] == slots["h"] or aspect == aspect2:
            return make(rng)
        sentence = fill(rng, parse(pick(rng, REVIEWS)), slots)
        told = set(re.findall("[a-z]+", sentence.lower())).intersection(slots.values()) - {"is", "are"}
        return {"sentence": sentence, "label": label}, " ".join(sorted(told))

    return _generated("sentiment", make, split, n, seed)


def dialogue(split: str, n: int | None = None, seed: int = SEED) -> Iterator[dict]:
    """Chats of two with a line of small talk or two, {"dialogue", "summary"}; the facts decide the split."""

    def make(rng: random.Random) -> tuple[dict, str]:
        girl, boy = (pick(rng, GIRLS), "her"), (pick(rng, BOYS), "his")
        (a, a_his), (b, b_his) = pick(rng, ((girl, boy), (boy, girl)))
        slots = Slots(a=a, b=b, a_his=a_his, b_his=b_his, day=pick(rng, DAYS), place=pick(rng, PLACES))
        slots |= {name: pick(rng, BELONGINGS) for name in ("thing", "thing2")}
        slots |= {name: pick(rng, list(ELDERS)) for name in ("elder", "elder2", "elder3")}
        slots |= {name: pick(rng, TIMES) for name in ("time", "time2")}
        slots |= {"chore": pick(rng, CHORES), "spot": pick(rng, SPOTS)}
        slots["duty"] = fill(rng, parse(pick(rng, DUTIES)), slots)
        which = int(rng.random() * (len(CHATS) // 2))
        turns = fill(rng, parse(CHATS[2 * which]), slots).split("\n")
        for _ in range(int(rng.random() * 3)):
            speaker = pick(rng, "AB")
            turns.insert(int(rng.random() * len(turns)), f"{speaker}: {fill(rng, parse(SMALL_TALK), slots)}")
        names = {"A": a, "B": b}
        chat = "\n".join(f"{names[turn[0]]}{turn[1:]}" for turn in turns)
        summary = fill(rng, parse(CHATS[2 * which + 1]), slots)
        return {"dialogue": chat, "summary": summary}, summary

    return _generated("dialogue", make, split, n, seed)


def _generated(name: str, make: Callable, split: str, n: int | None, seed: int) -> Iterator[dict]:
    """The first `n` different rows of one split that come from `make(rng)`, a (row, signature)."""

    def rows() -> Iterator[dict]:
        rng, seen = random.Random(f"{name} {split} {seed}"), set()
        while True:
            row, signature = make(rng)
            text = next(iter(row.values()))
            if split_of(signature) == split and text not in seen:
                seen.add(text)
                yield row

    return islice(rows(), n)


# -----------------------------------------------------------------------------
# instructions: what an assistant is asked to do, with the one right answer, so that following can be counted

OPPOSITES = "hot:cold big:small day:night wet:dry fast:slow old:new open:closed up:down light:dark full:empty"
OPPOSITES = dict(pair.split(":") for pair in OPPOSITES.split())
SOUNDS = "dog:woof cat:meow cow:moo duck:quack sheep:baa owl:hoot lion:roar bee:buzz pig:oink frog:ribbit"
SOUNDS = dict(pair.split(":") for pair in SOUNDS.split())
WORDS = """apple baker boat bread bridge candle castle cloud clock corn crow desk door drum egg farm fish
fire fox frost gate garden glass goat hat hill honey horse island jar jam king kite lake lamp leaf lemon moon
nest nut oak orange paper pear pond queen rain river road rope sand sea seed ship shoe silver snow star sun
swan table tent tree wheel window wood""".split()
WISHES = {  # what is asked, and what is said; {x} and {y} are drawn, {z} follows from them
    "opposite": ("What is the opposite of {x}?|Tell me the opposite of {x}.", "The opposite of {x} is {z}."),
    "sound": ("What does {a_x} say?|Which sound does {a_x} make?", "{A_x} says {z}."),
    "repeat": ("(Say|Write|Repeat) the word {x} {y} times.", "{z}"),
    "capitals": ("(Write|Put) {x} in capital letters.|Shout: {x}!", "{z}"),
    "spell": ("Spell the word {x}.|How is {x} spelt?", "{z}"),
    "backwards": ("(Write|Say) these words backwards: {x}.", "{z}"),
    "count": ("Count from {x} to {y}.", "{z}"),
    "larger": ("Which is larger, {x} or {y}?|(Name|Tell me) the larger of {x} and {y}.", "{z} is larger."),
    "sum": ("What is {x} plus {y}?|Add {x} and {y}.", "<<{x}+{y}={z}>>{z}"),
    "after": ("Which day comes after {x}?|What day is it the day after {x}?", "{z} comes after {x}."),
    "greet": ("Say hello to {x}.|Greet {x}.", "Hello, {x}!"),
    "first": ("What is the first letter of {x}?|Which letter does {x} begin with?", "{X} begins with {z}."),
}  # fmt: skip


def instructions(split: str, n: int | None = None, seed: int = SEED) -> Iterator[dict]:
    """Conversations, {"messages"}, of one to three turns, a third of them with somebody to speak as.

    What is asked, not how, decides the split: a word that a test wants spelt is spelt nowhere in training.
    """

    def wish(rng: random.Random, kind: str) -> list[dict]:
        y = ""
        if kind in ("larger", "sum"):
            x, y = number(rng, 2, 60), number(rng, 2, 39)
            if x == y:
                return wish(rng, kind)
            z = x + y if kind == "sum" else max(x, y)
        elif kind == "count":
            x, y = (start := number(rng, 1, 20)), start + number(rng, 2, 7)
            z = " ".join(map(str, range(x, y + 1)))
        elif kind in ("opposite", "sound"):
            x, z = pick(rng, list((OPPOSITES if kind == "opposite" else SOUNDS).items()))
        elif kind == "after":
            day = int(rng.random() * 7)
            x, z = DAYS[day], DAYS[(day + 1) % 7]
        elif kind == "greet":
            x = z = pick(rng, GIRLS + BOYS)
        elif kind == "backwards":
            words = [pick(rng, WORDS) for _ in range(number(rng, 2, 4))]
            x, z = " ".join(words), " ".join(words[::-1])
        else:
            x, y = pick(rng, WORDS), number(rng, 2, 4) if kind == "repeat" else ""
            z = {"repeat": " ".join([x] * (y or 1)), "capitals": x.upper(), "first": x[0]}.get(
                kind, " ".join(x)
            )
        # There is nothing to generalise from about what a dog says; everything else has its split.
        if kind not in ("opposite", "sound", "after", "greet") and split_of(f"{x} {y} {kind}") != split:
            return wish(rng, kind)
        slots, (asked, said) = Slots(x=str(x), y=str(y), z=str(z)), WISHES[kind]
        return talk(*(fill(rng, parse(text), slots) for text in (asked, said)))

    def rows() -> Iterator[dict]:
        rng, seen = random.Random(f"instructions {split} {seed}"), set()
        while True:
            kinds = [pick(rng, list(WISHES)) for _ in range(pick(rng, (1, 1, 1, 2, 3)))]
            messages = [message for kind in kinds for message in wish(rng, kind)]
            if rng.random() < 0.3:
                role = fill(rng, parse("You are a (kind|helpful) (robot|teacher)."), {})
                messages.insert(0, {"role": "system", "content": role})
            if (text := json.dumps(messages)) not in seen:
                seen.add(text)
                yield {"messages": messages}

    return islice(rows(), n)


# -----------------------------------------------------------------------------
# corpora: what each name stands for, and where it is looked for


@dataclass(frozen=True)
class Corpus:
    """A text on Hugging Face's hub. Its first edition can be downloaded there; others may lie on this disk.

    An edition is {split: its files in $DATA_DIR/`folder`, plain or .gz}. "all" has no splits, so we hold out
    its tail; "head" has none either, and ends in the middle of a document.
    """

    hub: str
    licence: str
    folder: str
    editions: tuple[dict[str, tuple[str, ...]], ...]


def _wikitext(n: int, train_files: int, raw: str = "") -> Corpus:
    parts = {"train": train_files, "validation": 1, "test": 1}
    name = f"wikitext-{n}{raw}-v1/{{}}-{{:05}}-of-{{:05}}.parquet"
    on_hub = {split: tuple(name.format(split, i, k) for i in range(k)) for split, k in parts.items()}
    file = f"wikitext-{n}{raw}/wiki.{{}}.{'raw' if raw else 'tokens'}"
    on_disk = {split: (file.format(split.removesuffix("ation")),) for split in parts}
    return Corpus("Salesforce/wikitext", "CC BY-SA 3.0", "", (on_hub, on_disk))


CORPORA = {
    "tinystories": Corpus(
        "roneneldan/TinyStories",
        "CDLA-Sharing-1.0",
        "tinystories",
        (
            {"train": ("TinyStoriesV2-GPT4-train.txt",), "validation": ("TinyStoriesV2-GPT4-valid.txt",)},
            {"train": ("TinyStories-train.txt",), "validation": ("TinyStories-valid.txt",)},
            {"head": ("TinyStories-train-first-2MiB.txt",)},
        ),
    ),
    "wikitext2": _wikitext(2, train_files=1),
    "wikitext2_raw": _wikitext(2, 1, raw="-raw"),  # no <unk>: what GPT-2's published perplexity is of
    "wikitext103": _wikitext(103, train_files=2),
    "fineweb_edu": Corpus(  # two of the sample's 14 files: 4.3 GB, about 1.4B tokens, a day for one card
        "HuggingFaceFW/fineweb-edu",
        "ODC-By 1.0",
        "fineweb_edu",
        ({"all": ("sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet")},),
    ),
}
EMBEDDED = {  # name -> its documents, how many in train, how many in validation and in test
    "storyworld": (storyworld, 30_000, 1_000),
    "arithmetic": (arithmetic_text, 40_000, 1_000),
    "numbers": (numbers_text, 40_000, 1_000),
}


@dataclass
class Source:
    """One split of a corpus, found: how to read it, and what a run writes down about it."""

    read: Callable[[dict], Iterator[str]]  # counts the rows without text in the dict that it is given
    source: str
    licence: str
    fingerprint: Callable[[], str]
    size: int | None = None  # documents to take from a generator, which would never end
    running_text: Callable[[], bool] = lambda: False  # its documents are pieces of longer texts


def documents(
    corpus: str, split: str, data_dir: str | None = None, about: dict | None = None
) -> Iterator[str]:
    """The documents of one split, one at a time. Raises DataError at once if there is no such thing.

    `corpus` is a name (`storyworld`, `arithmetic`, or one of CORPORA), a path, folder or glob of your own
    .txt, .jsonl or .parquet files (also .gz), or a mix, "tinystories:0.9,arithmetic:0.1". Rows without text
    are left out; while reading, they are counted in `about`["left_out"].
    """
    found = _find(corpus, split, data_dir)
    print(f"data: {corpus}, {split}: {found.source}", file=sys.stderr)
    return _reported(found, corpus, split, {} if about is None else about)


def _reported(found: Source, corpus: str, split: str, about: dict) -> Iterator[str]:
    yield from islice(found.read(about), found.size)
    if about.get("left_out"):
        print(f"data: {corpus}, {split}: {about['left_out']:,} rows without text left out", file=sys.stderr)


def corpus_info(corpus: str, split: str, data_dir: str | None = None) -> dict:
    """What `documents` reads, for a run's record: {"source", "licence", "fingerprint" (of the content)}, and
    "running_text": True if its documents are pieces of longer texts.
    """
    found = _find(corpus, split, data_dir)
    about = {"source": found.source, "licence": found.licence, "fingerprint": found.fingerprint()}
    return about | ({"running_text": True} if found.running_text() else {})


def _find(corpus: str, split: str, data_dir: str | None) -> Source:
    data_dir = data_dir or os.environ.get("DATA_DIR") or "data"
    if split not in SPLITS:
        raise DataError(f'there is no split "{split}"; the splits are {", ".join(SPLITS)}')
    if corpus in EMBEDDED:
        make, n_train, n_other = EMBEDDED[corpus]
        # The fingerprint is of what it says: a change to the grammar shows, a change to a comment does not.
        fingerprint = lambda: _sha256(doc.encode() for doc in islice(make(split), 300))  # noqa: E731
        size = n_train if split == "train" else n_other
        return Source(
            lambda about: make(split), f"generated by data.py, seed {SEED}", "MIT", fingerprint, size
        )
    if corpus in CORPORA:
        return _registered(corpus, split, data_dir)
    is_mix = re.fullmatch(r"[^:,]+:\d*\.?\d+(,[^:,]+:\d*\.?\d+)*", corpus)
    if is_mix and not os.path.exists(corpus):
        return _mix(corpus, split, data_dir)
    paths = _own_files(corpus)
    if not paths:
        names = ", ".join([*EMBEDDED, *CORPORA])
        raise DataError(f'"{corpus}" is neither a file nor the name of a corpus; those are {names}')
    return _from_files(paths, paths, "yours", hold_out=split)


def _own_files(corpus: str) -> list[str]:
    """The files of a path, a folder or a glob. What exists is no glob, though its name have [ ] or *."""
    if os.path.isfile(corpus):
        return [corpus]
    if os.path.isdir(corpus):
        found = sorted(glob(os.path.join(escape(corpus), "**"), recursive=True))
        return [path for path in found if os.path.isfile(path) and _kind(path)]
    return [path for path in sorted(glob(corpus, recursive=True)) if os.path.isfile(path)]


def _registered(name: str, split: str, data_dir: str) -> Source:
    """The first edition of which any file is in $DATA_DIR; failing that, the hub's."""
    corpus = CORPORA[name]

    def here(file: str) -> str | None:
        path = os.path.join(data_dir, corpus.folder, file)
        return next((p for p in (path, path + ".gz") if os.path.exists(p)), None)

    # One edition for all splits: the validation text of one may be the training text of another.
    begun = [e for e in corpus.editions if any(here(file) for files in e.values() for file in files)]
    edition = begun[0] if begun else corpus.editions[0]
    part = next((part for part in ("all", "head", split) if part in edition), None)
    if part is None:
        raise DataError(f"{name} has no {split} split; it has {' and '.join(edition)}")
    paths, names = [], []
    for file in edition[part]:
        path = here(file)
        names.append(os.path.relpath(path, data_dir) if path else f"{corpus.hub} on Hugging Face, {file}")
        paths.append(path or _from_hub(name, file, edition is corpus.editions[0], data_dir))
    hold_out = split if part != split else None
    articles = corpus.hub == "Salesforce/wikitext"
    return _from_files(paths, names, corpus.licence, hold_out, torn=part == "head", articles=articles)


def _from_hub(name: str, file: str, on_hub: bool, data_dir: str) -> str:
    corpus = CORPORA[name]
    try:
        if not on_hub:
            raise DataError("this edition of it is not on the hub")
        return hub_file(corpus.hub, file)
    except DataError as error:
        path = os.path.join(data_dir, corpus.folder, file)
        raise DataError(
            f"{name} could not be fetched: {error}. Get online for {file} of {corpus.hub} on Hugging Face, "
            f"or put it at {path} (or .gz), or use the embedded corpus, which needs neither: storyworld"
        ) from None


def _from_files(
    paths: list[str], names: list[str], licence: str, hold_out: str | None = None, torn=False, articles=False
) -> Source:
    """`names` are what is shown of `paths`. `hold_out`: these files have no splits, so this one is cut from
    their tail.
    """
    for path in paths:
        if not _kind(path):
            raise DataError(f"{path}: cannot read this; .txt, .jsonl and .parquet can be read, also as .gz")
        if os.path.getsize(path) == 0:
            raise DataError(f"{path} is empty")
    source = names[0] if len(names) == 1 else f"{len(names)} files, {names[0]} to {names[-1]}"
    source += f" ({HOLD_OUT[hold_out]})" if hold_out else ""

    def read(about: dict) -> Iterator[str]:
        docs = (doc for path in paths for doc in read_file(path, articles, about))
        return _hold_out_tail(docs, hold_out, torn) if hold_out else docs

    def fingerprint() -> str:
        return _sha256(block for path in paths for block in _blocks(path))

    def running_text() -> bool:
        return articles or all(not TABLE.search(path) and not _has_marks(path) for path in paths)

    return Source(read, source, licence, fingerprint, running_text=running_text)


def _mix(text: str, split: str, data_dir: str) -> Source:
    """Corpora interleaved so that, at every point, each has had its share of the bytes to within a document.

    A finite corpus is never repeated: the mix ends when the first one does. A generator goes on as long as it
    is asked; of generators alone, the one with the largest share sets the length.
    """
    shares = {name: float(share) for name, share in (part.rsplit(":", 1) for part in text.split(","))}
    if len(shares) <= text.count(",") or min(shares.values()) <= 0:
        raise DataError(f'"{text}": name each corpus once, with a share above 0')
    found = {name: _find(name, split, data_dir) for name in shares}
    leader = max(shares, key=shares.get) if all(source.size for source in found.values()) else None

    def read(about: dict) -> Iterator[str]:
        readers = {}
        for name, source in found.items():
            readers[name] = islice(source.read(about), source.size if name == leader else None)
        progress = dict.fromkeys(shares, 0.0)  # bytes so far / share
        while True:
            name = min(progress, key=progress.get)  # the one that is furthest behind
            doc = next(readers[name], None)
            if doc is None:
                return
            progress[name] += len(doc.encode()) / shares[name]
            yield doc

    source = "; ".join(f"{shares[name]:g} {name}: {s.source}" for name, s in found.items())
    licence = "; ".join(f"{name}: {s.licence}" for name, s in found.items())
    return Source(
        read, source, licence, lambda: _sha256((text + s.fingerprint()).encode() for s in found.values())
    )


# -----------------------------------------------------------------------------
# files: .txt, .jsonl and .parquet, plain or gzipped, to documents

HELD_OUT = 1_000  # documents, at most, in a validation or test split that is cut from a tail
HOLD_OUT = {  # what is said about it
    "train": "all but the held-out tail",
    "test": f"held out: the 5 % before the last 5 %, at most {HELD_OUT:,} documents",
    "validation": f"held out: the last 5 %, at most {HELD_OUT:,} documents",
}
PASSAGE = 2_000  # characters; text without <|endoftext|> is cut at the next blank line after so many


def _kind(path: str) -> str:
    match = re.search(r"\.(txt|tokens|raw|jsonl|parquet)(\.gz)?$", path)
    return match[1] if match else ""


def read_file(path: str, articles: bool = False, about: dict | None = None) -> Iterator[str]:
    """The documents of a file: rows of .jsonl and .parquet (field "text"); of .txt what stands between
    <|endoftext|> marks, or else passages of about PASSAGE characters. `articles`: it is WikiText. Rows
    without text are counted in `about`["left_out"].
    """
    about = {} if about is None else about
    if articles:  # kept to the byte: its perplexity is compared with other people's
        yield from _articles(_wikitext_lines(path))
        return
    if TABLE.search(path):
        yield from _texts(path, about)
        return
    lines = text_lines(path)
    docs = _between_marks(lines) if _has_marks(path) else _passages(lines)
    docs = filter(None, map(str.strip, docs))
    first = next(docs, None)
    if first is None:
        raise DataError(f"{path} holds no text")
    yield first
    yield from docs


def _texts(path: str, about: dict) -> Iterator[str]:
    rows, empty, found = 0, [], False
    for row in read_rows(path, ("text",)):
        rows += 1
        text = text_of(row.get("text"), f'{path}, row {rows}, "text"')
        if text is not None:
            found = True
            yield text
            continue
        about["left_out"] = about.get("left_out", 0) + 1
        if len(empty) < 100:
            empty.append(row)
    if not rows:
        raise DataError(f"{path} holds no text")
    if not found:
        raise nothing_to_read(path, empty, 'a "text"')


def nothing_to_read(source: str, rows: list[dict], what: str) -> DataError:
    """The error for a data set in which no row has its text."""
    return DataError(
        f"{source}: no row has {what}; the columns are {columns_of(rows)} (row 1: {shortened(rows[0])})"
    )


def _wikitext_lines(path: str) -> Iterator[str]:
    if not TABLE.search(path):
        return text_lines(path)
    return (row.get("text") or " \n" for row in read_rows(path))  # on the hub a blank line is an empty row


def _has_marks(path: str) -> bool:
    return any(END_OF_TEXT in line for line in islice(text_lines(path), 10_000))


def _between_marks(lines: Iterable[str]) -> Iterator[str]:
    doc = []
    for line in lines:
        before, *after = line.split(END_OF_TEXT)
        doc.append(before)
        for text in after:
            yield "".join(doc)
            doc = [text]
    yield "".join(doc)


def _passages(lines: Iterable[str]) -> Iterator[str]:
    passage, size = [], 0
    for line in lines:
        passage.append(line)
        size += len(line)
        if size >= PASSAGE and (not line.strip() or size >= 4 * PASSAGE):
            yield "".join(passage)
            passage, size = [], 0
    yield "".join(passage)


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """A title is ` = Title = ` after a blank line; ` = = Section = = ` is not one."""
    article, previous = [], ""
    for line in lines:
        if len(article) > 1 and not previous.strip() and re.fullmatch(r" = [^=]+ = \n", line):
            yield "".join(article)
            article = []
        article.append(line)
        previous = line
    yield "".join(article)


def _hold_out_tail(docs: Iterable[str], split: str, torn: bool) -> Iterator[str]:
    """The last 5 % of the documents, at most HELD_OUT, is validation, as many before it test, the rest train.

    One pass, with 2 HELD_OUT documents in memory. `torn`: the last document is cut off, and dropped.
    """
    tail, n = deque(), 0
    for doc in docs:
        tail.append(doc)
        n += 1
        if len(tail) > 2 * HELD_OUT + torn:
            early = tail.popleft()
            if split == "train":
                yield early
    if n < 3:
        raise DataError(f"only {n} document(s): too little text to hold out a validation and a test split")
    tail = list(tail)[: len(tail) - torn]
    k = max(1, min(HELD_OUT, n // 20))
    yield from {"train": tail[: -2 * k], "test": tail[-2 * k : -k], "validation": tail[-k:]}[split]


def _blocks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def _sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# tasks: what a model is asked, what it should say, and how that is judged


@dataclass(frozen=True)
class Example:
    """One item of a task: the text that fills its template, and what should follow, from its space on."""

    text: str
    target: str
    label: int | None = None  # classification: index in Task.labels


@dataclass(frozen=True)
class Task:
    """A data set as a question in words. Prompting, fine-tuning and evaluation all use this same wording."""

    template: str  # what a text to continue looks like; "{}" is where an example's text goes
    columns: tuple[str, str]  # of the text and of its answer
    metric: str  # accuracy, rouge or exact_match
    test: str  # the split that results are reported on
    licence: str
    labels: tuple[str, ...] = ()  # what to say for class 0, 1, ...
    max_new_tokens: int = 0  # of a generated answer
    stop: str = "\n\n"  # a generated answer ends here at the latest
    hub: tuple[str, ...] = ()  # Hugging Face id and configuration
    files: dict[str, tuple[str, ...]] | None = None  # split -> names of its file in $DATA_DIR, no suffix
    hold_out: int = 0  # rows at the end of train that serve as validation where there is none
    generator: Callable | None = None  # (split, n) -> rows, of an embedded task
    question: str = "{}"  # what the user of a conversation asks

    def prompt(self, text: str) -> str:
        return self.template.replace("{}", text)


def _task_files(folder: str, **names: str) -> dict[str, tuple[str, ...]]:
    return {split: tuple(f"{folder}/{name}" for name in text.split()) for split, text in names.items()}


SPLIT_FILES = {"train": "train", "validation": "validation dev valid", "test": "test"}
REVIEW = {"template": "{}\nIt was", "columns": ("sentence", "label"), "metric": "accuracy"}
REVIEW |= {"labels": (" bad", " good"), "question": "{}\nIs this review good or bad?"}
CHAT = {"template": "Conversation:\n{}\nSummary:", "columns": ("dialogue", "summary"), "metric": "rouge"}
CHAT |= {"stop": "\n", "test": "test", "question": "Summarize this conversation in one sentence.\n\n{}"}
PROBLEM = {"template": "Question: {}\nAnswer:", "columns": ("question", "answer"), "metric": "exact_match"}
PROBLEM |= {"test": "test"}
TASKS = {
    "sst2": Task(
        **REVIEW,
        test="validation",  # GLUE keeps the labels of its test split to itself
        licence="not stated by its authors; research use",
        hub=("nyu-mll/glue", "sst2"),
        files=_task_files("sst2", **SPLIT_FILES),
    ),
    "samsum": Task(
        **CHAT,
        licence="CC BY-NC-ND 4.0",
        max_new_tokens=80,
        hub=("knkarthick/samsum",),
        files=_task_files("samsum", **SPLIT_FILES),
    ),
    "gsm8k": Task(
        **PROBLEM,
        licence="MIT",
        max_new_tokens=256,
        hub=("openai/gsm8k", "main"),
        files=_task_files("gsm8k", train="train", test="test"),
        hold_out=500,
    ),
    "sentiment": Task(**REVIEW, test="test", licence="MIT", generator=sentiment),
    "dialogue": Task(**CHAT, licence="MIT", max_new_tokens=48, generator=dialogue),
    "arithmetic": Task(**PROBLEM, licence="MIT", max_new_tokens=128, generator=arithmetic),
}
GENERATED = {"train": 4_000, "validation": 500, "test": 1_000}  # rows of an embedded task


@cache
def load_task(
    name: str, split: str, data_dir: str | None = None, first: int = 0, count: int = 0
) -> tuple[list[Example], dict[str, str]]:
    """The examples of one split, and {"source", "licence", "fingerprint"} of them for a run's record.

    With `count` only so many, from number `first` on; embedded tasks have as many as anybody asks for.

    Real tasks are looked for in $DATA_DIR as plain files and then on the hub, through `datasets`. Raises
    DataError that says what is missing and where it would be found.
    """
    task = find_task(name)
    data_dir = data_dir or os.environ.get("DATA_DIR") or "data"
    if split not in SPLITS:
        raise DataError(f'there is no split "{split}"; the splits are {", ".join(SPLITS)}')
    if task.generator:
        last = first + (count or GENERATED[split])
        rows = list(islice(task.generator(split, last), first, None))
        source = f"generated by data.py, seed {SEED}" + (f", from row {first + 1:,} on" if first else "")
        numbered = list(enumerate(rows, first + 1))
    else:
        held = task.hold_out and split != "test"
        rows, source = _task_rows(name, "train" if held else split, data_dir)
        numbered = list(enumerate(rows, 1))
        if held:
            numbered = numbered[: -task.hold_out] if split == "train" else numbered[-task.hold_out :]
            source += f" (its last {task.hold_out} rows are validation)"
        numbered = numbered[first : first + count] if count else numbered[first:]
    if not numbered:
        raise DataError(f"{name}, {split}: {source} holds no examples")
    examples = []
    for number, row in numbered:
        example = _example(name, task, row, f"{source}, row {number}")
        if example:
            examples.append(example)
    if not examples:
        columns = " and ".join(f'"{column}"' for column in task.columns)
        raise nothing_to_read(f"{name}, {split}: {source}{_hint(name, task)}", rows, f"text in {columns}")
    about = {"source": source, "licence": task.licence}
    _note_left_out(about, len(numbered) - len(examples))
    fingerprint = _sha256(f"{task.prompt(e.text)}\0{e.target}\0".encode() for e in examples)
    return examples, about | {"fingerprint": fingerprint}


def _note_left_out(about: dict, n: int, what: str = "without text") -> None:
    """Writes into a run's record, and into what is printed of the source, how many rows were left out."""
    if n:
        about["left_out"] = about.get("left_out", 0) + n
        about["source"] += f" ({n:,} {what} left out)"


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise DataError(f'there is no task "{name}"; the tasks are {", ".join(TASKS)}')
    return TASKS[name]


def _hint(name: str, task: Task) -> str:
    return f"; results on {name} are reported on its {task.test} split"


def _example(name: str, task: Task, row: dict, where: str) -> Example | None:
    """A row as an Example; None if it lacks its text or its answer, as one row of SAMSum."""
    text, answer = (text_of(row.get(column), f'{where}, "{column}"') for column in task.columns)
    if text is None or answer is None:
        return None
    if not task.labels:
        return Example(text, f" {answer}")
    if answer not in map(str, range(len(task.labels))):  # -1: the hub's way to hide a test split's labels
        last = len(task.labels) - 1
        raise DataError(f"{where}: label {answer!r} is not one of 0 to {last}{_hint(name, task)}")
    return Example(text, task.labels[int(answer)], int(answer))


def _task_rows(name: str, split: str, data_dir: str) -> tuple[list[dict], str]:
    """The raw rows of one split, and where they are from."""
    task = TASKS[name]
    names = task.files[split]
    path = _first_file(data_dir, names)
    if path:
        return list(read_rows(path)), os.path.relpath(path, data_dir)
    repo, *config = task.hub
    try:
        return hub_rows(repo, *config, split=split), f"{repo} on Hugging Face, {split}"
    except DataError as error:
        stand_in = next(n for n, t in TASKS.items() if t.generator and t.metric == task.metric)
        raise DataError(
            f"{name} is not on this disk and could not be fetched: {error}. Get online ({repo} on Hugging "
            f"Face), or put its {split} split at {os.path.join(data_dir, names[0])}.jsonl (or .csv, .tsv, "
            f".parquet, also .gz) with the columns {' and '.join(task.columns)}, or use the embedded task, "
            f"which needs neither: {stand_in}"
        ) from None


def _first_file(data_dir: str, stems: Iterable[str]) -> str | None:
    """The first of these files in $DATA_DIR, in any of the kinds that `read_rows` reads."""
    for stem in stems:
        for kind in (".jsonl", ".tsv", ".json", ".csv", ".parquet"):
            for gz in ("", ".gz"):
                path = os.path.join(data_dir, stem + kind + gz)
                if os.path.exists(path):
                    return path
    return None


def few_shot(name: str, shots: int, seed: int = SEED, data_dir: str | None = None) -> list[Example]:
    """`shots` examples drawn from the train split by seed, with as many of each class as of the others."""
    examples, _ = load_task(name, "train", data_dir)
    rng = random.Random(f"{name} {seed}")
    drawn = [examples[i] for i in rng.sample(range(len(examples)), min(len(examples), 50 * shots))]
    classes = max(1, len(TASKS[name].labels))
    kept, counts = [], [0] * classes
    for example in drawn:
        if len(kept) < shots and counts[example.label or 0] < -(-shots // classes):
            kept.append(example)
            counts[example.label or 0] += 1
    return kept


# -----------------------------------------------------------------------------
# conversations and preferences: what alignment learns from


@dataclass(frozen=True)
class Preference:
    """A conversation that ends with the user's turn, and two answers to it."""

    messages: list[dict]  # [{"role": "system", "user" or "assistant", "content": ...}, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Collection:
    """A data set of conversations or preferences: where it is, on the hub and in $DATA_DIR."""

    hub: str
    files: tuple[str, ...]  # the first that is there is read, and split by the first question
    licence: str
    hub_split: str = "train"
    hub_file: str = ""  # of a repository that `datasets` cannot read: the file with the rows
    note: str = ""  # what one has to know to get it


COLLECTIONS = {
    "alpaca": Collection("tatsu-lab/alpaca", ("alpaca/train", "instruct/alpaca_5000"), "CC BY-NC 4.0"),
    "dolly": Collection("databricks/databricks-dolly-15k", ("dolly/train",), "CC BY-SA 3.0"),
    "lima": Collection(
        "GAIR/lima",
        ("lima/train", "instruct/lima"),
        "CC BY-NC-SA",
        hub_file="train.jsonl",
        note="GAIR/lima is gated and comes as a script, which `datasets` does not run any more: its file "
        "train.jsonl can be had by who has accepted the terms on its page and run `hf auth login`; dolly and "
        "alpaca need neither",
    ),
    "hh-rlhf": Collection("Anthropic/hh-rlhf", ("hh-rlhf/train", "hh-rlhf/helpful-base/test"), "MIT"),
    "ultrafeedback": Collection(
        "HuggingFaceH4/ultrafeedback_binarized", ("ultrafeedback/train",), "MIT", hub_split="train_prefs"
    ),
}


def load_conversations(name: str, split: str, data_dir: str | None = None) -> tuple[list[list[dict]], dict]:
    """Conversations of one split, [[{"role", "content"}, ...], ...], and their source, for a run's record.

    `name`: the embedded `instructions`, a task (its questions and answers are turns), alpaca, dolly, lima, or
    a file. What is not split by its makers is split by the first question that the user asks: 90, 5, 5 %.
    """
    if name in TASKS:
        examples, about = load_task(name, split, data_dir)
        question = TASKS[name].question
        return [talk(question.replace("{}", e.text), e.target.strip()) for e in examples], about
    if name == "instructions":
        chats = [row["messages"] for row in instructions(split, GENERATED[split])]
        about = {"source": f"generated by data.py, seed {SEED}", "licence": "MIT"}
    else:
        chats, about = _collection(name, split, data_dir, messages_of, "a question and an answer")
    return chats, about | {"fingerprint": _sha256(json.dumps(c).encode() for c in chats)}


def load_preferences(name: str, split: str, data_dir: str | None = None) -> tuple[list[Preference], dict]:
    """Preferences of one split and their source: hh-rlhf, ultrafeedback, or a file of pairs."""
    pairs, about = _collection(name, split, data_dir, preference_of, "a question and two answers to it")
    kept = [p for p in pairs if p.chosen != p.rejected]
    _note_left_out(about, len(pairs) - len(kept), "pairs with identical sides")
    if not kept:
        raise DataError(f"{name}, {split}: {about['source']} holds no pairs")
    texts = (json.dumps([p.messages, p.chosen, p.rejected]).encode() for p in kept)
    return kept, about | {"fingerprint": _sha256(texts)}


def preference_of(row: dict, where: str = "") -> Preference | None:
    """A row as a Preference; None if it lacks a side, or if its sides answer different questions."""
    messages, chosen, rejected = pair_of(row, where)
    return Preference(messages, chosen, rejected) if messages else None


def _collection(name: str, split: str, data_dir: str | None, parse: Callable, what: str) -> tuple[list, dict]:
    """One split of the rows that `parse` makes something of. Rows with one first question share a split."""
    rows, source, licence = _collection_rows(name, data_dir or os.environ.get("DATA_DIR") or "data")
    if not rows:
        raise DataError(f"{name}: {source} holds no rows")
    items, in_split = 0, []
    for number, row in enumerate(rows, 1):
        item = parse(row, f"{source}, row {number}")
        if not item:
            continue
        items += 1
        if split_of(first_question(getattr(item, "messages", item))) == split:
            in_split.append(item)
    if not items:
        raise nothing_to_read(source, rows, what)
    if not in_split:
        raise DataError(
            f"{source}: none of its {items:,} rows falls into the {split} split. Rows with the same first "
            "question stay together; of different questions one in 20 is validation and one in 20 is test: "
            "there are too few"
        )
    about = {"source": f"{source}, split by the first question", "licence": licence}
    _note_left_out(about, len(rows) - items, f"without {what}")
    return in_split, about


def _collection_rows(name: str, data_dir: str) -> tuple[list[dict], str, str]:
    """The rows of a collection or of a file, where they are from, and their licence."""
    found = COLLECTIONS.get(name)
    if found is None:
        if not os.path.isfile(name):
            known = ", ".join(["instructions", *COLLECTIONS, *TASKS])
            raise DataError(f'"{name}" is neither a file nor a collection; those are {known}')
        return list(read_rows(name)), name, "yours"
    path = _first_file(data_dir, found.files)
    if path:
        return list(read_rows(path)), os.path.relpath(path, data_dir), found.licence
    try:
        if found.hub_file:
            rows = list(read_rows(hub_file(found.hub, found.hub_file)))
        else:
            rows = hub_rows(found.hub, split=found.hub_split)
        return rows, f"{found.hub} on Hugging Face", found.licence
    except DataError as error:
        raise DataError(
            f"{name} is not on this disk and could not be fetched: {error}. {found.note or 'Get online'} "
            f"({found.hub} on Hugging Face). Or put it at {os.path.join(data_dir, found.files[0])}.jsonl; "
            "the embedded collections need neither: instructions, arithmetic"
        ) from None


def refuse_overlap(train: Iterable[str], test: Iterable[str], what: str) -> None:
    """Raises DataError if a text that is tested on is trained on."""
    shared = set(train) & set(test)
    if shared:
        raise DataError(f"{what}: {len(shared)} test items are also trained on, such as {min(shared)[:80]!r}")


# -----------------------------------------------------------------------------
# answers: what of a model's text counts, and the calculator

NUMBER = re.compile(r"(?<![\d.])[-−]?[$€£]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def extract_number(text: str) -> str | None:
    """The answer of a worked solution as a plain number: "#### 1,080" and "It costs $1,080.00." → "1080".

    What stands behind the first "####" counts, or else behind the last "A:" or "answer is", or else the last
    number of all. None if there is none.
    """
    if "####" in text:
        found = NUMBER.search(text.split("####")[1].split("\n")[0])
    else:
        marked = re.findall(r"(?:^\s*A:|answer is:?)(.*)$", text, flags=re.M | re.I)
        found = NUMBER.search(marked[-1]) if marked else None
        found = found or next(iter(deque(NUMBER.finditer(text), maxlen=1)), None)
    return plain_number(found[0]) if found else None


def plain_number(text: str) -> str:
    """ "-$1,234.50" → "-1234.5": one spelling for one number, so that answers can be compared as strings."""
    sign = "-" if text[0] in "-−" else ""
    digits = re.sub(r"[^\d.]", "", text)
    whole, _, decimals = digits.partition(".")
    plain = (whole.lstrip("0") or "0") + ("." + decimals.rstrip("0")).rstrip(".")
    return plain if plain == "0" else sign + plain


class CalculatorError(ValueError):
    """The expression is not arithmetic, has no value, or is too large."""


TOKEN = re.compile(
    r"\s*(?:(\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+)|(\*\*|[-+*/()%]))", re.ASCII
)
LONGEST, DEEPEST, LARGEST_NUMBER = 200, 20, 256  # characters, parentheses and signs, bits


def calculate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression: numbers, + - * / **, percent, parentheses. Never `eval`.

    A recursive descent over this grammar. Anything else, and more than a word problem can need, raises
    CalculatorError, so that no text costs more than a moment.

        sum     = product (("+" | "-") product)*
        product = factor (("*" | "/") factor)*
        factor  = ("+" | "-") factor | atom "%"* ("**" factor)?
        atom    = number | "(" sum ")"
    """
    expression = expression.strip()
    if len(expression) > LONGEST:
        raise CalculatorError(f"an expression of {len(expression):,} characters is too long")
    tokens, at = deque(), 0
    while at < len(expression):
        token = TOKEN.match(expression, at)
        if not token:
            raise CalculatorError(f"{expression[at : at + 10]!r} is not arithmetic")
        tokens.append(token[1] or token[2])
        at = token.end()
    value = _sum(tokens, 0)
    if tokens:
        raise CalculatorError(f"{tokens[0]!r} stands where the expression should end")
    return value


def _take(tokens: deque, *signs: str) -> str | None:
    """The next token, if it is one of `signs`."""
    return tokens.popleft() if tokens and tokens[0] in signs else None


def _small(value: Fraction) -> Fraction:
    if _bits(value) > LARGEST_NUMBER:
        raise CalculatorError("a number is too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _sum(tokens: deque, depth: int) -> Fraction:
    value = _product(tokens, depth)
    while sign := _take(tokens, "+", "-"):
        term = _product(tokens, depth)
        value = _small(value + term if sign == "+" else value - term)
    return value


def _product(tokens: deque, depth: int) -> Fraction:
    value = _factor(tokens, depth)
    while sign := _take(tokens, "*", "/"):
        other = _factor(tokens, depth)
        if sign == "/" and not other:
            raise CalculatorError("division by zero")
        value = _small(value * other if sign == "*" else value / other)
    return value


def _factor(tokens: deque, depth: int) -> Fraction:
    if depth > DEEPEST:
        raise CalculatorError("too many parentheses or signs")
    if sign := _take(tokens, "+", "-"):
        value = _factor(tokens, depth + 1)
        return -value if sign == "-" else value
    value = _atom(tokens, depth)
    while _take(tokens, "%"):
        value = _small(value / 100)
    if _take(tokens, "**"):
        power = _factor(tokens, depth + 1)
        if power.denominator != 1 or (power < 0 and not value):
            raise CalculatorError(f"cannot raise {decimal_text(value)} to {decimal_text(power)}")
        if abs(power) * _bits(value) > 2 * LARGEST_NUMBER:  # before it is computed, not after
            raise CalculatorError("a number is too large")
        value = _small(value ** int(power))
    return value


def _atom(tokens: deque, depth: int) -> Fraction:
    if _take(tokens, "("):
        value = _sum(tokens, depth + 1)
        if not _take(tokens, ")"):
            raise CalculatorError("a parenthesis is not closed")
        return value
    if not tokens or not tokens[0][-1].isdigit() and tokens[0][-1] != ".":
        raise CalculatorError("a number is missing")
    return _small(Fraction(tokens.popleft().replace(",", "")))


def decimal_text(value: Fraction, places: int = 4) -> str:
    """A Fraction as people write it: "24", "2.5", and "0.3333" where the decimals do not end."""
    scaled = round(abs(value) * 10**places)
    whole, rest = divmod(scaled, 10**places)
    text = f"{whole}.{rest:0{places}}".rstrip("0").rstrip(".") if rest else str(whole)
    return f"-{text}" if value < 0 and scaled else text


def calculator_answer(text: str) -> str | None:
    """What a calculator types behind a text that ends in an open annotation: "... is <<9*3=" → "27>>"."""
    found = re.search(r"<<([^<>=]*)=$", text[-210:])
    try:
        return f"{decimal_text(calculate(found[1]))}>>" if found else None
    except CalculatorError:
        return None


# -----------------------------------------------------------------------------
# metrics: every one with its 95 % interval, {"value", "low", "high", "n"}


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean loss: as uncertain as a choice among so many tokens. Depends on what a token is."""
    return math.exp(min(700, nats / tokens))


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """What compressing the text with this model would cost; comparable whatever the vocabularies."""
    return nats / math.log(2) / n_bytes


def proportion(hits: int, n: int) -> dict:
    """A share with Wilson's interval (1927), which stays within [0, 1] and holds for few or no hits, too."""
    z = 1.959964
    p, spread = hits / n, z * math.sqrt(hits / n * (1 - hits / n) / n + (z / (2 * n)) ** 2)
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    low, high = max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
    return {"value": p, "low": low, "high": high, "n": n}


def bootstrap(values, statistic: Callable | None = None, rounds: int = 2000, seed: int = 0) -> dict:
    """A statistic of `values` (n, ...), by default their mean, with its percentile bootstrap interval."""
    import numpy as np

    values, rng = np.asarray(values), np.random.default_rng(seed)
    statistic = statistic or (lambda sample: sample.mean(0))
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(rounds)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(statistic(values)), "low": float(low), "high": float(high), "n": len(values)}


def paired_bootstrap(a, b, rounds: int = 10_000, seed: int = 0) -> dict:
    """mean(a) - mean(b) of two systems on the same items; they differ if the interval excludes 0."""
    import numpy as np

    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"paired systems must have the same items: {len(a)} and {len(b)}")
    return bootstrap(a - b, rounds=rounds, seed=seed)


def macro_f1(labels_and_predictions) -> float:
    """The mean of the classes' F1, so that a rare class counts as much as a frequent one."""
    import numpy as np

    labels, predictions = np.asarray(labels_and_predictions).T
    scores = []
    for c in np.union1d(labels, predictions):
        both = ((labels == c) & (predictions == c)).sum()
        scores.append(2 * both / ((labels == c).sum() + (predictions == c).sum()))
    return float(np.mean(scores))


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin, 2004): F1 of shared words, word pairs and longest common subsequence."""
    scores = _rouge_scorer().score(reference, prediction)
    return {name: score.fmeasure for name, score in scores.items()}


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def pass_at(k: int, n: int, correct: int) -> float:
    """The chance that k of n samples, `correct` of them right, hold a right one (Chen et al., 2021)."""
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Iterable[str | None]) -> str | None:
    """The most frequent answer (self-consistency, Wang et al., 2022); of equals, the one given first."""
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=counts.get, default=None)  # max keeps the first


def judge(name: str, examples: list[Example], outputs: list) -> tuple[list[dict], dict[str, dict]]:
    """Outputs of a model against what they should be: a record an example, and the metrics.

    `outputs` are class indices where the task has labels, and generated texts elsewhere.
    """
    task, records = TASKS[name], []
    for example, output in zip(examples, outputs, strict=True):
        if task.labels:
            found = {"prediction": task.labels[output].strip(), "correct": output == example.label}
        elif task.metric == "exact_match":
            text = output.split(task.stop)[0].strip()
            found = {
                "output": text,
                "prediction": extract_number(text),
                "answer": extract_number(example.target),
            }
            found["correct"] = found["prediction"] == found["answer"]
        else:
            text = output.strip().split(task.stop)[0].strip()
            found = {"output": text} | rouge(text, example.target)
        records.append({"text": example.text, "target": example.target.strip(), **found})
    if task.metric == "rouge":
        metrics = {m: bootstrap([r[m] for r in records]) for m in ("rouge1", "rouge2", "rougeL")}
        length = sum(len(r["output"].split()) for r in records) / len(records)
        return records, metrics | {"words": {"value": length, "n": len(records)}}
    metrics = {task.metric: proportion(sum(r["correct"] for r in records), len(records))}
    if task.labels:
        pairs = [(e.label, output) for e, output in zip(examples, outputs, strict=True)]
        metrics["macro_f1"] = bootstrap(pairs, macro_f1, rounds=500)
    else:
        said = sum(r["prediction"] is not None for r in records)
        metrics["answered"] = proportion(said, len(records))
    return records, metrics


# -----------------------------------------------------------------------------
# choosing among many answers


def best_of(scores: Iterable[float]) -> int | None:
    """Index of the highest score; of equals the first, of none None."""
    scores = list(scores)
    return max(range(len(scores)), key=scores.__getitem__) if scores else None


def weighted_vote(answers: Iterable[str | None], weights: Iterable[float]) -> str | None:
    """The answer whose weights add up to most (Li et al., 2023); samples without an answer have no vote."""
    totals: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=totals.get, default=None)


def gate(probabilities: Iterable[float], threshold: float) -> tuple[int, int]:
    """Sampling on until one is good enough: (index of the best so far, samples spent)."""
    best, spent = 0, 0
    probabilities = list(probabilities)
    for spent, p in enumerate(probabilities, 1):
        best = best if p <= probabilities[best] else spent - 1
        if probabilities[best] >= threshold:
            break
    return best, spent


def equations(text: str) -> list[tuple[str, str]]:
    """The annotated steps of a solution, [(expression, result), ...] of `<<expression=result>>`."""
    return [(e.replace(" ", ""), r.strip()) for e, r in re.findall(r"<<([^<>=]*)=([^<>=]*)>>", text)]


def calculates(text: str) -> bool:
    """Whether every annotated step of a solution is calculated right, and its last result is its answer."""
    steps = equations(text)
    try:
        right = all(decimal_text(calculate(e)) == extract_number(r) for e, r in steps)
    except CalculatorError:
        return False
    return bool(steps) and right and extract_number(steps[-1][1]) == extract_number(text)


# -----------------------------------------------------------------------------
# judging a verifier: scores against labels


def auc(labels, scores) -> float:
    """The chance that a right answer scores above a wrong one, ties counting half; nan without both kinds."""
    import numpy as np

    labels, scores = np.asarray(labels, bool), np.asarray(scores, float)
    if labels.all() or not labels.any():
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]  # of equals, the mean of their ranks
    n = labels.sum()
    return float((ranks[labels].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def auc_within(labels, scores) -> dict:
    """The mean over problems of `auc` of each one's answers, (problems, n); how hard a problem is has no say.

    Problems with only right or only wrong answers say nothing, and are not counted.
    """
    import numpy as np

    each = [auc(a, s) for a, s in zip(labels, scores, strict=True)]
    each = [a for a in each if not math.isnan(a)]
    return bootstrap(np.array(each), rounds=500) if each else {"value": math.nan, "n": 0}


def calibration(labels, probabilities, bins: int = 10) -> dict:
    """Expected calibration error (Guo et al., 2017) and what a reliability plot shows, bin by bin."""
    import numpy as np

    labels, probabilities = np.asarray(labels, float), np.asarray(probabilities, float)
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    found = []
    for b in range(bins):
        here = which == b
        if here.any():
            found.append(
                {
                    "n": int(here.sum()),
                    "said": float(probabilities[here].mean()),
                    "is": float(labels[here].mean()),
                }
            )
    error = sum(b["n"] * abs(b["said"] - b["is"]) for b in found) / len(labels)
    return {"ece": error, "bins": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [--name=value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", default="storyworld", help="a name, a path or glob, or a mix")
    parser.add_argument("--task", help=f"{', '.join(TASKS)}: show its items as a model sees them")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--show", type=int, default=5, help="how many")
    args = parser.parse_args()
    try:
        if args.task:
            examples, about = load_task(args.task, args.split)
            print(f"{len(examples):,} examples, {about['source']}; licence: {about['licence']}", end="\n\n")
            for example in examples[: args.show]:
                print(f"{TASKS[args.task].prompt(example.text)}[{example.target}]", end="\n\n")
            return
        for doc in islice(documents(args.corpus, args.split), args.show):
            print(doc, end="\n\n")
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_script(main)
