"""The token-level credit methods, by the name that selects them in a config (`credit`)."""

from ktae_trl.arguments import UserError, imported, nearest
from ktae_trl.credit.combine import HOW
from ktae_trl.credit.gtpo import GTPO
from ktae_trl.credit.hicra import HICRA
from ktae_trl.credit.ktae.method import KTAE
from ktae_trl.credit.method import GRPO, Card, Method, from_function
from ktae_trl.credit.oar import OARG, OARP
from ktae_trl.credit.otb import OTB
from ktae_trl.credit.rlsd import RLSD
from ktae_trl.credit.tree import TreeRPO

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (KTAE, OARG, OARP, TreeRPO, GTPO, OTB, RLSD, HICRA)
}


def find_method(credit: str) -> type[Method]:
    """Return the method that `credit` names.

    Args:
        credit: a key of `METHODS`, "none", or the dotted path of a `Method` subclass or of a function of `Groups`, such
            as `my_package.my_credit`. A dotted path is resolved from the working directory.

    Raises:
        UserError: the name is unknown, or the dotted path leads to something that is not a credit method.
        ImportError: the dotted path cannot be imported.
    """
    known = {GRPO.name: GRPO, **METHODS}
    if credit in known:
        method = known[credit]
    elif "." in credit:
        method = _imported(credit)
    else:
        raise UserError(
            f"credit={credit!r} is unknown{nearest(credit, known)}. Choose from: {', '.join(known)}, or give a dotted "
            "path such as my_package.my_credit"
        )
    own = credit.rpartition(".")[2]
    method.name, method.family, method.title = credit, method.family or own, method.title or own
    method.card = method.card or Card(own, " ".join((method.__doc__ or "").split("\n\n")[0].split()))
    return method


def _imported(path: str) -> type[Method]:
    found = imported(path, "The credit method")
    if isinstance(found, type) and not issubclass(found, Method):
        raise UserError(f"credit={path!r} is a class, but not a subclass of ktae_trl.credit.method.Method")
    if not callable(found):
        raise UserError(f"credit={path!r} must be a class or a function, not an object of type {type(found).__name__}")
    method = found if isinstance(found, type) else from_function(found)
    if method.how not in HOW:
        raise UserError(f"credit={path!r}: how must be one of {', '.join(HOW)}, not {method.how!r}")
    return method
