"""The Transformer: its layers by hand, what may see what, its start, its derivatives, and its search."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.derivatives import group_gradients, hvp
from common.functional import parameters_of, pure_loss
from common.networks import Transformer
from common.networks.transformer import Attention, TransformerLayer, sinusoids
from common.translation import translation_loss

PAD, BOS, EOS = 0, 1, 2
NORMS = ["post", "pre", "none"]


def tiny(**options) -> Transformer:
    sizes = {"dim": 8, "feedforward": 12, "heads": 2, "encoder_layers": 2, "decoder_layers": 1, "max_length": 16}
    return Transformer(11, **sizes | options)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


# Two sentences of different lengths, on both sides.
SOURCE = torch.tensor([[5, 9, 3, 7, EOS], [4, 6, EOS, PAD, PAD]])
TARGET = torch.tensor([[BOS, 8, 3, EOS, PAD, PAD], [BOS, 10, 4, 4, 7, EOS]])


# --- Sizes and layers by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "norms"), [("post", 6 * 2 + 6 * 3), ("pre", 6 * 2 + 6 * 3 + 2), ("none", 0)])
def test_parameter_count(norm, norms):
    with torch.device("meta"):
        model = Transformer(1000, norm=norm)
    attention, feedforward = 4 * (512 * 512 + 512), 512 * 1024 + 1024 + 1024 * 512 + 512
    layers = 6 * (attention + feedforward) + 6 * (2 * attention + feedforward)
    # the target's embedding is the output projection as well
    assert sum(p.numel() for p in model.parameters()) == 2 * 1000 * 512 + layers + norms * 2 * 512


def test_positions_by_hand():
    # d = 4: wavelengths 2π and 2π·10000^(1/2) = 2π·100
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    assert_close(sinusoids(3, 4), torch.tensor(expected))


def attention_by_loops(attention: Attention, x, memory, allowed) -> torch.Tensor:
    """`allowed(example, query, key)`; one head and one query at a time."""
    Q, K, V = attention.q_proj(x), attention.k_proj(memory), attention.v_proj(memory)
    width = x.shape[-1] // attention.heads
    out = torch.zeros_like(x)
    for b, head, i in itertools.product(range(len(x)), range(attention.heads), range(x.shape[1])):
        part = slice(head * width, (head + 1) * width)
        keys = [j for j in range(memory.shape[1]) if allowed(b, i, j)]
        weights = torch.stack([Q[b, i, part] @ K[b, j, part] / math.sqrt(width) for j in keys]).softmax(0)
        out[b, i, part] = sum(weight * V[b, j, part] for weight, j in zip(weights, keys, strict=True))
    return attention.out_proj(out)


def test_attention_by_loops():
    attention = Attention(6, 2, dropout=0.0)
    x, memory = randn(2, 4, 6), randn(2, 5, 6)
    there = torch.tensor([[True] * 5, [True, True, True, False, False]])
    got = attention(x, memory, mask=there[:, None, None])
    assert_close(got, attention_by_loops(attention, x, memory, lambda b, i, j: there[b, j]))
    assert_close(attention(x, x, causal=True), attention_by_loops(attention, x, x, lambda b, i, j: j <= i))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cross", [False, True])
def test_layer_structure(norm, cross):
    layer = TransformerLayer(
        6, 10, 2, cross=cross, norm=norm, dropout=0.3, attention_dropout=0.1, activation_dropout=0.1
    ).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(randn(*parameter.shape) / 2)
    x, memory = randn(2, 4, 6), randn(2, 5, 6) if cross else None
    mask = torch.tensor([[True] * 4, [True, True, False, False]])[:, None, None]
    source_mask = torch.tensor([[True] * 5, [True, True, True, False, False]])[:, None, None] if cross else mask
    branches = [
        (
            lambda x: layer.self_attn(x, x, causal=True) if cross else layer.self_attn(x, x, mask=mask),
            layer.self_attn_norm,
        )
    ]
    if cross:
        branches += [(lambda x: layer.cross_attn(x, memory, mask=source_mask), layer.cross_attn_norm)]
    branches += [(lambda x: layer.fc2(layer.fc1(x).clamp(min=0)), layer.final_norm)]
    expected = x
    for branch, layer_norm in branches:
        if norm == "post":
            expected = layer_norm(expected + branch(expected))
        elif norm == "pre":
            expected = expected + branch(layer_norm(expected))
        else:
            expected = expected + branch(expected)
    assert_close(layer(x, source_mask, memory), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_sides_by_hand(norm):
    model = tiny(norm=norm).eval()
    mask = (SOURCE != PAD)[:, None, None]
    last = {"pre": lambda side, x: side.norm(x)}.get(norm, lambda side, x: x)

    def begin(side, tokens):
        return math.sqrt(8) * side.embedding.weight[tokens] + sinusoids(tokens.shape[1], 8)

    memory = begin(model.encoder, SOURCE)
    for layer in model.encoder.layers:
        memory = layer(memory, mask)
    memory = last(model.encoder, memory)
    x = begin(model.decoder, TARGET)
    for layer in model.decoder.layers:
        x = layer(x, mask, memory)
    assert_close(model(SOURCE, TARGET), last(model.decoder, x) @ model.decoder.embedding.weight.T)
    assert sum(isinstance(module, nn.LayerNorm) for module in model.modules()) == {"post": 7, "pre": 9, "none": 0}[norm]


# --- What sees what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_padding_changes_nothing(norm):
    model = tiny(norm=norm).eval()
    logits = model(SOURCE, TARGET)
    wider = partial(nn.functional.pad, value=PAD)
    assert_close(model(wider(SOURCE, (0, 3)), wider(TARGET, (0, 2)))[:, :6], logits)
    # each sentence by itself, without any padding
    assert_close(model(SOURCE[:1], TARGET[:1, :4]), logits[:1, :4])
    assert_close(model(SOURCE[1:, :3], TARGET[1:]), logits[1:])


def test_the_future_has_no_effect_and_the_past_has():
    model = tiny().eval()
    logits = model(SOURCE, TARGET)
    for place in range(1, 6):
        changed = TARGET.clone()
        changed[:, place] = 9
        difference = (model(SOURCE, changed) - logits).abs().amax((0, 2))
        assert (difference[:place] == 0).all()
        assert (difference[place:] > 1e-6).all()


def test_every_token_of_the_source_and_its_place_have_an_effect():
    model = tiny().eval()
    logits = model(SOURCE, TARGET)
    for place in range(5):
        changed = SOURCE.clone()
        changed[0, place] = 8
        assert ((model(changed, TARGET) - logits)[0].abs().amax(-1) > 1e-6).all()
    swapped = SOURCE[:, [1, 0, 2, 3, 4]]
    assert ((model(swapped, TARGET) - logits).abs().amax((0, 2)) > 1e-6).all()


@pytest.mark.parametrize("only", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_acts_in_training_alone(only):
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = tiny(**rates | {only: 0.5})
    assert not torch.allclose(model(SOURCE, TARGET), model(SOURCE, TARGET))
    plain = tiny(**rates)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(SOURCE, TARGET), plain(SOURCE, TARGET))


def test_the_tie_is_one_parameter_and_survives_copies():
    for model in (tiny(), copy.deepcopy(tiny()), tiny().to(torch.float32)):
        assert model.output.weight is model.decoder.embedding.weight
        names = [name for name, _ in model.named_parameters()]
        assert "decoder.embedding.weight" in names
        assert "output.weight" not in names
        assert "encoder.positions" not in model.state_dict()


@pytest.mark.parametrize("norm", NORMS)
def test_dropout_acts_on_both_embeddings_and_every_branch(norm):
    # if all of them are dropped nothing is left, and the norm of nothing is nothing
    everything = tiny(norm=norm, dropout=1.0, attention_dropout=0.0, activation_dropout=0.0)
    assert not everything(SOURCE, TARGET).any()
    assert not everything.encode(SOURCE)[0].any()
    assert everything.eval()(SOURCE, TARGET).any()


# --- Derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("norm", NORMS)
def test_hessian_vector_product_against_differences(norm, seed):
    loss = pure_loss(model := tiny(norm=norm), translation_loss, seed=seed)
    batch = {"source": SOURCE, "target": TARGET}
    theta = parameters_of(model)
    v = {name: randn(*leaf.shape) for name, leaf in theta.items()}

    def gradient(shift: float):
        moved = {name: (leaf + shift * v[name]).requires_grad_() for name, leaf in theta.items()}
        return dict(zip(moved, torch.autograd.grad(loss(moved, batch), list(moved.values())), strict=True))

    # central differences: an error of h² and one of rounding, 1e-16/h, of entries near 1; no ReLU changes sign within h
    h = 1e-6
    ahead, behind = gradient(h), gradient(-h)
    Hv = hvp(loss, theta, v, batch)
    for name, leaf in Hv.items():
        assert_close(leaf, (ahead[name] - behind[name]) / (2 * h), rtol=1e-5, atol=1e-7)
    assert Hv["decoder.embedding.weight"][PAD].any()  # by the output projection
    assert not Hv["encoder.embedding.weight"][PAD].any()


@pytest.mark.parametrize("norm", NORMS)
def test_per_example_gradients_equal_a_loop(norm):
    loss = pure_loss(model := tiny(norm=norm), translation_loss)
    batch = {"source": SOURCE, "target": TARGET}
    theta = parameters_of(model)
    together = group_gradients(loss, theta, batch, mode="vmap")
    for i, (length_s, length_t) in enumerate(((5, 4), (3, 6))):
        one = {"source": SOURCE[i : i + 1, :length_s], "target": TARGET[i : i + 1, :length_t]}
        live = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
        alone = torch.autograd.grad(loss(live, one), list(live.values()))
        for name, expected in zip(live, alone, strict=True):
            assert_close(together[name][i], expected)


# --- The search -------------------------------------------------------------------------------------------------------


END = 5  # a token that the model below likes well enough to end with


def talker() -> Transformer:
    """Weights with which translations differ between sources, and end early or late."""
    model, random = tiny(norm="pre").eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15 if "embedding" in name else 0.5, generator=random)
            elif "norm" not in name:
                parameter.zero_()
    return model


search = partial(Transformer.generate, bos=BOS, eos=END)


def greedy(model: Transformer, source: torch.Tensor, max_length: int) -> list[int]:
    tokens = [BOS]
    while len(tokens) <= max_length and tokens[-1] != END:
        logits = model(source, torch.tensor([tokens]))[0, -1]
        logits[PAD] = -math.inf
        tokens.append(int(logits.argmax()))
    return tokens[1:]


def mean_log_probability(model: Transformer, source: torch.Tensor, tokens: tuple[int, ...]) -> float:
    logits = model(source, torch.tensor([[BOS, *tokens[:-1]]]))[0]
    logits[:, PAD] = -math.inf
    return logits.log_softmax(-1)[range(len(tokens)), list(tokens)].mean().item()


def sources(count: int) -> torch.Tensor:
    return torch.randint(3, 11, (count, 4), generator=torch.Generator().manual_seed(3))


def stripped(row: torch.Tensor) -> list[int]:
    return row[row != PAD].tolist()


def test_beam_of_one_is_greedy():
    model, source = talker(), sources(12)
    got = search(model, source, max_length=7)
    expected = [greedy(model, source[i : i + 1], 7) for i in range(12)]
    assert [stripped(row) for row in got] == expected
    assert len({len(row) for row in expected}) > 2  # some end before others


def test_a_wide_beam_finds_the_best_of_all():
    model, source = talker(), sources(3)
    words = range(1, 11)
    got = search(model, source, max_length=3, beam=10**3)
    open_words = [word for word in words if word != END]
    every = [(END,), *((a, END) for a in open_words), *itertools.product(open_words, open_words, words)]
    for i in range(3):
        scores = {tokens: mean_log_probability(model, source[i : i + 1], tokens) for tokens in every}
        assert tuple(stripped(got[i])) == max(scores, key=scores.__getitem__)


def test_a_wider_beam_finds_more_likely_translations():
    model, source = talker(), sources(12)
    score = {}
    for beam in (1, 4):
        rows = map(stripped, search(model, source, max_length=7, beam=beam))
        score[beam] = sum(mean_log_probability(model, source[i : i + 1], tuple(row)) for i, row in enumerate(rows))
    assert score[4] > score[1]


def test_search_does_not_depend_on_the_batch():
    model = talker()
    together = search(model, SOURCE, max_length=6, beam=3)
    for row, alone in zip(together, (SOURCE[:1], SOURCE[1:, :3]), strict=True):
        assert stripped(row) == stripped(search(model, alone, max_length=6, beam=3)[0])


def test_search_leaves_the_model_and_the_random_state_alone():
    model = talker().train()
    model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    first = search(model, SOURCE, max_length=5, beam=2)
    assert torch.equal(first, search(model, SOURCE, max_length=5, beam=2))
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match=r"Transformer: sentences must have at most 16 tokens"):
        search(model, SOURCE, eos=-1, max_length=20)  # an end that never comes
    assert modes == [module.training for module in model.modules()]


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rms"}, r"Transformer: `norm` must be one of post, pre, none, got 'rms'"),
        ({"heads": 3}, r"Transformer: `dim` must be even and a multiple of `heads`, got 8 and 3"),
        ({"dim": 9, "heads": 3}, r"Transformer: `dim` must be even and a multiple of `heads`, got 9 and 3"),
        ({"decoder_layers": 0}, r"Transformer: both sides need a layer, got 2 and 0"),
        ({"padding": 11}, r"Transformer: `padding` must be one of 11 tokens, got 11"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_wrong_searches_and_sentences():
    model = tiny()
    with pytest.raises(ValueError, match=r"generate: `beam` and `max_length` must be at least 1, got 0 and 5"):
        search(model, SOURCE, max_length=5, beam=0)
    with pytest.raises(
        ValueError, match=r"Transformer: sentences must have at most 16 tokens \(`max_length`\), got 20"
    ):
        model(SOURCE.repeat(1, 4), TARGET)
