"""What a user names on the command line, made into a model, its data and its loss.

Nothing is executed but what the user names as `package.module:callable`, no weights are read, and nothing but
`hub:NAME` and our own published sets asks the network. A model is as its library builds it, so that its initialised
weights can be taken there.
"""

import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from common.batches import count_examples, map_tensors
from common.functional import check_bare, classification_loss, in_evaluation_mode
from common.networks import NETWORKS, Autoencoder, CharLSTM, make_network, reconstruction_loss
from common.types import Batch, UserLoss
from reproduce.bring_data import CHARACTERS, IGNORED, WINDOW, Brought, bring_data, call_named, is_pair, named, takes

__all__ = ["Brought", "bring_data", "bring_loss", "bring_model", "describe_model", "evaluate", "keyword_loss"]


def bring_model(spec: str, data: Brought, *, seed: int, options: Mapping[str, Any] = {}) -> nn.Module:
    """The model that `spec` names, with as many outputs as the data has classes and its own initialisation.

    A model made for images of one size (torchvision's vit_b_16: 224) keeps that size, so that its weights fit the model
    as its library builds it, and has the data's images resized on the way in; `describe_model` says so. With the option
    `image_size` it is built for images of that size instead, where its library can; any other model, which takes images
    as they are, then has them resized to that size.

    Args:
        spec: One of
            a name of `common.networks`, such as resnet-20 or plain-5-8, with batch normalisation if it ends in -bn;
            charlstm; autoencoder;
            torchvision:NAME, an image classifier without weights;
            timm:NAME, likewise;
            hf:CONFIG.json, a model of transformers from its configuration: by the class under `architectures`, or else
            an image classifier or a causal language model, as the data is; never from code beside the file;
            package.module:callable, which returns a module, and is given `num_classes` if it has such a parameter. The
            current directory is searched too.
        data: What it is to be trained on; its device is the model's.
        seed: Of torch's global random numbers, which draw the weights and are afterwards as they were.
        options: Of the model's constructor, or of the configuration.

    Raises:
        ValueError: The name is unknown, or the model does not fit the data, or cannot be compared: detection,
            segmentation, auxiliary outputs; or a package that is not installed.
        TypeError: The user's callable returns no module, or one that is wrapped or compiled.
    """
    library, _, name = spec.partition(":")
    builders = {"torchvision": _torchvision, "timm": _timm, "hf": _huggingface}
    build, is_user = (builders[library], False) if name and library in builders else (_user, True)
    if not name:
        build, name, is_user = _ours, spec, False
    devices = [data.device] if data.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # on the CPU, where libraries build: the same weights on every device
        try:
            model = build(spec if is_user else name, data, dict(options))
        except (ValueError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # libraries say in many ways that an option does not fit
            if is_user:
                raise
            raise ValueError(
                f"bring_model: {spec} must be built with the options {dict(options)}, got {type(error).__name__}: "
                f"{error}"
            ) from error
    check_bare(model, "bring_model")
    model = model.to(data.device)
    if not is_user:  # how a user's model is called is known to the user's loss alone
        _check_fit(spec, model, data)
    return model


def describe_model(spec: str, model: nn.Module, data: Brought) -> str:
    """One sentence for the terminal and the records: name, parameters, and the size at which it sees the images."""
    count = sum(parameter.numel() for parameter in model.parameters())
    size = next((hook.size for hook in model._forward_pre_hooks.values() if isinstance(hook, _Resize)), None)
    if size is None or data.input_shape is None:
        return f"{spec}, {count:,} parameters"
    own = "×".join(map(str, data.input_shape[1:]))
    return f"{spec}, {count:,} parameters, which sees the {own} images resized to {size}×{size}"


# ---------------------------------------------------------------------------------------------- the images' size
class _Resize:
    """A pre-hook that resizes the images a model is called with; it leaves parameters and their names as they are."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tuple(map(self.resized, args)), {name: self.resized(value) for name, value in kwargs.items()}

    def resized(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[-2:] == (self.size, self.size):
            return x
        if x.shape[-1] > self.size:
            return F.interpolate(x, (self.size, self.size), mode="area")
        return F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)


def _seeing(model: nn.Module, size: int | None, data: Brought) -> nn.Module:
    """The model, with images resized to `size` where it is given and the data's differ."""
    if size is not None and data.input_shape is not None and data.input_shape[-2:] != (size, size):
        model.register_forward_pre_hook(_Resize(size), with_kwargs=True)
    return model


def _check_images(spec: str, data: Brought) -> None:
    if data.num_classes is None or data.input_shape is None or len(data.input_shape) != 3:
        got = "batches that are not pairs (x, y)" if data.input_shape is None else f"inputs of shape {data.input_shape}"
        raise ValueError(
            f"bring_model: {spec} needs images (channels, height, width) and class labels, got {got} from {data.name}. "
            f"For text take charlstm or hf:CONFIG.json, for other data package.module:callable."
        )


# ---------------------------------------------------------------------------------------------- libraries
def _ours(name: str, data: Brought, options: dict[str, Any]) -> nn.Module:
    if name == "charlstm":
        if data.num_classes is None or data.input_shape is None or data.example[0].is_floating_point():
            raise ValueError(
                f"bring_model: charlstm needs characters, got {data.name}. Take one of {', '.join(CHARACTERS)}."
            )
        return CharLSTM(**{"vocabulary_size": data.num_classes, **options})
    _check_images(name, data)
    channels, _, width = data.input_shape  # pyright: ignore[reportGeneralTypeIssues]
    if name == "autoencoder":
        return Autoencoder(**{"image_size": width, "in_channels": channels, **options})
    size = options.pop("image_size", None)
    own = {"num_classes": data.num_classes, "in_channels": channels}
    own |= {"batch_norm": True} if name.endswith("-bn") else {}
    try:
        return _seeing(make_network(name.removesuffix("-bn"), **own | options), size, data)
    except ValueError as error:
        raise ValueError(
            f"bring_model: `model` must be one of charlstm, autoencoder, {', '.join(NETWORKS)}, or carry sizes, or be "
            f"torchvision:NAME, timm:NAME, hf:CONFIG.json or package.module:callable, got {name!r}. {error}"
        ) from error


def _torchvision(name: str, data: Brought, options: dict[str, Any]) -> nn.Module:
    _check_images(f"torchvision:{name}", data)
    classifiers = torchvision.models.list_models(module=torchvision.models)
    if name not in classifiers:
        if name in torchvision.models.list_models():
            raise ValueError(
                f"bring_model: `model` must be an image classifier, got torchvision:{name}, which detects, segments, "
                "or takes video or quantised numbers. Bring one that segments or takes video as "
                "package.module:callable, with data and a loss. A detector has a loss in training mode only, and "
                "models are initialised in evaluation mode."
            )
        raise ValueError(f"bring_model: torchvision must have the model, got {name!r}.{_nearest(name, classifiers)}")
    if name in ("googlenet", "inception_v3"):
        if options.get("aux_logits", True):
            raise ValueError(
                f"bring_model: a model must return its logits alone, got torchvision:{name}, which in training adds "
                "auxiliary outputs. Pass the option aux_logits=False, or bring model and loss as "
                "package.module:callable."
            )
        options = {"init_weights": True, **options}  # torchvision's default, of which it warns
    size = options.pop("image_size", None)
    builder = torchvision.models.get_model_builder(name)
    parameters = inspect.signature(inspect.signature(builder).return_annotation).parameters
    if "image_size" in parameters:  # a VisionTransformer
        options |= {} if size is None else {"image_size": size}
    elif "input_size" in parameters:  # MaxVit, which does not keep what it is built for
        size = size or 224
        options["input_size"] = (size, size)
    model = builder(weights=None, num_classes=data.num_classes, **options)
    return _seeing(model, getattr(model, "image_size", size), data)


def _timm(name: str, data: Brought, options: dict[str, Any]) -> nn.Module:
    _check_images(f"timm:{name}", data)
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"bring_model: timm:{name} needs the package timm, got {error}. pip install timm") from error
    if not timm.is_model(name):  # also what would be fetched from the hub
        raise ValueError(f"bring_model: timm must have the model, got {name!r}.{_nearest(name, timm.list_models())}")
    size = options.pop("image_size", None)
    own = {"num_classes": data.num_classes, "in_chans": data.input_shape[0]}  # pyright: ignore[reportOptionalSubscript]
    made_for = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if made_for is not None and made_for.fixed_input_size:
        own |= {} if size is None else {"img_size": size}
        size = size or made_for.input_size[-1]
    return _seeing(timm.create_model(name, pretrained=False, **own | options), size, data)


