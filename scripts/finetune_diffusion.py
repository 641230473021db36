"""Diffusion: the learning-rate curves of LoRA, on convolutions and attention, and of full finetuning (issue 10).

A UNet and a noise scheduler of `diffusers`, the loop of its `train_text_to_image.py` without its trimmings. Without
flags it needs no hub: a small UNet learns scikit-learn's digits from their names (two minutes on one core, once, kept
in `mua_rl.lm.models.cache_folder()`), and is finetuned on the same digits lying on their side. With a
hub, the paper's model:

    python scripts/finetune_diffusion.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset_name lambdalabs/naruto-blip-captions --steps 2000 --batch_size 16

The metric is minus the loss on held-out images under noise and at timesteps that never change, so that two runs differ
in what they learnt alone. Needs `pip install 'mua-rl[fields]'`.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial

import curves
import data_sets
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import set_seed

from mua_rl.errors import Diverged, UserError
from mua_rl.exits import run_command
from mua_rl.lm import models

TARGET_MODULES = r".*\.(conv1|conv2|to_q|to_k|to_v|to_out\.0)"
"""Both convolutions of every residual block, the four projections of every self- and cross-attention."""
HELD_OUT_TIMESTEPS = (100, 300, 500, 700)
HELD_OUT_NOISE, HELD_OUT_BATCH = 1, 64


@dataclass
class DiffusionArguments:
    """The base, the data and the length of a run."""

    model: str | None = field(
        default=None, metadata={"help": "A Stable Diffusion pipeline, by hub id or folder. Default: the small UNet."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Images with captions, by hub id or folder, for --model."}
    )
    image_column: str = field(default="image", metadata={"help": "Of the data set."})
    caption_column: str = field(default="text", metadata={"help": "Of the data set."})
    image_size: int = field(default=512, metadata={"help": "Height and width that images are cropped to, in pixels."})
    held_out: int = field(default=128, metadata={"help": "Images that are kept for the metric."})
    steps: int = field(default=40, metadata={"help": "Optimizer steps of a run."})
    batch_size: int = field(default=16, metadata={"help": "Images of a step."})
    pretraining_steps: int = field(default=600, metadata={"help": "Of the small UNet, 32 images each."})


@dataclass(frozen=True)
class Denoising:
    """Images with captions to denoise.

    Attributes:
        scheduler: Of the noise.
        images: Pixels, or the latents of an autoencoder, `(N, C, H, W)`.
        captions: What the UNet's cross-attention reads, `(N, L, D)`.
    """

    scheduler: DDPMScheduler
    images: torch.Tensor
    captions: torch.Tensor

    def loss(self, unet: nn.Module, rows: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Mean squared error of each of R images, `(R,)`.

        Args:
            unet: Predicts the noise, or the velocity where the scheduler says so.
            rows: Which images, `(R,)`.
            noise: `(R, C, H, W)`.
            timesteps: `(R,)`.
        """
        device = curves.device()
        images, noise, timesteps = self.images[rows].to(device), noise.to(device), timesteps.to(device)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(images, noise, timesteps) if velocity else noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = unet(noisy, timesteps, self.captions[rows].to(device)).sample
        return (predicted.float() - target).square().flatten(1).mean(1)

    def train(
        self, unet: nn.Module, optimizer: Optimizer, schedule: LRScheduler, seed: int, steps: int, batch_size: int
    ) -> None:
        """Random images, noise and timesteps, all drawn by the seed; gradients clipped to norm 1.

        Raises:
            Diverged: The loss is not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            rows = torch.randint(len(self.images), (batch_size,), generator=generator)
            noise = torch.randn(batch_size, *self.images.shape[1:], generator=generator)
            timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
            loss = self.loss(unet, rows, noise, timesteps).mean()
            if not loss.isfinite():
                raise Diverged(f"the loss is {loss:g} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def measure(self, unet: nn.Module) -> tuple[float, float]:
        """Minus the mean loss over all images, with the same noise each time, and its standard error over images."""
        generator = torch.Generator().manual_seed(HELD_OUT_NOISE)
        losses = torch.zeros(len(self.images), device=curves.device())
        for timestep in HELD_OUT_TIMESTEPS:
            for rows in torch.arange(len(self.images)).split(HELD_OUT_BATCH):
                noise = torch.randn(len(rows), *self.images.shape[1:], generator=generator)
                losses[rows] += self.loss(unet, rows, noise, torch.full_like(rows, timestep))
        losses /= len(HELD_OUT_TIMESTEPS)
        return -losses.mean().item(), losses.std().item() / math.sqrt(len(losses))

    def split(self, held_out: int) -> tuple["Denoising", "Denoising"]:
        """All but the last images, and the last.

        Raises:
            UserError: There are not enough.
        """
        data_sets.check_held_out(held_out, len(self.images))
        return (
            replace(self, images=self.images[:-held_out], captions=self.captions[:-held_out]),
            replace(self, images=self.images[-held_out:], captions=self.captions[-held_out:]),
        )

    def turned(self) -> "Denoising":
        """The same images turned by a quarter."""
        return replace(self, images=self.images.rot90(1, (2, 3)))


def digits() -> Denoising:
    """Scikit-learn's 1797 handwritten digits, 8 × 8, the last by other writers; a caption is four fixed vectors."""
    pixels, labels = load_digits(return_X_y=True)
    names = torch.randn(10, 4, 64, generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return Denoising(DDPMScheduler(beta_schedule="squaredcos_cap_v2"), images, names[torch.tensor(labels)])


def small_unet(task: Denoising, steps: int) -> tuple[UNet2DConditionModel, str]:
    """A UNet of 1.4 million weights that denoises a task, trained once, and its name."""

    def make() -> list[nn.Module]:
        set_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 64),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=64,
            attention_head_dim=4,
        )
        return [curves.pretrain(unet, partial(task.train, steps=steps, batch_size=32), steps)]

    name = f"unet-digits-{steps}"
    # Whoever holds out more images has another one.
    return UNet2DConditionModel.from_pretrained(curves.made_once(f"{name}-{len(task.images)}", make)), name


