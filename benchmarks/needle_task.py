"""The task of the needle benchmark, and training on it: which tokens matter is known exactly.

A completion has three steps. A step is F filler words, the number of the step, a decision (careful or careless) and a
full stop. A careful step succeeds with probability 0.95, a careless one with 0.5, and the completion is correct if all
steps succeed. So three tokens matter, and 3 F + 6 do not. A grammar fixes which tokens are allowed at each position.

Before training, policies are fitted to texts in which both decisions are equally frequent (`starting_policies`).
Then each step samples one group of G rollouts from each policy, computes token advantages with a row of `ROWS`, and
makes one optimizer step with TRL's loss. The expected accuracy of a rollout is known from its decisions, so learning
curves need no extra evaluation.

Shape suffixes: S policies (one per seed), G rollouts, T tokens, V vocabulary, K steps of a completion.
"""

import functools
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from needle_model import Parameters, clip_each, gradients, initial, unroll
from needle_rows import ROWS, Rollouts
from torch import Tensor

STEPS = 3  # K
CAREFUL, CARELESS = 0.95, 0.5  # probability that a step succeeds
WORDS = 100  # filler words
BEGIN, NUMBERS, STOP, DECISIONS, FILLER = 0, 1, 4, 5, 11  # first ids: prompt, step numbers, full stop, decisions, words
VOCABULARY = FILLER + WORDS
WIDTH = 64
ROLLOUTS = 1200  # rollouts of a training run; trees get the same number of generated tokens
WARM_STEPS, WARM_BATCH, WARM_RATE, WARM_FILLER, WARM_MODELS = 300, 32, 3e-3, 24, 4
EPSILON, MAX_GRAD_NORM = 0.2, 1.0  # TRL's clipping and the default of transformers
WINDOW = 80  # rollouts over which accuracy is averaged to find when it reaches the target
TARGET = 0.8  # of the way from the accuracy with undecided steps to the best possible one


@dataclass(frozen=True)
class Cell:
    """One condition of the experiment."""

    row: str  # key of `ROWS`
    rate: float  # learning rate
    filler: int  # F
    group: int = 8  # G
    rule: str = "all"  # key of `RULES`: how steps depend on each other
    mood: float = 0.0  # how strongly filler words and decisions go together in the starting policy

    @property
    def setting(self) -> dict:
        """Return what the cell has in common with those it is compared with."""
        return {name: value for name, value in asdict(self).items() if name not in ("row", "rate")}


# Whether each step gets the higher probability of success, from whether each decision is careful: (..., K) bool.
RULES = {
    "all": lambda careful: careful,
    "chain": lambda careful: careful.cumprod(-1).bool(),  # care is of use only after steps that were all careful
    "agree": lambda careful: careful == careful[..., :1],  # a step must be done as the first one
}


def chances(careful: Tensor, rule: str) -> Tensor:
    """Return the probability of success of each step, (..., K), from whether each decision is careful."""
    return torch.where(RULES[rule](careful), CAREFUL, CARELESS)


def target(rule: str) -> float:
    """Return the accuracy that counts as learned."""
    every = torch.cartesian_prod(*[torch.tensor([False, True])] * STEPS)
    accuracy = chances(every, rule).prod(-1)
    return float(accuracy.mean() + TARGET * (accuracy.max() - accuracy.mean()))


class Grammar(NamedTuple):
    """Which tokens are allowed at each position of a completion."""

    allowed_TV: Tensor  # bool
    ranges: list[tuple[int, int]]  # the same as first id and end, for each position
    decisions_K: Tensor  # positions of the decisions


@functools.cache
def grammar(filler: int) -> Grammar:
    """Return the grammar of completions with this number of filler words per step."""
    ranges = []
    for k in range(STEPS):
        decision = DECISIONS + 2 * k
        ranges += [(FILLER, VOCABULARY)] * filler
        ranges += [(NUMBERS + k, NUMBERS + k + 1), (decision, decision + 2), (STOP, STOP + 1)]
    ids = torch.arange(VOCABULARY)
    allowed = torch.stack([(ids >= first) & (ids < end) for first, end in ranges])
    return Grammar(allowed, ranges, torch.arange(STEPS) * (filler + 3) + filler + 1)


def is_careful(ids: Tensor) -> Tensor:
    """Return which decisions are careful. The two decisions of a step have consecutive ids, careful first."""
    return (ids - DECISIONS) % 2 == 0


# The starting policies


