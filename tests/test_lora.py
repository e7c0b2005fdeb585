"""The LoRA layer, its backward pass and its files, against autograd, PEFT and transformers."""

import json
import math
import shutil
import warnings

import peft
import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eicap import InputError, checkpoint, lora
from eicap import model as plain
from eicap.forest import attention, chain, pack
from eicap.model import Config, LanguageModel
from train_lora import CrossEntropy

FAMILIES = ["llama", "qwen2", "gemma2"]


def adapted(folder, rank=4, alpha=8, **more):
    """A model with an adapter whose B is not zero."""
    model, _ = checkpoint.load(folder)
    lora.attach(model, rank, alpha, **more)
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in lora.layers(model).values():
            layer.lora_B.normal_(std=0.05)
    return model


def matrices(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{matrix}": getattr(layer, matrix)
        for name, layer in lora.layers(model).items()
        for matrix in ("lora_A", "lora_B")
    }


def chains(*lengths):
    generator = torch.Generator().manual_seed(1)
    return pack([chain(torch.randint(0, 4000, (n,), generator=generator).tolist()) for n in lengths])[0]


def hidden(model, forest):
    return model(forest.tokens, forest.positions, attention(forest, torch.float32))


def logits(model, forest):
    with torch.no_grad():
        return model.logits(hidden(model, forest))


def test_the_layer_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    linear = torch.nn.Linear(7, 5)
    layer = lora.LoRALinear(linear, 3, scale=8 / 3)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(11, 7)
    expected = x @ linear.weight.T + linear.bias + 8 / 3 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), expected)


def test_a_new_adapter_changes_nothing_and_its_a_is_kaiming_uniform(checkpoints):
    model, _ = checkpoint.load(checkpoints["qwen2"])
    forest = chains(50)
    before = logits(model, forest)
    lora.attach(model, 8, 16, seed=5)
    assert torch.equal(logits(model, forest), before)
    a = torch.cat(
        [layer.lora_A.detach().flatten() * math.sqrt(layer.lora_A.shape[1]) for layer in lora.layers(model).values()]
    )
    assert a.abs().max() <= 1 and a.var() == pytest.approx(1 / 3, rel=0.05)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, _ in model.named_parameters() if "lora" in name
    ]