def _huggingface(path: str, data: Brought, options: dict[str, Any]) -> nn.Module:
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise ValueError(
            f"bring_model: hf:{path} needs the package transformers, got {error}. pip install transformers"
        ) from error
    written = _read_config(path)
    kind = written.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"bring_model: `model_type` in '{path}' must be one that transformers {transformers.__version__} has, got "
            f"{kind!r}.{_nearest(str(kind), list(CONFIG_MAPPING))} Code beside the file is not run."
        )
    config = CONFIG_MAPPING[kind].from_dict(written | options)
    is_text = data.is_text
    if not is_text:
        _check_images(f"hf:{path}", data)
    default = transformers.AutoModelForCausalLM if is_text else transformers.AutoModelForImageClassification
    _fit_text(config, path, data) if is_text else _fit_images(config, data)
    names = written.get("architectures") or []
    if names:
        model_class = getattr(transformers, str(names[0]), None)
        if not (inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)):
            raise ValueError(
                f"bring_model: `architectures` in '{path}' must be a class of transformers, got {names[0]!r}."
            )
        model: nn.Module = model_class(config)
    else:
        model = default.from_config(config, trust_remote_code=False)
    return model.float() if is_text else _seeing(model.float(), _side(getattr(config, "image_size", None)), data)


def _read_config(path: str) -> dict[str, Any]:
    try:
        written = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"bring_model: '{path}' must be the JSON file of a configuration, got {type(error).__name__}: {error}. "
            "It is the config.json beside a model's weights."
        ) from error
    if not isinstance(written, dict):
        raise ValueError(f"bring_model: '{path}' must hold a JSON object, got {type(written).__name__}.")
    # what would run code or fetch weights
    left_out = ("auto_map", "use_pretrained_backbone", "_name_or_path", "dtype", "torch_dtype")
    return {key: value for key, value in written.items() if key not in left_out}


