"""`builtin:inference`: does the second sentence follow from the first, may it, or can it not?"""

from __future__ import annotations

from holdfast.tasks.draw import Draw, words

LABELS = ("entailment", "neutral", "contradiction")

PEOPLE = words(
    "baker, lawyer, painter, nurse, farmer, pilot, judge, singer, plumber, tailor, author, "
    "dentist, banker, butcher, soldier, teacher, doctor, porter, sailor, actor",
    "gardener, architect, juggler, surgeon, librarian, carpenter, fisherman, poet, chemist, clown",
)
NAMES = words(
    "Anna, Bruno, Clara, David, Elena, Felix, Greta, Hugo, Irene, Jonas, Karin, Lars",
    "Matteo, Nora, Oscar, Paula, Ruben, Sofia",
)
# thing: what it is a kind of
THINGS = {
    "seen": {
        "rose": "flower",
        "tulip": "flower",
        "trout": "fish",
        "salmon": "fish",
        "hammer": "tool",
        "saw": "tool",
        "apple": "fruit",
        "pear": "fruit",
        "parrot": "bird",
        "goose": "bird",
        "flute": "instrument",
        "cello": "instrument",
        "chair": "piece of furniture",
        "table": "piece of furniture",
        "van": "vehicle",
        "truck": "vehicle",
    },
    "held": {
        "daisy": "flower",
        "carp": "fish",
        "wrench": "tool",
        "plum": "fruit",
        "owl": "bird",
        "trumpet": "instrument",
        "desk": "piece of furniture",
        "tractor": "vehicle",
    },
}
PLACES = words(
    "at the market, in the station, near the river, behind the church, in the museum, at the port",
    "in the library, by the lake, outside the theatre, at the airport",
)
# An adjective and its opposite.
OPPOSITES = words(
    "old/new, big/small, clean/dirty, cheap/expensive, heavy/light, wet/dry",
    "broken/intact, bright/dark, hot/cold",
)
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
# Ways to hand a thing over: done, left open, not done.
DEALS = (
    ("sold {t} to {o}", "gave {t} to {o}", "handed {t} to {o}", "lent {t} to {o}"),
    ("offered {t} to {o}", "promised {t} to {o}", "showed {t} to {o}", "talked of {t} with {o}"),
    ("refused {t} to {o}", "kept {t} from {o}", "gave {o} nothing but a look at {t}"),
)


def write(draw: Draw, label: int) -> tuple[str, str]:
    """A pair of sentences whose relation is `LABELS[label]`.

    The second sentence alone says nothing: each of its forms goes with every label.
    """
    premise, hypothesis = draw.of(_CASES)(draw, label)
    return sentence(premise), sentence(hypothesis)


def deal(draw: Draw, label: int) -> tuple[str, str]:
    """Whether a thing changed hands."""
    one, two, three = draw.words(NAMES, 3)
    thing = _thing(draw)[0]
    done = draw.of(DEALS[label]).format(t=a(_adjective(draw)[0], thing), o=two)
    premise = f"{draw.word(PLACES)} {one} {done} while {three} was talking to a {draw.word(PEOPLE)}"
    return premise, draw.of(
        (f"{two} got the {thing} from {one}", f"{one} let {two} have {a('', thing)}")
    )


def state(draw: Draw, label: int) -> tuple[str, str]:
    """What a thing is like: said, left open, denied."""
    name, other = draw.words(NAMES, 2)
    adjective, opposite = _adjective(draw)
    thing, sort = _thing(draw)
    denied = draw.of((f"{opposite} {thing}", f"{thing}, not {adjective} at all,"))
    said = (f"{adjective} {thing}", thing, denied)[label]
    premise = f"{draw.word(PLACES)} {other} and the {draw.word(PEOPLE)} saw the {said} of {name}"
    return premise, draw.of(
        (f"the {thing} of {name} is {adjective}", f"{name} has {a(adjective, sort)}")
    )


def count(draw: Draw, label: int) -> tuple[str, str]:
    """How many there were."""
    low = 1 + draw.below(4)
    number = (NUMBERS[low + 1 + draw.below(2)], "some", NUMBERS[draw.below(low)])[label]
    job, other = draw.words(PEOPLE, 2)
    name, thing = draw.word(NAMES), _thing(draw)[0]
    premise = (
        f"{draw.word(PLACES)} {name} saw {number} {job}s and {NUMBERS[low]} {other}s "
        f"who were carrying {a('', thing)}"
    )
    return premise, f"{name} saw more than {NUMBERS[low]} {job}s with {a('', thing)}"


def kind(draw: Draw, label: int) -> tuple[str, str]:
    """A thing and what it is a kind of."""
    name, other = draw.words(NAMES, 2)
    thing, sort = _thing(draw)
    kinds = _kinds(draw)
    unlike = draw.other(tuple(k for k in kinds if kinds[k] != sort))
    owns = (a("", thing), a("", unlike), f"no {sort} but {a('', unlike)}")[label]
    others = (f"no {sort}", a("", thing), a("", thing))[label]
    said = [f"{name} owns {owns}", f"{other} owns {others}"]
    if draw.chance(0.5):
        said.reverse()
    premise = f"the {draw.word(PEOPLE)} says {draw.word(PLACES)} that {said[0]} and {said[1]}"
    return premise, f"{name} owns {a('', sort)}"


_CASES = (deal, state, count, kind)


def _kinds(draw: Draw) -> dict[str, str]:
    return THINGS["held" if draw.held else "seen"]


def _thing(draw: Draw) -> tuple[str, str]:
    return draw.of(tuple(_kinds(draw).items()))


def _adjective(draw: Draw) -> tuple[str, str]:
    one, opposite = draw.word(OPPOSITES).split("/")
    return (opposite, one) if draw.chance(0.5) else (one, opposite)


def a(adjective: str, noun: str) -> str:
    """A noun phrase with its article."""
    phrase = f"{adjective} {noun}".strip()
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
