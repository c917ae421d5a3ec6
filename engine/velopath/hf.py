"""Checkpoints of Hugging Face (Llama, Mistral, Qwen2, Qwen3), read and written as config.json and safetensors.

Never pickles, never code. What `Decoder` does not compute is refused, not ignored: RoPE scaling, other biases and
activations, quantisation.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from velopath.errors import ConfigError, DataError
from velopath.model import Decoder, ModelConfig
from velopath.tensor_files import (
    fill_tensors,
    load_tensors,
    named_tensors,
    read_json,
    save_tensors,
    staged_folder,
    write_json,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`model_type` -> the one architecture of it that is supported."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}
"""Settings that change what the model computes, with the values that a `Decoder` has."""


def load_hf(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[ModelConfig, Decoder]:
    """The model in `folder` (config.json and model.safetensors, or its shards with their index), as `dtype`.

    Weights stored in another floating dtype are converted; fp32 is what training wants as master weights. Raises
    `ConfigError` on a model that `Decoder` does not compute and on weights that exist only as pickles (`.bin`,
    `.pt`), `DataError` naming the file that is missing, malformed or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    decoder = Decoder(config, seed=None, device=device).to(dtype)
    targets = named_tensors(decoder)
    missing = set(targets)
    for path, expected in _weight_files(folder):
        values = {n: t for n, t in load_tensors(path).items() if not n.endswith(".rotary_emb.inv_freq")}
        if expected is not None and not expected <= set(values):
            lost = sorted(expected - set(values))[0]
            raise DataError(f"tensor {lost!r} is missing, the index says it is here", path=path)
        if config.tie_word_embeddings:
            _drop_tied_copy(values, path)
        here = {n: t for n, t in targets.items() if n in values}
        if expected is None:
            here = targets
        fill_tensors(here, values, path)
        missing -= set(here)
    if missing:
        raise DataError(f"tensor {sorted(missing)[0]!r} is in none of the files", path=folder / INDEX)
    return config, decoder


def read_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of `folder`/config.json. Raises `ConfigError` naming the setting that is not supported."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; expected a folder saved by Hugging Face's save_pretrained")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise DataError("expected a JSON object", path=path)
    family = str(raw.get("model_type"))
    expected = [ARCHITECTURES.get(family)]
    if family not in ARCHITECTURES or raw.get("architectures", expected) != expected:
        known = ", ".join(ARCHITECTURES.values())
        raise ConfigError(
            f"{path}: model_type {raw.get('model_type')!r}, architectures {raw.get('architectures')!r}; "
            f"expected one of {known} with its own model_type"
        )
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{path}: rope_parameters is {rope!r}; expected a mapping")
    for name, allowed in _NEUTRAL.items():
        for value in (raw.get(name, allowed[0]), rope.get(name, allowed[0])):
            if value not in allowed and not (name == "rope_scaling" and _is_default_rope(value)):
                raise ConfigError(f"{path}: {name} is {value!r}; only {allowed[0]!r} is supported")
    if not _is_default_rope(rope):
        raise ConfigError(f"{path}: rope_parameters is {rope!r}; only rope_type 'default' is supported")
    fields: dict[str, Any] = {"family": family, "sliding_window": _window(raw, family, path)}
    fields |= {"rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10_000.0))}
    # LlamaConfig's, where they differ from ours; the others' stand in their files
    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048} if family == "llama" else {}
    for field in dataclasses.fields(ModelConfig):
        if field.name in fields:
            continue
        if field.name in raw:
            fields[field.name] = raw[field.name]
        elif field.name in defaults:
            fields[field.name] = defaults[field.name]
        elif (
            field.default is dataclasses.MISSING or family != "llama" and field.name != "tie_word_embeddings"
        ):
            raise ConfigError(f"{path}: {field.name} is missing; expected a complete configuration")
    try:
        return ModelConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _window(raw: Mapping[str, Any], family: str, path: Path) -> int | None:
    """Mistral's window; the others', which Qwen names without using it, must not be in use."""
    if family == "mistral":
        window = raw.get("sliding_window", 4096)  # transformers' default
        return None if window is None else int(window)
    layers = set(raw.get("layer_types") or ())
    if (family == "llama" and raw.get("sliding_window") is not None) or layers - {"full_attention"}:
        raise ConfigError(
            f"{path}: sliding_window is {raw.get('sliding_window')!r}, layer_types {sorted(layers)}; only mistral "
            "may have a window"
        )
    return None


