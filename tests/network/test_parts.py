"""Every parameter in exactly one part, and in the right one, for architectures of every kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.errors import Refused
from holdfast.network.parts import Parts, canonical, named_parameters, parts

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
hf = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 20,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2}
DEBERTA = TEXT | {
    "relative_attention": True, "max_relative_positions": 8, "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["p2c"], "position_biased_input": False,
}  # fmt: skip
MOE = {"num_key_value_heads": 2, "num_local_experts": 4}


def hugging(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**settings))


def untied(model: Any) -> nn.Module:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model  # type: ignore[no-any-return]


def layers(pattern: str, n: int, prefix: str = "") -> dict[str, str]:
    """{"layer.k": glob of layer k} where `pattern` has the number as `#`."""
    return {f"{prefix}layer.{k}": pattern.replace("#", str(k)) for k in range(n)}


# model -> {part: globs that together match exactly the parameters of that part}
Case = tuple[Callable[[], nn.Module], dict[str, str]]
HUGGING_FACE: dict[str, Case] = {
    "bert": (
        hugging("BertForSequenceClassification", "BertConfig", **TEXT),
        {"embeddings": "bert.embeddings.*"}
        | layers("bert.encoder.layer.#.*", 3)
        | {"head": "bert.pooler.* classifier.*"},
    ),
    "bert, base model of one layer": (
        hugging("BertModel", "BertConfig", **TEXT | {"num_hidden_layers": 1}),
        {"embeddings": "embeddings.*", "layer.0": "encoder.layer.0.*", "head": "pooler.*"},
    ),
    "bert, masked words": (
        hugging("BertForMaskedLM", "BertConfig", **TEXT),
        {"embeddings": "bert.embeddings.*"}
        | layers("bert.encoder.layer.#.*", 3)
        | {"head": "cls.*"},
    ),
    "roberta": (
        hugging("RobertaForSequenceClassification", "RobertaConfig", **TEXT),
        {"embeddings": "roberta.embeddings.*"}
        | layers("roberta.encoder.layer.#.*", 3)
        | {"head": "classifier.dense.* classifier.out_proj.*"},
    ),
    "distilbert": (
        hugging(
            "DistilBertForSequenceClassification", "DistilBertConfig",
            vocab_size=40, dim=16, n_layers=3, n_heads=2, hidden_dim=20,
        ),
        {"embeddings": "distilbert.embeddings.*"}
        | layers("distilbert.transformer.layer.#.*", 3)
        | {"head": "pre_classifier.* classifier.*"},
    ),
    "electra": (
        hugging(
            "ElectraForSequenceClassification", "ElectraConfig", **TEXT | {"embedding_size": 8}
        ),
        {"embeddings": "electra.embeddings.* electra.embeddings_project.*"}
        | layers("electra.encoder.layer.#.*", 3)
        | {"head": "classifier.*"},
    ),
    "deberta-v2": (
        hugging("DebertaV2ForSequenceClassification", "DebertaV2Config", **DEBERTA),
        {"embeddings": "deberta.embeddings.* *.rel_embeddings.* deberta.encoder.LayerNorm.*"}
        | layers("deberta.encoder.layer.#.*", 3)
        | {"head": "pooler.* classifier.*"},
    ),
    "albert": (
        hugging(
            "AlbertForSequenceClassification", "AlbertConfig",
            vocab_size=40, embedding_size=8, hidden_size=16, num_attention_heads=2,
            intermediate_size=20,
        ),
        {
            "embeddings": "albert.embeddings.* albert.encoder.embedding_hidden_mapping_in.*",
            "layer.0": "albert.encoder.albert_layer_groups.*",
            "head": "albert.pooler.* classifier.*",
        },
    ),
    "mpnet": (
        hugging("MPNetForSequenceClassification", "MPNetConfig", **TEXT),
        {"embeddings": "mpnet.embeddings.* mpnet.encoder.relative_attention_bias.*"}
        | layers("mpnet.encoder.layer.#.*", 3)
        | {"head": "classifier.*"},
    ),
    "modernbert": (
        hugging(
            "ModernBertForSequenceClassification", "ModernBertConfig",
            **TEXT | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
        ),
        {"embeddings": "model.embeddings.*"}
        | layers("model.layers.#.*", 3)
        | {"head": "model.final_norm.* head.* classifier.*"},
    ),
    "xlnet": (
        hugging(
            "XLNetForSequenceClassification", "XLNetConfig",
            vocab_size=40, d_model=16, n_layer=3, n_head=2, d_inner=20,
        ),
        {"embeddings": "transformer.mask_emb transformer.word_embedding.*"}
        | layers("transformer.layer.#.*", 3)
        | {"head": "sequence_summary.* logits_proj.*"},
    ),
    "xlm, a layer in four lists": (
        hugging("XLMModel", "XLMConfig", vocab_size=40, emb_dim=16, n_layers=3, n_heads=2),
        {"embeddings": "position_embeddings.* embeddings.* layer_norm_emb.*"}
        | layers("attentions.#.* layer_norm1.#.* ffns.#.* layer_norm2.#.*", 3),
    ),
    "gpt2, tied": (
        hugging("GPT2LMHeadModel", "GPT2Config", **GPT2),
        {"embeddings": "transformer.wte.weight transformer.wpe.weight"}
        | layers("transformer.h.#.*", 3)
        | {"head": "transformer.ln_f.*"},
    ),
    "gpt2, classifier": (
        hugging("GPT2ForSequenceClassification", "GPT2Config", **GPT2),
        {"embeddings": "transformer.wte.weight transformer.wpe.weight"}
        | layers("transformer.h.#.*", 3)
        | {"head": "transformer.ln_f.* score.weight"},
    ),
    "llama": (
        hugging("LlamaForCausalLM", "LlamaConfig", **TEXT),
        {"embeddings": "model.embed_tokens.weight"}
        | layers("model.layers.#.*", 3)
        | {"head": "model.norm.weight lm_head.weight"},
    ),
    "qwen2, tied": (
        hugging(
            "Qwen2ForCausalLM", "Qwen2Config",
            **TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        ),
        {"embeddings": "model.embed_tokens.weight"}
        | layers("model.layers.#.*", 3)
        | {"head": "model.norm.weight"},
    ),
    "opt, norm registered early": (
        hugging(
            "OPTForCausalLM", "OPTConfig",
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=20,
        ),
        {"embeddings": "model.decoder.embed_*"}
        | layers("model.decoder.layers.#.*", 2)
        | {"head": "model.decoder.final_layer_norm.*"},
    ),
    "mixtral": (
        hugging("MixtralForCausalLM", "MixtralConfig", **TEXT | MOE),
        {"embeddings": "model.embed_tokens.weight"}
        | layers("model.layers.#.*", 3)
        | {"head": "model.norm.weight lm_head.weight"},
    ),
    "mamba": (
        hugging(
            "MambaForCausalLM", "MambaConfig",
            vocab_size=40, hidden_size=16, num_hidden_layers=3, state_size=4,
        ),
        {"embeddings": "backbone.embeddings.weight"}
        | layers("backbone.layers.#.*", 3)
        | {"head": "backbone.norm_f.weight"},
    ),
    "bart": (
        hugging("BartForSequenceClassification", "BartConfig", **SEQ2SEQ),
        {"embeddings": "model.shared.* model.*coder.embed_positions.* *.layernorm_embedding.*"}
        | layers("model.encoder.layers.#.*", 2, "encoder.")
        | layers("model.decoder.layers.#.*", 3, "decoder.")
        | {"head": "classification_head.*"},
    ),
    "t5": (
        hugging("T5ForConditionalGeneration", "T5Config", **T5),
        {
            "embeddings": "shared.weight",
            "encoder.layer.0": "encoder.block.0.*",
            "encoder.layer.1": "encoder.block.1.* encoder.final_layer_norm.weight",
            "decoder.layer.0": "decoder.block.0.*",
            "decoder.layer.1": "decoder.block.1.*",
            "head": "decoder.final_layer_norm.weight",
        },
    ),
    "t5, own output matrix": (
        lambda: untied(hugging("T5ForConditionalGeneration", "T5Config", **T5)()),
        {"head": "decoder.final_layer_norm.weight lm_head.weight"},
    ),
    "t5, one layer each": (
        hugging("T5ForConditionalGeneration", "T5Config", **T5 | {"num_layers": 1}),
        {
            "encoder.layer.0": "encoder.block.0.* encoder.final_layer_norm.weight",
            "decoder.layer.0": "decoder.block.0.*",
        },
    ),
    "whisper": (
        hugging("WhisperModel", "WhisperConfig", **SEQ2SEQ, pad_token_id=0),
        {
            "embeddings": "encoder.conv* *.embed_tokens.* *.embed_positions.*",
            "encoder.layer.1": "encoder.layers.1.* encoder.layer_norm.*",
            "decoder.layer.2": "decoder.layers.2.*",
            "head": "decoder.layer_norm.*",
        },
    ),
    "vit": (
        hugging("ViTForImageClassification", "ViTConfig", **VISION),
        {"embeddings": "vit.embeddings.cls_token vit.embeddings.p*"}
        | layers("vit.*layer*.#.*", 2)
        | {"head": "vit.layernorm.* classifier.*"},
    ),
    "clip, two towers": (
        hugging("CLIPModel", "CLIPConfig", text_config=TEXT, vision_config=VISION),
        {"embeddings": "*_model.embeddings.* vision_model.pre_layrnorm.*"}
        | layers("text_model.encoder.layers.#.*", 3, "text_model.")
        | layers("vision_model.encoder.layers.#.*", 2, "vision_model.")
        | {"head": "logit_scale *_model.final_layer_norm.* *.post_layernorm.* *_projection.*"},
    ),
    "swin, stages opened": (
        hugging(
            "SwinForImageClassification", "SwinConfig",
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2],
            window_size=2,
        ),
        {
            "embeddings": "swin.embeddings.*",
            "layer.0": "swin.encoder.layers.0.*",  # with the downsampling that follows
            "layer.1": "swin.encoder.layers.1.blocks.0.*",
            "layer.2": "swin.encoder.layers.1.blocks.1.*",
            "head": "swin.layernorm.* classifier.*",
        },
    ),
    "convnext, downsampling before a stage": (
        hugging(
            "ConvNextForImageClassification", "ConvNextConfig",
            num_stages=2, hidden_sizes=[8, 16], depths=[1, 2],
        ),
        {
            "embeddings": "convnext.embeddings.*",
            "layer.0": "convnext.encoder.stages.0.*",
            "layer.1": "*.stages.1.downsampling_layer.* *.stages.1.layers.0.*",
            "layer.2": "*.stages.1.layers.1.*",
            "head": "convnext.layernorm.* classifier.*",
        },
    ),
    "resnet": (
        hugging(
            "ResNetForImageClassification", "ResNetConfig",
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2],
        ),
        {
            "embeddings": "resnet.embedder.*",
            "layer.0": "resnet.encoder.stages.0.*",
            "layer.1": "resnet.encoder.stages.1.layers.0.*",
            "layer.2": "resnet.encoder.stages.1.layers.1.*",
            "head": "classifier.*",
        },
    ),
}  # fmt: skip


# --- networks in plain torch ---------------------------------------------------------------------


class Holder(nn.Module):
    """A module with the given children, in that order."""

    def __init__(self, **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Conv(Holder):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(conv=nn.Conv2d(i, o, 3), bn=nn.BatchNorm2d(o))


class Message(Holder):
    def __init__(self) -> None:
        super().__init__(message=nn.Linear(16, 8), update=nn.GRUCell(8, 8))


class Dense(Holder):
    def __init__(self) -> None:
        super().__init__(linear=nn.Linear(8, 8))


class Expert(Holder):
    def __init__(self) -> None:
        super().__init__(up=nn.Linear(8, 16), down=nn.Linear(16, 8))


class Block(Holder):
    def __init__(self, experts: int = 0) -> None:
        ff = nn.ModuleList(Expert() for _ in range(experts)) if experts else Expert()
        super().__init__(attention=nn.MultiheadAttention(8, 2), norm=nn.LayerNorm(8), experts=ff)


def blocks(n: int, kind: Callable[[], nn.Module] = Block) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(n))


def backbone(n: int = 2) -> nn.Module:
    return Holder(embeddings=nn.Embedding(9, 8), layers=blocks(n), pooler=nn.Linear(8, 8))


def linears(*sizes: int) -> nn.Sequential:
    pairs = pairwise(sizes)
    return nn.Sequential(*(m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())))


PLAIN: dict[str, Case] = {
    "cnn": (
        lambda: Holder(
            features=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
            classifier=linears(8, 4, 2),
        ),
        {
            "embeddings": "features.0.* features.1.*",
            "layer.0": "features.2.*",
            "layer.1": "classifier.0.*",
            "head": "classifier.2.*",
        },
    ),
    "torchvision's resnet": (
        lambda: Holder(
            conv1=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(4),
            layer1=nn.Sequential(Conv(4, 4), Conv(4, 4)),
            layer2=nn.Sequential(Conv(4, 8), Conv(8, 8)), fc=nn.Linear(8, 2),
        ),
        {
            "embeddings": "conv1.* bn1.*", "layer.0": "layer1.0.*", "layer.1": "layer1.1.*",
            "layer.2": "layer2.0.*", "layer.3": "layer2.1.*", "head": "fc.*",
        },
    ),
    "u-net": (
        lambda: Holder(
            stem=nn.Conv2d(1, 4, 3), downs=nn.ModuleList([Conv(4, 8), Conv(8, 16)]),
            middle=Conv(16, 16), ups=nn.ModuleList([Conv(16, 8), Conv(8, 4)]),
            out=nn.Conv2d(4, 1, 1),
        ),
        {
            "embeddings": "stem.*", "layer.0": "downs.0.*", "layer.1": "downs.1.*",
            "layer.2": "middle.*", "layer.3": "ups.0.*", "layer.4": "ups.1.*", "head": "out.*",
        },
    ),
    "gru": (
        lambda: Holder(
            embedding=nn.Embedding(9, 8), gru=nn.GRU(8, 8, 2, bidirectional=True),
            attention=nn.Linear(16, 1), fc=nn.Linear(16, 2),
        ),
        {
            "embeddings": "embedding.*", "layer.0": "gru.*_l0 gru.*_l0_reverse",
            "layer.1": "gru.*_l1 gru.*_l1_reverse", "head": "attention.* fc.*",
        },
    ),
    "two lstms": (
        lambda: Holder(a=nn.LSTM(8, 8), drop=nn.Dropout(), b=nn.LSTM(8, 8), fc=nn.Linear(8, 2)),
        {"layer.0": "a.*", "layer.1": "b.*", "head": "fc.*"},
    ),
    "recurrent encoder-decoder": (
        lambda: Holder(
            encoder=Holder(table=nn.Embedding(9, 8), rnn=nn.GRU(8, 8)),
            decoder=Holder(table=nn.Embedding(9, 8), rnn=nn.GRU(8, 8), out=nn.Linear(8, 9)),
        ),
        {
            "embeddings": "*.table.*", "encoder.layer.0": "encoder.rnn.*",
            "decoder.layer.0": "decoder.rnn.*", "head": "decoder.out.*",
        },
    ),
    "autoencoder": (
        lambda: Holder(encoder=linears(8, 4, 2), decoder=linears(2, 4, 8)),
        {
            "embeddings": "encoder.0.*", "layer.0": "encoder.2.*", "layer.1": "decoder.0.*",
            "head": "decoder.2.*",
        },
    ),
    "message passing, norms beside": (
        lambda: Holder(
            nodes=nn.Linear(5, 8), convs=blocks(3, Message),
            norms=blocks(3, partial(nn.LayerNorm, 8)), readout=nn.Linear(8, 2),
        ),
        {"embeddings": "nodes.*", "head": "readout.*"} | layers("convs.#.* norms.#.*", 3),
    ),
    "experts are no layers": (
        lambda: Holder(table=nn.Embedding(9, 8), layers=blocks(2, partial(Block, 6))),
        {"embeddings": "table.*", "layer.0": "layers.0.*", "layer.1": "layers.1.*"},
    ),
    "a dense layer, then experts": (
        lambda: Holder(layers=nn.ModuleList([Block(), Block(6)]), out=nn.Linear(8, 9)),
        {"layer.0": "layers.0.*", "layer.1": "layers.1.*", "head": "out.*"},
    ),
    "lists in a list": (
        lambda: Holder(
            layers=nn.ModuleList(nn.ModuleList([Block(), Expert()]) for _ in range(2)),
            norm=nn.LayerNorm(8),
        ),
        {"layer.0": "layers.0.*", "layer.1": "layers.1.*", "head": "norm.*"},
    ),
    "encoder and decoder lists side by side": (
        lambda: Holder(
            source=nn.Embedding(9, 8), target=nn.Embedding(9, 8), encoder_layers=blocks(2),
            encoder_norm=nn.LayerNorm(8), decoder_layers=blocks(2), generator=nn.Linear(8, 9),
        ),
        {
            "embeddings": "source.* target.*", "encoder.layer.0": "encoder_layers.0.*",
            "encoder.layer.1": "encoder_layers.1.* encoder_norm.*",
            "decoder.layer.0": "decoder_layers.0.*", "decoder.layer.1": "decoder_layers.1.*",
            "head": "generator.*",
        },
    ),
    "torch's encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2, nn.LayerNorm(8)
        ),
        {"layer.0": "layers.0.*", "layer.1": "layers.1.*", "head": "norm.*"},
    ),
    "one sequential": (
        lambda: nn.Sequential(nn.Embedding(9, 8), Block(), Block(), nn.LayerNorm(8)),
        {"embeddings": "0.*", "layer.0": "1.*", "layer.1": "2.*", "head": "3.*"},
    ),
    "sentence encoder in a pipeline": (
        lambda: nn.Sequential(backbone(), nn.Identity(), Dense(), Dense()),
        {
            "embeddings": "0.embeddings.*", "layer.0": "0.layers.0.*", "layer.1": "0.layers.1.*",
            "head": "0.pooler.* 2.* 3.*",
        },
    ),
    "head registered first": (
        lambda: Holder(classifier=nn.Linear(8, 2), body=backbone()),
        {"embeddings": "body.embeddings.*", "head": "classifier.* body.pooler.*"},
    ),
    "a body called classifier": (
        lambda: Holder(classifier=backbone(), out=nn.Linear(8, 2)),
        {"embeddings": "classifier.embeddings.*", "head": "classifier.pooler.* out.*"},
    ),
    "a list of heads as long as the stack": (
        lambda: Holder(body=backbone(2), heads=nn.ModuleList([linears(8, 8, 2) for _ in "ab"])),
        {"layer.1": "body.layers.1.*", "head": "body.pooler.* heads.*"},
    ),
    "output matrix called embed_out": (
        lambda: Holder(embed_in=nn.Embedding(9, 8), h=blocks(2), embed_out=nn.Linear(8, 9)),
        {"embeddings": "embed_in.*", "head": "embed_out.*"},
    ),
    "a recurrent head": (
        lambda: Holder(body=backbone(), lstm=nn.LSTM(8, 8, 2), fc=nn.Linear(8, 2)),
        {"layer.0": "body.layers.0.*", "head": "body.pooler.* lstm.* fc.*"},
    ),
    "linear": (lambda: nn.Linear(2, 2), {"head": "weight bias"}),
    "two linears": (lambda: linears(3, 3, 3), {"embeddings": "0.*", "head": "2.*"}),
    "bare parameters": (
        lambda: Holder(a=nn.Parameter(torch.zeros(2)), b=nn.Parameter(torch.zeros(()))),
        {"head": "a b"},
    ),
    "no parameters": (nn.ReLU, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", [*HUGGING_FACE, *PLAIN])
def test_every_parameter_is_in_its_part(case: str) -> None:
    build, expected = (HUGGING_FACE | PLAIN)[case]
    torch.manual_seed(0)
    model = build()
    found = parts(model)
    assert list(found.names) == [name for name, _ in model.named_parameters()]
    for part, globs in expected.items():
        matching = {n for n in found.names if any(fnmatchcase(n, g) for g in globs.split())}
        assert all(any(fnmatchcase(n, g) for n in found.names) for g in globs.split()), part
        assert set(found.members(part)) == matching, part
    consistent(found, model)


def consistent(found: Parts, model: nn.Module) -> None:
    """What holds for any network."""
    assert set(found.names.values()) == set(found.order) == set(found.depth) == set(found.sizes)
    depths = [found.depth[part] for part in found.order]
    assert depths == sorted(depths)
    for part in found.order:
        inner = 0 < found.depth[part] < 1
        assert inner == ("layer." in part) and (inner or part in ("embeddings", "head"))
    assert sum(found.sizes.values()) == sum(p.numel() for p in model.parameters())


def test_depth_of_one_stack() -> None:
    found = parts(HUGGING_FACE["bert"][0]())
    assert found.order == ("embeddings", "layer.0", "layer.1", "layer.2", "head")
    assert list(found.depth.values()) == [0, 0.5 / 3, 1.5 / 3, 2.5 / 3, 1]


def test_depth_runs_through_encoder_and_decoder() -> None:
    found = parts(HUGGING_FACE["bart"][0]())
    assert found.order[1:-1] == (
        "encoder.layer.0", "encoder.layer.1", "decoder.layer.0", "decoder.layer.1",
        "decoder.layer.2",
    )  # fmt: skip
    assert list(found.depth.values()) == [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1]


def test_towers_have_a_scale_each() -> None:
    depth = parts(HUGGING_FACE["clip, two towers"][0]()).depth
    assert depth["text_model.layer.1"] == 0.5
    assert depth["vision_model.layer.1"] == 0.75


def test_tied_weights_count_once() -> None:
    model = HUGGING_FACE["gpt2, tied"][0]()
    found = parts(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in found.names
    assert found.sizes["embeddings"] == 40 * 16 + 1024 * 16


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("module.bert.a", "bert.a"),
        ("module.module.a", "a"),
        ("_orig_mod.module.a", "a"),
        ("a._checkpoint_wrapped_module.b._fsdp_wrapped_module.c", "a.b.c"),
        ("_forward_module.a", "a"),
        ("base_model.model.bert.query.base_layer.weight", "bert.query.weight"),
        ("base_model.model.query.lora_A.default.weight", "query.lora_A.default.weight"),
        ("base_model.model.classifier.original_module.weight", "classifier.weight"),
        ("bert.module.a", "bert.module.a"),
        ("modules.a", "modules.a"),
        ("a.base_model.model.b", "a.base_model.model.b"),
    ],
)
def test_canonical(wrapped: str, plain: str) -> None:
    assert canonical(wrapped) == plain
    assert canonical(plain) == plain


def test_wrapping_changes_no_key() -> None:
    model = HUGGING_FACE["bert"][0]()
    plain = parts(model)
    assert parts(torch.compile(model)) == plain  # type: ignore[arg-type]
    assert parts(nn.DataParallel(model)) == plain


def test_peft_keeps_the_old_keys() -> None:
    peft = pytest.importorskip("peft")
    plain = parts(HUGGING_FACE["bert"][0]())
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    found = parts(peft.get_peft_model(HUGGING_FACE["bert"][0](), config))
    assert found.order == plain.order and found.depth == plain.depth
    assert {n: found.names[n] for n in plain.names} == plain.names
    adapters = set(found.names) - set(plain.names)
    assert len(adapters) == 3 * 2 + 2  # A and B in three layers, the copied classifier
    query = "bert.encoder.layer.1.attention.self.query.lora_A.default.weight"
    assert found.names[query] == "layer.1"
    assert found.names["classifier.modules_to_save.default.weight"] == "head"


def test_two_parameters_with_one_name_are_refused() -> None:
    model = Holder(module=nn.Linear(2, 2), _orig_mod=Holder(module=nn.Linear(2, 2)))
    with pytest.raises(Refused, match="both called 'weight'"):
        named_parameters(model)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(Refused, match="no shape yet"):
        parts(nn.LazyLinear(2))


def test_overrides_first_match_wins() -> None:
    model = HUGGING_FACE["bert"][0]()
    plain = parts(model)
    found = parts(model, {"bert.pooler.*": "layer.2", "bert.*.bias": "embeddings", "*": "head"})
    assert found.names["bert.pooler.dense.bias"] == "layer.2"
    assert found.names["bert.encoder.layer.0.output.dense.bias"] == "embeddings"
    assert found.names["bert.encoder.layer.0.output.dense.weight"] == "head"
    assert found.order == ("embeddings", "layer.2", "head")
    assert found.depth["layer.2"] == plain.depth["layer.2"]
    consistent(found, model)


def test_overrides_that_say_nothing_are_refused() -> None:
    model = HUGGING_FACE["bert"][0]()
    with pytest.raises(Refused, match=r"nearest are .*bert\.pooler\.dense"):
        parts(model, {"bert.poler.dense.weight": "head"})
    with pytest.raises(Refused, match=r"did you mean 'layer\.2'"):
        parts(model, {"bert.pooler.*": "layr.2"})
    with pytest.raises(Refused, match="no parameter matches"):
        parts(model, {r"bert\..*": "head"})  # a regex, not a glob


def test_members_and_table() -> None:
    found = parts(PLAIN["gru"][0]())
    assert found.members("embeddings") == ("embedding.weight",)
    with pytest.raises(Refused, match=r"did you mean 'layer\.\d'"):
        found.members("layer.7")
    lines = repr(found).splitlines()
    assert lines[0].split() == ["part", "depth", "weights"]
    assert lines[1].split() == ["embeddings", "0.000", "72"]
    assert len(lines) == 5
