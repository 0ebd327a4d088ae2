"""LEVI: an ensemble on layers of a frozen encoder, beside a small model that learns from scratch.

    ŷ_l = A_l [h_l(x); s(x)],   L = Σ_l ℓ(y, ŷ_l),   prediction = mean over l of ŷ_l

h_l(x): the mean over a row's tokens of layer l's output, for some layers l of the encoder, which
stays as it is; s(x): the same mean of a small transformer over embeddings of its own of the same
tokens; A_l: adapting layers (Roh et al. 2024, arXiv 2402.04644, for accuracy on data of another
domain than the training rows). The encoder alone leans on what it was pre-trained on, the small
model on what is particular to the task; the layers of an ensemble err differently.

From memory, and not verified in the paper: that the prediction is the mean of the ŷ_l. Not found:
which layers, how wide, what s and A_l are. Here the layers lie at equal shares of the depth, s has
two pre-norm layers, and A_l is linear, GELU, linear.

It is a choice of head (`--head levi`) and no `Method`: an ensemble belongs to one task, with its
labels, and must be there again when a run is served. A method's `prepare` sees the first task's
model only, and is not called for the second nor when a folder is loaded. `ensemble` makes one of
any classifier for a loop or Trainer of one's own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from holdfast.errors import Refused

POSITIONS = 512  # later tokens have the position of the last
OF_THE_HEAD = ("architectures", "id2label", "label2id", "num_labels", "problem_type")


class LeviConfig(PretrainedConfig):
    """text_config: the encoder's. layers: those that are read, counted from 1. width, depth: of the
    small model."""

    model_type = "levi"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self, text_config: Any = None, layers: Any = (), width: int = 128, depth: int = 2,
        **more: Any,
    ) -> None:  # fmt: skip
        told = text_config.to_dict() if hasattr(text_config, "to_dict") else dict(text_config or {})
        told = {k: v for k, v in told.items() if k not in OF_THE_HEAD}
        self.text_config = AutoConfig.for_model(**({"model_type": "bert"} | told))
        self.layers, self.width, self.depth = list(layers), width, depth
        super().__init__(**({"pad_token_id": self.text_config.pad_token_id} | more))


class Small(nn.Module):
    """A transformer without pre-training: token ids and mask (rows, tokens) -> (rows, width)."""

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(POSITIONS, width)
        layer = nn.TransformerEncoderLayer(width, 2, 4 * width, activation="gelu", norm_first=True,
                                           batch_first=True)  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width),
                                            enable_nested_tensor=False)  # fmt: skip

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).clamp(max=POSITIONS - 1)
        x = self.layers(self.tokens(ids) + self.positions(places), src_key_padding_mask=mask == 0)
        return mean(x, mask)


class LeviForSequenceClassification(PreTrainedModel):
    """The ensemble of one task; takes what sequence classifiers of Transformers take."""

    config_class = LeviConfig
    base_model_prefix = "encoder"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the encoder decides
    _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = AutoModelForSequenceClassification.from_config(config.text_config).base_model
        text = config.text_config.get_text_config()
        self.small = Small(text.vocab_size, config.width, config.depth)
        self.adapting = nn.ModuleList(
            nn.Sequential(
                nn.Linear(text.hidden_size + config.width, config.width),
                nn.GELU(),
                nn.Linear(config.width, config.num_labels),
            )
            for _ in config.layers
        )
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> LeviForSequenceClassification:
        """As ever, but the encoder is frozen and in evaluation mode: its outputs stay the same."""
        super().train(mode)
        self.encoder.eval().requires_grad_(False)  # here, for loading sets the mode last
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """logits: (rows, outputs), the mean; hidden_states: not returned. loss: the sum over l."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        inside = self.encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True,
                              **more).hidden_states  # fmt: skip
        small = self.small(input_ids, mask)
        each = [
            adapt(torch.cat([mean(inside[layer], mask).to(small.dtype), small], 1))
            for layer, adapt in zip(self.config.layers, self.adapting, strict=True)
        ]
        loss = None
        if labels is not None:
            loss = sum(self.loss_function(labels=labels, pooled_logits=y, config=self.config)
                       for y in each)  # fmt: skip
        return SequenceClassifierOutput(loss=loss, logits=torch.stack(each).mean(0))


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over a row's tokens: (rows, tokens, width) -> (rows, width)."""
    weight = mask[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def ensemble(
    model: Any, *, members: int = 3, width: int = 128, depth: int = 2
) -> LeviForSequenceClassification:
    """An ensemble in place of a classifier's own head, on the same encoder, which is frozen.

    model: a sequence classifier of Transformers, for text. members: how many layers are read, at
    equal shares of the depth: of six layers 2, 4 and 6; all, if there are fewer. width (even) and
    depth: of the small model. Draws from torch's own generator.
    """
    config, text = model.config, model.config.get_text_config()
    if config.is_encoder_decoder or not hasattr(text, "vocab_size"):
        raise Refused("no encoder or decoder of text, whose layers could be read",
                      where=type(model).__name__, remedy="--head task")  # fmt: skip
    layers, given = text.num_hidden_layers, config.to_dict()
    members = min(members, layers)
    chosen = [round(layers * (i + 1) / members) for i in range(members)]
    head = {k: given[k] for k in OF_THE_HEAD[1:] if k in given}
    made = LeviForSequenceClassification(LeviConfig(config, chosen, width, depth, **head))
    made.encoder = model.base_model
    return made.train(model.training)


AutoConfig.register("levi", LeviConfig)
AutoModelForSequenceClassification.register(LeviConfig, LeviForSequenceClassification)
