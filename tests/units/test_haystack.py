"""Needles in text: the published prompts word for word, readers that know the rules, keys kept apart."""

import re
from collections import Counter

import numpy as np
import pytest

from tasks import bpe
from tasks.corpus import Corpus
from tasks.haystack import GENERATORS
from tasks.haystack.babi import CHANCE, FACTS, PEOPLE, PLACES, is_right, story
from tasks.haystack.noise import GRASS, CorpusText, grass, sentences
from tasks.haystack.passkey import STYLES, chance, draw_key, passkey
from tasks.haystack.types import EVALUATION, HELD_OUT, TRAINING, Request, TooShort, largest, side_of, weave
from tasks.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
LONG = 5000  # bytes: every task fits


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A tokenizer whose tokens are several bytes."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(bpe.train([f"{GRASS} What is the pass key? Remember it.\n"] * 50, 300))
    return bpe.BPETokenizer(path)


def ask(name, seed=0, length=LONG, **rest):
    return GENERATORS[name](Request(np.random.default_rng(seed), BYTES, length, **rest))


def text(sample):
    return BYTES.decode(sample.prompt)


def garbage(count):
    """The noise of Landmark Attention: the line repeated with single spaces, cut by characters."""
    return " ".join([GRASS] * 2000)[:count]


@pytest.mark.parametrize(("n", "before"), [(0, 0), (100, 37), (1000, 1000), (5000, 2500)])
def test_landmark_and_longlora_are_as_published(n, before):
    lines = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.",
        garbage(before),
        "The pass key is 4711. Remember it. 4711 is the pass key.",
        garbage(n - before),
        "What is the pass key? The pass key is",
    ]
    wanted = "\n".join(lines)
    for style in ("landmark", "longlora"):
        made = passkey(style, BYTES, 1 + len(wanted), before / max(n, 1), "4711")
        assert text(made) == wanted and len(made.prompt) == 1 + len(wanted)
        assert text(made)[made.fact - 1 :].startswith("\nThe pass key is 4711.")
        assert BYTES.decode(made.answer) == " 4711"
        assert made.stops == (style == "landmark")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_stuffed_mamba_replaces_a_block(depth):
    intro = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
    key = "The passkey is 00042. Remember it. 00042 is the passkey.\n"
    question = "\nWhat is the pass key? The passkey is"
    count = (2048 - len(intro) - len(question)) // (len(GRASS) + 1)
    blocks = [f"{GRASS}\n"] * count
    blocks[int(depth * (count - 1))] = key
    made = passkey("stuffed_mamba", BYTES, 2049, depth, "00042")  # and the document start
    assert text(made) == intro + "".join(blocks) + question
    assert not made.stops


def test_infinitebench_has_whole_lines():
    made = text(passkey("infinitebench", BYTES, 4096, 0.4, "01234"))
    intro, context, question, lead = made.split("\n\n")
    lines = context.split("\n")
    at = lines.index("The pass key is 01234. Remember it. 01234 is the pass key.")
    assert set(lines[:at] + lines[at + 1 :]) == {GRASS} and at == round(0.4 * (len(lines) - 1))
    assert intro.endswith("I will quiz you about the important information.")
    assert (question, lead) == ("What is the pass key?", "The pass key is")
    assert 4096 - len(GRASS) - 2 < len(made) < 4096


@pytest.mark.parametrize("length", [300, 1024, 3001])
def test_beacon_has_exactly_the_length_with_any_tokenizer(pieces, length):
    for tokenizer in (BYTES, pieces):
        made = passkey("beacon", tokenizer, length, 0.3, "54321")
        assert len(made.prompt) == length
        said = tokenizer.decode(made.prompt)
        assert said.count("The pass key is 54321. Remember it. 54321 is the pass key.\n\n") == 1
        assert said.endswith("\n\nWhat is the pass key? The pass key is")
        noise = said.partition("there.\n")[2]
        assert noise.startswith(f"{GRASS}{GRASS}"[:50]) or length == 300  # no space between the lines
    start = len("There is an important infomation hidden in the following context. ")
    assert passkey("beacon", BYTES, length, 0.0, "54321").fact > start


