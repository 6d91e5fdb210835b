"""bAbI's tasks 1 to 3 (arXiv:1502.05698), their facts spread in text as in BABILong (arXiv:2406.10149).

Stories are simulated here by the rules: people walk between places, take things and leave them. Task 1 asks
where a person is, task 2 where a thing is, task 3 where it was before it was somewhere.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from tasks.haystack.noise import pieces, sentences
from tasks.haystack.types import Request, Sample, largest, sample_of, weave

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")
THINGS = ("football", "milk", "apple")
GO = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TAKE = ("took", "picked up", "grabbed", "got")
DROP = ("dropped", "left", "discarded", "put down")
FACTS = {"qa1": (2, 10), "qa2": (4, 14), "qa3": (8, 24)}  # how many, at least and at most
CHANCE = 1 / len(PLACES)


@dataclasses.dataclass
class World:
    """Who is where and has what, where each thing is known to have been, and the facts that say so."""

    at: dict[str, str] = dataclasses.field(default_factory=dict)
    holder: dict[str, str] = dataclasses.field(default_factory=dict)
    history: dict[str, list[str]] = dataclasses.field(default_factory=lambda: {t: [] for t in THINGS})
    facts: list[str] = dataclasses.field(default_factory=list)

    def step(self, rng: np.random.Generator, things: bool) -> None:
        """One more fact; of things only where someone whose place is known can act on one."""
        able = [p for p in PEOPLE if p in self.at] if things else []
        person = able[rng.integers(len(able))] if able and rng.random() < 0.5 else ""
        if not (person and self._handle(rng, person)):
            self._go(rng, PEOPLE[rng.integers(len(PEOPLE))])

    def _go(self, rng: np.random.Generator, person: str) -> None:
        elsewhere = [place for place in PLACES if place != self.at.get(person)]
        place = elsewhere[rng.integers(len(elsewhere))]
        self.at[person] = place
        self.facts.append(f"{person} {GO[rng.integers(len(GO))]} the {place}.")
        for thing, holder in self.holder.items():
            if holder == person:
                self.history[thing].append(place)

    def _handle(self, rng: np.random.Generator, person: str) -> bool:
        """Take or drop something, if that can be."""
        here, held = self.at[person], [t for t in THINGS if self.holder.get(t) == person]
        free = [t for t in THINGS if t not in self.holder and self.history[t][-1:] in ([], [here])]
        if held and (not free or rng.random() < 0.4):
            thing, verb = held[rng.integers(len(held))], DROP[rng.integers(len(DROP))]
            del self.holder[thing]
        elif free:
            thing, verb = free[rng.integers(len(free))], TAKE[rng.integers(len(TAKE))]
            self.holder[thing] = person
            if not self.history[thing]:
                self.history[thing].append(here)
        else:
            return False
        self.facts.append(f"{person} {verb} the {thing}.")
        return True


def story(task: str, rng: np.random.Generator) -> tuple[list[str], str, str, str]:
    """(facts, question, answer, who or what is asked about) of "qa1", "qa2" or "qa3"."""
    low, high = FACTS[task]
    while True:
        world = World()
        for _ in range(int(rng.integers(low, high + 1))):
            world.step(rng, task != "qa1")
        if task == "qa1":
            known = [person for person in PEOPLE if person in world.at]
            person = known[rng.integers(len(known))]
            return world.facts, f"Where is {person}?", world.at[person], person
        things = [t for t in THINGS if len(world.history[t]) >= (1 if task == "qa2" else 2)]
        things = [t for t in things if task == "qa2" or world.history[t].count(world.history[t][-1]) == 1]
        if things:
            thing = things[rng.integers(len(things))]
            *_, last = past = world.history[thing]
            if task == "qa2":
                return world.facts, f"Where is the {thing}?", last, thing
            return world.facts, f"Where was the {thing} before the {last}?", past[-2], thing


def generate(task: str, request: Request) -> Sample:
    """A story spread in text, in order; the answer is a place.

    Raises:
        TooShort: ``request.length`` has no room for the story alone.
    """
    rng = request.rng
    facts, question, answer, about = story(task, rng)
    noise, places = pieces(request.text(sentences)), sorted(rng.random(len(facts)))
    mentions = [i for i, fact in enumerate(facts) if about in fact]
    first = mentions[-1] if task == "qa1" else mentions[0]

    def build(size: int) -> Sample:
        text, starts = weave(noise[:size], facts, places, " ")
        at = starts[first]
        after = f"{text[at:]}\nQuestion: {question}\nAnswer:"
        return sample_of(request.tokenizer, text[:at], after, f" {answer}", [answer])

    each = len(request.tokenizer.encode(" ".join(noise))) / max(len(noise), 1) + 1
    return largest(build, lambda x: len(x.prompt), request.length, len(noise), each, task)


def is_right(said: str, answer: str) -> bool:
    """BABILong's rule: the place stands in what was said before the first full stop."""
    return answer in said.partition(".")[0].lower()


GENERATORS = {task: functools.partial(generate, task) for task in FACTS}
