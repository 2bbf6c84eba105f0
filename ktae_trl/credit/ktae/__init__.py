"""KTAE: key-token values from the correct and wrong rollouts of a group (arXiv 2505.16826).

counting (which tokens occur where) -> association (tables over 2 x 2 counts) -> values (K of every token) ->
method (settings, metrics and card of `credit: ktae`)
"""

from ktae_trl.credit.ktae.values import KeyTokenTable, key_token_strengths, key_token_table, key_token_values

__all__ = ["KeyTokenTable", "key_token_strengths", "key_token_table", "key_token_values"]