def texts(n: int, mood: float, generator: torch.Generator) -> Tensor:
    """Return texts with `WARM_FILLER` filler words per step, (n, T).

    Words follow a random bigram model with Zipf's frequencies. Decisions are careful with probability 1/2. With a mood,
    half of the texts are careful with probability (1 + mood) / 2 and the others with (1 - mood) / 2, and the frequency
    of half of the words is exp(mood) times as high in the former as in the latter.
    """
    language = torch.Generator().manual_seed(0)  # the same for all policies
    bigrams = torch.randn(WORDS, WORDS, generator=language) - torch.log(torch.arange(WORDS) + 3.0)
    leaning = torch.randperm(WORDS, generator=language) % 2 - 0.5
    side = torch.randint(2, (n, 1), generator=generator) - 0.5
    cumulative = (bigrams + mood * side[:, :, None] * leaning).softmax(-1).cumsum(-1)  # (n, word before, word)
    word = torch.randint(WORDS, (n, 1), generator=generator)
    rows = []
    for first, end in grammar(WARM_FILLER).ranges:
        u = torch.rand(n, 1, generator=generator)
        if first == FILLER:
            at = cumulative.gather(1, word[..., None].expand(-1, -1, WORDS)).squeeze(1)
            word = (at < u).sum(1, keepdim=True).clamp(max=WORDS - 1)
            rows.append(FILLER + word)
        elif end - first == 2:
            rows.append(first + (u > 0.5 + mood * side).long())
        else:
            rows.append(torch.full_like(word, first))
    return torch.cat(rows, 1)


@functools.cache
def starting_policies(mood: float) -> Parameters:
    """Return `WARM_MODELS` policies of different initialization, fitted to `texts`."""
    new = [initial(model, VOCABULARY, WIDTH) for model in range(WARM_MODELS)]
    p = {name: torch.cat([one[name] for one in new]) for name in new[0]}
    optimizer = torch.optim.AdamW(p.values(), lr=WARM_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, WARM_STEPS)
    generator = torch.Generator().manual_seed(1)
    allowed_TV = grammar(WARM_FILLER).allowed_TV
    for _ in range(WARM_STEPS):
        ids_TSG = texts(WARM_MODELS * WARM_BATCH, mood, generator).T.unflatten(1, (WARM_MODELS, WARM_BATCH))
        trace = unroll(p, torch.full_like(ids_TSG[0], BEGIN), len(ids_TSG), lambda t, h, ids=ids_TSG: ids[t])
        found = gradients(p, trace, allowed_TV, lambda logps_SGT, _: -logps_SGT.mean((1, 2)).sum())
        clip_each(found, MAX_GRAD_NORM)
        step(optimizer, p, found)
        schedule.step()
    return p


def step(optimizer: torch.optim.Optimizer, p: Parameters, gradient: Parameters) -> None:
    """Make an optimizer step. Adam treats each number separately, so stacked policies do not affect each other."""
    for name, g in gradient.items():
        p[name].grad = g
    optimizer.step()


# Training


