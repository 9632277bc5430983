"""What the pipelines of images and of clips have in common: labels, and from noise to latents.

Legend: B images or clips, C latent channels, T, h and w sides of the latent; F frames of H x W pixels.
"""

import json
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Union

import diffusers.pipelines
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import iwin_dit
from iwin_dit.data.codec import (
    VAES,
    decode,
    denormalize,
    latent_frames,
    spatial_factor,
    usable_dtype,
    vae_statistics,
)
from iwin_dit.diffusion.guidance import GUIDANCE, Guidance
from iwin_dit.diffusion.sampling import (
    check_scheduler,
    model_timesteps,
    of_velocity,
    set_timesteps,
    split_sigma,
    step_arguments,
    times,
)
from iwin_dit.diffusion.specs import DATA, GUIDANCE_SCALE, NUM_INFERENCE_STEPS, GuidanceName
from iwin_dit.models.transformer import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel
from iwin_dit.pipelines.labels import ClassNames
from iwin_dit.pipelines.loaders import write_loaders
from iwin_dit.runtime import files, scratch
from iwin_dit.runtime.errors import DataError

# diffusers looks for a component's library among the attributes of diffusers.pipelines before it asks for
# trust in code that lies beside the weights: with the package installed, its own classes are used.
diffusers.pipelines.iwin_dit = sys.modules[iwin_dit.__name__]

