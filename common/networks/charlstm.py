"""The character language model of DIMAML: an LSTM with a derivative of every order, or in torch's fused kernel.

Axes: b streams, t characters, d channels, n vocabulary. GATES is torch's order of the gates.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from common.functional import in_evaluation_mode

GATES = ("input", "forget", "cell", "output")

State = list[tuple[Tensor, Tensor]]
"""For each layer its output h and its cells c after the last character, both (b, d)."""


class Gates(nn.Module):
    """One linear layer a gate, all four computed together.

    Four, so that each gate has parameters of its own name, by which a distribution or a scale is kept.
    """

    def __init__(self, before: int, after: int, *, bias: bool) -> None:
        super().__init__()
        self.input, self.forget, self.cell, self.output = (nn.Linear(before, after, bias=bias) for _ in GATES)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(after), 1 / math.sqrt(after))

    def layers(self) -> list[nn.Linear]:
        return [self.input, self.forget, self.cell, self.output]

    def weight(self) -> Float[Tensor, "four_d before"]:
        """The gates' weights, one above the other."""
        return torch.cat([gate.weight for gate in self.layers()])

    def bias(self) -> Float[Tensor, "four_d"]:
        return torch.cat([gate.bias for gate in self.layers()])


class LSTMLayer(nn.Module):
    r"""c ← σ(f) c + σ(i) tanh(g), h ← σ(o) tanh(c), with i, f, g, o = W x + b + U h one character after the other.

    W and b are `ih`, U is `hh`; torch's second bias, which adds nothing, is left out. U(−1/√d, 1/√d), as torch's LSTM.
    """

    def __init__(self, before: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.ih, self.hh = Gates(before, hidden, bias=True), Gates(hidden, hidden, bias=False)

    def forward(
        self, x: Float[Tensor, "b t before"], state: tuple[Tensor, Tensor] | None = None, *, fused: bool = False
    ) -> tuple[Float[Tensor, "b t d"], tuple[Tensor, Tensor]]:
        if state is None:
            # of the input, so that vmap and forward mode find it wrapped as the input is
            zero = x.new_zeros(x.shape[0], self.hidden)
            state = zero, zero
        return self.in_kernel(x, state) if fused else self.step_by_step(x, state)

    def step_by_step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        U = self.hh.weight()
        steps = F.linear(x, self.ih.weight(), self.ih.bias()).unbind(1)  # W x + b of all characters at once
        outputs = []
        for Wx in steps:
            i, f, g, o = (Wx + F.linear(h, U)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), (h, c)

    def in_kernel(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        gates = [*self.ih.layers(), *self.hh.layers()]
        b = self.ih.bias()
        # One block of memory in cuDNN's order, which it would otherwise copy together, with a warning, at every call.
        flat = torch.cat([gate.weight.flatten() for gate in gates] + [b, torch.zeros_like(b)])
        shapes = [(4 * self.hidden, x.shape[-1]), (4 * self.hidden, self.hidden), b.shape, b.shape]
        parts = flat.split([math.prod(shape) for shape in shapes])
        weights = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        # cuDNN's "training" means that a derivative may be asked for; there is no dropout inside one layer
        y, h, c = torch.lstm(x, [h[None], c[None]], weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
        # as the loop's outputs lie in memory: with the same seed, dropout then draws the same masks
        return y.contiguous(), (h[0], c[0])


class CharLSTM(nn.Module):
    r"""Which character comes next: (b, t) → (b, n, t), logits for the character after each.

    Embedding → LSTM → dropout → LSTM → dropout → linear. Every call begins from h = c = 0. Logits have the vocabulary
    along dimension 1, as `cross_entropy` wants it, so that the default loss of every method (its mean over streams and
    characters, in nats) takes a batch (characters, next characters), both (b, t), as it stands.

    The names of the parameters do not depend on the vocabulary: `embedding.weight`, `lstm.0.ih.forget.weight`,
    `lstm.0.ih.forget.bias`, `lstm.0.hh.forget.weight` and so on for every gate of `GATES` and every layer,
    `classifier.weight`, `classifier.bias`. Embedding N(0, 1), LSTM U(−1/√d, 1/√d), classifier as torch has it with
    its bias zero. 919,552 + 385 n parameters at the defaults.

    Args:
        vocabulary_size: n.
        embedding: Channels of the embedding.
        hidden: d, channels of every LSTM layer.
        layers: How many of them.
        dropout: Share of each layer's outputs that training leaves out, anew for every character.
        fused: Also an attribute, to be switched at any time. False: a loop over characters, whose derivatives of every
            order, reverse, forward or under `vmap`, are right. True: the same function in torch's LSTM kernel, which
            is faster and has a first derivative only (on a GPU): for evaluation, and for ordinary training.

    Raises:
        ValueError: A size below 1, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        embedding: int = 128,
        hidden: int = 256,
        layers: int = 2,
        dropout: float = 0.1,
        fused: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary_size": vocabulary_size, "embedding": embedding, "hidden": hidden, "layers": layers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"CharLSTM: `{name}` must be at least 1, got {size}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"CharLSTM: `dropout` must lie in [0, 1), got {dropout}.")
        self.fused = fused
        self.embedding = nn.Embedding(vocabulary_size, embedding)
        self.lstm = nn.ModuleList(LSTMLayer(hidden if layer else embedding, hidden) for layer in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, vocabulary_size)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Int64[Tensor, "b t"]) -> Float[Tensor, "b n t"]:
        return self.continued(tokens)[0]

    def continued(
        self, tokens: Int64[Tensor, "b t"], state: State | None = None
    ) -> tuple[Float[Tensor, "b n t"], State]:
        """The logits, with the state of every layer before the first character (None: zero) and after the last."""
        x = self.embedding(tokens)
        after = []
        for number, layer in enumerate(self.lstm):
            x, last = layer(x, None if state is None else state[number], fused=self.fused)
            after.append(last)
            x = self.dropout(x)
        return self.classifier(x).transpose(1, 2), after


@torch.no_grad()
def bits_per_character(model: CharLSTM, streams: Int64[Tensor, "b n"], *, chunk: int = 1000) -> float:
    r"""−(1/N) Σ log₂ p(character | all before it in its stream), over the N = b (n − 1) characters that have one.

    In evaluation mode and the fused kernel, `chunk` characters at a time with the state carried on, so that memory does
    not grow with the stream. The model's mode and weights are as before.

    Args:
        model: Its parameters decide where this is computed.
        streams: Characters of one stream or more; DIMAML's test is all of the test text as one, `ids[None]`.
        chunk: Characters of each stream at a time; of no effect but on memory.

    Raises:
        ValueError: A stream of fewer than two characters, or a `chunk` below 1.
    """
    if streams.shape[1] < 2 or not len(streams) or chunk < 1:
        raise ValueError(
            "bits_per_character: `streams` must hold at least two characters a stream, and `chunk` be at least 1, "
            f"got {tuple(streams.shape)} and {chunk}."
        )
    was_fused = model.fused
    device = model.classifier.weight.device
    total, state = torch.zeros((), dtype=torch.float64, device=device), None
    try:
        model.fused = True
        with in_evaluation_mode(model):
            for first in range(0, streams.shape[1] - 1, chunk):
                part = streams[:, first : first + chunk + 1].to(device)
                logits, state = model.continued(part[:, :-1], state)
                total += F.cross_entropy(logits, part[:, 1:], reduction="sum").double()
    finally:
        model.fused = was_fused
    return (total / (len(streams) * (streams.shape[1] - 1)) / math.log(2)).item()
