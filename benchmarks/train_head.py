"""Trains a small EAGLE-3 head for a model of Llama's family, so that `--speculate eagle:HEAD` can be seen at work.

The texts are the model's own: it answers prompts, and the head learns from these answers, since its guesses will be
judged by such. The head learns the model's distribution, over several guesses in a row: each guess reads what the head
made of the one before, as it will when it drafts (arXiv 2503.01840, section 3). It starts as a copy of the model's last
layer. Then it drafts greedy answers to prompts about subjects that it was not trained on, at one stream, beside an
engine without drafts that takes turns with it.

    python benchmarks/train_head.py MODEL FOLDER [--answers 320] [--output FILE.json]
    python benchmarks/train_head.py MODEL FOLDER --answers 0      the folder has a head: serve it

MODEL is a folder, a GGUF file, a repository, or quickstart. Everything is seeded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from anychip import LLM, SamplingParams
from anychip.bench.report import write
from anychip.hub import resolve_folder
from anychip.model_config import ModelConfig, load_model_config
from anychip.types import QUICKSTART
from anychip.weights.gguf_checkpoint import open_checkpoint

GUESSES = 3
"""In a row, as they are trained."""
NUM_DRAFT_TOKENS = 4096
ANSWER = 96
"""Tokens of each answer."""
TASKS = (
    "Write a short story about {}.",
    "Explain {} to a child.",
    "Give me three facts about {}.",
    "What should one know before buying {}?",
    "Write a Python function about {}, with a comment on each line.",
    "Write a polite e-mail about {}.",
    "What is good and what is bad about {}?",
    "Make a list of ten words that go with {}.",
)
SUBJECTS = """
bicycles bread bridges cameras candles castles cheese chess clocks clouds coffee coins comets cotton dances deserts
dolphins doors dreams elephants engines farms ferries festivals fire fishing flags flowers forests fountains
friendship games gardens glaciers gold hats history honey horses hotels ice insects islands jazz kites ladders lakes
lamps languages letters libraries lighthouses magnets maps markets mirrors money mountains museums music night oceans
olives orchards owls paint parks pencils pianos planets poems potatoes puppets radios rain recipes rivers robots roofs
sailing salt schools shadows ships silk snow soap stamps stars statues storms sugar tea telescopes tents tides tigers
trains trees tunnels umbrellas violins volcanoes walls watches whales wheat windmills windows wolves wool"""
NUM_HELD = 12
"""Subjects that the head is not trained on."""


def asked(seed: int, *, held: bool) -> list[str]:
    """All tasks on the subjects of one side, shuffled."""
    subjects = SUBJECTS.split()
    random.Random(0).shuffle(subjects)
    subjects = subjects[:NUM_HELD] if held else subjects[NUM_HELD:]
    prompts = [task.format(subject) for task in TASKS for subject in subjects]
    return random.Random(seed).sample(prompts, len(prompts))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.theta = config.rope_parameters["rope_theta"]
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, rows in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            self.self_attn.add_module(f"{name}_proj", nn.Linear(2 * size, rows * self.dim, bias=False))
        self.self_attn.o_proj = nn.Linear(self.heads * self.dim, size, bias=False)
        self.mlp.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.mlp.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.mlp.down_proj = nn.Linear(config.intermediate_size, size, bias=False)

    def forward(self, embedded: Tensor, features: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """`earlier` has the keys and values of the guesses before this one, and is given this one's. A position sees
        those of true features up to where the guesses began, and then one of each guess."""
        read = torch.cat((self.input_layernorm(embedded), self.hidden_norm(features)), dim=-1)
        batch, count, _ = read.shape
        q, k, v = (
            projection(read).view(batch, count, -1, self.dim).transpose(1, 2)
            for projection in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        )
        groups = self.heads // self.kv_heads
        q, k, v = self.turned(q), self.turned(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        earlier.append((k, v))
        guess = len(earlier) - 1
        seen = torch.ones(count, count, dtype=torch.bool).tril(-guess)
        scores = [(q @ earlier[0][0].transpose(2, 3)).masked_fill(~seen, float("-inf"))]
        shifted = [tuple(each.roll(guess - at, dims=2) for each in earlier[at]) for at in range(1, guess + 1)]
        scores += [(q * key).sum(-1, keepdim=True) for key, _ in shifted]
        weights = (torch.cat(scores, dim=-1) / self.dim**0.5).softmax(-1)
        attended = weights[..., :count] @ earlier[0][1]
        for at, (_, value) in enumerate(shifted):
            attended = attended + weights[..., count + at, None] * value
        hidden = features + self.self_attn.o_proj(attended.transpose(1, 2).reshape(batch, count, -1))
        x = self.post_attention_layernorm(hidden)
        return hidden + self.mlp.down_proj(functional.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * self.theta ** -(torch.arange(0, self.dim, 2) / self.dim)
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Head(nn.Module):
    """Its parameters have the names that they have in a checkpoint. `ids` are the tokens that it drafts."""

    def __init__(self, target: LlamaForCausalLM, ids: Tensor) -> None:
        super().__init__()
        config, last = target.config, target.model.layers[-1]
        size = config.hidden_size
        self.ids = ids
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.midlayer = Layer(config)
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, len(ids), bias=False)
        with torch.no_grad():
            self.fc.weight.mul_(0.1)[:, -size:] += torch.eye(size)
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(self.midlayer.self_attn, name).weight[:, size:] = getattr(last.self_attn, name).weight
            self.midlayer.self_attn.o_proj.weight.copy_(last.self_attn.o_proj.weight)
            self.midlayer.mlp.load_state_dict(last.mlp.state_dict())
            self.midlayer.hidden_norm.weight.copy_(last.input_layernorm.weight)
            self.midlayer.post_attention_layernorm.weight.copy_(last.post_attention_layernorm.weight)
            self.norm.weight.copy_(target.model.norm.weight)
            self.lm_head.weight.copy_(target.lm_head.weight[ids])

    def forward(self, embedded: Tensor, taps: Tensor) -> Iterator[Tensor]:
        """Logits [batch, positions, draft tokens] by guess. The first `guess` positions of a guess mean nothing."""
        features, earlier = self.fc(taps), list[tuple[Tensor, Tensor]]()
        for _ in range(GUESSES):
            made = self.midlayer(embedded, features, earlier)
            yield self.lm_head(self.norm(made))
            features = made.roll(1, dims=1)


class Target:
    """The model, and what its layers hand on. Its weights are read as an engine reads them."""

    def __init__(self, config: ModelConfig) -> None:
        made = LlamaConfig(**{**config.raw, "dtype": torch.bfloat16})
        self.model = LlamaForCausalLM(made).to(torch.bfloat16).eval().requires_grad_(False)
        names = self.model.state_dict().keys()
        views = open_checkpoint(Path(config.folder)).views()
        weights = {name: view.read() for name, view in views if name in names}
        lacking = self.model.load_state_dict(weights, strict=False).missing_keys
        assert {*lacking} <= {"lm_head.weight"}, lacking
        self.model.tie_weights()
        self.layers = (1, config.num_layers // 2, config.num_layers - 1)
        self.seen: dict[int, Tensor] = {}
        for layer in self.layers:
            self.model.model.layers[layer].register_forward_hook(
                lambda module, given, out, layer=layer: self.seen.update({layer: out})
            )

    def run(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a text [1, length], by position of a head: embeddings of the next tokens, hidden states, and the logits
        that its first guess should have."""
        with torch.inference_mode():
            logits = self.model(ids, use_cache=False).logits.float()
            taps = torch.cat([self.seen[layer] for layer in self.layers], dim=-1).float()
            embedded = self.model.get_input_embeddings()(ids[:, 1:]).float()
        return embedded.clone(), taps[:, :-1].clone(), logits[:, 1:].clone()


