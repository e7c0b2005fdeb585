"""The decoder: Llama 3, Qwen2.5 and Gemma 2 in one file.

Notable:
- there is no batch dimension and no padding: the input is T tokens, their positions, and an
  attention (see forest.py) that knows which token sees which;
- the families differ by fields of `Config`, which is read from the checkpoint's own config.json:
  biases on q, k, v (Qwen2.5); two more norms, soft-caps, a sliding window on every other layer,
  scaled embeddings and an offset of one in the norms' weights (Gemma 2);
- modules carry the names of the checkpoint's tensors, so that loading needs no table of names;
- `forward` can stop early: with `read`, the last layer goes on only where an answer is read.

Sources: Llama 3 (arXiv 2407.21783), Qwen2.5 (2412.15115), Gemma 2 (2408.00118), rotary
embedding (2104.09864), grouped-query attention (2305.13245), RMSNorm (1910.07467).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

ROWS_PER_THREAD = 16  # products of fewer rows round differently, so every block has a multiple of it for each thread
MLP_ROWS = 1024  # tokens that go through an MLP at a time on the CPU: what it holds then stays in cache
HEAD_WORDS = 16384  # rows of a half-precision output matrix that are widened at the same time


class UnsupportedModel(ValueError):
    """config.json asks for something that this decoder does not implement."""


@dataclass(frozen=True)
class Config:
    """The shape of a decoder. Lengths in tokens, widths in floats."""

    family: str  # "llama", "qwen2" or "gemma2"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int  # longest sequence the model was made for
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # Llama 3.1's, else None
    tied: bool  # the output matrix is the embedding
    dtype: torch.dtype  # what the weights are stored in
    qkv_bias: bool = False
    norm_offset: float = 0.0  # Gemma 2 stores the norms' weights minus one
    post_norms: bool = False  # Gemma 2 also norms what attention and MLP give
    embed_scale: float = 1.0
    activation: str = "silu"  # or "gelu_tanh"
    attention_scale: float = 0.0  # what q k is multiplied by
    attention_softcap: float | None = None
    final_softcap: float | None = None
    windows: tuple[int | None, ...] = ()  # per layer: how far back a query sees, None: all the way

    @classmethod
    def from_json(cls, config: dict) -> "Config":
        """The contents of config.json, in the older or the newer spelling, as a Config.

        Raises UnsupportedModel, naming the key, for what the decoder does not implement, and
        KeyError for a key that is missing.
        """
        family = config.get("model_type")
        if family not in ("llama", "qwen2", "gemma2"):
            raise UnsupportedModel(f"model_type {family!r} is not supported: only llama, qwen2 and gemma2 are")
        if config.get("quantization_config"):
            raise UnsupportedModel("quantization_config: quantized weights are not supported, use the original ones")
        if family == "qwen2" and config.get("use_sliding_window"):
            raise UnsupportedModel("use_sliding_window: Qwen2 with a sliding window is not supported")
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise UnsupportedModel(f"{key}: biases on these projections are not supported")

        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        theta, scaling = _rope(config)
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UnsupportedModel(f"dtype {dtype!r} is not supported")
        activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
        if family == "gemma2":  # early Gemma 2 files name plain gelu in hidden_act and mean the tanh form
            activation = "gelu_tanh" if activation in ("gelu", "gelu_pytorch_tanh") else activation
        if activation != ("gelu_tanh" if family == "gemma2" else "silu"):
            raise UnsupportedModel(f"activation {activation!r} is not supported for {family}")
        shape = dict(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            context=config.get("max_position_embeddings") or 8192,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=config.get("tie_word_embeddings", family == "gemma2"),
            dtype=getattr(torch, dtype),
            qkv_bias=family == "qwen2",
            activation=activation,
            attention_scale=head_dim**-0.5,
            windows=(None,) * layers,
        )
        if family == "gemma2":
            window = config.get("sliding_window")
            kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * layers
            shape.update(
                norm_offset=1.0,
                post_norms=True,
                embed_scale=config["hidden_size"] ** 0.5,
                attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
                attention_softcap=config.get("attn_logit_softcapping"),
                final_softcap=config.get("final_logit_softcapping"),
                windows=tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers]),
            )
        return cls(**shape)


def _rope(config: dict) -> tuple[float, dict | None]:
    """Base and scaling of the rotary embedding, in either spelling of config.json."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise UnsupportedModel(f"rope type {kind!r} is not supported: only default and llama3 are")
    return float(theta), rope if kind == "llama3" else None


