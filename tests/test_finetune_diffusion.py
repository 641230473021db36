"""The script of the diffusion field, in miniature: a UNet on digits, and a Stable Diffusion pipeline from a folder."""

import importlib
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from mua_rl.adapter.adapters import Full, LoRA, load_adapter
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.adapter.targets import lora_layers
from mua_rl.analysis.rows import read
from mua_rl.errors import Diverged, UserError
from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import RunFolder

for package in ("diffusers", "sklearn", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'mua-rl[fields]'")

pytestmark = pytest.mark.slow

MINIATURE = ["--steps", "3", "--batch_size", "4", "--held_out", "8", "--pretraining_steps", "3"]


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("finetune_diffusion")


@pytest.fixture(scope="module")
def launch(script, tmp_path_factory):
    """Runs the script with flags, in a folder that all tests share: one UNet is pretrained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        patch.setenv("MUA_RL_CACHE", "cache")

        def run(*flags):
            patch.setattr(sys, "argv", ["finetune_diffusion.py", *MINIATURE, *map(str, flags)])
            script.main()

        yield run


@pytest.fixture(scope="module")
def problem(script, launch):
    """The small UNet and its digits."""
    return script.problem(script.DiffusionArguments(steps=3, batch_size=4, held_out=8, pretraining_steps=3))


@pytest.fixture(scope="module")
def lora_run(launch):
    """A finished run of a LoRA."""
    launch("--rank", 8, "--lr", 0.0005, "--output_dir", "lora")
    return Path("lora")


def result_of(folder):
    return RunFolder(folder).result()


def test_lora_sits_on_the_convolutions_of_residual_blocks_and_on_the_projections_of_attention(problem):
    unet = LoRA(64, target_modules=problem.target_modules).attach(problem.load())
    names = [name for name, _ in lora_layers(unet)]
    kinds = {type(layer.base_layer) for _, layer in lora_layers(unet)}
    assert kinds == {nn.Conv2d, nn.Linear}
    resnets = [name for name, module in unet.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    attentions = [name for name, module in unet.named_modules() if type(module).__name__ == "Attention"]
    assert resnets and attentions
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    expected = [f"{name}.{conv}" for name in resnets for conv in ("conv1", "conv2")]
    expected += [f"{name}.{projection}" for name in attentions for projection in projections]
    assert sorted(names) == sorted(expected)


def test_every_lora_and_every_weight_of_full_finetuning_gets_a_gradient(script, problem):
    training, _ = script.digits().split(8)
    rows, noise = torch.arange(4), torch.randn(4, 1, 8, 8)
    for adapter in (LoRA(4, target_modules=problem.target_modules), Full(problem.target_modules)):
        unet = adapter.attach(problem.load())
        training.loss(unet, rows, noise, torch.full((4,), 500)).mean().backward()
        trained = [(name, weight) for name, weight in unet.named_parameters() if weight.requires_grad]
        moving = [(name, weight) for name, weight in trained if "lora_B" not in name]  # A is zero: B's is at first
        assert [name for name, weight in moving if weight.grad is None or not weight.grad.any()] == []


def test_the_loss_is_that_of_the_noise_or_of_the_velocity_as_the_scheduler_says(script):
    class Nothing(nn.Module):
        """Predicts zero."""

        def forward(self, noisy, timesteps, captions):
            assert captions.shape == (2, 4, 64)
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    digits, noise, rows = script.digits(), torch.randn(2, 1, 8, 8), torch.tensor([3, 5])
    timesteps = torch.tensor([10, 900])
    loss = digits.loss(Nothing(), rows, noise, timesteps)
    torch.testing.assert_close(loss, noise.square().mean((1, 2, 3)))
    digits.scheduler.register_to_config(prediction_type="v_prediction")
    signal = digits.scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    velocity = signal * noise - (1 - signal**2).sqrt() * digits.images[rows]
    torch.testing.assert_close(digits.loss(Nothing(), rows, noise, timesteps), velocity.square().mean((1, 2, 3)))


def test_measuring_twice_gives_the_same_whatever_was_drawn_in_between(problem):
    unet = problem.load()
    first = problem.measure(unet)
    torch.randn(7)
    assert problem.measure(unet) == first


def test_training_is_decided_by_its_seed(script, problem):
    adapter = LoRA(4, target_modules=problem.target_modules)
    metrics = [script.curves.finetune(problem, adapter, 1e-3, seed, 1e-3)[1] for seed in (1, 1, 2)]
    assert metrics[0] == metrics[1] != metrics[2]


def test_a_run_ends_in_an_adapter_that_brings_the_metric_back(lora_run, problem):
    result = result_of(lora_run)
    assert result.score > result.before
    unet = load_adapter(problem.load(), lora_run / "adapter")
    assert problem.measure(unet)[0] == pytest.approx(result.score, rel=1e-6)


def test_full_finetuning_takes_a_loras_record_and_saves_a_unet_of_diffusers(launch, lora_run, problem):
    from diffusers import UNet2DConditionModel

    launch("--rank", "full", "--lr_from", lora_run, "--output_dir", "full")
    lora = LRRecord.load(lora_run)
    assert LRRecord.load("full").learning_rate == pytest.approx(lora.learning_rate * (lora.rank / lora.outputs) ** 0.5)
    unet = UNet2DConditionModel.from_pretrained("full/model")
    assert problem.measure(unet)[0] == pytest.approx(result_of("full").score, rel=1e-6)


def test_the_curves_end_in_a_csv_a_report_and_a_record(launch):
    launch("--ranks", 4, "--grid", -9, -8, "--resolution", 1, "--seeds", 1, "--output_dir", "curves")
    assert {(row.trial.spec.rank, row.task, row.base) for row in read("curves/sweep.csv")} == {
        (4, "turned-digits", "unet-digits-3")
    }
    assert "minus held-out denoising loss" in Path("curves/report.md").read_text()
    assert LRRecord.load("curves").rank == 4


def test_a_loss_that_leaves_the_finite_numbers_ends_the_run(script, problem):
    nothing_but_nan = replace(script.digits(), images=torch.full((8, 1, 8, 8), torch.nan))
    problem = replace(problem, train=partial(nothing_but_nan.train, steps=2, batch_size=4))
    adapter = LoRA(4, target_modules=problem.target_modules)
    _, metric, _ = script.curves.finetune(problem, adapter, 1e-3, 0, 1e-3)
    assert math.isnan(metric)
    with pytest.raises(Diverged, match="step 0"):
        nothing_but_nan.train(problem.load(), None, None, 0, steps=2, batch_size=4)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--rank", 8], "--ranks"),
        (["--target_modules", "nothing", "--ranks", 4], "nothing"),
        (["--lr", 0.001, "--held_out", 1797], "--held_out"),
        (["--lr", 0.001, "--batch_size", 0], "--batch_size"),
        (["--lr", 0.001, "--rank", 65], "rank 65"),
        (["--lr", 0.001, "--model", "somewhere"], "--dataset_name"),
        (["--lr", 0.001, "--model", "./nowhere", "--dataset_name", "./nothing"], "pipeline ./nowhere cannot be loaded"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named(launch, flags, fault):
    with pytest.raises(UserError, match=fault):
        launch(*flags)


@pytest.fixture
def pipeline_folder(tmp_path):
    """Stable Diffusion 1.5's parts with random weights in little."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *"red blue", *(f"{letter}</w>" for letter in "redblu")]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(dict.fromkeys(words))}, merges=[])
    tokenizer.model_max_length = 8
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, PNDMScheduler(skip_prk_steps=True, steps_offset=1), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def captioned_images(tmp_path):
    """A folder of images with captions, as `datasets` reads it."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as stream:
        for i in range(6):
            colour = ("red", "blue")[i % 2]
            Image.new("RGB", (20 + i, 16), colour).save(folder / f"{i}.png")
            stream.write(json.dumps({"file_name": f"{i}.png", "text": colour}) + "\n")
    return folder


def test_a_stable_diffusion_pipeline_trains_on_images_with_captions(launch, pipeline_folder, captioned_images):
    from diffusers import UNet2DConditionModel

    launch(
        "--model", pipeline_folder, "--dataset_name", captioned_images, "--image_size", 16, "--held_out", 2,
        "--rank", "full", "--lr", 0.001, "--output_dir", "pipeline",
    )  # fmt: skip
    record, before = LRRecord.load("pipeline"), UNet2DConditionModel.from_pretrained(pipeline_folder / "unet")
    after = UNet2DConditionModel.from_pretrained("pipeline/model")
    assert record.base_fingerprint == fingerprint(before) != fingerprint(after)
    assert record.metric["after"] > record.metric["before"]


def test_a_column_that_the_data_set_lacks_is_named(launch, pipeline_folder, captioned_images):
    with pytest.raises(UserError, match="no columns image and caption, but image, text: say which"):
        launch("--model", pipeline_folder, "--dataset_name", captioned_images, "--caption_column", "caption")


def test_a_column_of_words_is_none_of_images(launch, pipeline_folder, captioned_images):
    with pytest.raises(UserError, match="column text holds no images"):
        launch("--model", pipeline_folder, "--dataset_name", captioned_images, "--image_column", "text")


def test_captions_and_latents_are_the_pipelines_own(script, pipeline_folder, captioned_images):
    from diffusers import StableDiffusionPipeline

    arguments = script.DiffusionArguments(
        model=str(pipeline_folder), dataset_name=str(captioned_images), image_size=16, batch_size=4
    )
    _, everything = script.stable_diffusion(arguments)
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    states = [pipeline.encode_prompt(colour, "cpu", 1, False)[0][0] for colour in ("red", "blue")]
    for image, caption in zip(everything.images, everything.captions, strict=True):
        colour = min((0, 1), key=lambda i: (caption - states[i]).abs().max().item())
        torch.testing.assert_close(caption, states[colour])
        pixels = torch.tensor([[1.0, -1, -1], [-1, -1, 1]])[colour][None, :, None, None].expand(1, 3, 16, 16)
        latent = pipeline.vae.encode(pixels).latent_dist
        assert ((image / pipeline.vae.config.scaling_factor - latent.mean[0]) / latent.std[0]).abs().max() < 5
    assert everything.images.shape == (6, 4, 8, 8) and len(everything.captions) == 6