def opened(model: str, **settings: Any) -> LLM:
    given = {"device": "cpu", "dtype": "bfloat16", "max_model_len": 512, "max_num_batched_tokens": 512, **settings}
    return LLM(model, **given, max_num_seqs=32, prefix_caching=False)


def prompt_ids(llm: LLM, prompts: Sequence[str]) -> list[list[int]]:
    """As turns of a chat, where the model's tokenizer has a template for them."""
    if llm.tokenizer.chat_template is None:
        return [llm.tokenizer.encode(prompt) for prompt in prompts]
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    texts = [llm.tokenizer.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    return [llm.tokenizer.encode(text, add_special_tokens=False) for text in texts]


def answers(model: str, count: int) -> list[Tensor]:
    """Prompts and the model's own answers to them, [1, length] each: every other one greedy."""
    began = time.monotonic()
    with opened(model) as llm:
        prompts = prompt_ids(llm, asked(1, held=False)[:count])
        sampling = [
            SamplingParams(temperature=0.7 * (at % 2), seed=at, max_tokens=ANSWER, ignore_eos=True)
            for at in range(len(prompts))
        ]
        outputs = llm.generate(prompts, sampling)
    print(f"{len(prompts)} answers of {ANSWER} tokens in {time.monotonic() - began:.0f} s", flush=True)
    return [torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]]) for output in outputs]