def rope_frequencies(config: Config, device: torch.device) -> torch.Tensor:
    """Angle per position of each pair of head dimensions: (head_dim / 2,) float32.

    Llama 3.1 stretches wavelengths longer than the context it was first trained on by `factor`,
    keeps short ones, and goes from one to the other linearly in between.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    rope = config.rope_scaling
    low, high, trained = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = trained * frequencies / (2 * math.pi)  # full turns that a pair makes over the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / rope["factor"])


def rope_table(config: Config, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine (T, 1, head_dim) and sine (T, 1, head_dim / 2) of every token's angles.

    The angle is float32, as in training; cosine and sine go through float64 on the CPU, so that their
    float32 values do not depend on which vector lane a token falls into.
    """
    angles = positions[:, None, None].float() * rope_frequencies(config, positions.device)
    angles = angles.double() if positions.device.type == "cpu" else angles
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), sin


class Rotate(torch.autograd.Function):
    """Rotary embedding of x (T, heads, head_dim): dimension i is paired with i + head_dim / 2."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotate.turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):  # a rotation's transpose is the rotation back
        cos, sin = ctx.saved_tensors
        return Rotate.turn(grad, cos, -sin), None, None

    @staticmethod
    def turn(x, cos, sin):
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half] -= x[..., half:] * sin
        out[..., half:] += x[..., :half] * sin
        return out


def project(linears, make, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What each of several linear layers gives for one input, make(*inputs): a list of (T, out_features).

    make is a norm or a gate: cheap, and of each row alone. An adapter in training puts its own `project` in this
    one's place (lora.py), which keeps the inputs for the backward pass and makes the rest again.
    """
    x = make(*inputs)
    return [linear(x) for linear in linears]


class RMSNorm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:  # Gemma 2 multiplies in float32, Llama and Qwen after rounding
            return (wide * (self.offset + self.weight.float())).to(x.dtype)
        return wide.to(x.dtype) * self.weight


def flatten_heads(seen: torch.Tensor) -> torch.Tensor:
    return seen.flatten(-2)  # (T, heads, head_dim) to (T, heads * head_dim)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        width, bias = config.head_dim, config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * width, bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * width, bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * width, bias)
        self.o_proj = nn.Linear(config.num_heads * width, config.hidden_size, bias=False)
        self.head_dim, self.project = width, project
        self.rule = {
            "window": config.windows[layer],
            "softcap": config.attention_softcap,
            "scale": config.attention_scale,
        }

    def forward(self, x, norm, rope, attend, read=None):
        q, k, v = self.project((self.q_proj, self.k_proj, self.v_proj), norm, x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))  # (T, heads or kv heads, head_dim)
        seen = attend(Rotate.apply(q, *rope), Rotate.apply(k, *rope), v, **self.rule)
        last = flatten_heads if read is None else lambda seen: flatten_heads(seen[read])
        (out,) = self.project((self.o_proj,), last, seen)
        return out


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation, self.project = config.activation, project

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        gate, up = self.project((self.gate_proj, self.up_proj), norm, x)
        (out,) = self.project((self.down_proj,), self.gated, gate, up)
        return out


