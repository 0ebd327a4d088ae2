from __future__ import annotations

import re
import time
from collections import Counter

import pytest

from holdfast.errors import Refused
from holdfast.tasks import BUILTIN, generated, inference, intents, load_task, sentiment
from holdfast.tasks.draw import Draw, Words

HASHES = {
    "inference": "100ffa2955dc21312cc90c112324d597961ea205ceaff33b4932729684896147",
    "intents": "468b75a8ffb58e5e0cc063576848ffb29eefb0a6b84ccba42381922802af0a7d",
    "sentiment": "75659253fd59e85e164d527176b0a7c2725b0f02558b6a4b6c99772ec46a164e",
}


@pytest.mark.parametrize("name", BUILTIN)
def test_the_rows_are_pinned(name: str) -> None:
    """A record made today is compared with one made by the next release."""
    assert load_task(f"builtin:{name}").hash == HASHES[name]


@pytest.mark.parametrize("name", BUILTIN)
def test_the_size_and_shape(name: str) -> None:
    task = load_task(f"builtin:{name}")
    assert task.synthetic and task.metric == "accuracy" and task.warnings == ()
    assert task.rows == {"train": 2700, "selection": 300, "evaluation": 600}
    rows = task.train + task.selection + task.evaluation
    assert len({(row.text, row.pair) for row in rows}) == 3600
    lengths = [len(f"{row.text} {row.pair or ''}".split()) for row in rows]
    assert min(lengths) >= 8 and sorted(lengths)[len(lengths) * 95 // 100] <= 30


@pytest.mark.parametrize("name", BUILTIN)
def test_the_seed_chooses_among_the_same_rows(name: str) -> None:
    one, other = (load_task(f"builtin:{name}", seed=seed) for seed in (0, 1))
    assert one.evaluation == other.evaluation and one.selection != other.selection
    assert set(one.train + one.selection) == set(other.train + other.selection)


@pytest.mark.parametrize("name", BUILTIN)
def test_the_share_of_wrong_labels_is_exact(name: str) -> None:
    made = generated.make(name)
    for rows, clean, noise in (
        (made.train, made.clean[0], generated.TRAIN_NOISE),
        (made.evaluation, made.clean[1], generated.EVALUATION_NOISE),
    ):
        wrong = sum(row.label != label for row, label in zip(rows, clean, strict=True))
        assert wrong == round(noise * len(rows))
        counts = Counter(clean)
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("module", [inference, intents, sentiment])
def test_held_out_words_are_in_no_training_row(module) -> None:
    made = generated.make(module.__name__.rsplit(".", 1)[1])
    training = " ".join(f"{row.text} {row.pair}" for row in made.train).lower()
    evaluation = " ".join(f"{row.text} {row.pair}" for row in made.evaluation).lower()
    vocabularies = [value for value in vars(module).values() if isinstance(value, Words)]
    vocabularies += [part for part in getattr(module, "ADJECTIVES", ())]
    assert vocabularies
    for vocabulary in vocabularies:
        assert not set(vocabulary.seen) & set(vocabulary.held)
        for word in vocabulary.held:
            for form in filter(None, word.lower().split("/")):
                pattern = rf"\b{re.escape(form.rstrip(','))}\b"
                assert not re.search(pattern, training), word
                assert re.search(pattern, evaluation), word


def test_held_out_things_and_phrases_are_in_no_training_row() -> None:
    training = " ".join(f"{row.text} {row.pair}" for row in generated.make("inference").train)
    assert not set(inference.THINGS["seen"]) & set(inference.THINGS["held"])
    assert not [word for word in inference.THINGS["held"] if re.search(rf"\b{word}\b", training)]
    made = generated.make("intents")
    for *_, phrase in intents.ACTS.values():
        pattern = re.compile(re.escape(phrase).replace(r"\{o\}", r"(it|the \w+)").split(r"\{c")[0])
        assert not any(pattern.search(row.text) for row in made.train)
        assert any(pattern.search(row.text) for row in made.evaluation)


def test_the_second_sentence_alone_says_nothing() -> None:
    """Every form of hypothesis goes with every label about equally."""
    forms: dict[str, Counter[int]] = {}
    made = generated.make("inference")
    for row, label in zip(made.train, made.clean[0], strict=True):
        cues = (" more than ", " got the ", " let ", " owns ", " is ", " has ")
        form = next(cue for cue in cues if cue in str(row.pair))
        forms.setdefault(form, Counter())[label] += 1
    for counts in forms.values():
        share = [counts[label] / sum(counts.values()) for label in range(3)]
        assert max(share) - min(share) < 0.15


def test_generating_is_quick() -> None:
    for name in BUILTIN:
        generated.make.cache_clear()
        start = time.process_time()
        generated.make(name)
        assert time.process_time() - start < 0.3


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(Refused, match="did you mean 'intents'"):
        load_task("builtin:intent")
    with pytest.raises(Refused, match="no option 'text'"):
        load_task("builtin:intents?text=a")


def test_draws_are_the_same_everywhere() -> None:
    draw = Draw("test", held=False)
    assert [draw.below(10) for _ in range(6)] == [1, 1, 8, 6, 1, 1]
    assert draw.order(6) == [1, 3, 4, 2, 0, 5]
