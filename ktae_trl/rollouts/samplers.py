"""Methods whose rollouts are of a certain kind: modules with `sample` and `check`, by the method's name."""

from ktae_trl.rollouts import tree

SAMPLERS = {
    "tree": tree,
}
