"""Low-rank adaptation: y = W x + (alpha / r) B A dropout(x), with W frozen, A random and B zero at first.

Notable:
- `LoRALinear` is the layer, in the letters of the paper (Hu et al. 2021, arXiv 2106.09685);
- `project` is what training runs instead of the layer's forward: the same values, with a backward pass written
  for frozen weights. Of the input of a projection it keeps only what that input is made from, so that of a whole
  decoder layer nothing is kept but the two inputs of its norms, q, k, v, what attention gives, gate and up;
- files are PEFT's own: adapter_config.json and adapter_model.safetensors.
"""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from eicap import InputError
from eicap.checkpoint import read_header, read_headers, read_json, read_tensor
from eicap.model import LanguageModel
from eicap.results import no_room, write_json

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HARMLESS = """
    peft_type r lora_alpha use_rslora rank_pattern alpha_pattern lora_dropout target_modules exclude_modules
    layers_to_transform layers_pattern base_model_name_or_path revision inference_mode auto_mapping peft_version
    megatron_core qalora_group_size eva_config loftq_config corda_config lora_ga_config runtime_config
    ensure_weight_tying
"""  # keys of adapter_config.json that are read here, or do not change what a saved adapter computes
PLAIN = {  # values of other keys that leave it plain LoRA; some ways to begin also change the base (PiSSA, OLoRA, …)
    "bias": ["none"],
    "task_type": ["CAUSAL_LM"],
    "init_lora_weights": [True, "gaussian", "eva", "orthogonal"],
}


# The layer


class LoRALinear(nn.Module):
    """A frozen linear layer W (out, in) and a trained one of rank r beside it: A (r, in) and B (out, r), float32."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.weight, self.bias, self.scale, self.dropout = linear.weight, linear.bias, scale, dropout
        out_features, in_features = linear.weight.shape
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=linear.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        low = F.linear(F.linear(F.dropout(x, self.dropout, self.training), a), b)
        return torch.add(F.linear(x, self.weight, self.bias), low, alpha=self.scale)


class _Project(torch.autograd.Function):
    """The outputs of several linear layers for one input x = make(*inputs), which is made again in the backward pass.

    With G the gradient of y = W x + s B A x (rows are tokens, D = dropout(x)):

        dA = s (G B)' D        dB = s G' (D A')        dx = G W + s (G B) A
    """

    @staticmethod
    def forward(ctx, linears, make, count, *tensors):
        inputs, matrices = tensors[:count], iter(tensors[count:])
        x = make(*inputs)
        ctx.linears, ctx.make, ctx.count = linears, make, count
        rate = max(getattr(linear, "dropout", 0.0) if linear.training else 0.0 for linear in linears)
        kept = [torch.rand_like(x, dtype=torch.float32) >= rate] if rate else []  # one mask for all that read x
        ctx.save_for_backward(*tensors, *kept)
        dropped = _drop(x, kept, rate)
        ctx.rate, outputs = rate, []
        for linear in linears:
            y = F.linear(x, linear.weight, linear.bias)
            if isinstance(linear, LoRALinear):
                a, b = next(matrices).to(x.dtype), next(matrices).to(x.dtype)
                y.addmm_(F.linear(dropped, a), b.t(), alpha=linear.scale)
            outputs.append(y)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        count, wants_x = ctx.count, any(ctx.needs_input_grad[3 : 3 + ctx.count])
        pairs = 2 * sum(isinstance(linear, LoRALinear) for linear in ctx.linears)
        saved = ctx.saved_tensors
        matrices, kept = iter(saved[count : count + pairs]), saved[count + pairs :]
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_(wants_x) for tensor in saved[:count]]
            made = ctx.make(*inputs)
        x, dx, found = made.detach(), None, []
        dropped = _drop(x, kept, ctx.rate)
        for linear, grad in zip(ctx.linears, grads):
            if wants_x:
                dx = grad @ linear.weight if dx is None else dx.addmm_(grad, linear.weight)
            if isinstance(linear, LoRALinear):
                wide_a, wide_b = next(matrices), next(matrices)
                a, b = wide_a.to(x.dtype), wide_b.to(x.dtype)
                low = (grad @ b).mul_(linear.scale)  # (T, r)
                found.append((dropped.t() @ low).t().to(wide_a.dtype))
                found.append((grad.t() @ F.linear(dropped, a)).mul_(linear.scale).to(wide_b.dtype))
                if wants_x and not kept:
                    dx.addmm_(low, a)
                elif wants_x:
                    dx += _drop(low @ a, kept, ctx.rate)
        back = torch.autograd.grad(made, inputs, dx) if wants_x else [None] * count
        return None, None, None, *back, *found


def _drop(x, kept, rate):
    return x * kept[0] / (1 - rate) if len(kept) else x


def project(linears, make, *inputs):
    """model.project for layers of which some are LoRALinear: the same values, less to keep for the backward pass."""
    adapted = [linear for linear in linears if isinstance(linear, LoRALinear)]
    matrices = [matrix for linear in adapted for matrix in (linear.lora_A, linear.lora_B)]
    return _Project.apply(linears, make, len(inputs), *inputs, *matrices)


def layers(model: LanguageModel) -> dict[str, LoRALinear]:
    """The adapter's layers, by the name of the linear layer that each stands for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _put(model: LanguageModel, name: str, rank: int, scale: float, dropout: float = 0.0) -> LoRALinear:
    """Replace the linear layer of this name, such as model.layers.0.self_attn.q_proj, by a LoRALinear."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    layer = LoRALinear(getattr(module, leaf), rank, scale, dropout)
    setattr(module, leaf, layer)
    module.project = project
    return layer


def attach(model: LanguageModel, rank: int, alpha: float, targets=TARGETS, dropout: float = 0.0, seed: int = 0) -> None:
    """Put a new adapter on every linear layer of these names; its A and B are what trains.

    A is Kaiming-uniform as in the paper's code, drawn from `seed`, and B zero: at first the model is unchanged.
    InputError for a rank that a matrix cannot have.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]:
        limit = min(model.get_submodule(name).weight.shape)
        if not 1 <= rank <= limit:
            raise InputError(f"--rank {rank}: {name} takes ranks from 1 to {limit}; choose a smaller one, or --target")
        layer = _put(model, name, rank, alpha / rank, dropout)
        bound = 1 / math.sqrt(layer.lora_A.shape[1])  # Kaiming-uniform with a = sqrt(5)
        with torch.no_grad():
            layer.lora_A.copy_(torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator))


