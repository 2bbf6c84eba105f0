"""How rollouts are drawn where TRL draws them in no such way.

`dynamic` replaces prompts. `SAMPLERS` are those of credit methods that need rollouts of a certain kind, by the method's
name: modules with `sample`, which draws the rollouts, and `check`, which refuses settings that do not go with it.
"""

from ktae_trl.sampling import tree

SAMPLERS = {
    "tree": tree,
}
