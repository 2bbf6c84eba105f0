"""What a model card says of the method that trained the model: tags, name, paper, what it does. Else it is GRPO's."""

import textwrap
from typing import NamedTuple


class Card(NamedTuple):
    """TRL's `_tag_names`, `_name` and `_paper`, and a sentence on what the method does."""

    tags: list[str]
    name: str
    paper: dict[str, str]
    does: str = ""


def _card(tag: str, name: str, does: str, title: str, arxiv: str, citation: str) -> Card:
    paper = {"title": title, "id": arxiv, "citation": textwrap.dedent(citation)}
    return Card(["trl", "grpo", tag], name, paper, does)


NONE = "Every token of a completion gets the same advantage, that of its rollout."


_OAR = (
    "Outcome-Grounded Advantage Reshaping for Fine-Grained Credit Assignment in Mathematical Reasoning",
    "2601.07408",
    """\
    @inproceedings{li2026oar,
        title     = {{Outcome-Grounded Advantage Reshaping for Fine-Grained Credit Assignment
                     in Mathematical Reasoning}},
        author    = {Ziheng Li and Liu Kang and Feng Xiao and Luxi Xing and Qingyi Si and Zhuoran Li
                     and Weikang Gong and Deqing Yang and Yanghua Xiao and Hongcheng Guo},
        booktitle = {Proceedings of the 64th Annual Meeting of the Association for Computational Linguistics},
        year      = 2026,
        eprint    = {arXiv:2601.07408},
    }""",
)
CARDS = {
    "ktae": _card(
        "ktae",
        "KTAE",
        "Each token's advantage is that of its rollout, scaled by how much the token goes with the right or the wrong "
        "rollouts of its prompt (Fisher's exact test, information gain, term frequencies).",
        "KTAE: A Model-Free Algorithm to Key-Tokens Advantage Estimation in Mathematical Reasoning",
        "2505.16826",
        """\
        @inproceedings{sun2025ktae,
            title     = {{KTAE: A Model-Free Algorithm to Key-Tokens Advantage Estimation
                         in Mathematical Reasoning}},
            author    = {Wei Sun and Wen Yang and Pu Jian and Qianlong Du and Fuwei Cui and Shuo Ren
                         and Jiajun Zhang},
            booktitle = {Advances in Neural Information Processing Systems},
            year      = 2025,
            eprint    = {arXiv:2505.16826},
        }""",
    ),
    "oar_g": _card(
        "oar",
        "OAR-G",
        "Each token's advantage is that of its rollout, weighted by the token's influence on the answer, as the "
        "gradient of the answer at its embedding tells it.",
        *_OAR,
    ),
    "oar_p": _card(
        "oar",
        "OAR-P",
        "Each token's advantage is that of its rollout, weighted by the token's influence on the answer: what its "
        "absence does to it.",
        *_OAR,
    ),
    "tree": _card(
        "treerpo",
        "TreeRPO",
        "Rollouts are sampled as trees, and the tokens of a segment get its own advantage: how right the answers below "
        "it are, against those of its siblings.",
        "TreeRPO: Tree Relative Policy Optimization",
        "2506.05183",
        """\
        @article{yang2025treerpo,
            title   = {{TreeRPO: Tree Relative Policy Optimization}},
            author  = {Zhicheng Yang and Zhijiang Guo and Yinya Huang and Xiaodan Liang and Yiwei Wang
                       and Jing Tang},
            journal = {arXiv preprint arXiv:2506.05183},
            year    = 2025,
        }""",
    ),
}
