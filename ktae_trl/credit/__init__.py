"""Credit methods by name. Each takes the `Rollouts` of a process and the config, and returns a `Credit`."""

from ktae_trl.credit import ktae, tree

METHODS = {
    "ktae": ktae.assign,
    "tree": tree.assign,
}
