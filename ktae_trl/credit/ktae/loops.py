"""The CPU loops of `counting`, compiled by numba."""

from numba import njit

TOKEN, GROUP, A, B, RIGHT, WRONG, ROLLOUT, PAIR = range(8)  # columns of `row`
KEPT = 6  # the first of these columns, which are returned in `tokens`
OF_TOKEN, OF_ROLLOUT, COUNT = range(3)  # rows of `pairs`


@njit(nogil=True)
def fill(ids, counted, right, first_group, rows, row, tokens, pairs, entry):
    """Count the tokens of these groups into `tokens` (one column per token), `entry` and `pairs`.

    Args:
        ids, counted, right: see `counting.count`.
        first_group: number of the first of these groups.
        rows: -1 for every id; scratch memory.
        row: room for the tokens of one group; scratch memory.
        tokens, entry: results.
        pairs: result; nothing is written if it has no columns.

    Returns:
        The number of tokens and of pairs, or -1 for both if an id is negative or not below `len(rows)`.
    """
    P, G, T = ids.shape
    U = W = 0  # tokens and pairs so far
    for p in range(P):
        n = 0
        for g in range(G):
            times, presence = (RIGHT, A) if right[p, g] else (WRONG, B)
            for t in range(T):
                entry[p, g, t] = 0
                if not counted[p, g, t]:
                    continue
                token = ids[p, g, t]
                if token < 0 or token >= len(rows):
                    return -1, -1
                u = rows[token]
                if u < 0:
                    u = n
                    n += 1
                    rows[token] = u
                    row[u, :] = 0
                    row[u, TOKEN] = token
                    row[u, GROUP] = first_group + p
                    row[u, ROLLOUT] = -1
                row[u, times] += 1
                if row[u, ROLLOUT] != g:
                    row[u, ROLLOUT] = g
                    row[u, presence] += 1
                    if pairs.shape[1]:
                        row[u, PAIR] = W
                        pairs[OF_TOKEN, W] = U + u
                        pairs[OF_ROLLOUT, W] = (first_group + p) * G + g
                        pairs[COUNT, W] = 0
                        W += 1
                if pairs.shape[1]:
                    pairs[COUNT, row[u, PAIR]] += 1
                    entry[p, g, t] = row[u, PAIR] + 1
                else:
                    entry[p, g, t] = U + u + 1
        for u in range(n):
            rows[row[u, TOKEN]] = -1
        for column in range(KEPT):
            for u in range(n):
                tokens[column, U + u] = row[u, column]
        U += n
    return U, W


@njit(nogil=True)
def shift(entry, by):
    for i in range(len(entry)):
        if entry[i]:
            entry[i] += by


@njit(nogil=True)
def look_up(entry, values, out):
    for i in range(len(entry)):
        out[i] = values[entry[i]]