def _fit_text(config: Any, path: str, data: Brought) -> None:
    text = config.get_text_config()
    if not hasattr(text, "vocab_size"):
        raise ValueError(f"bring_model: '{path}' must be a language model's for {data.name}, got no `vocab_size`.")
    vocabulary: Any = data.num_classes
    text.vocab_size, text.use_cache = vocabulary, False
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        number = getattr(text, name, None)
        if isinstance(number, int) and number >= vocabulary:  # no symbol of ours, and refused by embeddings
            setattr(text, name, None)
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and longest <= WINDOW:
        raise ValueError(
            f"bring_model: `max_position_embeddings` in '{path}' must be at least {WINDOW + 1}, the characters of an "
            f"example and the one that follows, got {longest}."
        )


def _fit_images(config: Any, data: Brought) -> None:
    config.num_labels = data.num_classes
    config.problem_type = "single_label_classification"
    if hasattr(config, "num_channels"):
        config.num_channels = data.input_shape[0]  # pyright: ignore[reportOptionalSubscript]


def _side(size: Any) -> int | None:
    return size[0] if isinstance(size, (list, tuple)) else size


def _user(spec: str, data: Brought, options: dict[str, Any]) -> nn.Module:
    function = named(spec, "model", "bring_model")
    own = {"num_classes": data.num_classes} if data.num_classes is not None and takes(function, "num_classes") else {}
    model = call_named(spec, "model", "bring_model", own | options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"bring_model: {spec} must return an nn.Module, got {type(model).__name__}.")
    return model


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names)
    return f" Did you mean {' or '.join(near)}?" if near else ""


