"""RunConfig: the one schema of a run. YAML in, `a.b=c` overrides, validated before anything is touched.

Unknown keys are errors. Domains and slices are maps keyed by name, never lists, so that an
override can name one. The resolved tree is echoed with its hash into the run folder.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from velopath.config_lengths import PathConfig, SliceConfig
from velopath.config_paths import absolute_paths
from velopath.config_proxy import ProxyConfig
from velopath.config_watch import (
    AlarmsConfig,
    EvaluateConfig,
    HealthConfig,
    PositiveInt,
    Tree,
)
from velopath.errors import ConfigError
from velopath.urls import is_url, redact

MAX_YAML_BYTES, MAX_YAML_DEPTH = 1 << 20, 50
Section = TypeVar("Section", bound=Tree)


class DataConfig(Tree):
    """What is read: slices in the order of the main path, and the held-out set."""

    slices: dict[str, SliceConfig] = Field(min_length=1, description="name -> slice, in reading order")
    heldout: str | None = Field(
        None, description="prepared folder or URL whose held-out split is used; null: first slice"
    )
    exhaustion: Literal["repeat", "renormalise", "stop"] = "repeat"
    on_bad_shard: Literal["fail", "quarantine"] = Field(
        "fail",
        description="a damaged shard: an error, or left out on record (reads all data once at each start; of a remote "
        "shard with a hash once)",
    )
    packing: Literal["concat", "best_fit"] = Field(
        "concat", description="rows are parts of the joined documents, or hold whole ones and padding"
    )
    order: Literal["full", "windowed"] | None = Field(
        None,
        description="rows shuffled over the whole domain, or within windows of shards; null: windowed where the "
        "data are remote, else full",
    )
    window: PositiveInt = Field(8, description="shards read at a time where the order is windowed")
    bin_shards: PositiveInt | None = Field(
        None,
        description="neighbouring shards that a bin of best_fit takes its documents from; null: 1 where the order is "
        "windowed, else all",
    )
    cache: str | None = Field(
        None, description="folder for inflated and fetched shards; null: ~/.cache/velopath"
    )
    cache_limit: str | None = Field(
        None, description="largest size of that folder, such as 50GB; unused shards are evicted; null: none"
    )
    fetch_attempts: PositiveInt = Field(
        5, description="how often a remote shard is tried, with growing pauses"
    )
    fetch_stall_seconds: Annotated[float, Field(gt=0)] = Field(
        10.0, description="an attempt ends where no byte comes for so long"
    )

    @model_validator(mode="after")
    def _replay_reads_earlier_slices(self) -> DataConfig:
        earlier: list[str] = []
        for name, entry in self.slices.items():
            for domain, source in entry.replay.items():
                if source not in earlier:
                    raise ValueError(
                        f"slice {name!r} replays {domain!r} of {source!r}, which is no earlier slice; "
                        f"there are {', '.join(earlier) or 'none'}"
                    )
            earlier.append(name)
        return self


class ModelChoice(Tree):
    """The model: a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3) to continue from, or a preset at random."""

    hf: str | None = Field(None, description="folder with config.json and safetensors")
    preset: str = Field(
        "tiny",
        description="used where hf is null: tiny, small, 40m, 160m, 1b, 3b, 8b, mistral-7b, qwen2-0.5b, qwen2-7b, "
        "qwen3-0.6b, qwen3-8b",
    )
    overrides: dict[str, int | float | bool] = Field(
        default_factory=dict, description="fields of the preset to replace"
    )


class ControlConfig(Tree):
    """What moves the weights: a controller, its signal and its targets."""

    controller: str = Field(
        "velocitune",
        description="velocitune, static, uniform, temperature, schedule, dynamic_batch_loading, doremi, ado, odm, "
        "or one of your own",
    )
    plugin: str | None = Field(None, description="a Python file that registers controllers of your own")
    options: dict[str, Any] = Field(default_factory=dict, description="keywords of the controller")
    targets: str | dict[str, float] | None = Field(
        None,
        description="a targets.json, or losses by domain in nats, completed by RUN/targets.json; null: that file",
    )
    every: PositiveInt = Field(50, description="m: steps between two evaluations and updates")
    heldout_tokens: PositiveInt = Field(
        32768, description="held-out tokens per domain and evaluation; 8 rows or more give a standard error"
    )
    decay_gain: Literal["measured"] | float | dict[str, float] | None = Field(
        None,
        description="nats added to the targets, for all or by domain: what a decay gains where the proxies were "
        "decayed and the main path is not; measured: as targets.json has it from proxy.decay",
    )
    signal: Literal["heldout", "training", "anchored"] = Field(
        "heldout",
        description="losses that drive the controller: held-out sets, the training batches since last, or the "
        "movement of the training batches between held-out anchors",
    )
    anchor_every: PositiveInt = Field(
        4, description="of signal anchored: updates from one anchor to the next"
    )
    anchor_keep: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="of signal anchored: share of the old value in the mean of training losses"
    )
    filter: str | dict[str, Any] | None = Field(
        None, description="ema, median or trend, or a map of kind and options; null: losses as measured"
    )
    shadow: bool = Field(False, description="propose and log weights, push none")
    rotate: bool = Field(False, description="draw another held-out sample at each evaluation")
    in_branch: Literal["hold", "replay", "live"] = Field(
        "hold",
        description="weights of a branch: the branch point's, the main path's log, or a live controller",
    )


class TrainConfig(Tree):
    """One optimiser step and the machine it runs on."""

    rows: PositiveInt = Field(8, description="rows per rank and step")
    row_tokens: PositiveInt = Field(2048, description="T: tokens per row")
    micro_rows: PositiveInt | None = Field(None, description="rows per forward pass; null: all at once")
    document_mask: bool = Field(
        False, description="attention stays inside documents, whose positions count from 0"
    )
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="layers computed again in the backward pass: whole, or all but attention and half the products",
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0: no clipping")
    parallel: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="several ranks: each holds the whole model, or parameters, gradients and moments are spread",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over fp32 master weights")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool | None = Field(None, description="torch.compile; null: on a GPU only")
    peak_flops: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="bf16 FLOP/s of one device, to print the share reached (MFU); null: known GPUs' own",
    )
    threads: Annotated[int, Field(ge=0)] = Field(1, description="prefetch threads of the sampler")
    cpu_threads: PositiveInt | None = Field(
        None, description="threads of torch's CPU kernels; null: torch's choice. Tiny models: 1"
    )
    log_every: PositiveInt = Field(
        10, description="also how soon several ranks notice a stop signal, in steps"
    )
    checkpoint_every: PositiveInt = 500
    keep_last: PositiveInt = Field(2, description="rolling checkpoints kept; branch points are always kept")

    @model_validator(mode="after")
    def _micro_rows_divide(self) -> TrainConfig:
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} does not divide rows {self.rows}")
        return self


class RunConfig(Tree):
    """A whole run."""

    title: str = "velopath run"
    seed: int = 0
    data: DataConfig
    model: ModelChoice = ModelChoice()
    control: ControlConfig = ControlConfig()
    path: PathConfig = PathConfig()
    train: TrainConfig = TrainConfig()
    proxy: ProxyConfig = ProxyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _bins_fit_window(self) -> RunConfig:
        data = self.data
        if data.bin_shards is not None and data.packing != "best_fit":
            raise ValueError("data.bin_shards is for data.packing best_fit")
        if data.bin_shards is not None and data.order == "windowed" and data.bin_shards > data.window:
            raise ValueError(f"data.bin_shards is {data.bin_shards}, more than data.window, {data.window}")
        return self

    @field_validator("seed")
    @classmethod
    def _seed_fits(cls, seed: int) -> int:
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed {seed} is outside 0 ... 2^63 - 1")
        return seed

    @property
    def row_options(self) -> dict[str, Any]:
        """How rows are made, as keywords of `open_sampler`."""
        data, train = self.data, self.train
        made = {"packing": data.packing, "bin_shards": data.bin_shards, "order": data.order}
        return made | {"window": data.window, "boundaries": train.document_mask}

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the resolved tree as canonical JSON."""
        text = json.dumps(self.shown(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def shown(self) -> dict[str, Any]:
        """The whole resolved tree as plain values, without the credentials that URLs may hold."""
        tree: dict[str, Any] = self.model_dump(mode="json")
        data = tree["data"]
        for entry in data["slices"].values():
            entry["root"] = redact(entry["root"]) if is_url(entry["root"]) else entry["root"]
        data["heldout"] = redact(data["heldout"]) if is_url(data["heldout"]) else data["heldout"]
        return tree

    def to_yaml(self) -> str:
        """`shown` as YAML; `load_config` reads it back."""
        import yaml

        return str(yaml.safe_dump(self.shown(), sort_keys=False, allow_unicode=True))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read YAML, apply `a.b=c` overrides in order, resolve interpolations, validate.

    Relative paths in the file are relative to the file. Raises `ConfigError` that names every wrong key.
    """
    path = Path(path)
    plain, _ = read_tree(path, overrides)
    return validate_config(absolute_paths(plain, path.parent), where=str(path))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[Any, Any], str]:
    """A YAML file's map with `a.b=c` overrides, interpolations resolved, and its text. Raises `ConfigError`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        text = _shallow_yaml(path)
        tree = OmegaConf.load(io.StringIO(text))
        if not OmegaConf.is_dict(tree):
            raise ConfigError(f"{path}: expected a map with the keys of RunConfig")
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(_checked(overrides))))
        plain = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"no such config file: {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; expected a YAML file") from None
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(plain, dict)
    return plain, text


