"""A small world, told in English: the text the demo model is made of, generated from a seed.

People carry things between places, and the world remembers where everything is, so that
what the text says can be asked about. Five kinds of text come out of it:

* `stories`: what happened, in order, sometimes with why;
* `questions`: a short story, a question about it, and the answer as a sentence;
* `ledgers`: a story, then JSON records of parts of it, a few to a record;
* `extracts`: a sentence, then two JSON records that say a part of it each;
* `records`: one sentence and what it says as a JSON record: the fine-tuning task, which
  the pretrained model has never seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

PEOPLE = [
    "Ada",
    "Ben",
    "Clara",
    "Dov",
    "Elsa",
    "Finn",
    "Greta",
    "Hugo",
    "Iris",
    "Jonas",
    "Kira",
    "Leo",
    "Mara",
    "Nils",
    "Olga",
    "Pavel",
    "Quinn",
    "Rosa",
    "Sven",
    "Tilda",
    "Uma",
    "Viktor",
    "Wanda",
    "Yusuf",
    "Zoe",
    "Anton",
    "Bella",
    "Carl",
    "Dina",
    "Emil",
]
PLACES = [
    "market",
    "barn",
    "harbour",
    "kitchen",
    "garden",
    "library",
    "mill",
    "school",
    "workshop",
    "bakery",
    "forest",
    "meadow",
    "tower",
    "station",
    "cellar",
    "bridge",
    "chapel",
    "orchard",
    "stable",
    "village",
]
THINGS = [
    "basket",
    "lamp",
    "rope",
    "kettle",
    "ladder",
    "blanket",
    "bucket",
    "chest",
    "clock",
    "drum",
    "hammer",
    "jug",
    "key",
    "letter",
    "mirror",
    "net",
    "parcel",
    "pot",
    "saddle",
    "sack",
    "scarf",
    "spade",
    "stool",
    "violin",
    "wheel",
]
LOOKS = [
    "red",
    "blue",
    "green",
    "old",
    "new",
    "small",
    "large",
    "heavy",
    "broken",
    "wooden",
    "silver",
    "round",
]
TIMES = {
    "in the morning": "morning",
    "at noon": "noon",
    "in the afternoon": "afternoon",
    "in the evening": "evening",
    "at night": "night",
    "on Monday": "Monday",
    "on Friday": "Friday",
    "on Sunday": "Sunday",
}
MOODS = ["happy", "tired", "hungry", "cold", "curious", "calm", "proud", "worried"]


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing a person can do to a thing: its dictionary form, its past, its participle."""

    base: str
    past: str
    participle: str


MOVE = tuple(
    Verb(*forms.split())
    for forms in [
        "carry carried carried",
        "bring brought brought",
        "take took taken",
        "drag dragged dragged",
        "send sent sent",
        "roll rolled rolled",
        "push pushed pushed",
        "lift lifted lifted",
    ]
)
HANDLE = tuple(
    Verb(*forms.split())
    for forms in [
        "find found found",
        "wash washed washed",
        "paint painted painted",
        "mend mended mended",
        "hide hid hidden",
        "drop dropped dropped",
        "draw drew drawn",
        "sell sold sold",
        "buy bought bought",
        "break broke broken",
        "choose chose chosen",
        "steal stole stolen",
    ]
)
GIVE = tuple(
    Verb(*forms.split())
    for forms in ["give gave given", "lend lent lent", "show showed shown", "hand handed handed"]
)
GO = (("go", "went"), ("walk", "walked"), ("run", "ran"), ("hurry", "hurried"), ("ride", "rode"))
INSIDE = {"market": "at", "station": "at", "bridge": "on", "harbour": "at", "school": "at"}