def in_blocks(function, x: torch.Tensor) -> torch.Tensor:
    """function(x), for a function of each row alone, over blocks of about MLP_ROWS rows on the CPU.

    Where x has a multiple of ROWS_PER_THREAD rows for each thread, so has every block.
    """
    if x.is_cuda or torch.is_grad_enabled():
        return function(x)
    whole = ROWS_PER_THREAD * torch.get_num_threads()
    size = max(MLP_ROWS // whole, 1) * whole
    out = torch.empty_like(x)
    for rows, result in zip(x.split(size), out.split(size)):
        result.copy_(function(rows))
    return out


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config)
            self.post_feedforward_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        self.post_norms = config.post_norms

    def forward(self, x, rope, attend, read=None):
        seen = self.self_attn(x, self.input_layernorm, rope, attend, read)
        x = x if read is None else x[read]
        if not self.post_norms:
            return in_blocks(lambda x: x + self.mlp(x, self.post_attention_layernorm), x + seen)
        x = x + self.post_attention_layernorm(seen)
        return in_blocks(lambda x: x + self.post_feedforward_layernorm(self.mlp(x, self.pre_feedforward_layernorm)), x)


class Checkpoint(torch.autograd.Function):
    """A layer of which only the input is kept, and which runs again in the backward pass.

    kept: where the input is copied to. The inputs of all layers lie in one tensor: lying among all that a layer frees
    again, they were seen to keep 0.85 GB of it from being used by the next (30 layers of 2,000 tokens).
    Chen et al. 2016, arXiv 1604.06174.
    """

    @staticmethod
    def forward(ctx, layer, x, kept, *rest):
        ctx.layer, ctx.kept, ctx.rest = layer, kept.copy_(x), rest
        ctx.random = torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()
        return layer(x, *rest)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.kept.detach().requires_grad_()
        with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.enable_grad():
            (torch.cuda.set_rng_state if x.is_cuda else torch.set_rng_state)(ctx.random)  # the same dropout
            out = ctx.layer(x, *ctx.rest)
        torch.autograd.backward(out, grad)  # the adapter's gradients add up in place
        return None, x.grad, None, *(None for _ in ctx.rest)


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # from_pretrained: the plain constructor draws random weights, which on the meta device imports 800 modules
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config)
        self.checkpointing = False  # in training: keep less, compute more

    def forward(self, tokens, positions, attend, read=None):
        x = self.embed_tokens(tokens)
        if self.config.embed_scale != 1:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype, device=x.device)
        rope = rope_table(self.config, positions, x.dtype)
        reads = [None] * (len(self.layers) - 1) + [read]
        if self.checkpointing and torch.is_grad_enabled():
            kept, x = x.new_empty(len(self.layers), *x.shape), x.requires_grad_()
            for layer, place, where in zip(self.layers, kept, reads):
                x = Checkpoint.apply(layer, x, place, rope, attend, where)
        else:
            for layer, where in zip(self.layers, reads):
                x = layer(x, rope, attend, where)
        return self.norm(x)


class LanguageModel(nn.Module):
    """A decoder and its output matrix; the names below it are the checkpoint's tensor names."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend, read=None) -> torch.Tensor:
        """Hidden states after the last norm.

        tokens, positions: (T,) int64. attend(q, k, v, window, softcap, scale): q (T, heads, head_dim)
        and k, v (T, kv heads, head_dim) to (T, heads, head_dim); forest.py makes it. read: (R,) int64
        token indices, or None for all T. Returns (R or T, hidden_size) in the weights' dtype.
        """
        return self.model(tokens, positions, attend, read)

    @property
    def output_matrix(self) -> torch.Tensor:
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits (R, vocab_size) of hidden states (R, hidden_size), whatever the weights' dtype.

        Half precision would tie options that differ: the product is accumulated and kept in float32.
        """
        weight = self.output_matrix
        if weight.dtype == torch.float32:
            logits = F.linear(hidden, weight)
        elif weight.is_cuda:
            logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        else:
            logits = torch.cat([F.linear(hidden.float(), w.float()) for w in weight.split(HEAD_WORDS)], dim=-1)
        cap = self.config.final_softcap
        if cap is None:
            return logits
        wide = logits if logits.is_cuda else logits.double()  # as for cosine and sine above
        return (cap * torch.tanh(wide / cap)).float()
