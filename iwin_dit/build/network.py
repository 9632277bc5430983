"""Where a recipe becomes a network and what it learns to predict."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from iwin_dit.config.schema import Config
from iwin_dit.diffusion.objective import Objective
from iwin_dit.models.transformer import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel
from iwin_dit.runtime.seeds import derive_seed

# keys of a recipe's model that the network has under other names, or not at all
OF_RECIPES = (
    *("size", "depth", "width", "heads", "label_dropout", "dense_from_step", "middle_dropout"),
    *("allow_blind", "init_from"),
)


def build_model(config: Config) -> IwinDiTTransformer2DModel:
    """The network, its weights drawn from the config's seed; the global random state is left as it was."""
    depth, width, heads, patch_size = config.model.shape
    kind = IwinDiTTransformer2DModel if config.model.sample_frames is None else IwinDiTTransformer3DModel
    options = {key: value for key, value in asdict(config.model).items() if key not in OF_RECIPES} | dict(
        patch_size=patch_size,
        out_channels=config.model.in_channels * config.objective.kind.outputs,
        num_layers=depth,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        class_dropout_prob=config.model.label_dropout,
        mixer=asdict(config.model.resolved_mixer),
        prediction_type=config.objective.prediction_type,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        return kind(**options)


def begin_with(
    model: nn.Module, tensors: Mapping[str, Tensor], redrawn: tuple[str, ...], may_lack: str = ""
) -> list[str]:
    """Copies stored weights into a network; where some names do not fit it, returns them and copies none.

    Args:
        redrawn: with what the names begin of those that may be of another shape, or missing: they stay as the
            network has drawn them, since they depend on the classes.
        may_lack: part of the names of others that may be missing.
    """
    own = model.state_dict()
    fitting = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.startswith(redrawn) and name in own and own[name].shape != tensor.shape)
    }
    lacking = (name for name in own if name not in fitting and not name.startswith(redrawn))
    odd = [name for name in lacking if not (may_lack and may_lack in name)]
    odd += [name for name in fitting if name not in own or own[name].shape != fitting[name].shape]
    if not odd:
        model.load_state_dict(fitting, strict=False)
    return sorted(odd)


def build_objective(config: Config) -> Objective:
    """What the model learns to predict."""
    options, (height, width) = config.objective, config.model.latent_size[-2:]
    options = replace(options, shift=options.shift_of(config.model.in_channels, height, width))
    return pkgutil.resolve_name(options.kind.implementation)(options)