def train(head: Head, target: Target, texts: list[Tensor], num_passes: int) -> None:
    steps = [text for at in range(num_passes) for text in random.Random(at).sample(texts, len(texts))]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(steps), pct_start=0.1)
    began = time.monotonic()
    for number, ids in enumerate(steps):
        embedded, taps, wanted = target.run(ids)
        right = wanted.softmax(-1)[..., head.ids]
        losses = [
            functional.cross_entropy(logits[:, guess:].flatten(0, 1), right[:, guess:].flatten(0, 1)) * 0.8**guess
            for guess, logits in enumerate(head(embedded, taps))
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if number % 50 == 0:
            shown = " ".join(f"{loss.item():.3f}" for loss in losses)
            print(f"step {number} of {len(steps)}: losses {shown}, {time.monotonic() - began:.0f} s", flush=True)


def save(head: Head, config: ModelConfig, layers: Sequence[int], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    own = config.raw | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": len(head.ids),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers)},
        "tie_word_embeddings": False,
    }
    own.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(own, indent=1))
    weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in head.state_dict().items()}
    weights["d2t"] = head.ids - torch.arange(len(head.ids))
    weights["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, head.ids, True)
    save_file(weights, folder / "model.safetensors")


# -- served -------------------------------------------------------------------------------------------------


def serve(model: str, folder: Path, num_prompts: int) -> list[dict[str, Any]]:
    """Greedy answers at one stream to prompts about the subjects that are held out: first with drafts behind every
    step, then as far as they pay by the measured costs. Two engines take turns; the time is the process's own."""
    rows = []
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    with (
        opened(model) as plain,
        opened(model, speculate=f"eagle:{folder}", max_drafts=GUESSES) as drafting,
    ):
        texts = prompt_ids(plain, asked(2, held=True)[:num_prompts])
        scheduler = drafting.engine.scheduler
        costs = scheduler.drafting._speculator.costs
        for always in (True, False):
            scheduler.drafting._speculator.costs = None if always else costs
            before, ratios, same = scheduler.stats.speculation, list[float](), 0
            for number, ids in enumerate(texts):
                took, said = {}, {}
                for name, llm in (("plain", plain), ("drafting", drafting))[:: 1 if number % 2 else -1]:
                    began = time.process_time()
                    said[name] = llm.generate([ids], sampling)[0].outputs[0].token_ids
                    took[name] = time.process_time() - began
                ratios.append(took["plain"] / took["drafting"])
                same += said["plain"] == said["drafting"]
            after = scheduler.stats.speculation
            places = [last - first for last, first in zip(after.accepted_at, before.accepted_at, strict=True)]
            rows.append({
                "drafts": "behind every step" if always else "as far as they pay",
                "prompts": len(texts),
                "times_faster": round(statistics.median(ratios), 3),
                "lowest_highest": [round(min(ratios), 3), round(max(ratios), 3)],
                "drafted": after.drafted - before.drafted,
                "accepted_at": places,
                "equal_answers": same,
                "load": round(os.getloadavg()[0], 1),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--answers", type=int, default=320, help="to train on; 0: the folder has a head, serve it")
    parser.add_argument("--passes", type=int, default=2, help="over the answers")
    parser.add_argument("--prompts", type=int, default=24, help="to serve")
    parser.add_argument("--output", type=Path, help="a file for what serving it brought")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = arguments.model if arguments.model == QUICKSTART else str(resolve_folder(arguments.model))
    began, trained = time.monotonic(), {}
    if arguments.answers:
        texts = answers(model, arguments.answers)
        config = load_model_config(model)
        target = Target(config)
        common = Counter(token for text in texts for token in text[0].tolist()).most_common(NUM_DRAFT_TOKENS)
        head = Head(target.model, torch.tensor(sorted(token for token, _ in common)))
        num_parameters = sum(each.numel() for each in head.parameters())
        print(f"{num_parameters:,} parameters, {len(head.ids)} tokens that it can draft", flush=True)
        train(head, target, texts, arguments.passes)
        save(head, config, target.layers, arguments.folder)
        trained = {"parameters": num_parameters, "tokens": sum(text.shape[1] for text in texts),
                   "passes": arguments.passes, "seconds": round(time.monotonic() - began)}  # fmt: skip
    rows = serve(model, arguments.folder, arguments.prompts)
    if arguments.output is not None:
        write(
            arguments.output, {"benchmark": "train_head", "model": Path(model).name, "trained": trained, "served": rows}
        )


if __name__ == "__main__":
    main()
