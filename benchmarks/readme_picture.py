"""The picture of coloured tokens in README: one group of the quickstart, valued by KTAE.

python benchmarks/readme_picture.py docs/images/coloured_tokens.png     # needs Chromium
"""

import html
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from ktae_trl import tiny
from ktae_trl.credit.ktae import key_token_values
from ktae_trl.report.tokens import colour, visible

PROBLEM = "9 - 3 - 1 - 3 + 5 = 7"
# The group of docs/methods/index.md: times, what a rollout does, whether its answer is correct, its text.
ROLLOUTS = [
    (4, "careful", True, "1: 9-3=6\n2: 6-1=5\n3: 5-3=2\n4: 2+5=7\nThe answer is \\boxed{7}."),
    (1, "stops too early", False, "1: 9-3=6\n2: 6-1=5\n3: 5-3=2\nThe answer is \\boxed{2}."),
    (1, "skips a step", False, "1: 9-3=6\n3: 6-3=3\n4: 3+5=8\nThe answer is \\boxed{8}."),
    (1, "guesses", False, "That is about \\boxed{0}."),
    (1, "guesses", False, "That is about \\boxed{11}."),
]
STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; margin: 0; padding: 18px 22px; width: 1056px }
body { background: #fff; color: #1a1a1a }
p { margin: 0 0 12px }
code { font: 17px/1.65 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre }
i { font-style: normal; border-radius: 3px; padding: 2px 1px }
.rollout { display: flex; gap: 14px; align-items: baseline; margin: 7px 0 }
.tag { width: 205px; flex: none; font-size: 15px; color: #444 }
.tag b { color: #1a1a1a }
.scale { float: right; font-size: 14px; color: #444 }
"""


def coloured(token: str, value: float) -> str:
    text = html.escape(visible(token)).rstrip("\n")  # one rollout is one line
    return f'<i style="background: rgb{colour(value)}">{text}</i>'


def page() -> str:
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    texts = [text for times, _, _, text in ROLLOUTS for _ in range(times)]
    correct = torch.tensor([[right for times, _, right, _ in ROLLOUTS for _ in range(times)]])
    batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    values = key_token_values(ids[None], mask[None], correct, ignore_ids=[tokenizer.eos_token_id])[0]
    lines, row = [], 0
    for times, what, right, _ in ROLLOUTS:
        tokens = [
            coloured(tokenizer.decode(token), value)
            for token, value, kept in zip(ids[row].tolist(), values[row].tolist(), mask[row].tolist(), strict=True)
            if kept and token != tokenizer.eos_token_id
        ]
        tag = f"<b>{'✓ correct' if right else '✗ wrong'}</b>, {what}{f' ({times}x)' if times > 1 else ''}"
        lines.append(f'<div class="rollout"><span class="tag">{tag}</span><code>{"".join(tokens)}</code></div>')
        row += times
    ramp = "".join(f'<i style="background: rgb{colour(x / 10)}; padding: 0 5px">&nbsp;</i>' for x in range(-10, 11, 2))
    return (
        f"<meta charset=utf-8><style>{STYLE}</style><p><b>{PROBLEM}</b>"
        f'<span class="scale">associated with wrong answers {ramp} with correct answers</span></p>{"".join(lines)}'
    )


if __name__ == "__main__":
    output = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "page.html")
        source.write_text(page())
        command = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1.5"]
        command += ["--window-size=1100,240", f"--screenshot={output}", source.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