DECODED_AT_ONCE = 8  # images; an autoencoder takes more memory for each than the model


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples a class-conditional latent diffusion transformer.

    Args:
        transformer: an :class:`~iwin_dit.IwinDiTTransformer2DModel`, or one of clips.
        vae: any diffusers autoencoder, or the :class:`~iwin_dit.IdentityAutoencoder` of models of pixels.
        scheduler: a diffusers scheduler that fits the transformer's objective.
        id2label: names of the classes; several names of one class are separated by commas.
        latents_mean, latents_std: per channel, how the transformer's latents are normalised. Default: what
            the autoencoder's config says.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        # from_pipe takes over the models of these very classes, not those of classes derived from them
        transformer: IwinDiTTransformer2DModel | IwinDiTTransformer3DModel,
        vae: Union[tuple(VAES.values())],  # type: ignore[valid-type]  # noqa: UP007  diffusers reads a table's
        scheduler: SchedulerMixin,
        id2label: Any = None,
        latents_mean: Any = None,
        latents_std: Any = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        names = {str(key): name for key, name in (id2label or {}).items()}  # JSON knows strings as keys only
        self.register_to_config(
            id2label=names or None,
            latents_mean=None if latents_mean is None else list(latents_mean),
            latents_std=None if latents_std is None else list(latents_std),
        )
        self.id2label = {int(key): value for key, value in names.items()}
        self.class_names = ClassNames(self.id2label)

    @classmethod
    def _dict_from_json_file(cls, json_file: str) -> dict[str, Any]:
        """The class name without the file that our folders add for where the package is missing."""
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """``model_index.json``, the last file that ``save_pretrained`` writes before it uploads, and loaders.

        The loaders are those of :func:`write_loaders`.
        """
        super().save_config(save_directory, push_to_hub, **options)
        folder, name = Path(save_directory), type(self).__name__
        index = folder / self.config_name
        config = json.loads(index.read_text()) | {"_class_name": ["pipeline", name]}
        config.pop("_name_or_path", None)
        index.write_bytes(files.to_json(config))
        write_loaders(folder, name, config)
        for component in ("transformer", "vae"):
            files.follow_umask(folder / component)

    @property
    def components(self) -> dict[str, Any]:
        """What the constructor takes: beside the models, the names of the classes and the normalisation.

        diffusers has the models alone; a pipeline made of these would draw other images.
        """
        state = {key: self.config[key] for key in ("id2label", "latents_mean", "latents_std")}
        return super().components | state

    def to(self, *arguments: Any, **options: Any) -> "ClassConditionalPipeline":
        """As diffusers; an autoencoder that may not compute in float16 stays in float32."""
        dtypes = [value for value in (*arguments, *options.values()) if isinstance(value, torch.dtype)]
        if not dtypes or usable_dtype(self.vae, dtypes[0]) == dtypes[0]:
            return super().to(*arguments, **options)
        vae = self.vae
        self.__dict__["vae"] = None  # past diffusers, which would take it out of the config
        try:
            super().to(*arguments, **options)
        finally:
            self.__dict__["vae"] = vae
        device = options.get("device", next((a for a in arguments if a not in dtypes), None))
        vae.to(device, usable_dtype(vae, dtypes[0]))
        return self

    @property
    def guidance_scale(self) -> float:
        """The scale of the call in progress; a callback may set ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call in progress."""
        return self._num_timesteps

    def get_label_ids(self, class_labels: Any) -> list[int]:
        """Class ids of ids and names, in the order given, by the rules of :class:`ClassNames`.

        Raises:
            ValueError: as :meth:`ClassNames.ids`.
        """
        return self.class_names.ids(class_labels, self.transformer.config.num_classes)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = GUIDANCE_SCALE,
        num_inference_steps: int = NUM_INFERENCE_STEPS,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  the signature that diffusers expects
        guide: IwinDiTTransformer2DModel | None = None,
        num_frames: int | None = None,
        internal_guidance: float = 1.0,
        guidance: GuidanceName = "cfg",
        guidance_rescale: float = 0.0,
        path_drop: bool = False,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> Any:
        """Draws one image, or clip, per label.

        Args:
            class_labels: ids or names, one or several, mixed as you like.
            guidance_scale: 1 is unguided and takes one forward pass a step instead of two.
            num_inference_steps: steps of the sampler.
            guidance_interval: (low, high) of t in [0, 1], with t = 1 noise, in which guidance acts.
            guidance_channels: guide only the first so many latent channels; 3 reproduces DiT's, SiT's and
                LightningDiT's published figures.
            height, width: in pixels. Default: what the model was made for.
            generator: one, or one per image; image k then depends on its own generator alone.
            latents: initial noise ``(B, C, [T,] h, w)`` instead of drawing it.
            output_type: ``pil``; ``np`` (B, [F,] H, W, 3) or ``pt`` (B, [F,] 3, H, W) in [0, 1]; normalised
                ``latent``. A clip as ``pil`` is a list of F images.
            return_dict: an output of diffusers' kind, with ``images`` or ``frames``, rather than a tuple.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": ...})``; returns
                such a dictionary, perhaps with new latents.
            guide: a smaller or less trained transformer of the same latents and classes, away from which
                predictions are pushed instead of from those without a class: autoguidance (Karras et al.
                2024). No null label is needed.
            num_frames: of clips, F. Default: what the model was made for.
            internal_guidance: scale of the guidance from inside the model, which costs no further pass; 1 is
                without. The model needs a head inside, ``base_block``.
            guidance: how the prediction is pushed: classifier-free guidance, CFG-Zero* or adaptive projected
                guidance, see :data:`iwin_dit.diffusion.guidance.GUIDANCE`.
            guidance_rescale: share of the guided prediction that gets back the standard deviation of the
                unguided one.
            path_drop: make the prediction without a class without the blocks in the middle, too, which costs
                less. The model needs ``dense_blocks``.
            sigmas: of flows, the times t at which the steps begin, descending from 1, before the scheduler's
                shift, instead of so many steps.
            timesteps: of models of noise, the integer timesteps of the steps, descending from 999, likewise.

        Raises:
            ValueError: for labels, sizes, schedulers, guidance or a guide that do not fit the model.
        """
        size = self._latent_size(num_frames, height, width)
        ids = self.get_label_ids(class_labels)
        if not ids:
            raise ValueError("class_labels is empty, expected at least one id or name")
        self._guidance_scale = guidance_scale
        if guidance not in GUIDANCE:
            raise ValueError(f"guidance is {guidance!r}, expected one of {', '.join(GUIDANCE)}")
        guided = Guidance(
            guidance_scale,
            guidance_channels,
            guidance_interval,
            internal_guidance,
            guidance_rescale,
            path_drop,
            GUIDANCE[guidance](),
        )
        self._check(guided, guide, num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        latents = self._initial_latents(len(ids), size, generator, latents)
        labels = torch.tensor(ids, device=self._execution_device)
        model, scheduler = self.transformer, self.scheduler
        null_label, dtype = model.null_label, model.dtype
        if model.config.prediction_type == DATA:
            model, guide = of_velocity(model), None if guide is None else of_velocity(guide)
        # on the CPU: schedulers look their numbers up there, and no step waits for a GPU
        steps = set_timesteps(scheduler, num_inference_steps, "cpu", sigmas=sigmas, timesteps=timesteps)
        asked, when = model_timesteps(scheduler).to(self._execution_device), times(scheduler)
        self._num_timesteps = len(steps)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        arguments = step_arguments(scheduler, generator) | {"return_dict": False}
        begin = when[0]  # of the step, whose calls are all guided or none
        scaled = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
        with self.progress_bar(total=len(steps)) as bar:
            for i, timestep in enumerate(steps):
                if getattr(scheduler, "state_in_first_order", True):  # or Heun corrects the last one
                    begin = when[i]
                guided = replace(guided, scale=self.guidance_scale)  # which a callback may set
                noisy = scaled(latents, timestep).to(dtype)
                prediction = guided.predict(model, noisy, asked[i], labels, null_label, begin, guide)
                prediction = split_sigma(prediction.float(), latents.shape[1], scheduler)
                latents = scheduler.step(prediction, timestep, latents, **arguments)[0]
                if callback_on_step_end is not None:
                    wanted = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = callback_on_step_end(self, i, timestep, wanted).pop("latents", latents)
                bar.update()
        result = latents if output_type == "latent" else self._postprocess(self._decode(latents), output_type)
        self.maybe_free_model_hooks()
        return self.output(result) if return_dict else (result,)

    @abstractmethod
    def _postprocess(self, pixels: Tensor, output_type: str) -> Any:
        """Pixels about [-1, 1] as the call's ``output_type``."""

    def _check(
        self,
        guidance: Guidance,
        guide: IwinDiTTransformer2DModel | None,
        steps: int,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> None:
        if guide is not None:
            self._check_guide(guide)
        guidance.check(self.transformer.config, guide is not None)
        check_scheduler(self.scheduler, self.transformer.config.prediction_type)
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}, expected at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}, expected 'pil', 'np', 'pt' or 'latent'")
        if unknown := set(callback_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(sorted(unknown))}, expected only "
                f"{', '.join(self._callback_tensor_inputs)}"
            )

    def _check_guide(self, guide: IwinDiTTransformer2DModel) -> None:
        model = self.transformer
        pairs = {"axes of the grid": (guide.rank, model.rank)}
        for key in ("in_channels", "num_classes", "prediction_type"):
            pairs[key] = guide.config[key], model.config[key]
        for name, (found, expected) in pairs.items():
            if found != expected:
                raise ValueError(f"the guide's {name} is {found}, expected {expected}, as of the model")
        hooks = [
            getattr(module, "_hf_hook", None) for module in guide.modules()
        ]  # offloading brings it there
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        here = torch.device(next((device for device in devices if device is not None), guide.device))
        there = self._execution_device
        places = [(device.type, device.index or 0) for device in (here, there)]
        if guide.dtype != model.dtype or places[0] != places[1]:
            raise ValueError(
                f"the guide is {guide.dtype} on {here}, the model {model.dtype} on {there}: "
                "move it there with guide.to(device, dtype)"
            )

    def _latent_size(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, ...]:
        """Sides of the latent, of frames and pixels; None is the model's own."""
        factor, multiple = spatial_factor(self.vae), spatial_factor(self.vae) * self.transformer.patch_size
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < 1 or pixels % multiple):
                raise ValueError(
                    f"{name} is {pixels}, expected a multiple of {multiple} (VAE factor times patch size)"
                    + ("" if pixels > 0 else " above 0")
                )
        *frames, own_height, own_width = self.transformer.latent_size
        if num_frames is not None:
            if not frames:
                raise ValueError(f"num_frames is {num_frames}, but this model draws images; leave it out")
            frames = [latent_frames(self.vae, num_frames)]
        sides = ((height, own_height), (width, own_width))
        return (*frames, *(own if pixels is None else pixels // factor for pixels, own in sides))

    def _initial_latents(
        self, batch: int, size: tuple[int, ...], generator: Any, latents: Tensor | None
    ) -> Tensor:
        """Noise ``(B, C, [T,] h, w)`` in float32, drawn where the generators live."""
        shape = (batch, self.transformer.config.in_channels, *size)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"got {len(generator)} generators for {batch} images, expected one, or one per image"
            )
        device = self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if latents.ndim != len(shape) or latents.shape[:2] != shape[:2]:
            axes = "frames x height x width" if len(shape) == 5 else "height x width"
            raise ValueError(f"latents are {tuple(latents.shape)}, expected {batch} x {shape[1]} x {axes}")
        return latents.to(device=device, dtype=torch.float32)

    def _decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to float32 pixels, about [-1, 1].

        Raises:
            DataError: where they are not finite, since image files would show them black; it says whose
                computation was not.
        """
        if not torch.isfinite(latents).all():
            raise DataError(
                "the transformer's latents are not finite; its weights are not usable in "
                f"{_name(self.transformer.dtype)}"
            )
        mean, std = self.config.latents_mean, self.config.latents_std
        if mean is None or std is None:
            mean, std = vae_statistics(self.vae)
        parts = denormalize(latents, mean, std).split(DECODED_AT_ONCE if latents.ndim == 4 else 1)
        pixels = torch.cat([decode(self.vae, part).float() for part in parts])
        if not torch.isfinite(pixels).all():
            hint = "; take bfloat16 or float32" if self.vae.dtype == torch.float16 else ""
            raise DataError(
                f"the autoencoder's pixels are not finite in {_name(self.vae.dtype)}, though the latents of "
                f"the transformer are{hint}"
            )
        return pixels


def export_pipeline(pipeline: ClassConditionalPipeline, folder: Path, recipe: dict[str, Any]) -> None:
    """Writes a pipeline and its recipe to ``folder``, replaced as a whole once the new one is complete."""
    with scratch.replacement(folder) as new:
        pipeline.save_pretrained(new, safe_serialization=True)
        (new / "recipe.json").write_bytes(files.to_json(recipe))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