class Noise:
    """Random numbers of each seed, which do not depend on the other seeds."""

    def __init__(self, seeds: list[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, *shape: int) -> Tensor:
        return torch.stack([torch.rand(shape, generator=generator) for generator in self.generators])


def share_in_trees(u: Tensor, block_T: list[int]) -> Tensor:
    """Give blocks of consecutive rollouts the same random numbers, so that they sample the same tokens.

    Args:
        u: (S, G, T).
        block_T: size of the blocks at each position, from the largest to 1.
    """
    G = u.shape[1]
    first = torch.stack([torch.arange(G) // block * block for block in block_T], 1)
    return u.gather(1, first.expand(len(u), -1, -1))


def sample(p: Parameters, group: int, rule: str, filler: int, noise: Noise, *, tree: bool):
    """Sample a group of rollouts from each policy; return the trace and the rollouts without their advantages."""
    ranges, T = grammar(filler).ranges, len(grammar(filler).ranges)
    u_SGT, luck_SGK, order_SG = noise.draw(group, T), noise.draw(group, STEPS), noise.draw(group)
    S = len(u_SGT)
    mask_SGT = torch.ones(S, group, T, dtype=torch.bool)
    if tree:  # one segment per step
        block_K = [2 ** (STEPS - 1 - k) for k in range(STEPS)]
        block_T = [block for block in block_K for _ in range(filler + 3)]
        u_SGT, luck_SGK = share_in_trees(u_SGT, block_T), share_in_trees(luck_SGK, block_K)
        mask_SGT &= torch.arange(group)[:, None] % torch.tensor(block_T) == 0

    def choose(t: int, h: Tensor) -> Tensor:
        first, end = ranges[t]
        if end - first == 1:
            return torch.full(h.shape[:2], first)
        logits = torch.baddbmm(p["output_bias_SV"][:, None, first:end], h, p["output_SHV"][..., first:end])
        cumulative = logits.softmax(-1).cumsum_(-1)
        return first + (cumulative < u_SGT[..., t, None]).sum(-1).clamp_(max=end - first - 1)

    trace = unroll(p, torch.full((S, group), BEGIN), T, choose)
    ids_SGT = trace.ids_TSG.permute(1, 2, 0)
    chances_SGK = chances(is_careful(ids_SGT[..., grammar(filler).decisions_K]), rule)
    decides_T = torch.zeros(T, dtype=torch.bool).index_fill_(0, grammar(filler).decisions_K, True)
    return trace, Rollouts(ids_SGT, mask_SGT, decides_T, luck_SGK < chances_SGK, order_SG), chances_SGK.prod(-1)


def policy_loss(logps_SGT: Tensor, advantages_SGT: Tensor, mask_SGT: Tensor) -> Tensor:
    """Return the sum over policies of TRL's loss with `loss_type` "dapo" or, all rollouts being equally long, "grpo".

        - mean over trained tokens of min(ratio A', clip(ratio, 1 - epsilon, 1 + epsilon) A')

    There is one optimizer step per generation, so the ratio is 1 and nothing is clipped.
    """
    ratio = (logps_SGT - logps_SGT.detach()).exp()
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    gain_SGT = torch.minimum(ratio * advantages_SGT, clipped * advantages_SGT) * mask_SGT
    return -(gain_SGT.sum((1, 2)) / mask_SGT.sum((1, 2))).sum()


class Runs(NamedTuple):
    """Training runs of a cell, one per seed."""

    accuracy_SN: Tensor  # mean expected accuracy of the rollouts of each step
    focus_S: Tensor  # mean |A'| of the decisions over that of all tokens, over the run
    signal_S: Tensor  # the same with A' of careful and -A' of careless decisions: credit for the right choice
    tokens: int  # generated tokens of a step, per seed
    policies: Parameters


def credit_of_decisions(advantages_SGT: Tensor, rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over trained tokens, (S,) each: |A'| of decisions, A' towards care, |A'| of all tokens."""
    trained_SGT = advantages_SGT * rollouts.mask_SGT
    decisions_SGK = trained_SGT[..., rollouts.decides_T]
    careful_SGK = is_careful(rollouts.ids_SGT[..., rollouts.decides_T])
    towards_SGK = torch.where(careful_SGK, decisions_SGK, -decisions_SGK)
    return decisions_SGK.abs().sum((1, 2)), towards_SGK.sum((1, 2)), trained_SGT.abs().sum((1, 2))


def train(cell: Cell, seeds: list[int], steps: int | None = None) -> Runs:
    """Train one policy per seed. The default of `steps` spends the budget of generated tokens."""
    credit = ROWS[cell.row]
    token_advantages = credit.begin()
    start = starting_policies(cell.mood)
    chosen = torch.tensor(seeds) % WARM_MODELS
    p = {name: value[chosen].clone() for name, value in start.items()}
    optimizer = torch.optim.AdamW(p.values(), lr=cell.rate, weight_decay=0)
    noise, accuracy, credits = Noise(seeds), [], []
    allowed_TV = grammar(cell.filler).allowed_TV
    T = len(allowed_TV)
    tokens = (2**STEPS - 1) * 2 * (T // STEPS) if credit.tree else cell.group * T
    for _ in range(steps or ROLLOUTS * T // tokens):
        trace, rollouts, expected_SG = sample(p, cell.group, cell.rule, cell.filler, noise, tree=credit.tree)

        def loss(logps_SGT: Tensor, logps_STGV: Tensor, rollouts: Rollouts = rollouts) -> Tensor:
            advantages_SGT = token_advantages(rollouts._replace(logps_STGV=logps_STGV))
            credits.append(torch.stack(credit_of_decisions(advantages_SGT, rollouts)))
            return policy_loss(logps_SGT, advantages_SGT, rollouts.mask_SGT)

        found = gradients(p, trace, allowed_TV, loss)
        clip_each(found, MAX_GRAD_NORM)
        step(optimizer, p, found)
        accuracy.append(expected_SG.mean(1))
    size_S, towards_S, all_S = torch.stack(credits).sum(0) / torch.tensor([STEPS, STEPS, T])[:, None]
    return Runs(torch.stack(accuracy, 1), size_S / all_S, towards_S / all_S, tokens, p)


def tokens_to_target(accuracy_SN: Tensor, tokens: int, group: int, goal: float) -> Tensor:
    """Return the generated tokens after which the mean accuracy of the last `WINDOW` rollouts first reaches the goal.

    Infinite if a run does not reach it.
    """
    window = max(1, WINDOW // group)
    smooth = accuracy_SN.unfold(1, min(window, accuracy_SN.shape[1]), 1).mean(-1)
    reached = smooth >= goal
    first = reached.int().argmax(1) + window
    return torch.where(reached.any(1), first * float(tokens), torch.inf)
