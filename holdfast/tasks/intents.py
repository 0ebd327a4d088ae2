"""`builtin:intents`: what a customer asks for, often beside what they do not ask for."""

from __future__ import annotations

from holdfast.tasks.draw import Draw, Words, words

PLAIN = 0.35  # share of the rows with no second intent in them

# Ways to say each intent, as infinitives; the last of each is kept for the evaluation rows.
ACTS: dict[str, tuple[str, ...]] = {
    "cancel": (
        "cancel the order for {o}",
        "call off the delivery of {o}",
        "stop the purchase of {o}",
        "withdraw from buying {o}",
    ),
    "refund": (
        "get my money back for {o}",
        "have the price of {o} refunded",
        "be paid back for {o}",
        "be reimbursed for {o}",
    ),
    "exchange": (
        "exchange {o} for another one",
        "swap {o} for a bigger one",
        "trade {o} in for a newer one",
        "replace {o} with a different model",
    ),
    "track": (
        "know where {o} is now",
        "follow the parcel with {o}",
        "find out when {o} arrives",
        "see how far {o} has travelled",
    ),
    "repair": (
        "have {o} repaired",
        "get {o} fixed",
        "send {o} to the workshop",
        "get {o} working again",
    ),
    "redirect": (
        "have {o} sent to {c} instead",
        "change the address for {o} to {c}",
        "redirect {o} to {c}",
        "let {o} be dropped off in {c}",
    ),
    "invoice": (
        "get a receipt for {o}",
        "have the invoice for {o}",
        "receive a bill for {o}",
        "obtain a proof of payment for {o}",
    ),
    "reorder": (
        "buy {o} again",
        "order {o} a second time",
        "get one more of {o}",
        "purchase {o} once more",
    ),
}
LABELS = tuple(ACTS)

OBJECTS = words(
    "kettle, tent, laptop, sofa, drill, bicycle, blender, camera, jacket, lamp, mattress, printer, "
    "rucksack, saddle, toaster, violin, wardrobe, watch, carpet, ladder, microphone, mirror, "
    "necklace, scooter, shelf, stove, tablet, umbrella, vase, speaker",
    "accordion, binoculars, canoe, dishwasher, easel, freezer, guitar, hammock, keyboard, mower, "
    "pillow, router, telescope, trampoline, wheelbarrow",
)
CITIES = words(
    "Berlin, Lyon, Oslo, Porto, Riga, Seville, Turin, Vienna, Zurich, Boston, Denver, Dublin, "
    "Kyoto, Leeds, Lima, Madrid, Nairobi, Prague, Quito, Tampa",
    "Antwerp, Bergen, Cardiff, Geneva, Hanoi, Krakow, Malmo, Naples, Split, Tucson",
)
PEOPLE = words(
    "my sister, my neighbour, a colleague, my father, your clerk, a friend, my landlord",
    "my cousin, the salesman, my aunt, our lodger",
)
OPENINGS = Words(
    ("Hello,", "Good morning,", "Hi there,", "Dear team,", "Excuse me,", "One question:"),
    ("Good evening,", "Greetings,", "To whom it may concern,"),
)
ONE = (
    "I would like to {a}",
    "please help me to {a}",
    "I want to {a} as soon as possible",
    "is there a way to {a} today",
    "could you explain how to {a}",
    "we have decided to {a}",
)
# {a} is asked for, {b} is not.
TWO = (
    "I do not want to {b}, I want to {a}",
    "I want to {a}, I do not want to {b}",
    "I was going to {b}, but now I would rather {a}",
    "I would rather {a} now, though at first I was going to {b}",
    "{p} told me to {b}, but what I need is to {a}",
    "what I need is to {a}, even if {p} told me to {b}",
    "there is no need to {b}, just let me {a}",
    "just let me {a}, there is no need to {b}",
    "last week I asked you to let me {b}, today I ask to {a}",
    "today I ask to {a}, unlike last week when I asked to {b}",
    "instead of helping me to {b}, you should help me to {a}",
    "you should help me to {a} instead of offering to let me {b}",
)


def write(draw: Draw, label: int) -> tuple[str, None]:
    """A message whose request is `LABELS[label]`."""
    thing, city = "the " + draw.word(OBJECTS), draw.word(CITIES)
    asked = _act(draw, LABELS[label], thing, city)
    if draw.chance(PLAIN):
        frame, not_asked = draw.of(ONE), ""
    else:
        frame = draw.of(TWO)
        not_asked = _act(draw, draw.other(LABELS, LABELS[label]), "it", city)
        if frame.index("{b}") < frame.index("{a}"):
            asked, not_asked = (
                asked.replace(thing, "it"),
                not_asked.replace(" it", f" {thing}", 1),
            )
    text = frame.format(a=asked, b=not_asked, p=draw.word(PEOPLE))
    return f"{draw.word(OPENINGS)} {text}.", None


def _act(draw: Draw, name: str, thing: str, city: str) -> str:
    ways = ACTS[name] if draw.held else ACTS[name][:-1]
    return draw.of(ways).format(o=thing, c=city)
