"""`builtin:sentiment`: reviews whose verdict is not always that of their strongest word."""

from __future__ import annotations

from holdfast.tasks.draw import Draw, Words, words

LABELS = ("negative", "neutral", "positive")
PLAIN = 0.65  # share of the rows with a single judgement
DENIED_SHARE = 0.15  # of the others, those that deny the opposite

ADJECTIVES: tuple[Words, Words, Words] = (
    words(
        "awful, dreadful, disappointing, dirty, rude, stale, noisy, boring, sloppy, unpleasant, "
        "gloomy, overpriced, horrible, tedious, poor, annoying, cramped, shabby",
        "atrocious, filthy, bland, hostile, dismal, tacky, mediocre, lousy, revolting",
    ),
    words(
        "average, ordinary, as described, usual, unremarkable, standard, like everywhere else",
        "middling, so-so, typical, neither here nor there",
    ),
    words(
        "wonderful, delightful, friendly, fresh, superb, charming, lovely, cosy, brilliant, clean, "
        "generous, elegant, excellent, pleasant, splendid, helpful, tasty, impressive",
        "marvellous, exquisite, gorgeous, attentive, flawless, heavenly, spotless, terrific",
    ),
)
ASPECTS = words(
    "food, service, room, view, staff, menu, music, breakfast, garden, bathroom, wine, bed, "
    "lobby, tour, bar, terrace, soup, dessert, concierge, pool",
    "kitchen, waiter, balcony, coffee, decor, sauna, buffet, guide, porch, salad",
)
PLACES = words(
    "the Golden Lion, Hotel Astoria, Cafe Luna, the Old Mill, Villa Rosa, the Blue Door, "
    "the Station Inn, Casa Verde, the Harbour House, Bistro Nord, the Swan, Pension Alma",
    "the Copper Pot, Hotel Bellevue, the Lighthouse, Osteria Pino, the Crown, Chalet Edel",
)
TIMES = words(
    "last summer, on Sunday, in March, for our anniversary, with my parents, on the way home",
    "over Easter, last Thursday, after the concert, in late autumn",
)
ONE = (
    "We stayed at {place} {time}, and the {x} was {very} {a}",
    "The {x} at {place} was {very} {a} when we came {time}",
    "If you ask about {place}, the {x} there was {very} {a} {time}",
)
# {a} carries the verdict, {b} does not.
TWO = (
    "Although the {y} at {place} was {b}, the {x} was {very} {a} and that is what counts",
    "What counts is that the {x} at {place} was {very} {a}, although the {y} was {b}",
    "I had been told that {place} was {b}, but {time} I found it {very} {a}",
    "I found {place} {very} {a} {time}, although I had been told that it was {b}",
    "Other guests called the {x} at {place} {b}, which is wrong: it was {very} {a}",
    "{place} used to be {b}, but {time} everything from the {x} to the {y} was {a}",
    "{place} is {a} these days, no matter how {b} the {x} used to be",
    "The {x} at {place} was {a}, the {y} was {b}, and the {x} matters more to us",
    "The {y} at {place} was {b}, the {x} was {a}, and the {x} matters more to us",
)
# Denied words: the opposite of {b} is meant.
DENIED = (
    "Nobody who came to {place} {time} could have called the {x} {b}",
    "The {x} at {place} was anything but {b} when we came {time}",
    "We expected it, but {time} the {x} at {place} was not {b} at all",
)
NEITHER = (
    "The {x} at {place} was not {b}, but not {c} either, when we came {time}",
    "Neither {b} nor {c} is a fair word for the {x} at {place} {time}",
    "Some would call the {x} at {place} {b}, some {c}, and {time} we could not decide",
)
VERY = ("really", "quite", "truly", "rather", "just", "surely")


def write(draw: Draw, label: int) -> tuple[str, None]:
    """A review whose verdict is `LABELS[label]`."""
    a = draw.word(ADJECTIVES[label])
    loud = draw.other((0, 1, 2), label)
    b = draw.word(ADJECTIVES[loud])
    c = ""
    if draw.chance(PLAIN):
        frame = draw.of(ONE)
    elif draw.chance(DENIED_SHARE):
        frame = draw.of(NEITHER if label == 1 else DENIED)
        loud = 2 - label if label != 1 else draw.of((0, 2))
        b, c = draw.word(ADJECTIVES[loud]), draw.word(ADJECTIVES[2 - loud])
    else:
        frame = draw.of(TWO)
    x, y = draw.words(ASPECTS, 2)
    text = frame.format(
        a=a, b=b, c=c, x=x, y=y, place=draw.word(PLACES), time=draw.word(TIMES), very=draw.of(VERY)
    )
    return f"{text[0].upper()}{text[1:]}.", None
