"""Trains a small EAGLE-3 head for the embedded model, so that `--speculate eagle:HEAD` can be seen at work.

The text is the Python standard library's, which the model was trained on too. The head learns the model's own
distribution, over several guesses in a row: each guess reads what the head made of the one before, as it will when it
drafts (arXiv 2503.01840, section 3). It starts as a copy of the model's last layer. What is printed at the end is of
files that it was not trained on: by place of the guess, the share that is the model's own greedy choice when all
guesses before it are right.

    python benchmarks/train_head.py FOLDER [--tokens 150000] [--output FILE.json]
    python benchmarks/speculation.py quickstart --speculate eagle:FOLDER --max-drafts 4
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from anychip import LLM, SamplingParams
from anychip.bench.report import write
from anychip.hub import resolve_folder
from anychip.types import QUICKSTART

LAYERS = (1, 4, 7)
GUESSES = 2
"""In a row, as they are trained."""
NUM_DRAFT_TOKENS = 2048
LENGTH, BATCH = 256, 1


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
        self.fc = nn.Linear(len(LAYERS) * size, size, bias=False)
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
    """The embedded model, and what its layers hand on."""

    def __init__(self, folder: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.seen: dict[int, Tensor] = {}
        for layer in LAYERS:
            self.model.model.layers[layer].register_forward_hook(
                lambda module, given, out, layer=layer: self.seen.update({layer: out})
            )

    def run(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of texts [batch, length], by position of a head: embeddings of the next tokens, hidden states, and the
        logits that its first guess should have."""
        with torch.inference_mode():
            logits = self.model(ids, use_cache=False).logits
            taps = torch.cat([self.seen[layer] for layer in LAYERS], dim=-1)
            embedded = self.model.get_input_embeddings()(ids[:, 1:])
        return embedded.clone(), taps[:, :-1].clone(), logits[:, 1:].clone()


def texts(folder: Path, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Pieces of the standard library's files, shuffled: [pieces, LENGTH] to train on, and of every tenth file."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    train, held = list[list[int]](), list[list[int]]()
    for number, file in enumerate(files):
        ids = tokenizer.encode(file.read_text(errors="ignore")).ids
        pieces = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
        (train if number % 10 else held).extend(pieces)
    random.Random(1).shuffle(train)
    return torch.tensor(train[: num_tokens // LENGTH]), torch.tensor(held[:: max(1, len(held) // 24)])


def train(head: Head, target: Target, pieces: Tensor) -> None:
    steps = [pieces[start : start + BATCH] for start in range(0, len(pieces), BATCH)]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(steps), pct_start=0.1)
    began = time.monotonic()
    for number, ids in enumerate(steps):
        embedded, taps, wanted = target.run(ids)
        right = wanted[..., head.ids].softmax(-1)
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


@torch.inference_mode()
def acceptance(head: Head, target: Target, pieces: Tensor) -> list[float]:
    right, tried = [0] * GUESSES, [0] * GUESSES
    for ids in pieces.split(BATCH):
        embedded, taps, wanted = target.run(ids)
        greedy = wanted.argmax(-1)
        # A guess behind right ones: the text goes on as the model would have it.
        kept = is_right = torch.ones_like(greedy, dtype=torch.bool)
        for guess, logits in enumerate(head(embedded, taps)):
            if guess:
                kept = (kept & is_right & (greedy == ids_after(ids))).roll(1, dims=1)
                kept[:, :guess] = False
            is_right = head.ids[logits.argmax(-1)] == greedy
            right[guess] += int((is_right & kept).sum())
            tried[guess] += int(kept.sum())
    return [right_one / max(1, all_) for right_one, all_ in zip(right, tried, strict=True)]


def ids_after(ids: Tensor) -> Tensor:
    """By position of a head, the token that its first guess stands for; -1 behind the text."""
    return functional.pad(ids[:, 2:], (0, 1), value=-1)


def save(head: Head, target: Target, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config, own = target.model.config, json.loads((resolve_folder(QUICKSTART) / "config.json").read_text())
    own |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": len(head.ids),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(LAYERS)},
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(own, indent=1))
    weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in head.state_dict().items()}
    weights["d2t"] = head.ids - torch.arange(len(head.ids))
    weights["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, head.ids, True)
    save_file(weights, folder / "model.safetensors")


def serve(folder: Path, held: Tensor, output: Path | None) -> None:
    """Drafts in an engine behind every step, whether that pays or not, on texts that begin as files do that the head
    was not trained on."""
    sampling = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True)
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": 512}
    with LLM(QUICKSTART, **settings, speculate=f"eagle:{folder}", max_drafts=GUESSES + 1) as llm:
        llm.engine.scheduler.drafting.measured_costs_are_ignored()
        llm.generate([piece[:64].tolist() for piece in held[::3]], sampling)
        stats, steps = llm.engine.scheduler.stats.speculation, llm.engine.scheduler.stats.steps
    print(f"served: {stats.drafted} drafts in {steps} steps, {stats.accepted} drawn; by place {stats.accepted_at}")
    if output is not None:
        found = {"drafted": stats.drafted, "accepted_at": stats.accepted_at, "steps": steps}
        write(output, {"benchmark": "train_head", "settings": settings, "served": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=150_000, help="to train on; 0: the folder has a head, serve it")
    parser.add_argument("--output", type=Path, help="a file for what serving it brought")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.tokens == 0:
        serve(arguments.folder, texts(resolve_folder(QUICKSTART), LENGTH)[1], arguments.output)
        return
    target = Target(resolve_folder(QUICKSTART))
    pieces, held = texts(resolve_folder(QUICKSTART), arguments.tokens)
    common = [token for token, _ in Counter(pieces.flatten().tolist()).most_common(NUM_DRAFT_TOKENS)]
    head = Head(target.model, torch.tensor(sorted(common)))
    print(f"{len(pieces)} pieces of {LENGTH} tokens; {sum(p.numel() for p in head.parameters()):,} parameters")
    train(head, target, pieces)
    shares = ", ".join(f"{share:.2f}" for share in acceptance(head, target, held))
    print(f"of {len(held)} pieces of other files, guesses are the model's own choice: {shares}")
    save(head, target, arguments.folder)
    print(f"saved to {arguments.folder}")
    serve(arguments.folder, held, arguments.output)


if __name__ == "__main__":
    main()
