"""Load a model to steer: the embedded one, GPT2-XL, another one of the hub, or a local folder."""

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common import embedded
from common.tensor_parallel import own_forwards, processes_for

EMBEDDED = "embedded"
VARIABLE = "STEERING_MODEL"
LARGE = 2**30  # bytes; from here on loading takes long enough for a progress bar


class LoadError(ValueError):
    """A model cannot be loaded; the message is one sentence that says why and what to do."""


class Preset(NamedTuple):
    """Where and how strongly to steer from Love to Hate.

    `layer` counts from 0: the vector is added to resid_post of this block. `coeff` multiplies the
    unit direction.
    """

    layer: int
    coeff: float
    source: str


class Loaded(NamedTuple):
    """What `load_model` returns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    preset: Preset


def load_model(
    name: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    tensor_parallel: bool = False,
) -> Loaded:
    """Load a causal language model for steering and say which.

    Args:
        name: `"embedded"`, the id of a model on the Hugging Face hub, or a local folder. Without
            it: the environment variable `STEERING_MODEL`, else `gpt2-xl` on Colab, else the
            embedded model.
        dtype: of the weights. fp32 also on a GPU, because the published figures are in fp32.
        device: where the model goes; by default the GPU where there is one, else the CPU. "auto"
            spreads a model that is larger than one GPU over all that are there, then the CPU's
            memory, then the disk (accelerate's device_map).
        tensor_parallel: split every large matrix over the processes of a group. Each of them, one
            for each device, makes this call and all that follow: `torchrun` starts them, or
            `RayEngine(tensor_parallel=…)`.

    Returns:
        The model in evaluation mode, its tokenizer (padding on the left, with the end of text), and
        the preset.

    Raises:
        LoadError: unknown name, no network, no causal language model, or too little memory; an
            architecture that transformers cannot split, heads that so many processes cannot share,
            or no group of processes; nothing was loaded.
        ValueError: both tensor_parallel and a device.
    """
    if tensor_parallel and device is not None:
        raise ValueError(
            f"expected tensor_parallel or device, got both (device={str(device)!r}): each process"
            " of the group has a device of its own"
        )
    name = name or os.environ.get(VARIABLE) or ("gpt2-xl" if on_colab() else EMBEDDED)
    source = _find(name)
    config = _read_config(name, source)
    where = _place(name, config, device, tensor_parallel)
    size = _check_memory(name, config, dtype, where)
    model, tokenizer = _load(name, source, dtype, where, show_progress=size > LARGE)
    blocks, width = config.get_text_config().num_hidden_layers, config.get_text_config().hidden_size
    other = "gpt2-xl" if name == EMBEDDED else EMBEDDED
    print(
        f"Loaded {'the embedded model' if name == EMBEDDED else name}: {type(model).__name__},"
        f" {blocks} blocks x {width}, {str(dtype).removeprefix('torch.')} on {where}.\n"
        f"Another one: load_model({other!r}), or {VARIABLE}={other}"
    )
    return Loaded(model, tokenizer, preset_for(name, blocks))


class _Where(NamedTuple):
    """Where a model goes: to a device, to several, or in parts to a group of processes."""

    device: torch.device
    spread: bool = False
    processes: int = 1

    def __str__(self) -> str:
        if self.processes > 1:
            return f"{self.device.type}, split over {self.processes} processes"
        return "the devices that are there" if self.spread else self.device.type

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` takes for it."""
        if self.processes > 1:
            from transformers.distributed.configuration_utils import DistributedConfig

            return {"distributed_config": DistributedConfig(tp_size=self.processes, tp_plan="auto")}
        return {"device_map": "auto"} if self.spread else {}


def _place(
    name: str,
    config: transformers.PretrainedConfig,
    device: str | torch.device | None,
    tensor_parallel: bool,
) -> _Where:
    """Return where a model goes; refuse to split what cannot be split."""
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if tensor_parallel:
        try:
            return _Where(best, processes=processes_for(config))
        except ValueError as error:
            raise LoadError(f"{name!r} cannot be split: {error}") from None
    return _Where(best, spread=True) if device == "auto" else _Where(torch.device(device or best))


def preset_for(name: str, blocks: int) -> Preset:
    """Return layer and coefficient for a model: known ones, or a first guess that says so.

    Args:
        name: as given to `load_model`.
        blocks: how many transformer blocks the model has.
    """
    if (known := known_preset(name)) is not None:
        return known
    published = _published_presets()["gpt2-xl"]
    return Preset(
        published["layer"] * blocks // published["blocks"],
        published["coeff"],
        "a guess, GPT2-XL's relative depth and coefficient: find yours by a sweep",
    )


def known_preset(name: str) -> Preset | None:
    """Return what was measured for the embedded model, or published for GPT2-XL; else None."""
    if name == EMBEDDED:
        found = json.loads((embedded.FOLDER / "preset.json").read_text(encoding="utf-8"))
        source = "a sweep on prompts of its own, see embedded_model/README.md"
        return Preset(found["layer"], found["coeff"], source)
    if (found := _published_presets().get(name.split("/")[-1])) is None:
        return None
    return Preset(found["layer"], found["coeff"], found["source"])


def _published_presets() -> dict[str, dict]:
    """Presets by the last part of the model's name, with its number of blocks."""
    return json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))


def copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's modules but not its weights; neither model sees the other's hooks.

    It is for libraries that rebuild the modules they are given, and for trying something on a large
    model without a second copy in memory. Changing a weight in place changes it in both; replacing
    a parameter does not.
    """
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())
    }
    for made in ("_device_mesh", "_mesh_manager"):  # groups of processes, which there are once
        if (found := vars(model).get(made)) is not None:
            shared[id(found)] = found
    copied = copy.deepcopy(model, shared)
    own_forwards(copied)  # where the model is split over processes
    return copied


def on_colab() -> bool:
    """Say whether this is a Colab notebook."""
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # not even a package `google`
        return False


def _find(name: str) -> str:
    """Return the folder, or the hub id of a model that is available, without downloading it."""
    if name == EMBEDDED:
        return str(embedded.FOLDER)
    folder = Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise LoadError(f"the folder {name} holds no model: it has no config.json")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LoadError(
            f"there is no folder {name}: expected 'embedded', a hub id such as 'gpt2-xl', or a"
            " local folder"
        )
    if isinstance(try_to_load_from_cache(name, "config.json") if _is_hub_id(name) else None, str):
        return name
    _ask_hub(name)
    return name


def _is_hub_id(name: str) -> bool:
    try:
        try_to_load_from_cache(name, "config.json")
    except hub_errors.HFValidationError:
        return False
    return True


def _ask_hub(name: str) -> None:
    """Fail early and in one sentence if the hub does not have the model, or cannot be reached."""
    if not _is_hub_id(name):
        raise LoadError(
            f"{name!r} is not a model: expected 'embedded', a hub id such as 'gpt2-xl', or a local"
            " folder"
        )
    unreachable = (
        f"{name!r} is neither a local folder nor downloaded yet, and the Hugging Face hub cannot be"
        f" reached: connect to the network, give a local folder, or use load_model({EMBEDDED!r})"
    )
    if constants.HF_HUB_OFFLINE:
        raise LoadError(unreachable)
    try:
        HfApi().model_info(name, timeout=20)
    except hub_errors.GatedRepoError:
        raise LoadError(
            f"{name!r} is gated: accept its licence on its hub page and log in with `hf auth login`"
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise LoadError(
            f"the hub has no model {name!r}, or it is private and you are not logged in"
        ) from None
    except Exception:  # no network, proxy or certificate; each HTTP library raises its own
        raise LoadError(unreachable) from None


def _read_config(name: str, source: str) -> transformers.PretrainedConfig:
    """Read the configuration, and refuse what is not a causal language model."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        hub_errors.StrictDataclassError,
    ):
        raise LoadError(
            f"the config.json of {name!r} is not one that transformers {transformers.__version__}"
            " can read"
        ) from None
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    given = set(config.architectures or [])
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (given and not given & causal):
        kind = ", ".join(sorted(given)) or config.model_type
        raise LoadError(f"{name!r} is not a causal language model: its config says {kind}")
    return config


def _check_memory(
    name: str, config: transformers.PretrainedConfig, dtype: torch.dtype, where: _Where
) -> int:
    """Return the bytes that the weights need; refuse if they are more than what is free."""
    device = where.device
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    need = sum(p.numel() for p in model.parameters()) * dtype.itemsize // where.processes
    free = free_memory(device)
    if need > free and not where.spread:
        raise LoadError(
            f"{name!r} needs {need / 1e9:.1f} GB of memory for its weights in"
            f" {str(dtype).removeprefix('torch.')}, and {free / 1e9:.1f} GB are free on"
            f" {device.type}: take a smaller model, dtype=torch.bfloat16, or device='auto', which"
            " spreads it"
        )
    return need


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _load(
    name: str, source: str, dtype: torch.dtype, where: _Where, show_progress: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer, with the progress bar of transformers only where asked for."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    if not show_progress:
        bars.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **(how := where.options()),
        )
        model, loading = loaded
        model = (model if how else model.to(where.device)).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LoadError(
            f"{name!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    finally:
        if shown:
            bars.enable_progress_bar()
    # transformers fills in both by itself: random weights, and a tokenizer that knows nothing.
    if loading["missing_keys"]:
        raise LoadError(
            f"{name!r} cannot be loaded: its weights lack"
            f" {', '.join(sorted(loading['missing_keys'])[:3])}"
        )
    if not tokenizer("a")["input_ids"]:
        raise LoadError(f"{name!r} cannot be loaded: it has no tokenizer")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
