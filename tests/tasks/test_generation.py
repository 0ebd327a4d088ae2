"""Text from text: which tokens are learned, what is scored, what a sequence of such tasks does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from torch.nn import functional

from holdfast import EWC, LoRA, Merge, Recipe, Refused, compare, load, run_sequence
from holdfast.errors import tell_once
from holdfast.experiments import gate
from holdfast.experiments.record import Record
from holdfast.tasks import Row, Task, load_task
from holdfast.tasks.kinds import evaluate, generation, kind_named, kind_of
from holdfast.tasks.scores import text_scores
from holdfast.training import checkpoints

DECODERS, END = {"gpt2": models.gpt2, "llama": models.llama}, 3


def task(metric: str = "likelihood", count: int = 7) -> Task:
    asked = ["the film was", "who ?", "a red book and a blue", "what", "the city"]
    said = ["good", "a man", "great film", "river", "not very cold"]
    rows = tuple(Row(asked[i % 5], None, said[i * 3 % 5]) for i in range(count))
    return Task(name="t", labels=None, metric=metric, train=rows, selection=(), evaluation=rows,
                source="", kind="generation")  # fmt: skip


def model(name: str) -> Any:
    return (DECODERS | {"t5": models.t5})[name]().eval()


def tokens(name: str) -> Any:
    found = models.tokenizer(template=name == "t5")
    return found


def encoded(made: Any, asked: Task, words: Any, most: int = 24) -> Any:
    return generation.KIND.encode(asked.train, asked, words, max_length=most, config=made.config)


# --- rows -----------------------------------------------------------------------------------------


def test_only_the_answer_and_its_end_are_learned() -> None:
    made, asked, words = model("gpt2"), task(), tokens("gpt2")
    for row, each in zip(asked.train, encoded(made, asked, words), strict=True):
        prompt = words(row.text + "\n", add_special_tokens=False)["input_ids"]
        answer = words(str(row.label), add_special_tokens=False)["input_ids"]
        assert each["input_ids"] == [*prompt, *answer, END]
        assert each["labels"] == [*[-100] * len(prompt), *answer, END]


def test_an_encoder_decoder_reads_one_and_writes_the_other() -> None:
    made, asked, words = model("t5"), task(), tokens("t5")
    for row, each in zip(asked.train, encoded(made, asked, words), strict=True):
        assert each["input_ids"] == words(row.text)["input_ids"]
        assert each["labels"] == [
            *words(str(row.label), add_special_tokens=False)["input_ids"],
            END,
        ]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_what_is_cut_is_counted(name: str) -> None:
    """A long prompt loses its beginning in a decoder: its end is what the answer follows."""
    made, asked, words = model(name), task(), tokens(name)
    rows = encoded(made, asked, words, 5)
    assert max(len(r["input_ids"]) for r in rows) == 5
    assert all(r["labels"][-1] == END for r in rows)
    whole = encoded(made, asked, words)
    cut = sum(a != b for a, b in zip(rows, whole, strict=True))
    assert 0 < cut < len(rows)
    assert generation.KIND.count_cut(asked.train, rows, asked, words, max_length=5) == cut
    assert generation.KIND.count_cut(asked.train, whole, asked, words, max_length=24) == 0
    if name == "gpt2":
        first = next(i for i, (a, b) in enumerate(zip(rows, whole, strict=True)) if a != b)
        assert rows[first]["input_ids"] == whole[first]["input_ids"][-5:]


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@torch.no_grad()
def test_likelihood_is_that_of_each_row_by_itself(name: str) -> None:
    """Padding, batches and the prompt's tokens have no part in it."""
    made, asked, words = model(name), task(), tokens(name)
    rows, losses, count = encoded(made, asked, words), 0.0, 0
    for row in rows:
        inputs = {k: torch.tensor([v]) for k, v in row.items()}
        logits, labels = made(**inputs).logits[0], inputs["labels"][0]
        if name != "t5":
            logits, labels = logits[:-1], labels[1:]
        said = labels != -100
        losses += float(functional.cross_entropy(logits[said], labels[said], reduction="sum"))
        count += int(said.sum())
    got = evaluate(made, rows, asked, generation.KIND.collator(words))
    assert got == pytest.approx(math.exp(-losses / count), rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generated_text_is_that_of_each_prompt_by_itself(name: str) -> None:
    made, asked, words = model(name), task(), tokens(name)
    prompts = generation.KIND.prompts([r.text for r in asked.train], words, decoder=name != "t5")
    together = generation.generate(made, prompts, words, most=4, batch=4)
    alone = [generation.generate(made, [ids], words, most=4)[0] for ids in prompts]
    assert together == alone and len({*together}) > 1
    ids = torch.tensor([prompts[2]])
    if name != "t5":
        for _ in range(4):  # greedily, token by token
            ids = torch.cat([ids, made(ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == END:
                break
        said = words.decode(ids[0, len(prompts[2]) :], skip_special_tokens=True)
        assert together[2] == said.strip()
    (found,) = generation.KIND.predict(
        made, {}, [asked.train[2].text], None, words, max_length=12, batch=1
    )
    assert str(found.label).startswith(together[2])


def test_a_model_that_says_the_answers_scores_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made, words = model("gpt2"), tokens("gpt2")
    for metric in ("exact_match", "token_f1", "rouge_l"):
        asked = task(metric)
        said = [str(row.label) for row in asked.train]
        monkeypatch.setattr(generation, "generate", lambda *_, said=said, **__: said)
        rows = encoded(made, asked, words)
        assert evaluate(made, rows, asked, generation.KIND.collator(words)) == pytest.approx(1.0)
        monkeypatch.setattr(
            generation, "generate", lambda *_, said=said, **__: ["year"] * len(said)
        )
        assert evaluate(made, rows, asked, generation.KIND.collator(words)) == 0.0


def test_text_scores_by_hand() -> None:
    truth, said = ["The red book.", "a b c d", "", "river"], ["red book", "b d x", "", "city"]
    assert text_scores("exact_match", truth, said) == [1.0, 0.0, 1.0, 0.0]
    # words without the article: b c d and b d x
    assert text_scores("token_f1", truth, said) == pytest.approx([1.0, 2 * 2 / 6, 1.0, 0.0])
    # longest common subsequence b d: precision 2/3, recall 2/4
    assert text_scores("rouge_l", ["a b c d"], ["b d x"]) == pytest.approx([4 / 7])


def test_nothing_is_drawn_and_modes_stay() -> None:
    made, asked, words = model("gpt2"), task("token_f1"), tokens("gpt2")
    made.train()
    before = torch.get_rng_state()
    evaluate(made, encoded(made, asked, words), asked, generation.KIND.collator(words))
    assert made.training and torch.equal(torch.get_rng_state(), before)


# --- files ----------------------------------------------------------------------------------------


def test_prompts_and_answers_from_files(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    lines = [{"prompt": f"who is {i} ?", "answer": f"man {i % 3}"} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, lines)))
    found = load_task(file)
    assert (found.kind, found.metric, found.labels) == ("generation", "likelihood", None)
    assert not found.regression and isinstance(found.train[0].label, str)
    other = tmp_path / "other.csv"
    other.write_text("q,a,b\n" + "".join(f"who is {i},man {i},{i % 2}\n" for i in range(20)))
    named = load_task(f"{other}?text=q&answer=a&metric=token_f1")
    assert named.metric == "token_f1" and {r.text[:6] for r in named.train} == {"who is"}
    assert named.hash != load_task(f"{other}?text=q&answer=a").hash
    for query, says in (
        ("?text=q&answer=a&metric=accuracy", "metric 'accuracy' does not suit"),
        ("?text=q&label=b&type=classification&metric=rouge_l", "say type=generation"),
        ("?text=q&answer=c", "no column 'c'"),
    ):
        with pytest.raises(Refused, match=says):
            load_task(f"{other}{query}")
    other.write_text("prompt,answer\nwho,\nwhat,a man\n")
    with pytest.raises(Refused, match="no answer"):
        load_task(other)


def test_a_folder_says_its_kind(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"prompt": f"a {i}", "answer": f"b {i}"}) for i in range(9))
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "meta.json").write_text('{"kind": "generation", "metric": "exact_match"}')
    assert load_task(tmp_path).metric == "exact_match"
    (tmp_path / "meta.json").write_text('{"kind": "generatoin"}')
    with pytest.raises(Refused, match="kind 'generatoin'"):
        load_task(tmp_path)