@torch.no_grad()
def stable_diffusion(arguments: DiffusionArguments) -> tuple[UNet2DConditionModel, Denoising]:
    """The UNet of a pipeline, and a data set as its autoencoder's latents and its text encoder's states.

    Raises:
        UserError: One of them cannot be loaded, or the data set lacks a column.
    """
    from diffusers import StableDiffusionPipeline  # here, since importing it warns where there is no torchvision

    with models.loading(f"the pipeline {arguments.model}"):
        pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, safety_checker=None)
        scheduler = DDPMScheduler.from_pretrained(arguments.model, subfolder="scheduler")
    name, columns = str(arguments.dataset_name), [arguments.image_column, arguments.caption_column]
    rows = data_sets.read(name).shuffle(seed=0)
    data_sets.find_columns(rows, name, columns, flags="--image_column and --caption_column")
    data_sets.check_images(rows, arguments.image_column)
    device, size = curves.device(), arguments.image_size
    pipeline.to(device)
    generator, latents, captions = torch.Generator(device).manual_seed(0), [], []
    for batch in rows.iter(arguments.batch_size):
        images = [image.convert("RGB") for image in batch[arguments.image_column]]
        pixels = pipeline.image_processor.preprocess(images, size, size, resize_mode="crop").to(device)
        latents.append(pipeline.vae.encode(pixels).latent_dist.sample(generator).cpu())
        captions.append(pipeline.encode_prompt(batch[arguments.caption_column], device, 1, False)[0].cpu())
    scaled = torch.cat(latents) * pipeline.vae.config.scaling_factor
    return pipeline.unet.cpu(), Denoising(scheduler, scaled, torch.cat(captions))


def problem(arguments: DiffusionArguments) -> curves.Field:
    """Base, training and held-out images as the curves' harness takes them.

    Raises:
        UserError: A size is not positive, or one of the pipeline and the data set is not given or cannot be loaded.
    """
    if (arguments.model is None) != (arguments.dataset_name is None):
        raise UserError("--model and --dataset_name go together; without both, the small UNet learns digits.")
    curves.check_least(arguments, steps=1, batch_size=1, pretraining_steps=1, image_size=1, held_out=2)
    if arguments.model and arguments.dataset_name:
        base, everything = stable_diffusion(arguments)
        name, task = arguments.model, arguments.dataset_name
        training, held_out = everything.split(arguments.held_out)
    else:
        upright, upright_held_out = digits().split(arguments.held_out)
        base, name = small_unet(upright, arguments.pretraining_steps)
        training, held_out = upright.turned(), upright_held_out.turned()
        task = "turned-digits"
    return curves.Field(
        algorithm="diffusion",
        task=task,
        base=name,
        target_modules=TARGET_MODULES,
        load=lambda: copy.deepcopy(base).to(curves.device()),
        train=partial(training.train, steps=arguments.steps, batch_size=arguments.batch_size),
        measure=held_out.measure,
        metric="minus held-out denoising loss",
        steps=arguments.steps,
        batch={"images": arguments.batch_size},
    )


def main() -> None:
    """See the module."""
    curves.launch(DiffusionArguments, problem)


if __name__ == "__main__":
    run_command(main)