# ---------------------------------------------------------------------------------------------- outputs and losses
class Outcome(NamedTuple):
    """What a model makes of a batch: the mean loss, and the logits (b, classes, …) with their labels (b, …)."""

    loss: Tensor
    logits: Tensor | None
    labels: Tensor | None


def keyword_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model computes itself, `model(**batch).loss`, as those of transformers do.

    A pair (x, y) is put under the model's own names: images and labels, or characters with the last of those that
    follow, as input and as labels, which a causal language model shifts.
    """
    return _with_keywords(model, batch).loss


def _with_keywords(model: nn.Module, batch: Batch) -> Outcome:
    keywords = batch
    # as `Brought.is_text`: a pair of whole numbers with a label each is another task
    is_text = is_pair(batch) and not batch[0].is_floating_point() and batch[1].ndim == 2
    if is_text:
        ids = torch.cat([batch[0], batch[1][:, -1:]], 1)
        keywords = {"input_ids": ids, "labels": ids}
    elif is_pair(batch):
        keywords = {str(model.main_input_name): batch[0], "labels": batch[1]}
    output = model(**keywords)
    loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"keyword_loss: the model must return its loss as `loss`, got {type(loss).__name__} in a "
            f"{type(output).__name__}. Do the batches hold `labels`? Otherwise name a loss, package.module:callable."
        )
    logits, labels = getattr(output, "logits", None), keywords.get("labels")
    if is_text and logits is not None:
        return Outcome(loss, logits[:, :-1].transpose(1, 2), batch[1])
    return Outcome(loss, logits, labels) if _are_of_classes(logits, labels) else Outcome(loss, None, None)


def _are_of_classes(logits: object, labels: object) -> bool:
    """Logits (b, classes) and labels (b,), whole numbers: not a regression's."""
    if not (isinstance(logits, Tensor) and isinstance(labels, Tensor) and (logits.ndim, labels.ndim) == (2, 1)):
        return False
    return logits.shape[1] > 1 and not labels.is_floating_point()


def _has_own_loss(model: nn.Module) -> bool:
    return hasattr(model, "main_input_name") and hasattr(model, "config")  # transformers', or made like them


def _measured(model: nn.Module, loss_fn: UserLoss, batch: Batch) -> Outcome:
    if loss_fn is classification_loss:
        x, y = batch
        logits = model(x).float()
        return Outcome(F.cross_entropy(logits, y), logits, y)
    if loss_fn is keyword_loss:
        return _with_keywords(model, batch)
    return Outcome(loss_fn(model, batch), None, None)