def test_kinds_do_not_mix_and_unknown_ones_are_named() -> None:
    plain = Task(name="p", labels=("a", "b"), metric="accuracy", train=(), selection=(),
                 evaluation=(), source="")  # fmt: skip
    with pytest.raises(Refused, match="several kinds: classification, generation"):
        kind_of([plain, task()])
    with pytest.raises(Refused, match="generation"):
        kind_named("generatoin")


# --- a sequence -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two decoders' tasks, a decoder and an encoder-decoder."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("gpt2", "llama", "t5"):
        model(name).save_pretrained(folder / name)
        tokens(name).save_pretrained(folder / name)
    for name, words in (("day", ["good", "great", "fine"]), ("night", ["bad", "poor", "dull"])):
        rows = [
            {"prompt": f"the {w} film {n}", "answer": words[(i + j) % 3]}
            for i, w in enumerate(("red", "blue", "green"))
            for j, n in enumerate("abcdefgh")
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


SHORT: dict[str, Any] = {"epochs": 2.0, "batch_size": 4, "lr": 3e-3, "max_length": 16,
                         "progress": False}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_first_text_that_recipes_share_gives_the_run_by_itself(
    name: str, place: Path, tmp_path: Path
) -> None:
    """What methods read of a task whose model all tasks share."""
    recipes = {"plain": Recipe(), "both": Recipe(methods=[EWC(rows=8), Merge(rows=8)])}
    tasks = [place / "day.jsonl", place / "night.jsonl"]
    compare(str(place / name), tasks, {n: (r, {}) for n, r in recipes.items()}, seeds=[3],
            out=tmp_path, **SHORT)  # fmt: skip
    for label, recipe in recipes.items():
        alone = run_sequence(str(place / name), tasks, recipe, seed=3, out=tmp_path / "a" / label,
                             **SHORT)  # fmt: skip
        shared = Record.load(tmp_path / label / "seed-3")
        assert "first" in shared.extra and shared.scores == alone.scores
        one, two = (load(f).models["night"] for f in (tmp_path / label / "seed-3",
                                                      tmp_path / "a" / label))  # fmt: skip
        assert models.same(models.weights(one), models.weights(two))


@pytest.mark.parametrize("peft", [(), LoRA(rank=2)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])  # llama's output layer is its own
def test_a_sequence_is_learned_gone_on_with_served_and_judged(
    name: str, peft: Any, place: Path, tmp_path: Path
) -> None:
    recipe = Recipe(peft=peft, methods=[EWC(rows=8), Merge(rows=8)])
    tasks = [place / "day.jsonl", place / "night.jsonl"]
    whole = run_sequence(str(place / name), tasks, recipe, out=tmp_path / "w", **SHORT)
    assert whole.scores[0][0] and whole.tasks[0]["kind"] == "generation"
    run_sequence(str(place / name), tasks[:1], recipe, out=tmp_path / "a", **SHORT)
    run_sequence(None, tasks[1:], from_run=tmp_path / "a", out=tmp_path / "b", progress=False)
    one, two = (load(tmp_path / f) for f in "wb")
    assert models.same(*(models.weights(s.models["night"]) for s in (one, two)))
    assert Record.load(tmp_path / "b").scores == whole.scores
    assert one.models["day"] is one.models["night"]  # one model writes all
    embedded = one.models["day"].get_input_embeddings().weight.cpu()
    assert torch.equal(embedded, model(name).get_input_embeddings().weight) == bool(peft)
    assert isinstance(one.predict("day", ["the red film"])[0].label, str)
    (found,) = gate.judge_run(tmp_path / "w", max_forgetting=0.02)
    assert (found.before, found.after) == pytest.approx((whole.scores[0][0], whole.scores[1][0]))


def test_an_encoder_is_refused(place: Path, tmp_path: Path) -> None:
    models.save_bert(tmp_path / "bert")
    with pytest.raises(Refused, match="is no language model"):
        run_sequence(str(tmp_path / "bert"), [place / "day.jsonl"], out=tmp_path / "a", **SHORT)
    assert not (tmp_path / "a").exists()


def test_a_language_model_in_use_is_held_by_running_text(place: Path, tmp_path: Path) -> None:
    """By what EWC reads of windows of it, as a twin does window by window; nothing is trained."""
    lines = [f"the {w} film was {n} and {m}" for w in ("red", "blue", "green", "warm", "cold")
             for n in models.WORDS[:14] for m in ("good", "bad")]  # fmt: skip
    file = tmp_path / "general.txt"
    file.write_text("\n".join(lines))
    recipe = Recipe(methods=[EWC(rows=10_000, strength=1e9)])
    record = run_sequence(None, [place / "day.jsonl"], recipe, from_run=place / "gpt2",
                          old_task=file, out=tmp_path / "b", **SHORT)  # fmt: skip
    assert record.names == ["general", "day"] and record.steps[0] == 0

    general, words, made = load_task(file), tokens("gpt2"), model("gpt2")
    windows = []
    for row in general.train:
        ids = words(str(row.label))["input_ids"]
        windows += [ids[at : at + 16] for at in range(0, len(ids), 16)]
    batches = [{"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}
               for ids in windows if len(ids) > 1]  # fmt: skip
    bound = recipe.unbound(seed=0)
    bound.remember("general", made, batches, shared=made)
    state = checkpoints.read_state(tmp_path / "b" / "tasks" / "1-general")["tensors"]
    twin = bound.state_dict()["tensors"]
    assert state.keys() == twin.keys()
    for key in twin:
        if key != "generator":
            torch.testing.assert_close(state[key], twin[key], rtol=1e-4, atol=1e-8)

    losses, count = 0.0, 0
    for row in general.evaluation:
        ids = words(str(row.label))["input_ids"]
        for at in range(0, len(ids), 16):
            window = torch.tensor([ids[at : at + 16]])
            logits = made(window).logits[0, :-1].detach()
            losses += float(functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    assert record.scores[0][0] == pytest.approx(math.exp(-losses / count), rel=1e-5)
    free = run_sequence(None, [place / "day.jsonl"], "plain", from_run=place / "gpt2",
                        old_task=file, out=tmp_path / "c", **SHORT)  # fmt: skip
    fell = [1 - each.scores[1][0] / each.scores[0][0] for each in (record, free)]  # type: ignore[operator]
    assert abs(fell[0]) < fell[1] / 3


def test_running_text_is_for_decoders(place: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "general.txt", tmp_path / "out"
    file.write_text("a film is a film and a book is not\n" * 200)
    models.bert().save_pretrained(tmp_path / "classifier")
    tokens("t5").save_pretrained(tmp_path / "classifier")
    models.write_task(tmp_path, "mood")
    with pytest.raises(Refused, match=r"classifier: is no language model .*no labels for its head"):
        run_sequence(None, [tmp_path / "mood.jsonl"], from_run=tmp_path / "classifier",
                     old_task=file, out=out, **SHORT)  # fmt: skip
    with pytest.raises(Refused, match="is no language model"):
        run_sequence(None, [place / "day.jsonl"], from_run=tmp_path / "classifier",
                     old_task=place / "night.jsonl", out=out, **SHORT)  # fmt: skip
    with pytest.raises(Refused, match="general: is running text, and an encoder-decoder"):
        run_sequence(str(place / "t5"), [place / "day.jsonl", file], out=out, **SHORT)
    assert not out.exists()


def test_default_says_what_does_nothing_here(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no head to fit, and no old head whose answers could be held."""
    tell_once.cache_clear()
    tasks = [place / "day.jsonl", place / "night.jsonl"]
    run_sequence(str(place / "gpt2"), tasks, "default", out=tmp_path, **SHORT)
    assert "lwf: tasks that share a whole model" in caplog.text and "no fresh head" in caplog.text


def test_merge_keeps_what_a_decoder_learned(place: Path, tmp_path: Path) -> None:
    """With γ → ∞ on old inputs the old answers stay, and the new are then hardly learned."""
    tasks = [place / "day.jsonl", place / "night.jsonl"]
    kept = {}
    for strength in (0.0, 1e6):
        recipe = Recipe(methods=[Merge(strength=strength)])
        out = tmp_path / str(strength)
        record = run_sequence(str(place / "gpt2"), tasks, recipe, out=out, **SHORT)
        scores = np.array(record.scores, dtype=float)
        kept[strength] = scores[1, 0] / scores[0, 0]
    assert kept[1e6] > kept[0.0] and kept[1e6] > 0.9
