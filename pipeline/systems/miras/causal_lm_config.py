"""The config of a decoder with memory as transformers loads it: the backbone's own config, and the sections of here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.model_config import MAY_CHANGE
from pipeline.systems.miras.config import MemoryConfig, MirasConfig

S = TypeVar("S")
MODEL_TYPE = "mnemos"
ANY_LENGTH = 2**20
"""What `max_position_embeddings` says of a model whose attention has a window, and whose texts have no limit."""
NOT_THE_BACKBONE = (
    "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "problem_type", "torch_dtype",
    "transformers_version",
)  # fmt: skip
"""Keys of a backbone's config that are about its files, or about labels."""
CODE = ("auto_map", "code_sha256")
"""Keys that say which code lies beside a config. A folder that the installed class saves has none."""
COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Special tokens: those of the backbone, unless others are given."""


class MnemosConfig(PreTrainedConfig):
    """`backbone`: the config of the decoder as its own class of transformers has it, with its model_type. `attention`,
    `memory`: `AttentionConfig` and `MemoryConfig` as plain values, fields that are left out at their defaults.
    `max_position_embeddings`: the longest text, prompt and what is generated; ANY_LENGTH where there is no limit.

    Raises ValueError for a section or a model type that is none.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        backbone: Mapping[str, Any] | None = None,
        attention: Mapping[str, Any] | None = None,
        memory: Mapping[str, Any] | None = None,
        max_position_embeddings: int = ANY_LENGTH,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if type(self).__module__.partition(".")[0] != TRANSFORMERS_DYNAMIC_MODULE_NAME:
            for name in CODE:
                kwargs.pop(name, None)
        self.backbone = dict(backbone or {"model_type": "olmo2"})
        self.attention = plain_section(section_of(AttentionConfig, attention or {}, "attention"))
        self.memory = plain_section(section_of(MemoryConfig, memory or {}, "memory"))
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        own = self.backbone_config()
        for name in TOKENS:
            kwargs.setdefault(name, getattr(own, name, None))
        super().__init__(**kwargs)
        # What others ask of a config, whatever the file says: it is the backbone's.
        for name in COMMON:
            setattr(self, name, getattr(own, name))

    def backbone_config(self) -> PreTrainedConfig:
        """The config of the decoder, a new one."""
        values = dict(self.backbone)
        kind = values.pop("model_type", None)
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"backbone: transformers has no model type {kind!r}")
        found: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(values)
        return found

    def decisive(self) -> dict[str, Any]:
        """As `to_dict`, without the fields of the sections that leave the model the same."""
        found = self.to_dict()
        for name, kind in (("attention", AttentionConfig), ("memory", MemoryConfig)):
            for field in dataclasses.fields(kind):
                if MAY_CHANGE.items() <= field.metadata.items():
                    found[name].pop(field.name, None)
        return found

    @property
    def text_limit(self) -> int | None:
        """Tokens of a text, prompt and what is generated; None: any number, behind a window."""
        return None if self.attention["kind"] == "window" else self.max_position_embeddings

    def sections(self) -> MirasConfig:
        """The sizes of the model, of a backbone whose weights are given."""
        return MirasConfig(
            backbone=BackboneConfig(layers=self.backbone_config().num_hidden_layers),
            attention=section_of(AttentionConfig, self.attention, "attention"),
            memory=section_of(MemoryConfig, self.memory, "memory"),
        )


def config_of(sizes: MirasConfig, backbone: PreTrainedConfig, *, limit: int | None) -> MnemosConfig:
    """The config of a model with these sizes, `on_backbone`, on this decoder. `limit`: tokens of a text at the most.

    Backends are left to the machine that loads it, and where weights came from is not said.
    """
    values = backbone.to_dict()
    memory = plain_section(dataclasses.replace(sizes.memory, backend="auto"))
    memory.pop("pretrained", None)
    return MnemosConfig(
        backbone={key: value for key, value in values.items() if key not in NOT_THE_BACKBONE},
        attention=plain_section(dataclasses.replace(sizes.attention, backend="auto")),
        memory=memory,
        max_position_embeddings=limit or ANY_LENGTH,
    )


def plain_section(section: Any) -> dict[str, Any]:
    """A section as JSON has it, so that what is read back is the same."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    found: dict[str, Any] = plain(dataclasses.asdict(section))
    return found


def section_of(kind: type[S], values: Mapping[str, Any], name: str) -> S:
    """The inverse of `plain_section`, of the section `name`. Raises ValueError for a field that it has not."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{name} has no {unknown[0]!r}: the config is of another version of the code")
    found: dict[str, Any] = {}
    for key, value in values.items():
        default = fields[key].default_factory
        if isinstance(value, Mapping) and isinstance(default, type):
            value = section_of(default, value, f"{name}.{key}")
        found[key] = tuple(value) if isinstance(value, list) else value
    return kind(**found)
