"""Many small recurrent policies in one tensor program: the model of the needle benchmark.

A policy is a GRU with one-hot inputs and a linear output layer. The parameters of S policies are stacked, so that a
step of all of them is one batched matrix product. Nothing mixes policies: each learns as it would alone.

Shape suffixes: S policies (one per seed), G rollouts, T tokens, V vocabulary, H hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


class Trace(NamedTuple):
    """What `unroll` computed: tokens, hidden states, and what the backward pass needs."""

    inputs_TSG: Tensor  # token read before each position
    ids_TSG: Tensor  # token chosen at each position
    hidden_TSGH: Tensor  # state that predicts the token at each position
    before_TSGH: Tensor  # state before it
    gates: list[tuple[Tensor, ...]]  # reset, update, candidate, and the recurrent part of the candidate


def initial(seed: int, vocabulary: int, width: int) -> Parameters:
    """Return the parameters of one new policy, with a leading dimension of 1. Uniform, as in torch.nn.GRU."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "table_SVX": (vocabulary, 3 * width),  # X: reset gate, update gate, candidate
        "recurrent_SHX": (width, 3 * width),
        "recurrent_bias_SX": (3 * width,),
        "output_SHV": (width, vocabulary),
        "output_bias_SV": (vocabulary,),
    }
    return {name: (2 * torch.rand(1, *shape, generator=generator) - 1) / width**0.5 for name, shape in shapes.items()}


def unroll(p: Parameters, first_SG: Tensor, length: int, choose: Callable[[int, Tensor], Tensor]) -> Trace:
    """Run the policies for `length` tokens.

        r, z = sigmoid(x_rz + h W_rz + b_rz)
        n    = tanh(x_n + r (h W_n + b_n))
        h'   = n + z (h - n)

    Args:
        p: stacked parameters.
        first_SG: the token read first.
        length: number of positions T.
        choose: maps a position and the state (S, G, H) to the token at this position, (S, G).
    """
    S, G = first_SG.shape
    H = p["recurrent_SHX"].shape[1]
    table = p["table_SVX"].flatten(0, 1)
    offset_S1 = torch.arange(S)[:, None] * p["table_SVX"].shape[1]
    bias_S1X = p["recurrent_bias_SX"][:, None]
    h, token = torch.zeros(S, G, H), first_SG
    inputs, ids, hidden, before, gates = [], [], [], [], []
    for t in range(length):
        x = table.index_select(0, (token + offset_S1).view(-1)).view(S, G, 3 * H)
        u = torch.baddbmm(bias_S1X, h, p["recurrent_SHX"])
        rz = (x[..., : 2 * H] + u[..., : 2 * H]).sigmoid_()
        r, z = rz[..., :H], rz[..., H:]
        n = torch.addcmul(x[..., 2 * H :], r, u[..., 2 * H :]).tanh_()
        inputs.append(token)
        before.append(h)
        h = torch.lerp(n, h, z)
        gates.append((r, z, n, u[..., 2 * H :]))
        hidden.append(h)
        token = choose(t, h)
        ids.append(token)
    return Trace(*map(torch.stack, (inputs, ids, hidden, before)), gates)


def backpropagate(p: Parameters, trace: Trace, d_hidden_TSGH: Tensor) -> Parameters:
    """Return the gradients of `table_SVX`, `recurrent_SHX` and `recurrent_bias_SX` from those of the hidden states."""
    T, S, G, H = d_hidden_TSGH.shape
    weights_SXH = p["recurrent_SHX"].transpose(1, 2)
    d_x, d_u = torch.empty(T, S, G, 3 * H), torch.empty(T, S, G, 3 * H)
    back = torch.zeros(S, G, H)
    for t in reversed(range(T)):
        r, z, n, u = trace.gates[t]
        d = d_hidden_TSGH[t] + back
        d_n = d * (1 - z) * (1 - n * n)
        d_z = d * (trace.before_TSGH[t] - n) * z * (1 - z)
        d_r = d_n * u * r * (1 - r)
        torch.cat((d_r, d_z, d_n), -1, out=d_x[t])
        torch.cat((d_r, d_z, d_n * r), -1, out=d_u[t])
        back = torch.baddbmm(d * z, d_u[t], weights_SXH)
    d_u = d_u.transpose(0, 1).flatten(1, 2)  # (S, T G, X)
    offset_S1 = torch.arange(S)[:, None] * p["table_SVX"].shape[1]
    table = torch.zeros_like(p["table_SVX"])
    table.flatten(0, 1).index_add_(0, (trace.inputs_TSG + offset_S1).flatten(), d_x.flatten(0, 2))
    before = trace.before_TSGH.transpose(0, 1).flatten(1, 2)
    return {
        "table_SVX": table,
        "recurrent_SHX": before.transpose(1, 2) @ d_u,
        "recurrent_bias_SX": d_u.sum(1),
    }


def log_distributions(p: Parameters, trace: Trace, allowed_TV: Tensor) -> Tensor:
    """Return the log-probability of every token at every position, (S, T, G, V), -inf for tokens not allowed there."""
    T, _, G, _ = trace.hidden_TSGH.shape
    logits = torch.baddbmm(p["output_bias_SV"][:, None], states(trace), p["output_SHV"]).unflatten(1, (T, G))
    return logits.masked_fill(~allowed_TV[:, None], -torch.inf).log_softmax(-1)


def states(trace: Trace) -> Tensor:
    """Return the hidden states of each policy, (S, T G, H)."""
    return trace.hidden_TSGH.transpose(0, 1).flatten(1, 2)


def gradients(p: Parameters, trace: Trace, allowed_TV: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Parameters:
    """Return the gradient of a loss of the log-probabilities of the chosen tokens.

    Args:
        p: stacked parameters.
        trace: result of `unroll` with these parameters.
        allowed_TV: which tokens are allowed at each position.
        loss: maps the log-probabilities of the chosen tokens, (S, G, T), and those of all tokens without gradient,
            (S, T, G, V), to a scalar. It is the sum over policies, so that each gets the gradient of its own loss.
    """
    leaves = {name: p[name].detach().requires_grad_() for name in ("output_SHV", "output_bias_SV")}
    trace = trace._replace(hidden_TSGH=trace.hidden_TSGH.detach().requires_grad_())
    logps_STGV = log_distributions(leaves, trace, allowed_TV)
    chosen = logps_STGV.gather(-1, trace.ids_TSG.transpose(0, 1)[..., None]).squeeze(-1)
    found = torch.autograd.grad(
        loss(chosen.transpose(1, 2), logps_STGV.detach()), [trace.hidden_TSGH, *leaves.values()]
    )
    return backpropagate(p, trace, found[0]) | dict(zip(leaves, found[1:], strict=True))


def clip_each(gradient: Parameters, largest: float) -> None:
    """Scale the gradient of each policy to at most this norm, in place, as torch.nn.utils.clip_grad_norm_ does."""
    squares_S = sum(g.flatten(1).square().sum(1) for g in gradient.values())
    factor_S = (largest / (squares_S.sqrt() + 1e-6)).clamp(max=1)
    for g in gradient.values():
        g.mul_(factor_S.view(-1, *[1] * (g.dim() - 1)))