def bring_loss(spec: str | None, data: Brought, model: nn.Module) -> UserLoss:
    """The loss of model and data, the mean over a batch's examples.

    Args:
        spec: `package.module:callable`, itself a loss(model, batch); or None: `model(**batch).loss` for batches that
            are dictionaries, and for transformers' models; the reconstruction error for the autoencoder; otherwise
            cross-entropy of model(x) against y.
        data: Its first batch is what the loss is tried on.
        model: Left as it is.

    Raises:
        ValueError: The loss is none that can be had, or fails, or the data has no class labels for the default; a
            language model that sees what follows.
        TypeError: The user's loss is not callable, or returns something else than a tensor of one number.
    """
    if spec is None:
        # ours are tried on two examples, as a whole batch of large images takes its time
        loss_fn, what, batch = _default_loss(data, model), "the default loss", map_tensors(_few, data.example)
    else:
        loss_fn, what, batch = named(spec, "loss", "bring_loss"), spec, data.example
    try:
        with torch.no_grad(), in_evaluation_mode(model):
            value = loss_fn(model, batch)
    except Exception as error:  # a user's code may raise anything
        raise ValueError(
            f"bring_loss: {what} must work with a batch of {data.name}, got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"bring_loss: {what} must return a scalar tensor, the mean over examples, got {got}.")
    if loss_fn is keyword_loss and data.is_text:
        _check_causal(model, data)
    return loss_fn


@torch.no_grad()
def _check_causal(model: nn.Module, data: Brought) -> None:
    """What a character's logits depend on must not hold the character that follows, which is their label."""
    ids, _ = map_tensors(_few, data.example)
    half = ids.shape[1] // 2
    with in_evaluation_mode(model):
        logits = getattr(model(ids), "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            return
        others = torch.cat([ids[:, :half], (ids[:, half:] + 1) % logits.shape[-1]], 1)
        change = (model(others).logits - logits).float().abs()
    if change[:, :half].max() > 1e-4 * change[:, half:].max():  # more than round-off
        raise ValueError(
            f"bring_loss: the default loss of text needs a causal language model, got {type(model).__name__}, whose "
            "logits depend on characters that follow. Name a causal class under `architectures`, or set "
            "is_decoder=true where a configuration has that; for another objective bring data and loss "
            "as package.module:callable."
        )


def _default_loss(data: Brought, model: nn.Module) -> UserLoss:
    if isinstance(model, Autoencoder):
        return reconstruction_loss
    if isinstance(data.example, Mapping):
        return keyword_loss
    if not is_pair(data.example) or data.num_classes is None:
        raise ValueError(
            f"bring_loss: the default loss needs batches (x, y) with whole numbers as labels, got {data.name}, which "
            "has none. Name a loss, package.module:callable, which is called with (model, batch)."
        )
    if data.num_classes < 2:
        raise ValueError(
            f"bring_loss: classification needs two classes, got one in {data.name}. Name a loss of its own."
        )
    if not _has_own_loss(model):
        return classification_loss
    x, y = data.example
    if x.is_floating_point() or y.ndim == 1 or data.is_text:
        return keyword_loss
    raise ValueError(
        f"bring_loss: a model of transformers needs dictionaries, such as input_ids and labels, got pairs from "
        f"{data.name}, whose meaning is not known. Return dictionaries, or name a loss, package.module:callable."
    )


@torch.no_grad()
def evaluate(model: nn.Module, loss_fn: UserLoss, data: Brought) -> dict[str, float]:
    """`test_loss`, and with the default losses of classification `test_accuracy` (share), over all test examples.

    In evaluation mode, without gradients; every module's mode is afterwards as it was. Accuracy counts labels: for text
    every character.

    Raises:
        ValueError: There is no test example.
    """
    losses, correct, labels, examples = [], [], [], 0
    with in_evaluation_mode(model):
        for batch in data.test_batches():
            n = count_examples(batch, "evaluate")
            outcome = _measured(model, loss_fn, batch)
            losses.append(outcome.loss.detach().double() * n)
            examples += n
            if outcome.logits is not None and outcome.labels is not None:
                correct.append((outcome.logits.argmax(1) == outcome.labels).sum())
                labels.append((outcome.labels != IGNORED).sum())
    if not examples:
        raise ValueError(f"evaluate: there must be a test example, got none from {data.name}.")
    metrics = {"test_loss": torch.stack(losses).sum().item() / examples}
    if labels:
        metrics["test_accuracy"] = torch.stack(correct).sum().item() / torch.stack(labels).sum().item()
    return metrics


def _few(leaf: Tensor) -> Tensor:
    return leaf[:2]


def _check_fit(spec: str, model: nn.Module, data: Brought) -> None:
    """One forward pass of two examples: the model takes them, and has an output a class."""
    batch = map_tensors(_few, data.example)
    remedy = (
        "Does it take images of that size? The option image_size=224, say, has them resized."
        if data.input_shape is not None and len(data.input_shape) == 3
        else "Is it made for such data?"
    )
    try:
        with torch.no_grad(), in_evaluation_mode(model):
            output = model(batch[0])
    except Exception as error:  # what a layer makes of a shape that it was not made for
        raise ValueError(
            f"bring_model: {spec} must take the data's inputs, {data.input_shape} each, got {type(error).__name__}: "
            f"{str(error).rstrip('. ')}. {remedy}"
        ) from error
    logits = getattr(output, "logits", output)
    dimension = -1 if output is not logits else 1  # transformers has classes last
    if isinstance(model, Autoencoder):
        return
    if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[dimension] != data.num_classes:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"bring_model: {spec} must return logits of {data.num_classes} classes, got {got} for {len(batch[0])} "
            "examples. A model that returns something else is brought as package.module:callable, with a loss."
        )
