"""The largest steps that a device's rules and the configuration's limits allow: what memory is sized by."""

from __future__ import annotations

from anychip.plugin_api import ShapePolicy, StepLimits, StepProgram, StepRules


def largest_steps(rules: StepRules, limits: StepLimits) -> list[list[int]]:
    """Steps, as numbers of tokens by row, that obey rules and limits and are the largest in rows, in the longest row,
    and in tokens for so many rows."""
    rows = min(limits.max_num_reqs, limits.max_num_tokens, rules.max_padded_tokens or limits.max_num_reqs)
    steps = [[1] * rows]
    if rules.mix_prefill_decode and rules.max_prefills != 0:
        left = limits.max_num_tokens - rows + 1
        longest = min(left, limits.max_model_len, (rules.max_padded_tokens or left * rows) // rows)
        steps.append([longest] + [1] * (rows - 1))
    prompts = min(rows, rows if rules.max_prefills is None else rules.max_prefills)
    counts = {1 << power for power in range(prompts.bit_length())} | {prompts}
    steps += [_equal_rows(rules, limits, limits.max_num_tokens, count) for count in sorted(counts) if count]
    return [*steps, largest_drafts(rules, limits, limits.max_num_tokens)] if limits.max_drafts else steps


def largest_drafts(rules: StepRules, limits: StepLimits, tokens: int) -> list[int]:
    """Of the steps whose rows have as many drafts as they may, the one with most rows: tokens by row. It has `tokens`
    at most."""
    width = min(1 + limits.max_drafts, tokens, limits.max_model_len)
    bounds = (limits.max_num_reqs * width, tokens, rules.max_padded_tokens, (rules.max_prefills or tokens) * width)
    return [width] * max(1, min(bound for bound in bounds if bound is not None) // width)


def largest_prompts(rules: StepRules, limits: StepLimits, tokens: int) -> list[int]:
    """Of the steps of whole prompts, the one with most tokens, and of such the one with fewest rows: tokens by row.
    It has `tokens` at most."""
    prompts = limits.max_num_reqs if rules.max_prefills is None else min(limits.max_num_reqs, rules.max_prefills)
    counts, longest = range(1, 1 + max(1, min(prompts, tokens))), limits.max_model_len - 1
    return max((_equal_rows(rules, limits, tokens, count, longest=longest) for count in counts), key=sum)


def _equal_rows(
    rules: StepRules, limits: StepLimits, tokens: int, count: int, *, longest: int | None = None
) -> list[int]:
    """`count` rows at most, as long as rules, limits and `tokens` allow, the last one shorter where tokens end."""
    width = min(limits.max_model_len if longest is None else longest, tokens, limits.max_num_tokens)
    if rules.max_padded_tokens is not None:
        count = min(count, rules.max_padded_tokens)
        width = min(width, rules.max_padded_tokens // count)
    width = max(1, width)
    total = min(tokens, limits.max_num_tokens, width * count)
    if total % width == 1 and not rules.mix_prefill_decode and total > width:
        total -= 1
    return [width] * (total // width) + ([total % width] if total % width else [])


def step_memory(program: StepProgram, policy: ShapePolicy, rules: StepRules, limits: StepLimits) -> int:
    """Bytes of the step that needs most, as the program says."""
    pages = max(limits.max_pages, default=1)  # no array is empty
    keys = {
        policy.bucket(
            num_tokens=sum(step),
            num_reqs=len(step),
            num_samples=sum(min(count, 1 + limits.max_drafts) for count in step),
            max_query_len=max(step),
            num_pages=pages,
            features=(),
        )
        for step in largest_steps(rules, limits)
    }  # fmt: skip
    return max(program.memory(key) for key in keys)