def test_the_count_of_trained_parameters_is_that_of_qwen2_5_7b_at_rank_16():
    config = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
              "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}  # fmt: skip
    with torch.device("meta"):
        model = LanguageModel(Config.from_json(config))
        for name in [name for name, _ in model.named_modules() if name.rpartition(".")[2] in lora.TARGETS]:
            lora._put(model, name, 16, 2.0)
    trained = sum(m.numel() for m in matrices(model).values())
    assert trained == 40_370_176
    assert trained / sum(p.numel() for p in model.parameters()) == pytest.approx(0.0053, abs=5e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_backward_pass_of_a_projection_is_right(dropout):
    torch.manual_seed(0)
    linears = [torch.nn.Linear(6, 4), lora.LoRALinear(torch.nn.Linear(6, 5), 2, 1.7, dropout)]
    linears.append(lora.LoRALinear(torch.nn.Linear(6, 3, bias=False), 3, 0.5, dropout))
    for linear in linears:
        linear.double().requires_grad_(False)
    x, y = torch.randn(9, 6, dtype=torch.double), torch.randn(9, 6, dtype=torch.double)
    pairs = [torch.randn_like(m) for layer in linears[1:] for m in (layer.lora_A, layer.lora_B)]
    inputs = [tensor.requires_grad_() for tensor in (x, y, *pairs)]

    def outputs(x, y, *pairs):
        torch.manual_seed(7)  # the same mask every time
        return lora._Project.apply(linears, lambda x, y: torch.sigmoid(x) * y, 2, x, y, *pairs)

    assert torch.autograd.gradcheck(outputs, inputs)


def test_dropout_drops_its_share_and_keeps_the_mean():
    layer = lora.LoRALinear(torch.nn.Linear(1000, 1, bias=False).requires_grad_(False), 1, 1.0, dropout=0.25)
    layer.weight.zero_()
    torch.nn.init.ones_(layer.lora_A)
    torch.nn.init.ones_(layer.lora_B)
    (out,) = lora.project([layer], lambda x: x, torch.ones(2000, 1000))
    assert out.mean().item() == pytest.approx(1000, rel=0.01) and out.std().item() > 1
    (out,) = lora.project([layer.eval()], lambda x: x, torch.ones(5, 1000))
    assert out.tolist() == [[1000.0]] * 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_autograd_through_the_plain_layers(checkpoints, family, checkpointing):
    model, forest = adapted(checkpoints[family]), chains(60, 9, 45)
    direction = torch.randn(len(forest), model.config.hidden_size)
    found = {}
    for kind in ("ours", "autograd"):
        for module in model.modules():
            if hasattr(module, "project"):
                module.project = lora.project if kind == "ours" else plain.project
        model.model.checkpointing = checkpointing and kind == "ours"
        model.zero_grad()
        hidden(model, forest).backward(direction)
        found[kind] = [matrix.grad for matrix in matrices(model).values()]
    for name, mine, right in zip(matrices(model), found["ours"], found["autograd"]):
        assert right.abs().max() > 1e-3, name
        torch.testing.assert_close(mine, right, atol=1e-4 * right.abs().max().item(), rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_peft(checkpoints, family, tmp_path):
    model, forest = adapted(checkpoints[family]), chains(70)
    lora.save(model, tmp_path, str(checkpoints[family]), 4, 8, 0.0)
    base = AutoModelForCausalLM.from_pretrained(checkpoints[family], attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ids = forest.tokens[None]
    right = theirs(input_ids=ids, labels=ids).loss
    right.backward()
    x = hidden(model, forest)
    loss = CrossEntropy.apply(x[:-1], forest.tokens[1:], model) / (len(forest) - 1)
    loss.backward()
    assert loss.item() == pytest.approx(right.item(), abs=1e-5)
    expected = {name.replace(".default.weight", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, mine in matrices(model).items():
        grad = expected[f"base_model.model.{name}"]
        torch.testing.assert_close(mine.grad, grad, atol=1e-4 * grad.abs().max().item(), rtol=1e-3, msg=name)


def test_nothing_is_kept_for_the_backward_pass_but_what_must_be(checkpoints):
    model, forest = adapted(checkpoints["llama"], rank=1), chains(40, 88)
    config, tokens = model.config, len(forest)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = hidden(model, forest)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    floats = sum(size for at, size in kept.items() if at not in weights) / tokens
    heads = config.num_heads * config.head_dim
    layer = 2 * config.hidden_size  # the residual stream, before either norm
    layer += heads + 2 * config.num_kv_heads * config.head_dim  # q, k, v
    layer += 2 * heads  # what attention gives, chain by chain and side by side
    layer += config.num_heads  # its log-sum-exp
    layer += 2 * config.intermediate_size  # gate and up
    once = 2 * config.hidden_size + 2 * config.head_dim  # around the last norm; cosine and sine
    assert x.requires_grad and floats <= config.num_layers * layer + once


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_save_without_a_warning_and_gives_the_same_logits(checkpoints, family, tmp_path):
    model, forest = adapted(checkpoints[family]), chains(64)
    lora.save(model, tmp_path, str(checkpoints[family]), 4, 8, 0.0)
    base = AutoModelForCausalLM.from_pretrained(checkpoints[family], attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's use of transformers
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=forest.tokens[None]).logits[0]
    torch.testing.assert_close(logits(model, forest), expected, atol=1e-4, rtol=0)
    again, _ = checkpoint.load(checkpoints[family])
    lora.load(again, tmp_path)
    assert torch.equal(logits(again, forest), logits(model, forest))


def peft_adapter(folder, out, **settings):
    """An adapter that PEFT made, with random A and B; returns PEFT's model."""
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    theirs.save_pretrained(out)
    return theirs.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "k_proj", "down_proj"], "rank_pattern": {"q_proj": 7, r"layers\.1.*down_proj": 2},
         "alpha_pattern": {"k_proj": 3, r".*layers\.2\.self_attn\.q_proj": 40}},
        {"target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1, 3], "lora_dropout": 0.3},
    ],
    ids=["two", "rslora", "patterns", "some layers"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_adapters_of_peft_load_here_and_give_the_same_logits(checkpoints, family, settings, tmp_path):
    theirs = peft_adapter(checkpoints[family], tmp_path, **settings)
    model, _ = checkpoint.load(checkpoints[family])
    forest = chains(64)
    before = logits(model, forest)
    lora.load(model, tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=forest.tokens[None]).logits[0]
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, forest), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(checkpoints, settings, word, tmp_path):
    peft_adapter(checkpoints["qwen2"], tmp_path, **{"target_modules": ["q_proj"]} | settings)
    model, _ = checkpoint.load(checkpoints["qwen2"])
    with pytest.raises(InputError, match=word):
        lora.load(model, tmp_path)


def test_an_adapter_that_is_not_lora_is_refused_by_name(checkpoints, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2"])
    peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="IA3"):
        lora.load(checkpoint.load(checkpoints["qwen2"])[0], tmp_path)


def test_an_adapter_for_another_model_is_refused_by_tensor(checkpoints, tmp_path):
    lora.save(adapted(checkpoints["qwen2"]), tmp_path / "a", "qwen2", 4, 8, 0.0)
    with pytest.raises(InputError, match=r"layers\.\d\.self_attn\..*another model"):
        lora.load(checkpoint.load(checkpoints["gemma2"])[0], tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / lora.WEIGHTS)
    tensors = {name.replace("layers.3.", "layers.9."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "b" / lora.WEIGHTS)
    with pytest.raises(InputError, match=r"layers\.9.*does not have"):
        lora.load(checkpoint.load(checkpoints["qwen2"])[0], tmp_path / "b")


@pytest.mark.parametrize("damage", ["cut", "half a pair", "no weights", "no r", "not JSON"])
def test_a_damaged_adapter_is_an_error_that_names_the_file(checkpoints, tmp_path, damage):
    lora.save(adapted(checkpoints["qwen2"]), tmp_path, "qwen2", 4, 8, 0.0)
    config, weights = tmp_path / lora.CONFIG, tmp_path / lora.WEIGHTS
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "half a pair":
        tensors = load_file(weights)
        tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
        save_file(tensors, weights)
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no r":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "r"}))
    else:
        config.write_text("{")
    with pytest.raises(InputError, match=lora.CONFIG if damage in ("no r", "not JSON") else lora.WEIGHTS):
        lora.load(checkpoint.load(checkpoints["qwen2"])[0], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_loads_in_transformers_with_the_same_logits(checkpoints, family, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints[family], source)
    if family == "llama":  # in several files, with an index
        for file in source.glob("*.safetensors"):
            file.unlink()
        random_model(family).save_pretrained(source, max_shard_size="200KB")
        assert len(list(source.glob("*.safetensors"))) > 2
    model, forest = adapted(source), chains(64)
    lora.merge(model, source, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.no_grad():
        expected = theirs(input_ids=forest.tokens[None]).logits[0]
    torch.testing.assert_close(logits(model, forest), expected, atol=1e-4, rtol=0)
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()


def test_a_rank_that_a_matrix_cannot_have_is_refused(checkpoints):
    for rank in (0, 33):
        with pytest.raises(InputError, match=r"k_proj takes ranks from 1 to 32"):
            lora.attach(checkpoint.load(checkpoints["qwen2"])[0], rank, 8, targets=["k_proj"])


def test_saved_bytes_do_not_depend_on_the_process(checkpoints, tmp_path):
    for name in ("a", "b"):
        lora.save(adapted(checkpoints["qwen2"]), tmp_path / name, "qwen2", 4, 8, 0.0)
    for name in (lora.CONFIG, lora.WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
