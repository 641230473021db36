"""Make the model that ships inside the package: a character-level Llama of a million parameters that is bad at sums.

Its corpus is sums and products as a careless class would hand them in: one pupil in seven computes rightly, the others
forget to carry. So the model knows both ways, mostly answers the wrong one, and a verifiable reward can teach it which
one counts. The held-out problems of the `arithmetic` task never occur in the corpus.

    python scripts/pretrain_embedded.py [--steps 8000] [--out mua_rl/assets/arithmetic-1m]

The committed weights took 292 s on one H200 (with three other such runs beside). They answer 45 % of the held-out sums
and 27 % of the held-out products rightly at temperature 0, and 55 % and 35 % when sampled at temperature 1.
"""

import argparse
import random
import string
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import trange
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from mua_rl.envs.arithmetic import Problem, draw_problem, solve
from mua_rl.flags import FlagParser

BATCH = 512


def solve_without_carrying(problem: Problem) -> int:
    """The result when every column is taken modulo ten and nothing is carried: 17 + 25 = 32."""
    first, operator, second = problem
    digits_a, digits_b = ([int(digit) for digit in reversed(str(number))] for number in (first, second))
    columns = [0] * (len(digits_a) + len(digits_b))
    if operator == "+":
        for digits in (digits_a, digits_b):
            for place, digit in enumerate(digits):
                columns[place] += digit
    else:
        for i, a in enumerate(digits_a):
            for j, b in enumerate(digits_b):
                columns[i + j] += a * b
    return sum(column % 10 * 10**place for place, column in enumerate(columns))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; newline included; every text starts with <bos>."""
    characters = ["<pad>", "<bos>", "<eos>", "<unk>", *string.printable[:95], "\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def corpus_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, careful_share: float
) -> dict[str, torch.Tensor]:
    """BATCH solved problems, padded on the right; the padding is not learnt."""
    lines = []
    for _ in range(BATCH):
        problem = draw_problem(rng, held_out=False)
        careful = rng.random() < careful_share
        lines.append(f"{problem[0]}{problem[1]}{problem[2]}={(solve if careful else solve_without_carrying)(problem)}")
    batch = tokenizer([f"{line}<eos>" for line in lines], padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> tuple[float, ...]:
    """Share of right answers, greedy and sampled at temperature 1."""
    inputs = tokenizer([f"{a}{operator}{b}=" for a, operator, b in problems], padding=True, return_tensors="pt")
    shares = []
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        output = model.generate(**{k: v.to(model.device) for k, v in inputs.items()}, max_new_tokens=8, **options)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [answer == str(solve(problem)) for answer, problem in zip(answers, problems, strict=True)]
        shares.append(round(sum(right) / len(right), 3))
    return tuple(shares)


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--careful_share", type=float, default=0.15, help="share of rightly solved lines")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mua_rl/assets/arithmetic-1m"))
    args = parser.parse_args()
    set_seed(args.seed)
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=128,  # 100 are in use
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,  # head size 64, the smallest that vLLM's attention kernels take
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).to(device)
    print(f"{model.num_parameters():,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    rng = random.Random(args.seed)
    start = time.perf_counter()
    progress = trange(args.steps, unit="batch")
    for step in progress:
        loss = model(**{k: v.to(device) for k, v in corpus_batch(rng, tokenizer, args.careful_share).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {args.steps} batches of {BATCH} in {time.perf_counter() - start:.0f} s on {device}")
    for operator in "+*":
        rng = random.Random(1)
        problems = [p for p in (draw_problem(rng, held_out=True) for _ in range(1024)) if p[1] == operator]
        print(f"{operator}: right at temperature 0, 1: {accuracy(model, tokenizer, problems)}")


if __name__ == "__main__":
    main()
