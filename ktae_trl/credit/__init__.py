"""Credit methods by name. Each takes the `Rollouts` of a process, the config and the `Policy`, and returns a `Credit`."""

from ktae_trl.credit import ktae, oar

METHODS = {
    "ktae": ktae.assign,
    "oar_g": oar.assign_gradient,
    "oar_p": oar.assign_perturbation,
}
