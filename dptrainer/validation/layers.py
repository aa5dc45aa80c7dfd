"""Problems of one layer, seen in its class and its settings."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dptrainer.validation.problem import Problem, layer_title

BATCH_NORM = nn.modules.batchnorm._BatchNorm
INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


def layer_problems(name: str, module: nn.Module) -> Iterator[Problem]:
    """Problems of one module, its children apart."""
    if not_materialised(module):
        # Its sizes are unknown, so that nothing else can be said of it yet.
        reason = f"{layer_title(name, module)} is lazy and has no shapes yet."
        fix = "run the model once on synthetic inputs, torch.zeros(2, ...), and build the optimizer after that."
        yield Problem(name, "DP018", reason, fix)
        return
    if isinstance(module, BATCH_NORM):
        yield from _batch_norm(name, module)
    elif isinstance(module, INSTANCE_NORM) and module.track_running_stats:
        reason = f"{layer_title(name, module)} keeps running statistics of private data without noise."
        yield Problem(name, "DP013", reason, "build it with track_running_stats=False.")
    elif isinstance(module, LOOKUPS):
        yield from _lookup(name, module)
    yield from _reparametrised(name, module)
    yield from _quantised(name, module)


def not_materialised(module: nn.Module) -> bool:
    """Whether the module waits for its first input to learn its shapes."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def group_count(channels: int) -> int:
    """The largest divisor of the number of channels up to 32 that leaves at least four channels to a group.

    A group of one channel without further positions is its own mean, so that the layer would be constant.
    """
    return max(groups for groups in range(1, 33) if channels % groups == 0 and (groups == 1 or channels >= 4 * groups))


def batch_norm_mixes(module: nn.Module) -> bool:
    """Whether a batch norm computes statistics over the batch, or would update them."""
    return module.training or not getattr(module, "track_running_stats", True)


def plain_batch_norm(module: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether a batch norm does what torch's does, and nothing else: no activation, no weights from elsewhere."""
    forwards = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
    names = {name for name, _ in module.named_parameters()}
    return type(module).forward in forwards and "forward" not in vars(module) and names <= {"weight", "bias"}


def _batch_norm(name: str, module: nn.modules.batchnorm._BatchNorm) -> Iterator[Problem]:
    """Batch statistics mix examples; in eval mode with fixed statistics the layer is an affine map per example."""
    channels, title = module.num_features, layer_title(name, module)
    replacement = f"GroupNorm({group_count(channels)}, {channels})"
    if batch_norm_mixes(module):
        by = "model = dptrainer.fix(model) replaces it" if plain_batch_norm(module) else "replace it"
        fix = f"{by} by {replacement}; or freeze it and call .eval() on it."
        yield Problem(name, "DP010", f"{title} mixes examples.", fix)
    elif any(p.requires_grad for p in module.parameters(recurse=False)):
        fix = f"requires_grad_(False) on its parameters, or replace it by {replacement}."
        yield Problem(name, "DP010", f"{title} is in eval mode but its weights still train.", fix)


def _lookup(name: str, module: nn.Embedding | nn.EmbeddingBag) -> Iterator[Problem]:
    title = layer_title(name, module)
    if module.max_norm is not None:
        reason = f"{title} has max_norm={module.max_norm}, which rewrites in forward the rows that the data uses."
        yield Problem(name, "DP010", reason, "set max_norm=None, or model = dptrainer.fix(model).")
    if module.scale_grad_by_freq:
        reason = f"{title} has scale_grad_by_freq, which counts indices over all examples of the batch."
        yield Problem(name, "DP010", reason, "set scale_grad_by_freq=False, or model = dptrainer.fix(model).")
    if module.sparse and module.weight.requires_grad:
        reason = f"{title} has sparse gradients; noise on the touched rows alone would show which were touched."
        yield Problem(name, "DP019", reason, "set sparse=False, or model = dptrainer.fix(model).")


def old_weight_norms(module: nn.Module) -> list[WeightNorm]:
    """The weight norms of ``module`` that are hooks, and not parametrisations."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]


def _reparametrised(name: str, module: nn.Module) -> Iterator[Problem]:
    """Weights that are computed from others. Parametrisations without state of their own are no problem."""
    title = layer_title(name, module)
    if old_weight_norms(module):
        reason = f"{title} has the old weight_norm, whose weight is computed outside the layer."
        fix = "use torch.nn.utils.parametrizations.weight_norm, or model = dptrainer.fix(model)."
        yield Problem(name, "DP019", reason, fix)
    # Its vectors are computed from weights alone, so they are no release; but no two passes are the same.
    hooked = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    if hooked or type(module) is nn.utils.parametrizations._SpectralNorm:
        reason = (
            f"{title} is a spectral norm, whose buffers change in every forward pass, so that none can be repeated."
        )
        fix = "take it off (remove_spectral_norm or remove_parametrizations) and keep weights small by weight decay."
        yield Problem(name, "DP019", reason, fix)


#: Where torch keeps what watches ranges, and layers with integer weights. By name: torch is moving them out.
_OBSERVERS = ("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize")
_INTEGERS = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def _quantised(name: str, module: nn.Module) -> Iterator[Problem]:
    homes = [kind.__module__ for kind in type(module).__mro__]
    title, after = layer_title(name, module), "train in floating point and quantise afterwards, which costs no privacy."
    if any(home in _OBSERVERS for home in homes):
        reason = f"{title} keeps the range of the activations that it sees, over all examples and without noise."
        yield Problem(name, "DP013", reason, after)
    elif any(home.startswith(_INTEGERS) for home in homes):
        reason = f"{title} has integer weights; it does not train, and no gradient passes it to the layers before it."
        yield Problem(name, "DP019", reason, after)