@pytest.mark.parametrize("style", STYLES)
def test_prompts_of_larger_tokens_use_the_room(pieces, style):
    for depth in (0.0, 1.0):
        made = passkey(style, pieces, 700, depth, "23456")
        line = len(pieces.encode(f"{GRASS}\n"))
        assert 700 - 2 * line < len(made.prompt) <= 700
        assert "23456. Remember it." in pieces.decode(made.prompt[made.fact - 1 :])
        assert pieces.decode(made.answer) == " 23456"


def test_depth_moves_the_key():
    for style in STYLES:
        places = [passkey(style, BYTES, 4096, d, "12345").fact for d in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert places == sorted(places) and places[0] < 200 and places[-1] > 3800


def test_noise_of_ones_own():
    noise = "".join(chr(97 + i % 26) for i in range(4000))
    made = text(passkey("landmark", BYTES, 1000, 0.5, "7", noise))
    first, second = made.split("\n")[1], made.split("\n")[3]
    assert first + second == noise[: len(first + second)] and len(made) == 999
    for style in ("stuffed_mamba", "infinitebench", "beacon"):
        assert GRASS[:20] not in text(passkey(style, BYTES, 1000, 0.5, "71234", noise))


def test_keys_have_the_published_law_and_sides_share_none():
    rng = np.random.default_rng(0)
    for style, law in STYLES.items():
        keys = {side: {draw_key(style, rng, side) for _ in range(40)} for side in (TRAINING, EVALUATION)}
        assert not keys[TRAINING] & keys[EVALUATION]
        every = [draw_key(style, rng) for _ in range(400)]
        low, high = law.keys
        assert all(low <= int(k) <= high and len(k) >= law.digits for k in every)
        np.testing.assert_allclose(np.mean([int(k) for k in every]), (low + high) / 2, rtol=0.12)
        held = np.mean([side_of(k) == EVALUATION for k in every])
        np.testing.assert_allclose(held, 1 / HELD_OUT, atol=0.07)
        assert chance(style)["exact_match"] == 1 / (high - low + 1)
    assert any(k.startswith("0") for k in (draw_key("stuffed_mamba", rng) for _ in range(100)))


def read_passkey(prompt):
    return [re.search(r"(\d+) is the pass ?key", prompt)[1]]


def read_needles(prompt):
    needles = re.findall(r"special magic \w+ for ([\w-]+) is: ([\w-]+)\.", prompt)
    query = re.search(r"magic \w+ for ([\w, -]+?) mentioned", prompt)[1]
    asked = re.split(r", and |, ", query)
    return [value for key in asked for of, value in needles if of == key]


def read_variables(prompt):
    value = re.search(r"assigned the value (\d+) in", prompt)[1]
    found = {value}
    for name, of in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", prompt):
        found |= {name} if of in found else set()
    return found - {value}


def read_common(prompt):
    listed = prompt.split("ones that appear most often.\n")[-1].partition("\nQuestion")[0]
    return [word for word, _ in Counter(re.findall(r"\d+\. (\w+)", listed)).most_common(10)]


def read_frequent(prompt):
    coded = prompt.partition("frequently appeared coded words. ")[2].partition("\nQuestion")[0]
    counts = Counter(coded.split())
    assert counts.most_common(1)[0][0] == "..."
    return [word for word, _ in counts.most_common(4)[1:]]


def read_story(prompt):
    """Follows people and things through the facts, whatever stands between."""
    at, holder, past = {}, {}, {}
    for person, verb, what in re.findall(rf"({'|'.join(PEOPLE)}) ([\w ]+?) the (\w+)\.", prompt):
        if what in PLACES:
            at[person] = what
            for thing in (t for t, h in holder.items() if h == person):
                past[thing].append(what)
        elif verb in ("took", "picked up", "grabbed", "got"):
            holder[what] = person
            past.setdefault(what, [at[person]])
            assert past[what][-1] == at[person]
        else:
            assert holder.pop(what) == person
    question = prompt.partition("\nQuestion: ")[2]
    if asked := re.match(r"Where is (?:the )?(\w+)\?", question):
        return [at[asked[1]] if asked[1] in at else past[asked[1]][-1]]
    thing, place = re.match(r"Where was the (\w+) before the (\w+)\?", question).groups()
    assert past[thing].count(place) == 1
    return [past[thing][past[thing].index(place) - 1]]


READERS = {
    **dict.fromkeys(STYLES, read_passkey),
    **{name: read_needles for name in GENERATORS if name.startswith("niah")},
    **dict.fromkeys(FACTS, read_story),
    "vt": read_variables,
    "cwe": read_common,
    "fwe": read_frequent,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_who_knows_the_rules_scores_everything(name):
    for seed in range(5):
        for noise in (None, sentences):
            made = ask(name, seed, noise=noise)
            prompt = text(made)
            assert set(READERS[name](prompt)) == set(made.references), prompt
            assert all(r in BYTES.decode(made.answer) for r in made.references)
            assert len(made.prompt) <= LONG and made.prompt[0] == BYTES.separator_id
            # Half of a prompt at least is noise: more would not fit.
            assert len(made.prompt) > LONG - 300
            assert 0 < made.fact < len(made.prompt)


@pytest.mark.parametrize("name", GENERATORS)
def test_samples_are_pure_and_sides_share_no_values(name):
    again = ask(name, 3), ask(name, 3)
    np.testing.assert_array_equal(again[0].prompt, again[1].prompt)
    assert not np.array_equal(again[0].answer, ask(name, 4).answer) or name.startswith("qa")
    if name not in ("cwe", "fwe", "vt", *FACTS):
        for side in (TRAINING, EVALUATION):
            made = ask(name, 5, side=side)
            assert all(side_of(reference) == side for reference in made.references)


def test_stories_ask_about_every_place_and_need_as_many_facts():
    answers = Counter(story(task, np.random.default_rng(i))[2] for task in FACTS for i in range(200))
    assert set(answers) == set(PLACES) and max(answers.values()) / 600 < 0.25 and CHANCE == 1 / 6
    assert is_right(" Kitchen. It was not in the garden.", "kitchen")
    assert not is_right(" garden. The kitchen", "kitchen")


def test_noise_has_exactly_the_characters_and_comes_from_its_corpus():
    rng = np.random.default_rng(0)
    documents = [b"alpha beta\n" * 9, b"gamma delta\n" * 5]
    corpus = Corpus.from_documents(documents)
    for noise in (grass, sentences, CorpusText(corpus, BYTES)):
        for count in (1, 89, 1000):
            assert len(noise(rng, count)) == count
    pieces = "".join(document.decode() for document in documents) * 3
    assert CorpusText(corpus, BYTES)(rng, 150) in pieces
    assert len(set(sentences(rng, 20000).split("."))) > 200


def test_largest_is_the_largest_that_fits():
    for tokens, limit in ((lambda n: 5 + n, 57), (lambda n: 5 + int(7.3 * n), 400), (lambda n: n // 2, 33)):
        for guess in (0.01, 1.0, 50.0):
            size = largest(lambda n: n, tokens, limit, 1000, guess, "x")
            assert tokens(size) <= limit < tokens(size + 1)
    assert largest(lambda n: n, lambda n: n, 100, 10, 1.0, "x") == 10


def test_weaving_keeps_the_order():
    woven, starts = weave(["a", "b", "c", "d"], ["X", "Y"], [0.5, 0.5], " ")
    assert woven == "a b X Y c d" and starts == [4, 6]


@pytest.mark.parametrize("name", GENERATORS)
def test_a_length_below_the_prompt_says_what_is_needed(name):
    with pytest.raises(TooShort, match="(it needs|needs) "):
        ask(name, length=100)


def test_what_cannot_work_is_named():
    with pytest.raises(ValueError, match="unknown style 'beacons'; use one of landmark"):
        passkey("beacons", BYTES, 500, 0.5, "1")
    with pytest.raises(ValueError, match="depth=1.5"):
        passkey("landmark", BYTES, 500, 1.5, "1")
    with pytest.raises(ValueError, match="key='12a'"):
        passkey("landmark", BYTES, 500, 0.5, "12a")