def save_hf(
    folder: str | Path,
    model: Decoder,
    *,
    tokenizer_file: str | Path | None = None,
    eos: int | None = None,
    model_card: str | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    replace: bool = True,
) -> Path:
    """Write `model` as a folder that `transformers` loads; returns it. It appears whole or not at all.

    config.json, generation_config.json, model.safetensors (one file, in `dtype`, None: as it is); with
    `tokenizer_file` (a tokenizer.json of Hugging Face tokenizers) also that and tokenizer_config.json, so that
    `AutoTokenizer` finds it; with `model_card` its text as README.md; `extra` are further
    JSON files, name -> content. `eos` is the id of the end-of-text token.
    An existing folder is replaced, or with `replace=False` refused (`ConfigError`).
    """
    folder = Path(folder)
    config = model.config
    if eos is not None and not 0 <= eos < config.vocab_size:
        raise ConfigError(f"eos is {eos}; expected an id from 0 to {config.vocab_size - 1}")
    tokenizer = _tokenizer(Path(tokenizer_file), config, eos) if tokenizer_file is not None else None
    tensors = {name: t.to(dtype) if dtype is not None else t for name, t in named_tensors(model).items()}
    with staged_folder(folder, replace=replace) as stage:
        write_json(
            stage / "config.json", config_json(config, eos=eos, dtype=tensors["model.norm.weight"].dtype)
        )
        write_json(stage / "generation_config.json", {"bos_token_id": None, "eos_token_id": eos})
        save_tensors(stage / WEIGHTS, tensors)
        if tokenizer is not None and tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, stage / "tokenizer.json")
            write_json(stage / "tokenizer_config.json", tokenizer)
        for name, content in (extra or {}).items():
            write_json(stage / name, content)
        if model_card is not None:
            (stage / "README.md").write_text(model_card, encoding="utf-8")
    return folder


def config_json(config: ModelConfig, *, eos: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json. RoPE's base and the dtype stand under the names of transformers 4 and 5."""
    name = str(dtype).removeprefix("torch.")
    shape = dataclasses.asdict(config)
    family = shape.pop("family")
    if family != "mistral":
        shape.pop("sliding_window")
    if family in ("qwen2", "qwen3"):
        shape |= {
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": config.num_hidden_layers,
        }
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **shape,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": None,
        "torch_dtype": name,
        "dtype": name,
        "use_cache": True,
    }


def _weight_files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The safetensors files of `folder` with the tensors that the index puts in each; None: all are in it."""
    if (folder / WEIGHTS).is_file():
        return [(folder / WEIGHTS, None)]
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        )
        if pickles:
            raise ConfigError(
                f"{folder} has its weights only as pickles ({pickles[0]}), which can run code and are never loaded; "
                "convert them with save_pretrained(folder, safe_serialization=True)"
            )
        raise DataError(f"neither {WEIGHTS} nor {INDEX} is there", path=folder)
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise DataError("has no weight_map from tensor to file", path=index)
    files: dict[str, set[str]] = {}
    for tensor, name in table.items():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or "\\" in name
            or not name.endswith(".safetensors")
        ):
            raise DataError(
                f"names the file {name!r}; expected a .safetensors file beside it", path=index, field=tensor
            )
        files.setdefault(name, set()).add(tensor)
    return [(folder / name, tensors) for name, tensors in sorted(files.items())]


def _drop_tied_copy(values: dict[str, Tensor], path: Path) -> None:
    """Some tied checkpoints hold the embedding twice; the copy must be one."""
    copy, embedding = values.pop("lm_head.weight", None), values.get("model.embed_tokens.weight")
    if copy is not None and embedding is not None and not torch.equal(copy, embedding):
        raise DataError(
            "lm_head.weight differs from model.embed_tokens.weight, but config.json says tie_word_embeddings; "
            "set it to false if the model is not tied",
            path=path,
        )


def _is_default_rope(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("rope_type", value.get("type", "default")) == "default"


def _tokenizer(path: Path, config: ModelConfig, eos: int | None) -> dict[str, Any]:
    """The content of tokenizer_config.json for the tokenizer in `path`, after checking that its ids fit."""
    raw = read_json(path)
    model = raw.get("model") if isinstance(raw, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, (dict, list)):
        raise DataError("not a tokenizer.json of Hugging Face tokenizers: model.vocab is missing", path=path)
    by_id = {i: t for t, i in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    by_id |= {t["id"]: t["content"] for t in raw.get("added_tokens") or ()}
    largest = max(by_id, default=len(vocabulary) - 1)
    if largest >= config.vocab_size:
        raise ConfigError(
            f"{path} has the token id {largest}, the model only ids below vocab_size {config.vocab_size}; "
            "export with the tokenizer the model was trained with"
        )
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    if eos is not None and eos in by_id:
        content["eos_token"] = by_id[eos]
    return content
