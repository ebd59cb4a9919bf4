"""The encoder-decoder Transformer of translation, as GradInit trains it, and its search for a translation.

Axes: b sentences, s and t tokens of the source and the target, d channels, n vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from common.functional import in_evaluation_mode

NORMS = ("post", "pre", "none")


def sinusoids(length: int, dim: int) -> Float[Tensor, "length dim"]:
    r"""Positions as waves: P[p, 2i] = sin(p / 10000^(2i/d)), P[p, 2i+1] = cos(p / 10000^(2i/d))."""
    angle = torch.arange(length)[:, None] / 10_000.0 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Attention(nn.Module):
    r"""softmax(Q Kᵀ/√(d/heads) + mask) V head by head, Q of `x`, K and V of `memory`, then the output projection.

    q_proj, k_proj, v_proj: Xavier uniform with gain 1/√2, torch's default biases. out_proj: gain 1, bias zero.
    """

    def __init__(self, dim: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s d"],
        *,
        mask: Bool[Tensor, "b 1 1 s"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b t d"]:
        Q, K, V = (
            projection(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, y in ((self.q_proj, x), (self.k_proj, memory), (self.v_proj, memory))
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(Q, K, V, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    r"""Residual branches F: self-attention, with `cross` attention to the source, and a network fc2 ∘ ReLU ∘ fc1.

    norm(x + F(x)) with norm "post", x + F(norm(x)) with "pre", x + F(x) with "none". Self-attention is causal in a
    layer with `cross`, a decoder's, and otherwise masked as the source is. fc1 and fc2 start as torch has them.
    """

    def __init__(
        self,
        dim: int,
        feedforward: int,
        heads: int,
        *,
        cross: bool,
        norm: str,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
    ) -> None:
        super().__init__()

        def make_norm() -> nn.Module:
            return nn.Identity() if norm == "none" else nn.LayerNorm(dim)

        self.post = norm == "post"
        self.self_attn, self.self_attn_norm = Attention(dim, heads, dropout=attention_dropout), make_norm()
        self.cross_attn = Attention(dim, heads, dropout=attention_dropout) if cross else None
        self.cross_attn_norm = make_norm() if cross else nn.Identity()
        self.fc1, self.fc2, self.final_norm = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim), make_norm()
        self.activation, self.activation_dropout = nn.ReLU(), nn.Dropout(activation_dropout)
        self.dropout = nn.Dropout(dropout)

    def feedforward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_dropout(self.activation(self.fc1(x))))

    def residual(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.post:
            return norm(x + self.dropout(branch(x)))
        return x + self.dropout(branch(norm(x)))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b 1 1 s"],
        memory: Float[Tensor, "b s d"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        cross = self.cross_attn
        if cross is None:
            x = self.residual(x, self.self_attn_norm, lambda x: self.self_attn(x, x, mask=mask))
        else:
            x = self.residual(x, self.self_attn_norm, lambda x: self.self_attn(x, x, causal=True))
            x = self.residual(x, self.cross_attn_norm, lambda x: cross(x, memory, mask=mask))
        return self.residual(x, self.final_norm, self.feedforward)


class Stack(nn.Module):
    r"""One side of the Transformer: √d · embedding + positions → layers → with norm "pre", a last norm.

    The embedding is N(0, 1/d), its padding row zero.
    """

    positions: Tensor

    def __init__(
        self,
        vocabulary_size: int,
        dim: int,
        layers: list[TransformerLayer],
        *,
        norm: str,
        dropout: float,
        padding: int,
        max_length: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, dim, padding_idx=padding)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        with torch.no_grad():
            self.embedding.weight[padding] = 0.0
        self.register_buffer("positions", sinusoids(max_length, dim), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()

    def forward(
        self,
        tokens: Int64[Tensor, "b t"],
        mask: Bool[Tensor, "b 1 1 s"],
        memory: Float[Tensor, "b s d"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        length, (longest, dim) = tokens.shape[1], self.positions.shape
        if length > longest:
            raise ValueError(
                f"Transformer: sentences must have at most {longest} tokens (`max_length`), got {length}. "
                "Shorten them, or build the model with a larger `max_length`: it has no parameters."
            )
        x = self.dropout(math.sqrt(dim) * self.embedding(tokens) + self.positions[:length])
        for layer in self.layers:
            x = layer(x, mask, memory)
        return self.norm(x)


class Transformer(nn.Module):
    r"""The Transformer (Vaswani et al. 2017) for translation; at its defaults GradInit's for IWSLT'14.

    source (b, s) → encoder → memory (b, s, d); target_in (b, t) and memory → decoder → output projection → logits
    (b, t, n), those at position i for the token that follows target_in[:, i]. Sentences are padded at their end:
    the source's padding is attended to by nobody, the target's by nothing that comes before it.

    As fairseq's `transformer_iwslt_de_en`, which the released code uses: separate projections of query, key and value;
    the source's embedding on its own, the target's one tensor with the output projection; weights as `Attention`,
    `TransformerLayer` and `Stack` say, which `common.initializers.transformer_` draws from a generator. Ours: sines
    and cosines of positions alternate, a permutation of fairseq's channels, and positions count from 0.

    Args:
        vocabulary_size: Tokens of source and target, those of padding, beginning and end among them.
        dim: Channels d, even and a multiple of `heads`.
        feedforward: Hidden units of the layers' networks.
        norm: Layer normalisation after each residual sum ("post"), before each branch and at the end of both sides
            ("pre"), or nowhere ("none", for `common.initializers.tfixup_`).
        dropout: Of embeddings and of every residual branch.
        attention_dropout: Of attention's weights.
        activation_dropout: Of hidden units.
        padding: The token that fills sentences up.
        max_length: The most tokens of a sentence. No parameter depends on it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        dim: int = 512,
        feedforward: int = 1024,
        heads: int = 4,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        norm: str = "post",
        dropout: float = 0.3,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.1,
        padding: int = 0,
        max_length: int = 1024,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"Transformer: `norm` must be one of {', '.join(NORMS)}, got {norm!r}.")
        if dim % 2 or dim % heads:
            raise ValueError(f"Transformer: `dim` must be even and a multiple of `heads`, got {dim} and {heads}.")
        if min(encoder_layers, decoder_layers) < 1:
            raise ValueError(f"Transformer: both sides need a layer, got {encoder_layers} and {decoder_layers}.")
        if not 0 <= padding < vocabulary_size:
            raise ValueError(f"Transformer: `padding` must be one of {vocabulary_size} tokens, got {padding}.")
        self.dim, self.norm, self.padding = dim, norm, padding

        def stack(layers: int, *, cross: bool) -> Stack:
            built = [
                TransformerLayer(
                    dim,
                    feedforward,
                    heads,
                    cross=cross,
                    norm=norm,
                    dropout=dropout,
                    attention_dropout=attention_dropout,
                    activation_dropout=activation_dropout,
                )
                for _ in range(layers)
            ]
            return Stack(
                vocabulary_size, dim, built, norm=norm, dropout=dropout, padding=padding, max_length=max_length
            )

        self.encoder = stack(encoder_layers, cross=False)
        self.decoder = stack(decoder_layers, cross=True)
        self.output = nn.Linear(dim, vocabulary_size, bias=False)
        self.output.weight = self.decoder.embedding.weight

    def encode(self, source: Int64[Tensor, "b s"]) -> tuple[Float[Tensor, "b s d"], Bool[Tensor, "b 1 1 s"]]:
        """The source as the decoder attends to it, and which of its tokens there are."""
        mask = (source != self.padding)[:, None, None]
        return self.encoder(source, mask), mask

    def forward(self, source: Int64[Tensor, "b s"], target_in: Int64[Tensor, "b t"]) -> Float[Tensor, "b t n"]:
        memory, mask = self.encode(source)
        return self.output(self.decoder(target_in, mask, memory))

    @torch.no_grad()
    def generate(
        self, source: Int64[Tensor, "b s"], *, bos: int, eos: int, max_length: int, beam: int = 1
    ) -> Int64[Tensor, "b t"]:
        r"""The translation that a beam search finds the most likely a token; with `beam` 1 it is greedy.

        Every step extends each of the `beam` best hypotheses by every token but padding and keeps those of the
        highest mean log-probability, (1/|y|) Σ log p(yᵢ | y₁ … yᵢ₋₁), EOS counted. One that has ended stays in
        the beam as it is; the search ends when all have, or at `max_length`. Dropout is off meanwhile.

        Args:
            bos: The token a target begins with.
            eos: The token a target ends with.
            max_length: The most tokens of a translation, `eos` among them.
            beam: Hypotheses kept.

        Returns:
            Tokens without `bos`, up to `eos` if it came within `max_length`, and padding from there on.
        """
        if beam < 1 or max_length < 1:
            raise ValueError(
                f"generate: `beam` and `max_length` must be at least 1, got {beam} and {max_length}. Greedy is beam=1."
            )
        with in_evaluation_mode(self):
            return self._search(source, bos, eos, max_length, beam)

    def _search(self, source: Tensor, bos: int, eos: int, max_length: int, beam: int) -> Tensor:
        memory, mask = (part.repeat_interleave(beam, 0) for part in self.encode(source))
        sentences, vocabulary = len(source), self.output.out_features
        # Hypotheses of one sentence lie side by side; at first one is alive, the others would be its copies.
        tokens = source.new_full((sentences * beam, 1), bos)
        score = memory.new_full((sentences, beam), -math.inf).float()
        score[:, 0] = 0.0
        ended = score.new_zeros(score.shape, dtype=torch.bool)
        length = torch.zeros_like(score)
        first_row = beam * torch.arange(sentences, device=source.device)[:, None]
        only_padding = score.new_full((vocabulary,), -math.inf)
        only_padding[self.padding] = 0.0
        for _ in range(max_length):
            logits = self.output(self.decoder(tokens, mask, memory)[:, -1]).float()
            logits[:, self.padding] = -math.inf
            log_p = logits.log_softmax(-1).unflatten(0, (sentences, beam))
            total = score[..., None] + torch.where(ended[..., None], only_padding, log_p)
            length = length + ~ended
            best = (total / length[..., None]).flatten(1).topk(beam).indices  # the best first
            parent, token = best // vocabulary, best % vocabulary
            score, length = total.flatten(1).gather(1, best), length.gather(1, parent)
            ended = ended.gather(1, parent) | (token == eos)
            tokens = torch.cat([tokens[(first_row + parent).flatten()], token.reshape(-1, 1)], 1)
            if ended.all():
                break
        return tokens.unflatten(0, (sentences, beam))[:, 0, 1:]
