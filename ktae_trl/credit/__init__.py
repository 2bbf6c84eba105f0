"""Credit methods by name: functions from the `Rollouts` of a process, the config and the `Policy` to a `Credit`."""

from ktae_trl.credit import oar, tree
from ktae_trl.credit.ktae import values as ktae

METHODS = {
    "ktae": ktae.assign,
    "oar_g": oar.assign_gradient,
    "oar_p": oar.assign_perturbation,
    "tree": tree.assign,
}
# What a method asks of the tokenizer, so that a run without it does not begin.
TOKENIZER_CHECKS = {
    "oar_g": oar.check_offsets,
    "oar_p": oar.check_offsets_and_padding,
}