def at(place: str) -> str:
    """`at the market`, `in the barn`: where a thing that is there is."""
    return f"{INSIDE.get(place, 'in')} the {place}"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: a sentence can be told from it, and a record made of it."""

    who: str
    verb: Verb
    what: str
    where: str
    when: str  # a key of TIMES, or ""
    to: str = ""
    moves: bool = False

    def sentence(self, random: Random) -> str:
        """One English sentence that says all of it, active or passive, the time first or last."""
        place = f"to the {self.where}" if self.moves else at(self.where)
        if self.to:
            told = random.choice(
                (
                    f"{self.who} {self.verb.past} the {self.what} to {self.to} {place}",
                    f"{self.who} {self.verb.past} {self.to} the {self.what} {place}",
                )
            )
        else:
            told = f"{self.who} {self.verb.past} the {self.what} {place}"
        if random.random() < 0.25:
            whom = f" to {self.to}" if self.to else ""
            told = f"the {self.what} was {self.verb.participle}{whom} {place} by {self.who}"
        if self.when and random.random() < 0.4:
            told = f"{self.when}, {told}"
        elif self.when:
            told = f"{told} {self.when}"
        return told[0].upper() + told[1:] + "."

    def asked(self, random: Random) -> tuple[str, str]:
        """A question about one part of it, and the answer as a sentence."""
        who, what, verb = self.who, self.what, self.verb
        place = f"to the {self.where}" if self.moves else at(self.where)
        choices = [
            (f"Who {verb.past} the {what}?", f"{who} {verb.past} the {what}."),
            (f"What did {who} {verb.base}?", f"{who} {verb.past} the {what}."),
            (f"Where did {who} {verb.base} the {what}?", f"{who} {verb.past} it {place}."),
        ]
        if self.when:
            choices.append((f"When did {who} {verb.base} the {what}?", f"{who} {verb.past} it {self.when}."))
        if self.to:
            choices.append(
                (f"To whom did {who} {verb.base} the {what}?", f"{who} {verb.past} it to {self.to}.")
            )
        return random.choice(choices)

    def record(self) -> str:
        """The same as JSON: dictionary form of the verb, bare nouns, absent parts left out."""
        parts = {"who": self.who, "did": self.verb.base, "what": self.what, "to": self.to}
        parts |= {"where": self.where, "when": TIMES.get(self.when, "")}
        return json.dumps({name: value for name, value in parts.items() if value})


@dataclass(slots=True)
class World:
    """Who and what is where, as the telling goes on."""

    random: Random
    people: dict[str, str] = field(default_factory=dict)
    things: dict[str, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def anything(self) -> str:
        thing = self.random.choice(THINGS)
        return f"{self.random.choice(LOOKS)} {thing}" if self.random.random() < 0.5 else thing

    def event(self) -> Event:
        """A new event among a few people and things, so that they come back."""
        pick = self.random.choice
        known_people, known_things = list(self.people), list(self.things)
        who = pick(known_people) if len(known_people) > 2 else pick(PEOPLE)
        old = known_things and self.random.random() < 0.6
        what = pick(known_things) if old else self.anything()
        when = pick(list(TIMES)) if self.random.random() < 0.5 else ""
        kind = self.random.random()
        if kind < 0.45:
            where = pick(PLACES)
            event = Event(who, pick(MOVE), what, where, when, moves=True)
        elif kind < 0.8:
            where = self.things.get(what) or pick(PLACES)
            event = Event(who, pick(HANDLE), what, where, when)
        else:
            where = self.things.get(what) or pick(PLACES)
            to = pick([name for name in PEOPLE if name != who])
            event = Event(who, pick(GIVE), what, where, when, to=to)
            self.people[to] = where
        self.people[who] = self.things[what] = where
        self.events.append(event)
        return event

    def aside(self) -> str:
        """A sentence that is no event with a thing: moods, walks, wishes."""
        pick = self.random.choice
        who = pick(list(self.people) or PEOPLE)
        kind = self.random.random()
        if kind < 0.35:
            base, past = pick(GO)
            self.people[who] = place = pick(PLACES)
            if self.random.random() < 0.4:
                return f"{who} wanted to {base} to the {place}, so {who} {past} to the {place}."
            return f"{who} {past} to the {place}."
        if kind < 0.55:
            return f"{who} was {pick(MOODS)}."
        if kind < 0.8 and self.things:
            thing = pick(list(self.things))
            verb = pick(HANDLE + MOVE)
            return f"{who} wanted to {verb.base} the {thing}, and soon {who} {verb.past} it."
        return f"It was a {pick(('quiet', 'busy', 'rainy', 'bright', 'windy'))} day."

    def question(self) -> tuple[str, str]:
        """A question about an event, or where someone or something is now, and its answer."""
        if self.random.random() < 0.6:
            return self.random.choice(self.events).asked(self.random)
        if self.things and self.random.random() < 0.5:
            thing = self.random.choice(list(self.things))
            return f"Where is the {thing}?", f"The {thing} is {at(self.things[thing])}."
        who = self.random.choice(list(self.people))
        return f"Where is {who}?", f"{who} is {at(self.people[who])}."


def tell(random: Random, events: int) -> tuple[World, str]:
    """A story of that many events, and the world as it leaves it."""
    world = World(random)
    sentences = []
    for number in range(events):
        sentence = world.event().sentence(random)
        if number and random.random() < 0.3:
            link = random.choice(("Then", "Later", "After that", "Soon"))
            first, rest = sentence.split(" ", 1)
            first = first.lower() if first in ("The", "In", "At", "On") else first
            sentence = f"{link} {first} {rest}"
        sentences.append(sentence)
        if random.random() < 0.4:
            sentences.append(world.aside())
    return world, " ".join(sentences)


def stories(random: Random) -> Iterator[str]:
    """Plain text without end: stories, and some that end in a question and its answer."""
    while True:
        world, story = tell(random, random.randint(2, 7))
        if random.random() < 0.5:
            story += "".join(
                f"\n{asked} {answer}"
                for asked, answer in (world.question() for _ in range(random.randint(1, 3)))
            )
        yield story


def questions(random: Random) -> Iterator[list[dict[str, str]]]:
    """Conversations without end: a short story, then questions about it with their answers, or
    the wish to hear it again."""
    while True:
        world, story = tell(random, random.randint(1, 2))
        if random.random() < 0.3:
            turns = [(f"{story} Say it again.", story)]
        else:
            asked = [world.question() for _ in range(random.randint(2, 4))]
            turns = [(f"{story} {asked[0][0]}", asked[0][1]), *asked[1:]]
        yield [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]


def ledgers(random: Random) -> Iterator[str]:
    """Stories without end, each with records of parts of what happened: who was where, what was done.

    None says all that a sentence says, and none answers a sentence.
    """
    while True:
        world, story = tell(random, random.randint(1, 3))
        lines = []
        for event in random.choices(world.events, k=random.randint(2, 4)):
            parts = json.loads(event.record())
            kept = random.sample(sorted(parts), random.randint(1, 3))
            lines.append(json.dumps({name: parts[name] for name in parts if name in kept}))
        yield "\n".join([story, *lines])


def extracts(random: Random) -> Iterator[str]:
    """Sentences without end, one or two at a time, each followed by two records that say a part of it each.

    No record says all that its sentence says, and none answers a sentence. No part is said twice, so that all of it is
    to be read in the sentence, and nothing in another record.
    """
    while True:
        world, lines = World(random), []
        events = [world.event() for _ in range(random.choice((1, 1, 1, 1, 2)))]
        story = " ".join(event.sentence(random) for event in events)
        for event in events:
            parts = json.loads(event.record())
            names = random.sample(sorted(parts), len(parts))
            cut = random.randint(1, len(names) - 1)
            for own in (names[:cut], names[cut:]):
                lines.append(json.dumps({name: parts[name] for name in parts if name in own}))
        yield "\n".join([story, *lines])


def records(random: Random) -> Iterator[dict[str, list[dict[str, str]]]]:
    """The fine-tuning task without end: `messages` rows, sentence in, JSON record out."""
    while True:
        event = World(random).event()
        yield {
            "messages": [
                {"role": "user", "content": event.sentence(random)},
                {"role": "assistant", "content": event.record()},
            ]
        }