def validate_config(tree: dict[Any, Any], where: str = "config") -> RunConfig:
    """A `RunConfig` of a plain tree, or `ConfigError` with one line for each wrong key."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, where))) from None


def _lines(error: ValidationError, where: str) -> list[str]:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        given = f" (given: {item['input']!r})" if item["type"] not in ("missing", "extra_forbidden") else ""
        what = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
        lines.append(f"{where}: {key}: {what}{given}")
    return lines


def validate_section(section: type[Section], given: Section, changes: dict[str, Any], where: str) -> Section:
    """A section of the configuration with changes, or `ConfigError` with one line for each wrong key."""
    try:
        return section.model_validate(given.model_dump() | changes)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, where))) from None


def _shallow_yaml(path: Path) -> str:
    """The text of a YAML file of bounded size and depth: the C loader recurses, and a deep file ends the process.

    What aliases expand to is bounded by OmegaConf.
    """
    import yaml

    with open(path, "rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES} bytes; expected a config file")
    text = content.decode()
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ConfigError(
                f"{path}: nested more than {MAX_YAML_DEPTH} levels deep; expected a config file"
            )
    return text


def _checked(overrides: Sequence[str]) -> Sequence[str]:
    for text in overrides:
        if "=" not in text or text.startswith("="):
            raise ConfigError(f"override {text!r} is not of the form a.b=c")
    return overrides