# Files


def save(model: LanguageModel, folder: Path, base: str, rank: int, alpha: float, dropout: float) -> None:
    """Write the adapter as PEFT does, each file whole or not at all. base: what base_model_name_or_path says."""
    found = layers(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in found}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }
    tensors = {}
    for name, layer in found.items():
        for matrix in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{name}.{matrix}.weight"] = getattr(layer, matrix).detach().cpu().contiguous()
    write_tensors(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, config)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file, written beside `path`, flushed to disk and renamed over it."""
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, beside, metadata={"format": "pt"})
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, safetensors.SafetensorError) as error:
        beside.unlink(missing_ok=True)
        text = str(error)
        raise no_room(path, error if isinstance(error, OSError) else OSError(5, text)) from None


def _read_config(folder: Path) -> dict:
    """adapter_config.json. InputError, naming the key, for what is not plain LoRA."""
    path = folder / CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {config.get('peft_type')!r} is not supported: only LORA is")
    for key, value in config.items():  # what is not known to be harmless changes what the adapter computes, unless off
        if key not in HARMLESS.split() and value and value not in PLAIN.get(key, ()):
            raise InputError(f"{path}: {key} = {json.dumps(value)} is not supported: only plain LoRA is")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise InputError(f"{path}: {key} is missing or not a number")
    return config


def _pattern(patterns: dict | None, name: str, default: float) -> float:
    """The value of the first pattern that the layer's name ends in, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def load(model: LanguageModel, folder: Path) -> str:
    """Put a saved adapter, ours or PEFT's, on a model. Returns the sha256 of its two files.

    Layers are those that the file has tensors for, ranks those of the tensors. InputError where the adapter is of
    another kind, or for a model of other layers or shapes.
    """
    config, path = _read_config(folder), folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path}: no such file; an adapter's folder needs it")
    entries, pairs = read_header(path), {}
    for key in entries:
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])(?:\.default)?\.weight", key)
        if not match:
            raise InputError(f"{path}: tensor {key} is not a LoRA matrix of a linear layer; not supported")
        pairs.setdefault(match[1], {})[match[2]] = key
    modules = dict(model.named_modules())
    for name, keys in pairs.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            raise InputError(f"{path}: adapts {name}, which this model does not have; it is for another model")
        if len(keys) < 2:
            raise InputError(f"{path}: {name} lacks one of lora_A and lora_B")
        a, b = entries[keys["lora_A"]], entries[keys["lora_B"]]
        out_features, in_features = linear.weight.shape
        if len(a.shape) != 2 or a.shape[1] != in_features or b.shape != (out_features, a.shape[0]):
            raise InputError(
                f"{path}: {name} has A {list(a.shape)} and B {list(b.shape)}, the model's matrix is "
                f"{[out_features, in_features]}; it is for another model"
            )
        rank = a.shape[0]
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        layer = _put(model, name, rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        with open(path, "rb", buffering=0) as file, torch.no_grad():
            layer.lora_A.copy_(read_tensor(file, a, keys["lora_A"]))
            layer.lora_B.copy_(read_tensor(file, b, keys["lora_B"]))
    if not pairs:
        raise InputError(f"{path}: holds no tensors")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return hashlib.sha256((folder / CONFIG).read_bytes() + path.read_bytes()).hexdigest()


def merge(model: LanguageModel, checkpoint: Path, folder: Path) -> None:
    """Write a full checkpoint, W + (alpha / r) B A in the place of W, that any other program loads.

    Goes file by file over the original one, in its own dtypes, and copies all that is not weights.
    """
    found = layers(model)
    entries = read_headers(checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(checkpoint.iterdir()):
            if file.suffix in (".json", ".jinja", ".model", ".txt"):
                shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise no_room(folder, error) from None
    for file in sorted({entry.file for entry in entries.values()}):
        tensors = {}
        with open(file, "rb", buffering=0) as source:
            for name, entry in ((n, e) for n, e in entries.items() if e.file == file):
                tensors[name] = read_tensor(source, entry, name)
                layer = found.get(name.removesuffix(".weight"))
                if layer is not None:
                    delta = layer.scale * (layer.lora_B @ layer.lora_A).detach().cpu()
                    tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
        write_tensors(tensors, folder / file.name)
